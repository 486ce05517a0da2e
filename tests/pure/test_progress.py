"""`jepa status` says when the newest checkpoint of a running trial is too old, and why there is no newer one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.progress import overdue_checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"step": 120, "minutes": 47, "error": "No space left on device"}, "No space left on device"),
        ({"step": 120, "minutes": 47, "error": ""}, "checkpoint of step 120 is 47 min old"),
        ({"step": 120, "minutes": 29, "error": "No space left on device"}, ""),
    ],
)
def test_a_checkpoint_older_than_three_intervals_is_shown_with_its_reason(
    tmp_path: Path, checkpoint: dict[str, Any], expected: str
) -> None:
    """The interval is 10 minutes. A checkpoint that is younger than 30 minutes is not mentioned."""
    trial = TrialDir(tmp_path)
    saved = 1000 * (time.time() - 60 * checkpoint["minutes"])
    facts = {"step": checkpoint["step"], "t": saved, "late_seconds": 1800, "error": checkpoint["error"]}
    write_json(trial.heartbeat, {"step": 900, "t": saved, "checkpoint": facts})
    note = overdue_checkpoint(trial)
    assert expected in note and bool(note) == bool(expected)


def test_a_trial_without_a_heartbeat_or_with_an_old_or_torn_one_is_not_overdue(tmp_path: Path) -> None:
    trial = TrialDir(tmp_path)
    assert overdue_checkpoint(trial) == ""
    write_json(trial.heartbeat, {"step": 900, "t": 1})
    assert overdue_checkpoint(trial) == ""
    trial.heartbeat.write_text('{"step": 9')
    assert overdue_checkpoint(trial) == ""
