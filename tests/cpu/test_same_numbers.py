"""One cost and one state of a trial, in every command and in MLflow."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.tracking import mlflow_client
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_json

Document = Any


class CommandLine:
    """`jepa` on a root, with its MLflow store."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.root = Root(folder)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.capsys = capsys
        monkeypatch.setenv("JEPA_ROOT", str(folder))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", self.uri)

    def document(self, *words: str) -> Document:
        """Return what a command prints with --json."""
        assert cli.main([*words, "--json"]) == 0
        return json.loads(self.capsys.readouterr().out)

    def tags_of_runs(self) -> dict[str, dict[str, str]]:
        """Return trial -> tags of its run; '' is the parent run."""
        client, _ = mlflow_client.connect(self.root, self.uri)
        tags: dict[str, dict[str, str]] = {}
        for run in client.search_runs(["1"]):
            trial = run.data.tags.get("jepa.trial", "")
            tags[trial] = run.data.tags
        return tags


@pytest.fixture
def jepa(
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> CommandLine:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return CommandLine(tmp_path, monkeypatch, capsys)


def drop_last(root: Root) -> None:
    """Move the last trial of the plan to those that were edited out."""
    path = root.sweep("demo").plan
    plan = read_json(path) or {}
    last = plan["trials"].pop()
    plan["dropped"] = [last]
    write_json(path, plan)


def test_every_command_and_mlflow_show_one_cost_and_one_state(jepa: CommandLine):
    """Of trials that are done, preempted, killed without an end, stopped, and edited out.

    What was edited out is exported and its cost counts, but no finding on the page is about it.
    """
    trials = fake_trials.sweep(jepa.root)
    done, preempted, killed, stopped, lost, dropped = trials
    drop_last(jepa.root)
    fake_trials.run(done)
    fake_trials.run(killed, stop=35, kill=True)
    fake_trials.run(stopped, stop=20, cause="stopped")
    stopped.stop.touch()
    for trial in (preempted, lost, dropped):
        fake_trials.run(trial, stop=35, cause="preempted")

    status = jepa.document("status", "demo")
    rows = {row["name"]: row for row in status["trials"]}
    states = {name: row["state"] for name, row in rows.items()}
    assert states[stopped.name] == "stopped"
    jepa.document("sync")
    tags = jepa.tags_of_runs()
    parent = tags.pop("")
    assert float(parent["jepa.gpu_hours"]) == pytest.approx(status["gpu_hours"], rel=0.01)
    assert {name: found["jepa.state"] for name, found in tags.items()} == states

    exported = jepa.document("export", "demo")
    assert {row["trial"]: row["state"] for row in exported} == states
    hours = sum(row["gpu_hours"] for row in exported)
    assert hours == pytest.approx(status["gpu_hours"], rel=0.01)
    page = jepa.document("scaling", "demo")
    assert page["cost"] == pytest.approx(status["gpu_hours"], rel=0.01)
    del states[dropped.name]
    assert {row["trial"]: row["state"] for row in page["trials"]} == states
