"""Points become frozen configs: composition, derived values, errors, and no import of torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.sweep_texts import Resolve

from jepa_cluster.data import manifest
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import mask_preview, masks
from jepa_cluster.ijepa.masks.blocks import SampleIds, Sampler, assemble
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import documents, plan
from jepa_cluster.sweep import points
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.status import TrialStatus


def test_derived_values_are_filled_in_before_the_recipe_is_hashed(do: Resolve, data: Path):
    """Digest and images come from the manifest, steps from epochs, K from the masks."""
    (trial,) = do("", "optim.epochs=10")
    r = trial.config.recipe
    assert r.data.digest == manifest.read(data / "train").digest
    assert r.data.images == 640
    assert r.optim.steps == 200
    assert r.optim.warmup_steps == 20
    assert r.optim.epochs is None
    assert r.optim.warmup_epochs is None
    assert r.mask.context_keep
    assert trial.config.runtime.data_root == str(data)


def test_steps_that_are_given_win_over_epochs(do: Resolve):
    """Over those of a preset: a budget in steps does not depend on the number of images."""
    (trial,) = do("", "optim.steps=77")
    assert trial.config.recipe.optim.steps == 77
    assert trial.config.recipe.optim.warmup_steps == 20


def test_axes_are_group_choices_or_values_and_seeds_multiply(do: Resolve):
    """The file of a model has its predictor."""
    trials = do("grid: {model: [vit_ti, vit_l], mask.targets: [1, 4]}\nseeds: [0, 3]")
    assert len({trial.config.id for trial in trials}) == 8
    (large,) = [trial for trial in trials if trial.label == "vit_l targets=1 s3"]
    assert large.point == {"model": "vit_l", "mask.targets": 1}
    assert large.seed == 3
    r = large.config.recipe
    assert r.model.name == "vit_l"
    assert r.predictor.depth == 12
    assert r.mask.targets == 1
    assert r.seed == 3


def test_the_first_rule_that_holds_decides_the_resources(do: Resolve):
    """A rule may name an axis or any setting. What it leaves out comes from the profile."""
    body = """
grid: {model: [vit_ti, vit_b, vit_l]}
resources:
  - {when: "model == 'vit_l'", nodes: 2, time: 1d}
  - {when: "model.width > 700", procs_per_node: 4}
"""
    shapes: list[tuple[int, int, int]] = []
    for trial in do(body):
        runtime = trial.config.runtime
        shapes.append((runtime.nodes, runtime.procs_per_node, trial.minutes))
    assert shapes == [(1, 2, 60), (1, 4, 60), (2, 2, 1440)]


def test_resources_and_runtime_do_not_change_which_trial_it_is(do: Resolve):
    """A recipe on other hardware is the same trial."""
    (a,) = do()
    (b,) = do("resources: [{nodes: 4}]", workers=0)
    assert a.config.id == b.config.id
    assert a.config.runtime != b.config.runtime


@pytest.mark.parametrize(
    ("body", "base", "says"),
    [
        ("grid: {mask.target_scal: [1]}", "optim.eps=1e-8", "did you mean 'mask.target_scale'?"),
        ("grid: {maks.targets: [1]}", "optim.eps=1e-8", "did you mean 'mask.targets'?"),
        ("grid: {model: [vit_xl]}", "optim.eps=1e-8", "no model is called 'vit_xl'"),
        (
            "grid: {mask.targets: [four]}",
            "optim.eps=1e-8",
            "mask.targets wants an integer, got 'four'",
        ),
        ("grid: {model.heads: [5]}", "optim.eps=1e-8", "does not divide model.width=384"),
        ("grid: {mask.target_scale: [[0.5, 0.9]]}", "optim.eps=1e-8", "sweeps/x.yaml"),
        ("grid: {model: [{a: 1}]}", "optim.eps=1e-8", "no model is called"),
        ("grid: {optim: [paper, reference]}", "optim.lrr=1", "did you mean 'optim.lr'?"),
        ("", "optim.lr=1,2", "is no plain setting"),
        ("", "optim.lr=[", "not a Hydra override"),
        ("", "optim=3", "no optim is called 3"),
        ("", "mask.targets.x=3", "unknown setting 'mask.targets.x'"),
        ("", "optim.batch=33", "cannot be shared equally by 2 ranks"),
        ("", "optim.steps=3", "does not end within 3 steps"),
        ("", "data.digest=abc", "data.digest=abc is asked for"),
        (
            "grid: {mask.min_keep: [4]}\nlist: [{optim.lr: 1e-3}, {}]",
            "optim.eps=1e-8",
            "two points are the same trial",
        ),
        ("where: seed == 9", "optim.eps=1e-8", "no point is left"),
        ("resources: [{when: \"modl == 'x'\"}]", "optim.eps=1e-8", "no setting is called 'modl'"),
    ],
)
def test_a_config_that_cannot_run_is_refused(do: Resolve, body: str, base: str, says: str):
    with pytest.raises(ConfigError) as e:
        do(body, base)
    assert says in str(e.value), str(e.value)


def test_without_a_manifest_the_error_has_the_command_that_makes_one(do: Resolve, tmp_path: Path):
    with pytest.raises(DataError, match="jepa shards build"):
        do("", data_root=str(tmp_path))


def test_a_cluster_profile_that_reads_other_data_than_the_environment_is_refused(
    do: Resolve,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Until the sweep file says which of the two."""
    monkeypatch.setenv("JEPA_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="the cluster profile reads "):
        do()
    assert do("", f"runtime.data_root={data}")
    monkeypatch.setenv("JEPA_DATA", str(data))
    assert do()


@pytest.mark.parametrize(
    ("axis", "line", "says"),
    [
        (
            "mask.target_scale: [[0.1, 0.2], [1, two]]",
            4,
            "mask.target_scale[1] wants a number, got 'two'",
        ),
        ("mask.target_scale: [[0.1, 0.2], [0.2, 0.1]]", 4, "write it as [low, high]"),
        ("mask.target_scale: [0.1, 0.2]", 4, "mask.target_scale wants [low, high], got 0.1"),
        ("mask.mode: [multiblock, multiblok]", 4, "got 'multiblok'\n"),
        ("mask.mode: [multiblock, multiblok]", 4, "did you mean 'multiblock'?"),
        ("model.heads: [3, 5]", 4, "model.heads=5 does not divide model.width=192"),
        ("optim.lr: [1e-3, 2.0]", 4, "optim.lr=2.0 is not above 0 and at most 1"),
        ("mask.targets: [1, 2]", 2, "optim.batch=33 cannot be shared equally"),
    ],
)
def test_the_error_of_a_bad_value_has_its_line(do: Resolve, axis: str, line: int, says: str):
    """It is the line of the axis or of the override in base; the error also names the point."""
    batch = 33 if line == 2 else 32
    with pytest.raises(ConfigError) as e:
        do(f"grid:\n  {axis}", "model=vit_ti", f"optim.batch={batch}")
    assert says in str(e.value)
    assert f"where: sweeps/x.yaml:{line}: {axis.partition(':')[0]}=" in str(e.value)


def test_a_new_mask_mode_is_one_entry_in_the_table(do: Resolve, monkeypatch: pytest.MonkeyPatch):
    """An entry in SAMPLERS is planned, has a cost and a preview. Its K may be null."""

    class Corner(Sampler):
        def sample(self, ids: SampleIds) -> masks.Masks:
            grid = self.grid
            count = len(ids.index)
            patches = np.arange(self.grid**2)
            is_target = np.tile(patches >= grid, (count, 1))
            context = np.tile(patches[:grid], (count, 1))
            targets = np.tile(patches[grid:], (count, 1, 1))
            return assemble(context, targets, is_target, np.full(count, grid))

        def check(self) -> None:
            if self.mask.targets != 1:
                raise ConfigError(f"mask.targets={self.mask.targets} is not 1")

        def describe_context(self) -> str:
            return "the first row"

    monkeypatch.setitem(masks.SAMPLERS, "corner", Corner)
    (trial,) = do("", "mask.mode=corner", "mask.targets=1")
    recipe = trial.config.recipe
    assert recipe.mask.mode == "corner"
    assert recipe.mask.context_keep is None
    assert cost.total_flops(recipe) > 0
    shown = mask_preview.document(mask_preview.preview(recipe.mask, recipe.model.grid, 0, 4))
    assert shown["kept"] == "the first row"
    assert shown["context_patches"] == [recipe.model.grid] * 2
    with pytest.raises(ConfigError, match=r"mask\.targets=4 is not 1"):
        do("", "mask.mode=corner")


def test_a_label_has_a_word_per_axis(do: Resolve):
    """Text needs no name of its axis."""
    (trial,) = do("grid: {model: [vit_ti], mask.target_scale: [[0.1, 0.15]], mask: [reference]}")
    assert trial.label == "vit_ti ts=.1-.15 reference s0"


def test_a_label_has_full_names_of_axes_that_end_alike(do: Resolve):
    (trial,) = do("grid: {model.depth: [2], predictor.depth: [3]}")
    assert trial.label == "model.depth=2 predictor.depth=3 s0"


IMPORTS_OF_LOGIN_NODE = """
import sys
from jepa_cluster.cli import terminal
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.scheduler import local
from jepa_cluster.launch.submit import documents, submit
from jepa_cluster.sweep import points, resolve, sweep_file, yaml_source

text = "question: Q\\nbase: [data=synthetic, optim.batch=32]"
sweep = sweep_file.from_source(yaml_source.parse(text, "x"), "x")
request = points.ResourceRequest("", 1, 1, 9)
(trial,) = resolve.resolve(sweep, request, {"data_root": sys.argv[1]})
assert cost.total_flops(trial.config.recipe) > 0
print({"torch", "timm", "mlflow", "webdataset", "submitit"} & set(sys.modules))
"""


def test_the_login_node_imports_no_torch(data: Path):
    """Resolution, masks, costs and the scheduler import no training library."""
    command = [sys.executable, "-c", IMPORTS_OF_LOGIN_NODE, str(data)]
    assert subprocess.check_output(command, text=True) == "set()\n"


FORK = "grid: {model: [vit_ti, vit_s]}\nfork: {at: [40, 100, 200], cooldown: 0.2}\nseeds: [0, 1]"


def test_a_fork_makes_the_longest_trial_the_trunk_of_the_others(do: Resolve):
    """Each trial is a wsd recipe with its own horizon and a cooldown of 20 %."""
    trials = do(FORK, "optim=wsd")
    assert len(trials) == 12
    for model in ("vit_ti", "vit_s"):
        group = [trial for trial in trials if trial.point["model"] == model and trial.seed == 1]
        cooldowns = [trial.config.recipe.optim.cooldown_steps for trial in group]
        assert cooldowns == [8, 20, 40]
        short, middle, trunk = group
        assert short.trunk == trunk.name
        assert middle.trunk == trunk.name
        assert trunk.trunk is None
        assert short.begins == 32
        assert middle.begins == 80
        assert trunk.begins == 0
        assert trunk.config.runtime.milestones == (32, 80)
        assert trunk.config.runtime.keeps(80)


def test_a_fork_does_not_change_the_identity_of_its_trials(do: Resolve):
    """The trunk and its milestones are no part of a recipe."""
    forked = do(FORK, "optim=wsd")
    separate = do(FORK.replace("0.2}", "0.2, from_zero: true}"), "optim=wsd")
    assert [trial.config.id for trial in separate] == [trial.config.id for trial in forked]
    assert not any(trial.trunk for trial in separate)


def test_a_branch_that_differs_from_its_trunk_before_it_starts_is_refused(do: Resolve):
    """The weight decay depends on the horizon, so the trainings differ from the first step on."""
    message = r"part before step 32[\s\S]*sweeps/x.yaml:4[\s\S]*optim=wsd"
    with pytest.raises(ConfigError, match=message):
        do(FORK, "optim=wsd", "optim.final_weight_decay=0.4")


def test_a_branch_costs_its_cooldown_unless_its_trunk_kept_no_milestone(
    do: Resolve, tmp_path: Path
):
    """The cost of a fork is that of its longest trial and of the cooldowns."""
    root = Root(tmp_path)
    short, middle, trunk = do(FORK, "optim=wsd")[:6:2]
    step = cost.total_flops(trunk.config.recipe) / 200
    for trial, steps in ((short, 8), (middle, 20), (trunk, 200)):
        flops = cost.total_flops(trial.config.recipe)
        assert flops * cost.own_step_fraction(root, trial) == pytest.approx(steps * step)
    folder = root.trial(trunk.name)
    folder.create(trunk.config)
    folder.checkpoint(60).mkdir(parents=True)  # beyond where `short` leaves it, before `middle`
    assert cost.own_step_fraction(root, short) == 1.0
    assert cost.own_step_fraction(root, middle) < 1.0
    folder.done.touch()
    assert cost.own_step_fraction(root, middle) == 1.0


def plan_of(trials: list[Trial], root: Root) -> plan.Plan:
    """Plan trials that are all new, on four slots."""
    by_name = {trial.name: trial for trial in trials}
    statuses = StatusSnapshot({name: TrialStatus("new") for name in by_name})
    estimate = cost.CostEstimate(1.0, 0.1, "test")
    return plan.Plan(
        root,
        points.Sweep("x", question="Q"),
        resources.Profile("slurm", slots=4),
        by_name,
        statuses,
        reconcile(by_name, statuses.states),
        dict.fromkeys(by_name, estimate),
    )


def test_branches_are_in_arrays_of_their_own(do: Resolve, tmp_path: Path):
    """The array of the branches is held until the trunks release it."""
    made = plan_of(do(FORK, "optim=wsd"), Root(tmp_path))
    first, second = made.arrays(100)
    assert len(first.trials) == 4
    for name in first.trials:
        assert made.trials[name].trunk is None
    trunks = {made.trials[name].trunk for name in second.trials}
    assert trunks == set(first.trials)


def test_the_plan_names_the_trunk_of_a_branch(do: Resolve, tmp_path: Path):
    made = plan_of(do(FORK, "optim=wsd"), Root(tmp_path))
    rows = documents.plan_document(made)["trials"]
    branch = rows[0]
    trunk = rows[branch["trunk"]]
    assert trunk["name"] == made.trials[branch["name"]].trunk
    assert branch["begins"] == 32


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("seed=7", "seeds: [7]"),
        ("runtime.nodes=4", "resources: [{nodes: 4}]"),
        ("runtime.procs_per_node=2", "resources: [{procs_per_node: 2}]"),
    ],
)
def test_a_setting_that_the_sweep_sets_is_refused_in_its_base(do: Resolve, override, hint):
    """It would have no effect."""
    with pytest.raises(ConfigError, match="base cannot set") as caught:
        do("", override)
    assert caught.value.hint == hint
