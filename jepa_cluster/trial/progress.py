"""How far a trial is and what it has used, by its files.

In: a trial directory. Out: its newest metrics, the age of its newest checkpoint, process-seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from jepa_cluster.errors import TrialError
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json

SPOOL_TAIL = 8192  # bytes at the end of a spool that hold its newest row


def latest_metrics(trial: TrialDir) -> dict[str, Any]:
    """Return the last complete row of the newest spool that has one; {} without a row."""
    for path in sorted((trial.path / "metrics").glob("[0-9]*.jsonl"), reverse=True):
        with path.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - SPOOL_TAIL))
            lines = f.read().split(b"\n")[:-1]
        for line in reversed(lines):
            if line.startswith(b'{"step"'):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
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


def seconds_used(trial: TrialDir, kind: str = "", running: bool = False) -> float:
    """Return process-seconds of all attempts by their records.

    An open attempt counts up to its last sign of life.
    kind: of these attempts alone, `slurm` or `local`. running: the newest one counts up to now.
    """
    total, attempts = 0.0, trial.attempts()
    for attempt in attempts:
        if "started" not in attempt or kind not in ("", attempt.get("kind")):
            continue
        last_sign = modified(trial.metrics(attempt["attempt"]))
        if attempt is attempts[-1]:
            last_sign = max(last_sign, modified(trial.heartbeat))
            if running:
                last_sign = time.time()
        started = attempt["started"]
        ended = attempt.get("ended") or max(last_sign * 1000, started)
        total += (ended - started) / 1000 * attempt.get("world", 1)
    return total


def modified(path: Path) -> float:
    """Return the time of a file's last change in Unix seconds; 0 when it does not exist."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
