"""Fixtures: those of sweep_texts.py, a folder with a sweep file, and the sweep as submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials
from support.slurm_rows import ask, trials
from support.submitted_sweep import SWEEP, Submitted
from support.sweep_texts import data, do

from jepa_cluster import cli
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.trial.directory import Root

__all__ = ["ask", "data", "do", "document", "folder", "submitted", "trials"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a folder with ask.yaml and a data root. JEPA_ROOT is the folder `root` in it."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "ask.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JEPA_DATA", raising=False)
    monkeypatch.delenv("JEPA_CLUSTER", raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    return tmp_path


@pytest.fixture
def submitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> Submitted:
    """Submit the sweep ask, and start nothing."""
    root = Root(folder / "root")
    sweep = documents.find_sweep(root, "ask.yaml")
    made = plan.make_plan(sweep, profile.load_profile(), root)
    submit._write_sweep(made, "0" * 12)
    trials = [root.trial(name) for name in made.trials]
    for trial in trials:
        trial.create(made.trials[trial.name].config)
    capsys.readouterr()
    return Submitted(root, trials)


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Call `document(*words)` to run a command with --json and get what it prints."""

    def run(*words: str) -> Any:
        cli.main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return run
