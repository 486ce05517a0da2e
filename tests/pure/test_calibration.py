"""`jepa calibrate`: ladders of learning rates, their optimum, and `optim.lr: calibrated`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.errors import ConfigError
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.report import analysis, calibration, findings
from jepa_cluster.report.rate_ladder import Ladder, Optimum, optimum
from jepa_cluster.results import tables
from jepa_cluster.sweep import ladder
from jepa_cluster.sweep.calibrated import predict, rate_of
from jepa_cluster.trial.directory import Root

SWEEP = """
question: How does the stub scale?
base: [data=synthetic, optim=demo, optim.batch=8, optim.warmup_steps=5]
grid:
  model: [vit_nano, vit_micro, vit_mini]
  mask.target_scale: [[0.1, 0.2], [0.2, 0.3]]
  optim.steps: [80, 40]
seeds: [3]
"""
BEST = {"vit_nano": 8e-3, "vit_micro": 6e-3, "vit_mini": 4e-3, "vit_s": 2e-3}  # at 80 steps
NOISE = 0.02


def best_rate(model: str, steps: int) -> float:
    return BEST[model] * (80 / steps) ** 0.5


def values(trial: object, step: int, noise: float = NOISE) -> dict[str, float]:
    """The metrics of a step; the error rises to both sides of the best rate."""
    recipe = trial.read_config().recipe  # type: ignore[attr-defined]
    optim = recipe.optim
    octaves = math.log2(optim.lr / best_rate(recipe.model.name, optim.steps))
    rng = np.random.default_rng([step, recipe.seed, recipe.model.width, int(optim.lr * 1e7)])
    trained = 0.5 * math.exp(0.05 * octaves**2 - 0.1 * math.log(recipe.model.width / 32))
    error = (0.9 if step == 0 else trained) * math.exp(noise * rng.normal())
    flops = float(step * recipe.model.width**2 * 1e4)
    return {"loss": 0.1, "flops_total": flops, "probe/class_error": error}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """An empty root beside a sweep file and its data."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "sizes.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    for name in ("JEPA_DATA", "JEPA_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(fake_trials, "values", values)
    return Root(tmp_path / "root")


def finish(root: Root, path: str) -> plan.Plan:
    """Submit a sweep and train the trials that are new."""
    sweep = documents.find_sweep(root, path)
    made = plan.make_plan(sweep, profile.load_profile(), root)
    submit._write_sweep(made, "0" * 12)
    for name, planned in made.trials.items():
        trial = root.trial(name)
        if not trial.done.exists():
            trial.create(planned.config)
            fake_trials.run(trial, every=20, commit=40)
    return made


def octaves_of(rates: int, apart: float, seeds: int, offset: float = 0.0) -> np.ndarray:
    return np.repeat(offset + apart * (np.arange(rates) - (rates - 1) / 2), seeds)


def found_in(
    octaves: np.ndarray,
    rise: np.ndarray,
    noise: float,
    seed: int,
    untrained: float = 0.6,
) -> Optimum:
    """Return the optimum of a ladder whose error is .4 at its best rate, 1."""
    rng = np.random.default_rng(seed)
    errors = 0.4 * np.exp(rise + noise * rng.normal(size=len(octaves)))
    found = optimum(Ladder(2.0**octaves, errors, np.full(len(octaves), untrained)))
    assert isinstance(found, Optimum)
    return found


# ---- one ladder


@pytest.mark.parametrize(("left", "right"), [(0.05, 0.05), (0.06, 0.02), (0.02, 0.06)])
def test_the_interval_contains_the_best_rate(left: float, right: float):
    """It does in most of 60 ladders, also where one side is steeper."""
    held = 0
    for seed in range(60):
        octaves = octaves_of(6, 1.0, 2, offset=(seed % 20) / 20 - 0.5)
        rise = octaves**2 * np.where(octaves < 0, left, right)
        found = found_in(octaves, rise, 0.03, seed)
        assert not found.problems
        held += 1.0 in found.lr
    assert held >= 49


def test_a_flat_ladder_has_a_wide_interval_and_no_problem():
    """A rate that is off costs nothing, and the result says so: its excess is near 0."""
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, 0 * octaves, 0.03, 1)
    assert not found.problems
    assert found.lr.high / found.lr.low > 8
    assert found.excess(found.lr.value * 2).value < 0.03


@pytest.mark.parametrize(("offset", "side"), [(4.5, -1), (-4.5, 1)])
def test_a_minimum_at_the_edge_is_refused_and_widened(offset: float, side: int):
    octaves = octaves_of(6, 1.0, 2, offset)
    found = found_in(octaves, 0.05 * octaves**2, 0.03, 1)
    assert found.widen == side
    assert "edge of the ladder" in " ".join(found.problems)


def test_a_ladder_is_not_widened_towards_rates_that_diverge():
    octaves = octaves_of(6, 1.0, 2, -2.2)
    errors = 0.4 * np.exp(0.05 * octaves**2)
    untrained = np.full(len(octaves), 0.9)
    assert optimum(Ladder(2.0**octaves, errors, untrained)).widen == 1
    found = optimum(Ladder(2.0**octaves, errors, untrained, diverged=[2.0]))
    assert not found.problems


def test_a_rate_that_hardly_trains_is_refused():
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, 0.05 * octaves**2, 0.05, 1, untrained=0.42)
    assert "better than the untrained encoder" in found.problems[0]


def test_an_error_with_a_maximum_is_refused():
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, -0.05 * octaves**2, 0.03, 1)
    assert "no minimum" in " ".join(found.problems)


def test_few_trials_give_no_optimum():
    octaves = octaves_of(2, 1.0, 2)
    found = optimum(Ladder(2.0**octaves, 0.4 + 0 * octaves, np.ones(4)))
    assert found == "4 finished at 2 rates; 5 trials at 3 rates are needed"


# ---- from the sweep file to a calibrated sweep


def calibrate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["calibrate", *arguments]) == 0
    return capsys.readouterr().out


def test_ladders_are_a_sweep_that_reuses_trials(root: Root, capsys: pytest.CaptureFixture[str]):
    """One ladder per size and horizon, at the first level of other settings and the same seeds."""
    made = finish(root, "sizes.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "6 cells of 3 sizes" in out
    written = yaml.safe_load(Path("sizes_lr.yaml").read_text())
    assert written["seeds"] == [3, 0]
    assert "mask.target_scale=[0.1, 0.2]" in written["base"]
    ladders = plan.make_plan(
        documents.find_sweep(root, "sizes_lr.yaml"), profile.load_profile(), root
    )
    assert len(ladders.trials) == 3 * 2 * 6 * 2
    assert len(set(ladders.trials) & set(made.trials)) == 6
    optims = [trial.config.recipe.optim for trial in ladders.trials.values()]
    assert {round(o.start_lr / o.lr, 6) for o in optims} == {0.02}
    assert {round(o.final_lr / o.lr, 6) for o in optims} == {0.002}


def test_calibrated_rates_are_frozen_into_the_recipe(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "law: lr ~ parameters^-" in out
    document = json.loads(root.sweep("sizes_lr").calibration.read_text())
    assert len(document["optima"]) == 6
    inside = 0
    for found in document["optima"]:
        assert not found["problem"]
        best = best_rate(found["model"], found["steps"])
        inside += found["low"] <= best <= found["high"]
        assert found["lr"] == pytest.approx(best, rel=0.4)
    assert inside >= 4
    text = SWEEP.replace("optim=demo", "optim=demo, optim.lr=calibrated")
    Path("again.yaml").write_text(f"{text}calibration: {{sweep: sizes_lr}}\n")
    made = finish(root, "again.yaml")
    rates = {found["lr"] for found in document["optima"]}
    for trial in made.trials.values():
        optim = trial.config.recipe.optim
        assert optim.lr in rates
        assert optim.start_lr == pytest.approx(0.02 * optim.lr)
        assert trial.config.runtime.lr_source.endswith("by sizes_lr")
    # A later calibration changes the rates of no submitted sweep.
    document["optima"] = [{**found, "lr": 1.0} for found in document["optima"]]
    root.sweep("sizes_lr").calibration.write_text(json.dumps(document))
    again = plan.make_plan(documents.find_sweep(root, "again"), profile.load_profile(), root)
    assert set(again.trials) == set(made.trials)


def test_a_minimum_at_the_edge_adds_two_rates(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """They are part of the same sweep, and the minimum lies inside then."""
    monkeypatch.setitem(BEST, "vit_mini", 0.06)
    calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "refused: the minimum lies at the edge of the ladder: add higher rates" in out
    assert "4 points added: sizes_lr.yaml" in out
    finish(root, "sizes_lr.yaml")
    assert "refused" not in calibrate(capsys, "sizes.yaml")


def test_a_large_size_gets_a_bracket_around_the_law(root: Root, capsys: pytest.CaptureFixture[str]):
    Path("sizes.yaml").write_text(SWEEP.replace("vit_mini]", "vit_mini, vit_s]"))
    assert "2 more cells when their law is known" in calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    assert "6 points added" in calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    calibrate(capsys, "sizes.yaml")
    document = json.loads(root.sweep("sizes_lr").calibration.read_text())
    assert len(document["optima"]) == 8


def test_a_calibration_holds_for_what_it_was_made_of(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    """Another horizon, momentum or size is refused; a size may take the law's prediction."""
    calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    calibrate(capsys, "sizes.yaml")
    text = SWEEP.replace("optim=demo", "optim=demo, optim.lr=calibrated")
    use = "calibration: {sweep: sizes_lr}"
    refusals = {
        text: "optim.lr=calibrated names no calibration",
        f"{text}calibration: {{sweep: sizes}}": "there is no calibration 'sizes'",
        f"{text}calibration: {{sweep: a, other_sizes: b}}": "wants refuse or law, got 'b'",
        f"{text.replace('[80, 40]', '[130]')}{use}": "calibrated at 80 steps, and this trial has",
        f"{text.replace('optim=demo,', 'optim=demo, optim.momentum=0.9,')}{use}": (
            "calibrated at optim.momentum=0.98, and this trial has 0.9"
        ),
        f"{text.replace('vit_mini]', 'vit_s]')}{use}": "has no ladder of vit_s",
    }
    for number, (content, message) in enumerate(refusals.items()):
        Path(f"refused{number}.yaml").write_text(content)
        assert cli.main(["plan", f"refused{number}.yaml"]) == 78
        assert message in capsys.readouterr().err
    larger = f"{text.replace('vit_mini]', 'vit_s]')}{use[:-1]}, other_sizes: law}}"
    Path("larger.yaml").write_text(larger)
    made = plan.make_plan(documents.find_sweep(root, "larger.yaml"), profile.load_profile(), root)
    sources = {trial.config.runtime.lr_source for trial in made.trials.values()}
    assert any(source.endswith("by the law of sizes_lr") for source in sources)


def test_findings_say_how_far_the_rates_are_from_the_best_ones(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    """A sweep at one rate is compared with the calibration that was made of it."""
    finish(root, "sizes.yaml")
    before = analysis.analyse(tables.load(root, "sizes"))
    assert "learning rates: not calibrated (jepa calibrate sizes)" in findings.summary(before)
    calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    calibrate(capsys, "sizes.yaml")
    found = analysis.analyse(tables.load(root, "sizes"))
    lines = "\n".join(findings.summary(found))
    assert "of 6 blocks are known to be within a factor of 1.5 of the best rate" in lines
    row = next(row for row in found.trials if row["model"] == "vit_nano" and row["steps"] == 40)
    assert row["lr/relative"] == pytest.approx(6e-3 / best_rate("vit_nano", 40), rel=0.3)
    assert row["lr/excess_error"] > 0
    assert "at the best learning rates: " in lines


def test_a_law_needs_three_sizes_and_predicts_others(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    results = calibration.calibrate(tables.load(root, "sizes_lr"))
    assert results.law
    cell = results.cells[-1].cell
    size = {"parameters": cell.parameters, "steps": cell.steps, "batch": cell.batch}
    predicted = predict(results.law, size, "the law")
    assert predicted.low < best_rate(cell.model, cell.steps) < predicted.high
    assert results.law["terms"][2] == pytest.approx(-0.5, abs=0.35)
    two = tables.load(root, "sizes_lr")
    kept = [result for result in two.trials if "mini" not in result.name]
    few = calibration.calibrate(tables.SweepResults("sizes_lr", two.plan, kept))
    assert few.law is None
    assert "3 sizes with a rate are needed" in few.lines()[-1]
    recipe = two.trials[0].recipe
    assert recipe
    with pytest.raises(ConfigError, match="has no ladder of vit_mini"):
        rate_of(few.document, recipe, by_law=True)


def test_a_sweep_with_forks_is_calibrated_at_each_horizon(root: Root):
    text = SWEEP.replace("optim=demo", "optim=wsd").replace("  optim.steps: [80, 40]\n", "")
    Path("forked.yaml").write_text(f"{text}fork: {{at: [40, 80]}}\n")
    source = ladder.without_rate(documents.find_sweep(root, "forked.yaml"))
    assert {point["optim.cooldown_steps"] for point in source.list} == {4, 8}
    made = plan.make_plan(source, profile.load_profile(), root)
    assert {trial.config.recipe.optim.schedule for trial in made.trials.values()} == {"wsd"}
    assert len(made.trials) == 6
