"""Points become frozen configs: composition, derived values, clear refusals; and no torch on the way."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import fake_trials

from jepa_cluster.data import manifest
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import mask_preview, masks
from jepa_cluster.ijepa.masks.blocks import SampleIds, Sampler, assemble
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import documents, plan
from jepa_cluster.sweep import points, resolve, sweep_file, yaml_source
from jepa_cluster.sweep.points import ResourceRequest
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.status import TrialStatus

Resolve = Callable[..., list[Trial]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 640 images, without the images."""
    return fake_trials.data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture
def do(data: Path) -> Resolve:
    def go(body: str = "", *base: str, **runtime: object) -> list[Trial]:
        overrides = ["data=synthetic", "optim.batch=32", "optim.warmup_epochs=1", *base]
        text = f"question: Q\nbase: {overrides}\n{body}"
        sweep = sweep_file.from_source(yaml_source.parse(text, "sweeps/x.yaml"), "x")
        return resolve.resolve(sweep, ResourceRequest("", 1, 2, 60), {"data_root": str(data), **runtime})

    return go


def test_derived_values_are_filled_in_before_the_recipe_is_hashed(do: Resolve, data: Path):
    """Digest and images from the manifest, steps from epochs, K from the masks; epochs are gone."""
    (trial,) = do("", "optim.epochs=10")
    r = trial.config.recipe
    assert (r.data.digest, r.data.images) == (manifest.read(data / "train").digest, 640)
    assert (r.optim.steps, r.optim.warmup_steps, r.optim.epochs, r.optim.warmup_epochs) == (200, 20, None, None)
    assert r.mask.context_keep and trial.config.runtime.data_root == str(data)


def test_steps_that_are_given_win_over_epochs(do: Resolve):
    """So that a budget in steps needs no arithmetic on the set's size."""
    (trial,) = do("", "optim.steps=77", "optim.warmup_steps=5")
    assert (trial.config.recipe.optim.steps, trial.config.recipe.optim.warmup_steps) == (77, 5)


def test_axes_are_group_choices_or_values_and_seeds_multiply(do: Resolve):
    """A model's file brings its predictor; a value lands where its name says."""
    trials = do("grid: {model: [vit_ti, vit_l], mask.targets: [1, 4]}\nseeds: [0, 3]")
    assert len({t.config.id for t in trials}) == 8
    large = next(t for t in trials if t.point == {"model": "vit_l", "mask.targets": 1} and t.seed == 3)
    r = large.config.recipe
    assert (r.model.name, r.predictor.depth, r.mask.targets, r.seed) == ("vit_l", 12, 1, 3)
    assert large.label == "vit_l targets=1 s3"


def test_the_first_rule_that_holds_decides_the_resources(do: Resolve):
    """By axis or by any setting of the composed config; what a rule leaves out, the profile says."""
    body = """
grid: {model: [vit_ti, vit_b, vit_l]}
resources: [{when: "model == 'vit_l'", nodes: 2, time: 1d}, {when: "model.width > 700", procs_per_node: 4}]
"""
    shapes = [(t.config.runtime.nodes, t.config.runtime.procs_per_node, t.minutes) for t in do(body)]
    assert shapes == [(1, 2, 60), (1, 4, 60), (2, 2, 1440)]


def test_resources_and_runtime_do_not_change_which_trial_it_is(do: Resolve):
    """The same recipe on other hardware is the same trial."""
    (a,), (b,) = do(), do("resources: [{nodes: 4}]", workers=0)
    assert a.config.id == b.config.id and a.config.runtime != b.config.runtime


@pytest.mark.parametrize(
    ("body", "base", "says"),
    [
        ("grid: {mask.target_scal: [1]}", "seed=0", "did you mean 'mask.target_scale'?"),
        ("grid: {maks.targets: [1]}", "seed=0", "did you mean 'mask.targets'?"),
        ("grid: {model: [vit_xl]}", "seed=0", "no model is called 'vit_xl'"),
        ("grid: {mask.targets: [four]}", "seed=0", "mask.targets wants an integer, got 'four'"),
        ("grid: {model.heads: [5]}", "seed=0", "does not divide model.width=384"),
        ("grid: {mask.target_scale: [[0.5, 0.9]]}", "seed=0", "sweeps/x.yaml"),
        ("grid: {model: [{a: 1}]}", "seed=0", "no model is called"),
        ("grid: {optim: [paper, reference]}", "optim.lrr=1", "did you mean 'optim.lr'?"),
        ("", "optim.lr=1,2", "is no plain setting"),
        ("", "optim.lr=[", "not a Hydra override"),
        ("", "optim=3", "no optim is called 3"),
        ("", "mask.targets.x=3", "unknown setting 'mask.targets.x'"),
        ("", "optim.batch=33", "cannot be shared equally by 2 ranks"),
        ("", "optim.steps=3", "does not end within 3 steps"),
        ("", "data.digest=abc", "data.digest=abc is asked for"),
        ("grid: {mask.min_keep: [4]}\nlist: [{optim.lr: 1e-3}, {}]", "seed=0", "two points are the same trial"),
        ("where: seed == 9", "seed=0", "no point is left"),
        ("resources: [{when: \"modl == 'x'\"}]", "seed=0", "no setting is called 'modl'"),
    ],
)
def test_what_cannot_run_is_refused_before_the_queue(do: Resolve, body: str, base: str, says: str):
    """One clear error each."""
    with pytest.raises(ConfigError) as e:
        do(body, base)
    assert says in str(e.value), str(e.value)


def test_a_missing_manifest_says_how_to_make_one(do: Resolve, tmp_path: Path):
    """The command to type, not a stack."""
    with pytest.raises(DataError, match="jepa shards build"):
        do("", data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("axis", "line", "says"),
    [
        ("mask.target_scale: [[0.1, 0.2], [1, two]]", 4, "mask.target_scale[1] wants a number, got 'two'"),
        ("mask.target_scale: [[0.1, 0.2], [0.2, 0.1]]", 4, "write it as [low, high]"),
        ("mask.target_scale: [0.1, 0.2]", 4, "mask.target_scale wants [low, high], got 0.1"),
        ("mask.mode: [multiblock, multiblok]", 4, "got 'multiblok'\n"),
        ("mask.mode: [multiblock, multiblok]", 4, "did you mean 'multiblock'?"),
        ("model.heads: [3, 5]", 4, "model.heads=5 does not divide model.width=192"),
        ("optim.lr: [1e-3, 2.0]", 4, "optim.lr=2.0 is not inside (0, 1]"),
        ("mask.targets: [1, 2]", 2, "optim.batch=33 cannot be shared equally"),
    ],
)
def test_a_bad_value_is_found_at_the_line_it_was_written_in(do: Resolve, axis: str, line: int, says: str):
    """That of its axis, or of its override in base; with the point it belongs to."""
    with pytest.raises(ConfigError) as e:
        do(f"grid:\n  {axis}", "model=vit_ti", f"optim.batch={33 if line == 2 else 32}")
    assert says in str(e.value) and f"where: sweeps/x.yaml:{line}: {axis.partition(':')[0]}=" in str(e.value)


def test_a_new_mask_mode_is_one_entry_in_the_table(do: Resolve, monkeypatch: pytest.MonkeyPatch):
    """Once it is in SAMPLERS, it is planned, priced, drawn and described; K stays null unless the mode fixes it."""

    class Corner(Sampler):
        def sample(self, ids: SampleIds) -> masks.Masks:
            grid, count, patches = self.grid, len(ids.index), np.arange(self.grid**2)
            is_target = np.tile(patches >= grid, (count, 1))
            context, targets = np.tile(patches[:grid], (count, 1)), np.tile(patches[grid:], (count, 1, 1))
            return assemble(context, targets, is_target, np.full(count, grid))

        def check(self) -> None:
            if self.mask.targets != 1:
                raise ConfigError(f"mask.targets={self.mask.targets} is not 1")

        def describe_context(self) -> str:
            return "the first row"

    monkeypatch.setitem(masks.SAMPLERS, "corner", Corner)
    (trial,) = do("", "mask.mode=corner", "mask.targets=1")
    recipe = trial.config.recipe
    assert recipe.mask.mode == "corner" and recipe.mask.context_keep is None and cost.total_flops(recipe) > 0
    shown = mask_preview.document(mask_preview.preview(recipe.mask, recipe.model.grid, 0, 4))
    assert shown["kept"] == "the first row" and shown["context_patches"] == [recipe.model.grid] * 2
    with pytest.raises(ConfigError, match=r"mask\.targets=4 is not 1"):
        do("", "mask.mode=corner")


def test_labels_are_words_that_a_selection_takes(do: Resolve):
    """What is no number stands alone; two axes that end the same are written out."""
    label = do("grid: {model: [vit_ti], mask.target_scale: [[0.1, 0.15]], mask: [reference]}")[0].label
    assert label == "vit_ti ts=.1-.15 reference s0"
    both = do("grid: {model.depth: [2], predictor.depth: [3]}")[0].label
    assert both == "model.depth=2 predictor.depth=3 s0"


def test_the_login_node_imports_no_torch(data: Path):
    """Resolution, masks, price and the scheduler's adapters: none of them pulls in a training library."""
    code = (
        "import sys\n"
        "from jepa_cluster.launch.cluster import cost\n"
        "from jepa_cluster.launch.scheduler import local\n"
        "from jepa_cluster.launch.submit import documents, submit\n"
        "from jepa_cluster.cli import terminal\n"
        "from jepa_cluster.sweep import points, sweep_file, yaml_source, resolve\n"
        "text = 'question: Q\\nbase: [data=synthetic, optim.batch=32]'\n"
        "s = sweep_file.from_source(yaml_source.parse(text, 'x'), 'x')\n"
        f"t = resolve.resolve(s, points.ResourceRequest('', 1, 1, 9), dict(data_root={str(data)!r}))\n"
        "assert cost.total_flops(t[0].config.recipe) > 0\n"
        "print([m for m in ('torch', 'timm', 'mlflow', 'webdataset', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FORK = "grid: {model: [vit_ti, vit_s]}\nfork: {at: [40, 100, 200], cooldown: 0.2}\nseeds: [0, 1]"


def test_a_fork_makes_the_longest_trial_the_trunk_of_the_others(do: Resolve):
    """Each horizon is an ordinary wsd recipe; the link and the milestones are runtime, so identities know nothing."""
    trials = do(FORK, "optim=wsd")
    assert len(trials) == 12
    for model in ("vit_ti", "vit_s"):
        short, middle, trunk = [t for t in trials if t.point["model"] == model and t.seed == 1]
        assert [t.config.recipe.optim.cooldown_steps for t in (short, middle, trunk)] == [8, 20, 40]
        assert short.trunk == middle.trunk == trunk.config.name and trunk.trunk is None
        assert (short.begins, middle.begins, trunk.begins) == (32, 80, 0)
        assert trunk.config.runtime.milestones == (32, 80) and trunk.config.runtime.keeps(80)
    alone = do(FORK.replace("0.2}", "0.2, from_zero: true}"), "optim=wsd")
    assert [t.config.id for t in alone] == [t.config.id for t in trials] and not any(t.trunk for t in alone)


def test_a_branch_that_would_part_from_its_trunk_too_early_is_refused(do: Resolve):
    """A weight decay that moves with the horizon is another training from the first step on."""
    with pytest.raises(ConfigError, match=r"part before step 32[\s\S]*sweeps/x.yaml:4[\s\S]*optim=wsd"):
        do(FORK, "optim=wsd", "optim.final_weight_decay=0.4")


def test_a_branch_costs_its_cool_down_unless_its_trunk_kept_no_milestone(do: Resolve, tmp_path: Path):
    """The price of a fork is that of its longest trial and the cool-downs."""
    root = Root(tmp_path)
    short, middle, trunk = do(FORK, "optim=wsd")[:6:2]
    work = [cost.total_flops(t.config.recipe) * cost.own_step_fraction(root, t) for t in (short, middle, trunk)]
    step = cost.total_flops(trunk.config.recipe) / 200
    assert work == pytest.approx([8 * step, 20 * step, 200 * step])
    root.trial(trunk.config.name).create(trunk.config)
    root.trial(trunk.config.name).done.touch()
    assert cost.own_step_fraction(root, short) == 1.0


def test_branches_follow_their_trunks_in_arrays_of_their_own(do: Resolve, tmp_path: Path):
    """The array of the branches is held until the trunks release them; the plan names the trunk of each."""
    trials = {t.config.name: t for t in do(FORK, "optim=wsd")}
    seen = StatusSnapshot({n: TrialStatus("new") for n in trials})
    prices = {n: cost.CostEstimate(1.0, 0.1, 2, "test") for n in trials}
    sweep, profile = points.Sweep("x", question="Q"), resources.Profile("slurm", slots=4)
    p = plan.Plan(Root(tmp_path), sweep, profile, trials, seen, reconcile(trials, seen.states), prices)
    first, second = p.arrays(100)
    assert {trials[n].trunk for n in first.trials} == {None} and len(first.trials) == 4
    assert {trials[n].trunk for n in second.trials} == set(first.trials)
    rows = documents.plan_document(p)["trials"]
    assert rows[0]["trunk"] == next(i for i, r in enumerate(rows) if r["name"] == trials[rows[0]["name"]].trunk)
    assert rows[0]["begins"] == 32
