"""`jepa export`: selected and dropped trials, and the cost of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.report import analysis, markdown, payload
from jepa_cluster.results import table_files, tables
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_json


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    trials = fake_trials.sweep(root)
    for trial in trials[:5]:
        fake_trials.run(trial)
    fake_trials.run(trials[5], stop=35, kill=True)
    return root


def test_export_takes_a_selection(
    root: Root,
    capsys: pytest.CaptureFixture[str],
):
    selection = ["model=vit_b", "!target_scale=.15*"]
    assert cli.main(["export", "demo", *selection, "--root", str(root.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "vit_b"
    assert row["mask.target_scale"] == ".05-.1"


def test_a_trial_that_was_edited_out_is_exported_and_its_cost_counts(
    root: Root, capsys: pytest.CaptureFixture[str]
):
    """It is marked, and no finding is about it. Cost is that of `status`, with all canaries."""
    plan = read_json(root.sweep("demo").plan) or {}
    *kept, last = plan["trials"]
    write_json(root.sweep("demo").plan, {**plan, "trials": kept, "dropped": [last]})
    for t, name in enumerate(("old", "new")):
        canary = root.trial(f"canary.demo.A.{name}.{last['name']}")
        canary.path.mkdir(parents=True)
        write_json(canary.canary, {"class": "A", "t": t, "hours": 1.0})
        canary.claim({"started": 0, "ended": 3_600_000, "world": 1})

    def document(*words: str) -> Any:
        assert cli.main([*words, "--root", str(root.path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    exported = document("export", "demo")
    assert [row["trial"] for row in exported if row["dropped"]] == [last["name"]]
    assert exported[-1]["trial"] == last["name"]
    assert document("export", "demo", "5")[0] == exported[-1]
    assert last["name"] in {row["trial"] for row in document("export", "demo", "--curves")}
    sweep = tables.load(root, "demo")
    assert [row["trial"] for row in payload.build(sweep)["trials"]] == [
        trial["name"] for trial in kept
    ]
    spent = sum(row["gpu_hours"] for row in exported) + 2
    assert sweep.cost == pytest.approx(spent)
    assert document("status", "demo")["gpu_hours"] == pytest.approx(spent)
    report = markdown.render(analysis.analyse(sweep), "")
    assert f"5 trials, 5 attempts, {spent:.3g} {sweep.unit} in all" in report


def export_billed(
    root: Root,
    capsys: pytest.CaptureFixture[str],
) -> tuple[list[Any], str]:
    """Return the document on stdout and the text on stderr."""
    assert cli.main(["export", "demo", "--billed", "--root", str(root.path), "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


@pytest.fixture
def slurm_array(root: Root) -> None:
    """Let the first two trials be an array of Slurm; the other trials ran on this machine."""
    names = [each.name for each in tables.load(root, "demo").trials]
    array = {
        "name": "jepa.demo.A.1",
        "job": "7",
        "trials": names[:2],
        "submitted": 1,
        "nodes": 1,
        "procs_per_node": 4,
    }
    root.sweep("demo").arrays.mkdir()
    write_json(root.sweep("demo").arrays / "jepa.demo.A.1.json", array)
    for name in names[:2]:
        root.trial(name).amend(1, {"kind": "slurm"})


@pytest.mark.usefixtures("slurm_array")
def test_a_billed_export_has_the_hours_of_sacct(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tasks = [
        slurm.Task("7", 0, "jepa.demo.A.1", "COMPLETED", seconds=900),
        slurm.Task("7", 0, "jepa.demo.A.1", "COMPLETED", seconds=900),
        slurm.Task("7", 1, "jepa.demo.A.1", "COMPLETED", seconds=90),
    ]
    monkeypatch.setattr(slurm, "sacct", lambda names, since: tasks)
    billed, _ = export_billed(root, capsys)
    for row, hours in zip(billed, (2.0, 0.1), strict=False):
        assert row["gpu_hours"] == hours
        assert row["gpu_hours_alone"] == hours
    own = tables.trial_table(tables.load(root, "demo"))
    for i in (2, 3, 4):
        assert billed[i]["gpu_hours"] == own[i]["gpu_hours"]


@pytest.mark.usefixtures("slurm_array")
def test_without_sacct_a_billed_export_has_the_hours_of_attempt_records(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    billed, note = export_billed(root, capsys)
    sweep = tables.load(root, "demo")
    assert billed == table_files.with_numbers(sweep, tables.trial_table(sweep))
    assert "own attempt records" in note


def test_finished_trials_of_different_code_are_named_by_status_and_report(
    root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One trial was done with old code, one began with it, the unfinished one does not count."""

    def texts() -> list[str]:
        shown = analysis.analyse(tables.load(root, "demo"))
        page = markdown.render(shown, markdown.PROMPT)
        cli.main(["status", "demo", "--root", str(root.path)])
        return [page, " ".join(capsys.readouterr().out.split())]

    names = [entry["name"] for entry in (read_json(root.sweep("demo").plan) or {})["trials"]]
    codes = ["old", "new", "new", "new", "new", "newest"]
    for name, code in zip(names, codes, strict=True):
        root.trial(name).amend(1, {"code": "new" if code == "old" else code})
    assert not any("versions of the code" in text for text in texts())
    root.trial(names[0]).amend(1, {"code": "old"})
    second = root.trial(names[1])
    second.amend(1, {"code": "old"})
    second.end_attempt(second.claim({"code": "new"}), {"cause": "done"})
    words = "the finished trials ran 2 versions of the code: new (4 trials), old (2 trials)"
    assert all(words in text for text in texts())
    cli.main(["export", "demo", "--root", str(root.path), "--json"])
    rows = {row["trial"]: row["code"] for row in json.loads(capsys.readouterr().out)}
    assert [rows[name] for name in names] == ["old", "old new", "new", "new", "new", "newest"]
