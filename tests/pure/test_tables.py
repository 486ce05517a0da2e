"""Tidy tables straight from the spools, the document of a sweep, and the self-contained page."""

import json
import re
from pathlib import Path

import pandas
import pytest
from scipy import stats
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.errors import TrackingError
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.report import analysis, figure, html, markdown, payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    trials = fake_trials.sweep(root)
    for trial in trials[:5]:
        fake_trials.run(trial)
    fake_trials.run(trials[5], stop=35, kill=True)
    return root


def test_the_tables_hold_settled_steps_with_axes_and_parameters(root: Root):
    """One row a settled step, one row a trial with its first and last probe; the open trial ends at its last commit."""
    sweep = tables.load(root, "demo")
    assert sweep.axes == ["model", "mask.target_scale"]
    table = tables.step_table(sweep)
    assert {r["step"] for r in table if r["trial"] == sweep.trials[5].name} == {0, 5, 10, 15, 20}
    assert table[0]["mask.target_scale"] == ".15-.2" and table[0]["parameters"] > 1e4
    last = tables.trial_table(sweep)
    assert [r["state"] for r in last] == ["done"] * 5 + ["running"]
    assert last[0]["initial/probe/class_error"] > last[0]["probe/class_error"] and last[0]["step"] == 60
    lines = tables.to_csv(last).splitlines()
    assert len(lines) == 7 and lines[0].startswith("sweep,trial,label,setting,model,mask.target_scale,seed")


def test_a_sweep_nobody_submitted_is_named_with_its_neighbours(root: Root):
    """The nearest name helps."""
    with pytest.raises(TrackingError, match="no sweep 'dmeo'") as e:
        tables.load(root, "dmeo")
    assert "did you mean 'demo'" in str(e.value)


def test_only_finished_trials_are_fitted_and_the_others_are_counted(root: Root):
    """The frontier keeps the better setting; the summary says what is missing."""
    s = analysis.analyse(tables.load(root, "demo"))
    assert len(s.finished) == 5 and s.error == "probe/class_error"
    assert [r["model"] for r in s.frontier] == ["vit_a", "vit_b", "vit_c"]
    lines = "\n".join(analysis.summary(s))
    assert "5 of 6 trials finished, 1 not" in lines and "b = " in lines and "iso-FLOP: no fit" in lines
    with pytest.raises(TrackingError, match="no trial has the metric 'probe/clas_error'"):
        analysis.analyse(tables.load(root, "demo"), "probe/clas_error")


def test_a_trial_whose_config_cannot_be_read_is_left_out_and_it_says_so(root: Root):
    """Frozen by another version, or edited: no size is known, so no law and no parabola may use it."""
    edited = tables.load(root, "demo").trials[0].trial
    edited.config.write_text(edited.config.read_text().replace("lr: 0.001", "lr: 0.002"))
    s = analysis.analyse(tables.load(root, "demo"))
    assert len(s.finished) == 4 and "1 trials are left out: their config.yaml" in "\n".join(analysis.summary(s))
    assert json.loads(payload.to_json(payload.build(s.sweep)))["trials"][0]["parameters"] is None
    figure.draw(s, root.path / "x.png")
    assert "| setting |" in markdown.render(s, "words")


def test_the_document_is_plain_json_with_laws_masks_and_every_trial(root: Root):
    """What the browser draws was computed here; numbers that are none become null."""
    doc = json.loads(payload.to_json(payload.build(tables.load(root, "demo"))))
    assert len(doc["trials"]) == 6 and set(doc["laws"]) >= {
        "probe/class_error|flops_total",
        "probe/knn_error|images_seen",
    }
    assert doc["laws"]["probe/class_error|flops_total"]["fits"][0]["name"] == "frontier"
    picture = doc["masks"]["ts=.15-.2"]
    assert len(picture["samples"][0]) == picture["grid"] ** 2 and set(picture["samples"][0]) == {"c", "t", "."}
    assert payload.to_json({"x": float("nan"), "y": [float("inf"), 1.5]}) == '{"x":null,"y":[null,1.5]}'


def test_the_page_asks_no_address_and_the_picture_is_a_png(root: Root):
    """One file, no CDN; a question with markup in it cannot break out of its element."""
    sweep = tables.load(root, "demo")
    s = analysis.analyse(sweep)
    doc = payload.add_curves(sweep, payload.build(sweep)) | {"question": "</script><b>?"}
    text = html.render(doc)
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?https?:""", own) and "</script><b>?" not in text
    figure.draw(s, root.path / "x.png")
    assert (root.path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_many_trials_is_a_table_of_settings_with_what_the_masks_realised(tmp_path: Path):
    """A line a setting, best first, with the fractions that its masks realised; words are kept."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, scales=fake_trials.SCALES, seeds=(0, 1, 2)):
        fake_trials.run(trial, every=20, commit=60)
    sweep = tables.load(root, "demo")
    path = markdown.write(analysis.analyse(sweep), tmp_path / "docs")
    text = path.read_text()
    assert "## Trials" not in text
    table = text.split("## Settings")[1].split("\n\n")[1].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]][-2:] == ["| ts=.05-.1", "| *before training*"]
    assert table[0].startswith("| setting | relative | vit_a | vit_b | vit_c | context_fraction")
    path.write_text(text.replace(markdown.PROMPT, "Small targets teach less."))
    assert "teach less" in markdown.write(analysis.analyse(sweep), tmp_path / "docs").read_text()
    assert cli.main(["report", sweep.name, "--root", str(tmp_path)]) == 0
    assert (root.sweep(sweep.name).path / f"{sweep.name}.md").exists(), "beside its plan unless another folder is named"
    assert len((tmp_path / "docs" / "demo.csv").read_text().splitlines()) == 28


def test_export_python_and_page_hold_the_same_numbers(root: Root, capsys: pytest.CaptureFixture[str]):
    """`jepa export`, `tables.trial_table` and the document's trials: value for value."""
    assert cli.main(["export", "demo", "--root", str(root.path), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    table = tables.trial_table(tables.load(root, "demo"))
    drawn = json.loads(payload.to_json(payload.build(tables.load(root, "demo"))))["trials"]
    assert len(exported) == len(table) == len(drawn) == 6
    for a, b, c in zip(exported, table, drawn, strict=True):
        assert a == b and set(a) == set(c)
        for key, value in b.items():
            assert c[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


@pytest.mark.parametrize("table", [[], ["--curves"]])
def test_csv_parquet_json_and_python_hold_the_same_numbers(root: Root, table: list[str], tmp_path: Path, capsys):
    """Every cell of every format, as another library reads it; a value that a row lacks is nothing, not zero."""
    sweep = tables.load(root, "demo")
    wanted = tables.step_table(sweep) if table else tables.trial_table(sweep)
    words = ["export", "demo", *table, "--root", str(root.path)]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == wanted
    columns = list(dict.fromkeys(key for row in wanted for key in row))
    for name, read in (("x.csv", pandas.read_csv), ("x.parquet", pandas.read_parquet)):
        assert cli.main([*words, "--out", str(tmp_path / name)]) == 0
        frame = read(tmp_path / name)
        assert list(frame.columns) == columns and len(frame) == len(wanted)
        for got, row in zip(frame.to_dict("records"), wanted, strict=True):
            for key, cell in got.items():
                value = row.get(key, "")
                assert cell == value or (pandas.isna(cell) and value in ("", None)), (name, key)


def test_export_takes_a_selection_and_nothing_else_is_in_it(root: Root, capsys: pytest.CaptureFixture[str]):
    """The grammar of every verb; `running` is what the queue says, so an attempt that nobody works on is none."""
    assert cli.main(["export", "demo", "model=vit_b", "!target_scale=.15*", "--root", str(root.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "vit_b" and row["mask.target_scale"] == ".05-.1"


def test_a_billed_export_has_the_accounts_hours_and_without_an_account_our_own(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """sacct knows of one array of two trials: its hours are theirs, in every column of costs."""
    names = [c.name for c in tables.load(root, "demo").trials]
    record = {"name": "jepa.demo.A.1", "job": "7", "trials": names[:2], "submitted": 1, "nodes": 1, "procs_per_node": 4}
    root.sweep("demo").arrays.mkdir()
    write_json(root.sweep("demo").arrays / "jepa.demo.A.1.json", record)
    words = ["export", "demo", "--billed", "--root", str(root.path), "--json"]
    tasks = [slurm.Task("7", i, "jepa.demo.A.1", "COMPLETED", seconds=n) for i, n in ((0, 900), (0, 900), (1, 90))]
    monkeypatch.setattr(slurm, "sacct", lambda names, since: tasks)
    for trial in map(root.trial, names[:2]):
        trial.amend(1, {"kind": "slurm"})
    assert cli.main(words) == 0
    billed = json.loads(capsys.readouterr().out)
    ours = tables.trial_table(tables.load(root, "demo"))
    assert [r["gpu_hours"] for r in billed[:2]] == [2.0, 0.1] == [r["gpu_hours_alone"] for r in billed[:2]]
    assert [r["gpu_hours"] for r in billed[2:5]] == [r["gpu_hours"] for r in ours[2:5]], (
        "trained here, so not in its books"
    )
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == ours and "own attempt records" in printed.err


def test_a_point_is_the_mean_of_its_seeds_with_students_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By scipy's own interval; a single seed has none; `jepa export --points` tells the same numbers."""
    root = Root(tmp_path)
    trials = fake_trials.sweep(root, models=("vit_a", "vit_b"), scales=fake_trials.SCALES[:1], seeds=(0, 1, 2))
    for trial in trials[:4]:
        fake_trials.run(trial)
    table = tables.trial_table(tables.load(root, "demo"))
    three, one = analysis.point_table(table)
    assert (three["label"], three["n"], one["label"], one["n"]) == (
        "vit_a ts=.15-.2", 3, "vit_b ts=.15-.2", 1,
    )  # fmt: skip
    for key in ("probe/class_error", "loss", "initial/probe/class_error"):
        values = [r[key] for r in table[:3]]
        low, high = stats.t.interval(0.9, 2, sum(values) / 3, stats.sem(values))
        found = three[key], three[f"low/{key}"], three[f"high/{key}"]
        assert found == pytest.approx((sum(values) / 3, low, high), rel=1e-9)
        assert one[key] == table[3][key] and f"low/{key}" not in one
    assert three["parameters"] == table[0]["parameters"] and "seed" not in three
    assert cli.main(["export", "demo", "--root", str(root.path), "--points", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [three, one]
