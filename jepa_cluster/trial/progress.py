"""How far a trial is, by its files.

In: a trial directory. Out: its newest metrics, and whether its newest checkpoint is too old.
"""

from __future__ import annotations

import math
import time
from typing import Any

from jepa_cluster.errors import TrialError
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_from, read_json
from jepa_cluster.trial.spool import parse_line

SPOOL_TAIL = 8192  # bytes at the end of a spool that hold its newest row


def latest_metrics(trial: TrialDir) -> dict[str, Any]:
    """Return the last complete row of the newest spool that has one; {} without a row."""
    for path in sorted((trial.path / "metrics").glob("[0-9]*.jsonl"), reverse=True):
        tail = read_from(path, max(0, path.stat().st_size - SPOOL_TAIL))
        for line in reversed(tail.splitlines()):
            record = parse_line(line)
            if record and "step" in record and "event" not in record:
                return record
    return {}


def overdue_checkpoint(trial: TrialDir) -> str:
    """Return a warning with age and reason when the newest checkpoint is too old, else ''.

    The heartbeat holds both. It may be old itself, because a full disk stops both files.
    """
    try:
        heartbeat = read_json(trial.heartbeat) or {}
    except (TrialError, OSError):
        return ""
    newest = heartbeat.get("checkpoint") or {}
    age = time.time() - newest.get("t", math.inf) / 1000
    if age <= newest.get("late_seconds", math.inf):
        return ""
    warning = f"checkpoint of step {newest['step']} is {age / 60:.0f} min old"
    error = newest.get("error")
    return f"{warning}: {error}" if error else warning
