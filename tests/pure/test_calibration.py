"""`jepa calibrate`: ladders of learning rates, their optimum, and `optim.lr: calibrated`."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from support import fake_trials
from support.stub_rates import BEST, SWEEP, best_rate, calibrate, finish, prepare, text_of

from jepa_cluster import cli
from jepa_cluster.errors import ConfigError
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.report import analysis, calibration, findings, rates
from jepa_cluster.results import tables
from jepa_cluster.sweep import ladder
from jepa_cluster.sweep.calibrated import rate_of
from jepa_cluster.trial.directory import Root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep file, its data and a root in which its ladders are trained."""
    folder = tmp_path_factory.mktemp("made")
    fake_trials.data_root(folder / "data")
    (folder / "sizes.yaml").write_text(SWEEP.replace("DATA", str(folder / "data")))
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder)
        assert cli.main(["calibrate", "sizes.yaml"]) == 0
        finish(Root(folder / "root"), "sizes_lr.yaml")
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """An empty root beside the sweep file."""
    shutil.copy(made / "sizes.yaml", tmp_path)
    prepare(monkeypatch, tmp_path)
    return Root(tmp_path / "root")


@pytest.fixture
def trained(made: Path, root: Root) -> Root:
    """A root in which the ladders are trained."""
    shutil.copy(made / "sizes_lr.yaml", root.path.parent)
    shutil.copytree(made / "root", root.path)
    return root


def test_ladders_are_a_sweep_that_reuses_trials(root: Root, capsys: pytest.CaptureFixture[str]):
    """One ladder per size and horizon, at the first level of other settings and the same seeds."""
    made = finish(root, "sizes.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "6 cells of 3 sizes" in out
    assert "first level of other settings: mask.target_scale=[0.1, 0.2]\nto choose ano" in out
    assert out.endswith("; when it is done: jepa calibrate sizes.yaml\n")
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
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    out = calibrate(capsys, "sizes.yaml")
    assert "law: lr ~ parameters^-" in out
    document = json.loads(trained.sweep("sizes_lr").calibration.read_text())
    assert len(document["optima"]) == 6
    inside = 0
    for found in document["optima"]:
        assert not found["problem"]
        best = best_rate(found["model"], found["steps"])
        inside += found["low"] <= best <= found["high"]
        assert found["lr"] == pytest.approx(best, rel=0.4)
    assert inside >= 4
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    Path("again.yaml").write_text(f"{text}calibration: {{sweep: sizes_lr}}\n")
    made = finish(trained, "again.yaml")
    rates = {found["lr"] for found in document["optima"]}
    for trial in made.trials.values():
        optim = trial.config.recipe.optim
        assert optim.lr in rates
        assert optim.start_lr == pytest.approx(0.02 * optim.lr)
        assert trial.config.runtime.lr_source.endswith("by sizes_lr")
    # A later calibration changes the rates of no submitted sweep.
    document["optima"] = [{**found, "lr": 1.0} for found in document["optima"]]
    trained.sweep("sizes_lr").calibration.write_text(json.dumps(document))
    again = plan.make_plan(documents.find_sweep(trained, "again"), profile.load_profile(), trained)
    assert set(again.trials) == set(made.trials)


def test_a_minimum_at_the_edge_adds_two_rates(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """They are part of the same file, whose other text stays, and the minimum lies inside then."""
    monkeypatch.setitem(BEST, "vit_mini", 0.06)
    calibrate(capsys, "sizes.yaml")
    file = Path("sizes_lr.yaml")
    file.write_text(f"# a comment\n{file.read_text()}cost: little\n")
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "refused: the minimum lies at the edge of the ladder: add higher rates" in out
    assert "4 points added: sizes_lr.yaml" in out
    again = calibrate(capsys, "sizes.yaml").splitlines()
    assert again[-1].startswith("next: jepa submit sizes_lr.yaml; when it is done: jepa calib")
    assert file.read_text().startswith("# a comment\n")
    assert file.read_text().endswith("cost: little\n")
    finish(root, "sizes_lr.yaml")
    out = calibrate(capsys, "sizes.yaml")
    assert "refused" not in out
    assert "next:" not in out


def test_a_large_size_gets_a_bracket_around_the_law(root: Root, capsys: pytest.CaptureFixture[str]):
    Path("sizes.yaml").write_text(text_of(("vit_mini]", "vit_mini, vit_s]")))
    assert "2 more cells when their law is known" in calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    assert "6 points added" in calibrate(capsys, "sizes.yaml")
    finish(root, "sizes_lr.yaml")
    calibrate(capsys, "sizes.yaml")
    document = json.loads(root.sweep("sizes_lr").calibration.read_text())
    assert len(document["optima"]) == 8


def test_a_calibration_holds_for_what_it_was_made_of(
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    """Another horizon, momentum or size is refused; a size may take the law's prediction."""
    calibrate(capsys, "sizes.yaml")
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    use = "calibration: {sweep: sizes_lr}"
    refusals = {
        text: "optim.lr=calibrated names no calibration",
        f"{text}calibration: {{sweep: sizes}}": (
            "there is no calibration 'sizes'\n  where: refused1.yaml:9:"
        ),
        f"{text}calibration: {{sweep: a, other_sizes: b}}": "wants refuse or law, got 'b'",
        f"{text.replace('[80, 40]', '[130]')}{use}": (
            "at optim.steps=80 of vit_nano, and this trial has 130\n  where: refused3.yaml:7:"
        ),
        f"{text.replace('optim.batch=8', 'optim.batch=16')}{use}": (
            "at optim.batch=8 of vit_nano, and this trial has 16\n  where: refused4.yaml:3:"
        ),
        f"{text.replace('optim=demo,', 'optim=demo, optim.momentum=0.9,')}{use}": (
            "calibrated at optim.momentum=0.98, and this trial has 0.9"
        ),
        f"{text.replace('vit_mini]', 'vit_s]')}{use}": (
            "no ladder of model=vit_s with this shape and predictor; it has vit_nano, vit_micro, "
            "vit_mini\n  where: refused6.yaml:5: model=vit_s; mask.target_scale=.1-.2; "
            "optim.steps=80\n  hint:  jepa calibrate a sweep that has it, or calibration: "
            "{sweep: sizes_lr, other_sizes: law}"
        ),
    }
    for number, (content, message) in enumerate(refusals.items()):
        Path(f"refused{number}.yaml").write_text(content)
        assert cli.main(["plan", f"refused{number}.yaml"]) == 78
        assert message in capsys.readouterr().err
    larger = f"{text.replace('vit_mini]', 'vit_s]')}{use[:-1]}, other_sizes: law}}"
    Path("larger.yaml").write_text(larger)
    larger_sweep = documents.find_sweep(trained, "larger.yaml")
    made = plan.make_plan(larger_sweep, profile.load_profile(), trained)
    sources = {trial.config.runtime.lr_source for trial in made.trials.values()}
    assert any(source.endswith("by the law of sizes_lr") for source in sources)


def test_rates_of_other_images_are_used_if_asked_for(
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    calibrate(capsys, "sizes.yaml")
    file = trained.sweep("sizes_lr").calibration
    digest = json.loads(file.read_text())["conditions"]["data.digest"]
    file.write_text(file.read_text().replace(digest, "0" * 16))
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    text += "calibration: {sweep: sizes_lr, other_data: "
    Path("again.yaml").write_text(f"{text}refuse}}\n")
    assert cli.main(["plan", "again.yaml"]) == 78
    assert "at data.digest=0000000000000000" in capsys.readouterr().err
    Path("again.yaml").write_text(f"{text}use}}\n")
    made = finish(trained, "again.yaml")
    sources = {trial.config.runtime.lr_source for trial in made.trials.values()}
    assert all(source.endswith("by sizes_lr, of other images") for source in sources)
    loaded = tables.load(trained, "again")
    assert not any(r["lr/is_near"] for r in rates.with_rates(loaded, tables.trial_table(loaded)))


def test_findings_say_how_far_the_rates_are_from_the_best_ones(
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    """A sweep at one rate is compared with the calibration that was made of it."""
    finish(trained, "sizes.yaml")
    before = analysis.analyse(tables.load(trained, "sizes"))
    assert "learning rates: not calibrated (jepa calibrate sizes)" in findings.summary(before)
    calibrate(capsys, "sizes.yaml")
    found = analysis.analyse(tables.load(trained, "sizes"))
    lines = "\n".join(findings.summary(found))
    assert "of 6 blocks known to be within a factor of 1.5 of the best rate" in lines
    row = next(row for row in found.trials if row["model"] == "vit_nano" and row["steps"] == 40)
    assert row["lr/relative"] == pytest.approx(6e-3 / best_rate("vit_nano", 40), rel=0.3)
    assert row["lr/excess_error"] > 0
    assert row["lr/source"] == "sizes_lr"
    assert cli.main(["export", "sizes", "model=vit_nano", "steps=40", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert {name: exported[0][name] for name in row if name.startswith("lr/")} == {
        name: row[name] for name in row if name.startswith("lr/")
    }
    assert "at the best learning rates: " in lines


def test_a_law_needs_three_sizes_and_predicts_others(
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    results = calibration.calibrate(tables.load(trained, "sizes_lr"))
    assert results.law
    cell = results.cells[-1].cell
    size = {"parameters": cell.parameters, "steps": cell.steps, "batch": cell.batch}
    _, low, high = results.law.predict(size)
    assert low < best_rate(cell.model, cell.steps) < high
    assert results.law.terms[2] == pytest.approx(-0.5, abs=0.35)
    two = tables.load(trained, "sizes_lr")
    kept = [result for result in two.trials if "mini" not in result.name]
    few = calibration.calibrate(tables.SweepResults("sizes_lr", two.plan, kept))
    assert few.law is None
    assert "3 sizes with a rate are needed" in few.lines()[-1]
    recipe = two.trials[0].recipe
    assert recipe
    with pytest.raises(ConfigError, match=r"of model=vit_mini .* vit_micro, and no law"):
        rate_of(few.document, recipe, rates.ANY)
    others = [dataclasses.replace(found, shape="other") for found in results.document.optima]
    vague = dataclasses.replace(results.law, off_law=1.0)
    document = dataclasses.replace(results.document, optima=tuple(others), law=vague)
    with pytest.raises(ConfigError, match=r"of model=vit_mini within a factor of [\d.]+, and 10"):
        rate_of(document, recipe, rates.ANY)


def test_only_errors_of_probes_choose_rates(trained: Root, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["calibrate", "sizes.yaml", "--metric", "loss"]) == 78
    assert "loss chooses no rate: it is not the error of a probe" in capsys.readouterr().err


def test_different_shapes_are_different_cells(root: Root):
    """Also of one number of parameters, as of another predictor."""
    Path("shapes.yaml").write_text(text_of() + "zip: {predictor.depth: [1, 2]}\n")
    source = ladder.without_rate(documents.find_sweep(root, "shapes.yaml"))
    made = plan.make_plan(source, profile.load_profile(), root)
    cells = ladder.cells_of(list(made.trials.values()))
    assert len({cell.key for cell in cells}) == 12


def test_settings_that_change_with_the_horizon_stay_with_it(root: Root):
    text = text_of((", optim.warmup_steps=5", ""), ("  optim.steps: [80, 40]\n", ""))
    Path("zipped.yaml").write_text(
        text + "zip: {optim.steps: [80, 40], optim.warmup_steps: [50, 5]}\n"
    )
    source = ladder.without_rate(documents.find_sweep(root, "zipped.yaml"))
    made = plan.make_plan(source, profile.load_profile(), root)
    optims = [trial.config.recipe.optim for trial in made.trials.values()]
    assert {(o.steps, o.warmup_steps) for o in optims} == {(80, 50), (40, 5)}


def test_a_sweep_keeps_the_calibration_that_it_was_planned_with(
    trained: Root, capsys: pytest.CaptureFixture[str]
):
    """Also when another one is written between plan and submit."""
    calibrate(capsys, "sizes.yaml")
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    Path("again.yaml").write_text(f"{text}calibration: {{sweep: sizes_lr}}\n")
    local = profile.load_profile()
    made = plan.make_plan(documents.find_sweep(trained, "again.yaml"), local, trained)
    file = trained.sweep("sizes_lr").calibration
    document = json.loads(file.read_text())
    document["optima"] = [{**found, "lr": 1.0} for found in document["optima"]]
    file.write_text(json.dumps(document))
    submit._write_sweep(made, "0" * 12)
    again = plan.make_plan(documents.find_sweep(trained, "again.yaml"), local, trained)
    assert set(again.trials) == set(made.trials)


@pytest.mark.parametrize("damage", ["version", "optima", "conditions", "sweep"])
def test_a_damaged_calibration_is_one_error(
    trained: Root, capsys: pytest.CaptureFixture[str], damage: str
):
    calibrate(capsys, "sizes.yaml")
    file = trained.sweep("sizes_lr").calibration
    document = json.loads(file.read_text())
    del document[damage]
    file.write_text(json.dumps(document))
    text = text_of(("optim=demo", "optim=demo, optim.lr=calibrated"))
    Path("again.yaml").write_text(f"{text}calibration: {{sweep: sizes_lr}}\n")
    assert cli.main(["plan", "again.yaml"]) == 78
    err = capsys.readouterr().err
    assert f"'calibration.{damage}' is missing" in err
    assert "calibration.json" in err
    calibrate(capsys, "sizes.yaml")  # makes it again


def test_a_ladder_is_not_calibrated_itself(root: Root, capsys: pytest.CaptureFixture[str]):
    calibrate(capsys, "sizes.yaml")
    assert cli.main(["calibrate", "sizes_lr.yaml"]) == 78
    assert "hint:  jepa calibrate sizes\n" in capsys.readouterr().err


def test_one_seed_gets_brackets_of_five_rates(root: Root, capsys: pytest.CaptureFixture[str]):
    Path("sizes.yaml").write_text(text_of(("vit_mini]", "vit_mini, vit_s]")))
    calibrate(capsys, "sizes.yaml", "--seeds", "0", "--rates", "10", "--factor", "1.5")
    finish(root, "sizes_lr.yaml")
    assert cli.main(["calibrate", "sizes.yaml", "--rates", "12", "--seeds", "0"]) == 78
    assert "--rates, --seeds would not change it" in capsys.readouterr().err
    assert "10 points added" in calibrate(capsys, "sizes.yaml")


def test_a_sweep_with_forks_is_calibrated_at_each_horizon(root: Root):
    text = text_of(("optim=demo", "optim=wsd"), ("  optim.steps: [80, 40]\n", ""))
    Path("forked.yaml").write_text(f"{text}fork: {{at: [40, 80]}}\n")
    source = ladder.without_rate(documents.find_sweep(root, "forked.yaml"))
    assert {point["optim.cooldown_steps"] for point in source.list} == {4, 8}
    made = plan.make_plan(source, profile.load_profile(), root)
    assert {trial.config.recipe.optim.schedule for trial in made.trials.values()} == {"wsd"}
    assert len(made.trials) == 6
