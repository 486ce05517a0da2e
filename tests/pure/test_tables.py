"""The tables of a sweep from its spools, and what the reports show of them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from scipy import stats
from support import fake_trials

from jepa_cluster import cli, labels
from jepa_cluster.errors import TrackingError
from jepa_cluster.report import analysis, figure, findings, html, markdown, payload, points
from jepa_cluster.results import table_files, tables
from jepa_cluster.trial.directory import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    trials = fake_trials.sweep(root)
    for trial in trials[:5]:
        fake_trials.run(trial)
    fake_trials.run(trials[5], stop=35, kill=True)
    return root


def test_the_tables_hold_settled_steps_with_axes_and_parameters(root: Root):
    """The rows of a running trial end at its last commit."""
    sweep = tables.load(root, "demo")
    assert sweep.axes == ["model", "mask.target_scale"]
    table = tables.step_table(sweep)
    running = sweep.trials[5].name
    steps = {row["step"] for row in table if row["trial"] == running}
    assert steps == {0, 5, 10, 15, 20}
    assert table[0]["mask.target_scale"] == ".15-.2"
    assert table[0]["parameters"] > 1e4


def test_a_row_of_the_trial_table_has_the_first_and_the_last_probe(root: Root):
    table = tables.trial_table(tables.load(root, "demo"))
    assert [row["state"] for row in table] == ["done"] * 5 + ["interrupted"]
    assert table[0]["initial/probe/class_error"] > table[0]["probe/class_error"]
    assert table[0]["step"] == 60
    lines = table_files.to_csv(table).splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("sweep,trial,label,setting,model,mask.target_scale,seed")


def test_an_unknown_sweep_is_refused_with_the_nearest_name(root: Root):
    with pytest.raises(TrackingError, match="no sweep 'dmeo'") as e:
        tables.load(root, "dmeo")
    assert "did you mean 'demo'" in str(e.value)


def test_only_finished_trials_are_fitted_and_the_others_are_counted(root: Root):
    """The frontier has the better setting of each model."""
    found = analysis.analyse(tables.load(root, "demo"))
    assert len(found.finished) == 5
    assert found.error == "probe/class_error"
    assert [row["model"] for row in found.frontier] == ["vit_a", "vit_b", "vit_c"]
    text = "\n".join(findings.summary(found))
    assert "5 of 6 trials finished, 1 not" in text
    assert "b = " in text
    assert "not known yet: best sizes by parabola (no budget is shared by three sizes" in text


def test_a_collapse_is_a_finding_whatever_the_probe_says(root: Root):
    """RankMe and target_std are compared with what the trial had at first."""
    found = analysis.analyse(tables.load(root, "demo"))
    assert "fell below" not in "\n".join(findings.summary(found))
    found.trials[1] |= {"initial/probe/rankme": 12.0, "probe/rankme": 2.0}
    found.trials[1] |= {"initial/target_std": 0.7, "target_std": 0.6}
    text = "\n".join(findings.summary(found))
    label = found.trials[1]["label"]
    assert f"probe/rankme fell below a quarter of its first value: {label} (12 -> 2)" in text
    assert "target_std" not in text


def test_the_online_encoder_is_compared_where_the_objectives_differ():
    """The target encoder of an arm with a frozen target is untrained."""
    row = {"probe/class_error": 0.5, "probe/online/class_error": 0.4}
    assert analysis.choose_metric([row], None) == "probe/class_error"
    arms = [{**row, "objective.target": name} for name in ("frozen", "pixels")]
    assert analysis.choose_metric(arms, None) == "probe/online/class_error"
    assert analysis.choose_metric(arms, "probe/class_error") == "probe/class_error"


def test_an_unknown_metric_is_refused(root: Root):
    with pytest.raises(TrackingError, match="no trial has the metric 'probe/clas_error'"):
        analysis.analyse(tables.load(root, "demo"), "probe/clas_error")


def test_a_trial_whose_config_cannot_be_read_is_left_out_with_a_note(root: Root):
    """Another version froze it or the user edited it, so its size is unknown."""
    config = tables.load(root, "demo").trials[0].trial.config
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.002"))
    found = analysis.analyse(tables.load(root, "demo"))
    assert len(found.finished) == 4
    assert "1 trials are left out: their config.yaml" in "\n".join(findings.summary(found))
    document = read_payload(found.sweep)
    assert document["trials"][0]["parameters"] is None
    figure.draw(found, root.path / "x.png")
    assert "| setting |" in markdown.render(found, "words")


def read_payload(sweep: tables.SweepResults) -> dict[str, Any]:
    """Return the JSON that the page gets, as the browser reads it."""
    return json.loads(payload.to_json(payload.build(sweep)))


def test_the_payload_is_json_with_laws_masks_and_every_trial(root: Root):
    document = read_payload(tables.load(root, "demo"))
    assert len(document["trials"]) == 6
    laws = document["laws"]
    assert "probe/class_error|flops_total" in laws
    assert "probe/knn_error|images_seen" in laws
    assert laws["probe/class_error|flops_total"]["fits"][0]["name"] == "frontier"
    picture = document["masks"]["ts=.15-.2"]
    assert len(picture["samples"][0]) == picture["grid"] ** 2
    assert set(picture["samples"][0]) == {"c", "t", "."}


def test_the_document_has_the_settings_that_all_trials_share(root: Root):
    """A page compares them with those of another sweep, the images included."""
    fixed = read_payload(tables.load(root, "demo"))["fixed"]
    assert fixed["model.patch"] == "8"
    assert fixed["mask.context_scale"] == ".85-1"
    assert fixed["data.digest"] == "abc"
    assert not {"model.width", "mask.target_scale"} & set(fixed)


def test_sizes_of_one_name_have_laws_of_their_own(tmp_path: Path):
    """Such as those of a sweep over widths; the law of a size is over its horizons."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_a", "vit_b"), steps=(20, 60)):
        fake_trials.run(trial)
    found = analysis.analyse(tables.load(root, "demo"))
    named = [{**row, "model": "vit"} for row in found.trials]
    laws = replace(found, trials=named, fitted={}).by_size
    sizes = sorted({row["parameters"] for row in named})
    assert list(laws) == [f"vit {parameters / 1e6:.3g}M" for parameters in sizes]
    assert len(laws) == 2


def test_the_payload_has_numbers_for_what_is_a_number(root: Root):
    document = read_payload(tables.load(root, "demo"))
    level = document["levels"]["mask.target_scale"][".15-.2"]
    assert level == {"low": 0.15, "mid": 0.175, "high": 0.2}
    ((effect,),) = [document["effects"]["probe/class_error"]]
    assert effect["effect"]["low"] <= effect["effect"]["value"] <= effect["effect"]["high"]
    first, *_ = document["laws"]["probe/class_error|flops_total"]["fits"]
    assert first["parameters"]["b"]["value"] > 0


def test_numbers_that_are_not_finite_become_null():
    document = {"x": float("nan"), "y": [float("inf"), 1.5]}
    assert payload.to_json(document) == '{"x":null,"y":[null,1.5]}'


def test_the_page_loads_nothing_and_escapes_markup(root: Root):
    """It is one file without a CDN, and a question cannot end its element."""
    sweep = tables.load(root, "demo")
    document = payload.add_curves(sweep, payload.build(sweep))
    document["question"] = "</script><b>?"
    text = html.render(document)
    without_libraries = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?https?:""", without_libraries)
    assert "</script><b>?" not in text


def test_the_figure_is_a_png(root: Root):
    path = root.path / "x.png"
    figure.draw(analysis.analyse(tables.load(root, "demo")), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_report_of_many_trials_is_a_table_of_settings(tmp_path: Path):
    """There is one line per setting, best first, with its mask fractions. The user's text stays."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, scales=fake_trials.SCALES, seeds=(0, 1, 2)):
        fake_trials.run(trial, every=20, commit=60)
    sweep = tables.load(root, "demo")
    path = markdown.write(analysis.analyse(sweep), tmp_path / "docs")
    text = path.read_text()
    assert "## Trials" not in text
    table = text.split("## Settings")[1].split("\n\n")[1].splitlines()
    settings = [line.split(" | ")[0] for line in table[2:]]
    assert settings[-2:] == [
        "| ts=.05-.1",
        "| *before training*",
    ]
    assert table[0].startswith("| setting | relative | vit_a | vit_b | vit_c | context_fraction")
    path.write_text(text.replace(markdown.PROMPT, "Small targets teach less."))
    again = markdown.write(analysis.analyse(sweep), tmp_path / "docs")
    assert "teach less" in again.read_text()
    lines = (tmp_path / "docs" / "demo.csv").read_text().splitlines()
    assert len(lines) == 28


def test_the_report_tells_sizes_of_one_name_apart(root: Root):
    sweep = tables.load(root, "demo")
    for n, result in enumerate(sweep.trials):
        model = replace(result.recipe.model, name="vit")
        sweep.trials[n] = replace(result, recipe=replace(result.recipe, model=model))
    assert {row["size"] for row in tables.trial_table(sweep)} == {
        "vit 0.0316M",
        "vit 0.112M",
        "vit 0.354M",
    }
    page = markdown.render(analysis.analyse(sweep), "")
    assert "| setting | relative | vit 0.0316M | vit 0.112M | vit 0.354M |" in page


def test_the_report_is_written_beside_the_plan_by_default(root: Root):
    assert cli.main(["report", "demo", "--root", str(root.path)]) == 0
    assert (root.sweep("demo").path / "demo.md").exists()


def test_export_python_and_page_have_the_same_numbers(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["export", "demo", "--root", str(root.path), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    sweep = tables.load(root, "demo")
    table = tables.trial_table(sweep)
    drawn = read_payload(sweep)["trials"]
    assert len(table) == 6
    for a, b, c in zip(exported, table, drawn, strict=True):
        numbers = [a.pop(f"mask.target_scale.{part}") for part in ("low", "mid", "high")]
        assert "-".join(map(labels.format_value, numbers[::2])) == a["mask.target_scale"]
        assert numbers[1] == pytest.approx((numbers[0] + numbers[2]) / 2)
        assert a == b
        assert {*a, "index", "class"} == set(c)
        for key, value in b.items():
            if isinstance(value, float):
                assert c[key] == pytest.approx(value, rel=1e-5), key
            else:
                assert c[key] == value, key


@pytest.mark.parametrize("options", [[], ["--curves"]], ids=["trials", "steps"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_exported_file_has_the_numbers_of_the_table(
    root: Root, options: list[str], suffix: str, tmp_path: Path
):
    """pandas reads every cell. A value that a row lacks is empty, not zero."""
    sweep = tables.load(root, "demo")
    expected = tables.step_table(sweep) if options else tables.trial_table(sweep)
    expected = table_files.with_numbers(sweep, expected)
    columns: dict[str, None] = {}
    for row in expected:
        columns.update(dict.fromkeys(row))

    path = tmp_path / f"x.{suffix}"
    command = ["export", "demo", *options, "--root", str(root.path), "--out", str(path)]
    assert cli.main(command) == 0
    frame = pandas.read_csv(path) if suffix == "csv" else pandas.read_parquet(path)
    assert list(frame.columns) == list(columns)
    for found, row in zip(frame.to_dict("records"), expected, strict=True):
        for key, cell in found.items():
            value = row.get(key, "")
            if value in ("", None):
                assert pandas.isna(cell) or cell == value, key
            else:
                assert cell == value, key


@pytest.mark.parametrize("options", [[], ["--curves"]], ids=["trials", "steps"])
def test_the_exported_document_is_the_table(
    root: Root, options: list[str], capsys: pytest.CaptureFixture[str]
):
    sweep = tables.load(root, "demo")
    expected = tables.step_table(sweep) if options else tables.trial_table(sweep)
    expected = table_files.with_numbers(sweep, expected)
    assert cli.main(["export", "demo", *options, "--root", str(root.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_a_point_is_the_mean_of_its_seeds_with_students_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """scipy computes the same interval. A single seed has none."""
    root = Root(tmp_path)
    trials = fake_trials.sweep(
        root,
        models=("vit_a", "vit_b"),
        scales=fake_trials.SCALES[:1],
        seeds=(0, 1, 2),
    )
    for trial in trials[:4]:
        fake_trials.run(trial)
    table = tables.trial_table(tables.load(root, "demo"))
    three, one = points.point_table(table)
    assert three["label"] == "vit_a ts=.15-.2"
    assert three["n"] == 3
    assert one["label"] == "vit_b ts=.15-.2"
    assert one["n"] == 1
    for key in ("probe/class_error", "loss", "initial/probe/class_error"):
        values = [row[key] for row in table[:3]]
        mean = sum(values) / 3
        low, high = stats.t.interval(0.9, 2, mean, stats.sem(values))
        assert three[key] == pytest.approx(mean, rel=1e-9)
        assert three[f"low/{key}"] == pytest.approx(low, rel=1e-9)
        assert three[f"high/{key}"] == pytest.approx(high, rel=1e-9)
        assert one[key] == table[3][key]
        assert f"low/{key}" not in one
    assert three["parameters"] == table[0]["parameters"]
    assert "seed" not in three
    assert cli.main(["export", "demo", "--root", str(root.path), "--points", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table_files.with_numbers(
        tables.load(root, "demo"), [three, one]
    )
