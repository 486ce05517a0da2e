"""`jepa train`, `jepa drill`, `jepa probe` as a script would call them: one document on stdout, all else on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.trial.layout import Root


def jepa(*words: str) -> Any:
    """The document, of a command that must end well."""
    command = [sys.executable, "-m", "jepa_cluster", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_trial_is_drilled_trained_and_probed_with_a_document_each(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """The drill kills copies and leaves the trial as it was; bit by bit the same is what it says."""
    config = tiny_config(**{"optim.steps": 8, "runtime.procs_per_node": 1})
    trial = Root(tmp_path).trial(config.name)
    trial.create(config)
    end = jepa("train", "--trial", str(trial.path))
    assert (end["cause"], end["step"], end["exit"], end["error"]) == ("done", 8, 0, "") and end["metrics"]
    assert jepa("train", "--trial", str(trial.path))["attempts"] == 1, "it is done: nothing is trained again"
    verdict = jepa(
        "drill", str(trial.path), "--steps", "6", "--kills", "1"
    )  # of a finished trial, from an earlier step
    assert verdict["passed"] and not verdict["differ"] and verdict["attempts"] == 2 and verdict["rows_identical"]
    assert (verdict["start"], verdict["end"], verdict["trial"]) == (0, 6, trial.name) and len(trial.attempts()) == 1
    (found,) = jepa("probe", str(trial.path), "--images", "64")
    assert found["trial"] == trial.name and found["step"] == 8 and 0 <= found["attentive_top1"] <= 1
