"""`jepa calibrate --per`: each level of a setting has a best learning rate of its own."""

import json
from pathlib import Path

import pytest
from support import fake_trials, stub_rates
from support.stub_rates import SWEEP, best_rate, calibrate, finish, prepare, text_of

from jepa_cluster import cli
from jepa_cluster.report import analysis, findings
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root, TrialDir

PIXELS = 2.0  # times the rate of a representation is the best one for pixels


def values(trial: TrialDir, step: int) -> dict[str, float]:
    """The metrics of a trial of the stub, whose best rate depends on what is predicted."""
    recipe = stub_rates.recipe_of(trial)
    factor = PIXELS if recipe.objective.target == "pixels" else 1.0
    return stub_rates.values(trial, step, factor=factor)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    fake_trials.data_root(tmp_path / "data")
    prepare(monkeypatch, tmp_path)
    monkeypatch.setattr(fake_trials, "values", values)
    text = SWEEP.replace("DATA", str(tmp_path / "data"))
    text = text.replace("mask.target_scale: [[0.1, 0.2], [0.2, 0.3]]", TARGETS)
    Path("sizes.yaml").write_text(text)
    return Root(tmp_path / "root")


TARGETS = "objective.target: [representation, pixels]"


def test_each_level_gets_its_own_rate(root: Root, capsys: pytest.CaptureFixture[str]):
    out = calibrate(capsys, "sizes.yaml", "--per", "objective.target")
    assert "a ladder of 12 cells of 3 sizes" in out
    assert "first level" not in out
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "vit_nano pixels 40 steps: lr 0.0" in out
    assert "law" not in out
    document = json.loads(root.sweep("sizes_lr").calibration.read_text())
    assert document["per"] == ["objective.target"]
    assert "objective.target" not in document["conditions"]
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    Path("again.yaml").write_text(f"{text}calibration: {{sweep: sizes_lr}}\n")
    made = finish(root, "again.yaml")
    for trial in made.trials.values():
        recipe = trial.config.recipe
        factor = PIXELS if recipe.objective.target == "pixels" else 1.0
        best = best_rate(recipe.model.name, recipe.optim.steps or 0)
        assert recipe.optim.lr == pytest.approx(factor * best, rel=0.4)
    lines = findings.summary(analysis.analyse(tables.load(root, "again")))
    assert any("learning rates by sizes_lr" in line for line in lines)


def test_a_level_without_ladders_is_refused(root: Root, capsys: pytest.CaptureFixture[str]):
    Path("sizes.yaml").write_text(text_of((TARGETS, "objective.target: [representation]")))
    calibrate(capsys, "sizes.yaml", "--per", "objective.target")
    finish(root, "sizes_lr.yaml")
    calibrate(capsys, "sizes.yaml")
    changes = ("optim=demo", "optim=demo, optim.lr=calibrated"), ("[representation]", "[frozen]")
    Path("again.yaml").write_text(f"{text_of(*changes)}calibration: {{sweep: sizes_lr}}\n")
    assert cli.main(["plan", "again.yaml"]) == 78
    message = "no ladder of model=vit_nano with this shape and predictor, objective.target"
    assert message in capsys.readouterr().err


def test_only_a_swept_setting_has_levels(root: Root, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["calibrate", "sizes.yaml", "--per", "objective.targt"]) == 78
    err = capsys.readouterr().err
    assert "objective.targt is not swept by sizes" in err
    assert "objective.target" in err


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        (
            "{objective.target: [pixels, frozen]}",
            "objective.target --horizons 1",
            "leave out --sizes",
        ),
        (
            "{optim.lr: [1e-3, 2e-3]}",
            "optim.lr",
            "optim.lr is not swept by sizes, or is the rate itself",
        ),
        (
            "{}\nzip: {objective.target: [pixels, frozen], optim.weight_decay: [.05, .1]}",
            "objective.target",
            "sizes has optim.weight_decay=0.05 and 0.1, and each needs ladders",
        ),
    ],
)
def test_ladders_that_could_not_be_used_are_refused(
    root: Root,
    capsys: pytest.CaptureFixture[str],
    grid: str,
    options: str,
    message: str,
):
    text = Path("sizes.yaml").read_text().partition("grid:")[0]
    Path("sizes.yaml").write_text(f"{text}, optim.steps=40]\ngrid: {grid}\n".replace("]\n,", ","))
    assert cli.main(["calibrate", "sizes.yaml", "--per", *options.split()]) == 78
    assert message in capsys.readouterr().err


def test_a_level_that_no_point_names_gets_its_own_rate(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    text = text_of((f"  {TARGETS}\n", ""), ("[80, 40]", "[40]"))
    Path("sizes.yaml").write_text(f"{text}list: [{{objective.target: pixels}}, {{}}]\n")
    calibrate(capsys, "sizes.yaml", "--per", "objective.target")
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "vit_nano pixels 40 steps: lr" in out
    assert "vit_nano 40 steps: lr" in out


def test_rates_are_no_part_of_a_shape(root: Root, capsys: pytest.CaptureFixture[str]):
    """Also where the levels are presets of a whole section."""
    text = text_of((TARGETS, "optim: [demo]"), ("optim=demo, ", ""))
    Path("sizes.yaml").write_text(text)
    calibrate(capsys, "sizes.yaml", "--per", "optim")
    finish(root, "sizes_lr.yaml")
    assert "vit_nano demo 40 steps: lr" in calibrate(capsys, "sizes.yaml")
