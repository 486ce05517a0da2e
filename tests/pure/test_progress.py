"""`jepa status` notes that the newest checkpoint of a running trial is too old, and why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.progress import overdue_checkpoint


def write_heartbeat(trial: TrialDir, minutes: int, error: str) -> None:
    """Write the heartbeat of a trial whose checkpoint of step 120 is `minutes` old."""
    saved = 1000 * (time.time() - 60 * minutes)
    checkpoint = {
        "step": 120,
        "t": saved,
        "late_seconds": 1800,
        "error": error,
    }
    write_json(trial.heartbeat, {"step": 900, "t": saved, "checkpoint": checkpoint})


@pytest.mark.parametrize(
    ("minutes", "error", "expected"),
    [
        (47, "No space left on device", "No space left on device"),
        (47, "", "checkpoint of step 120 is 47 min old"),
    ],
)
def test_a_checkpoint_older_than_three_intervals_has_a_note(
    tmp_path: Path, minutes: int, error: str, expected: str
) -> None:
    """The interval is 10 minutes."""
    trial = TrialDir(tmp_path)
    write_heartbeat(trial, minutes, error)
    assert expected in overdue_checkpoint(trial)


def test_a_younger_checkpoint_has_no_note(tmp_path: Path) -> None:
    trial = TrialDir(tmp_path)
    write_heartbeat(trial, 29, "No space left on device")
    assert overdue_checkpoint(trial) == ""


@pytest.mark.parametrize(
    "heartbeat",
    [
        pytest.param('{"step": 900, "t": 1}', id="no checkpoint"),
        pytest.param('{"step": 9', id="torn"),
    ],
)
def test_a_heartbeat_without_a_checkpoint_has_no_note(tmp_path: Path, heartbeat: str) -> None:
    trial = TrialDir(tmp_path)
    trial.heartbeat.write_text(heartbeat)
    assert overdue_checkpoint(trial) == ""


def test_a_trial_without_a_heartbeat_has_no_note(tmp_path: Path) -> None:
    assert overdue_checkpoint(TrialDir(tmp_path)) == ""
