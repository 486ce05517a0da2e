"""Process-seconds that a trial used. Status, limits, tables, pages and MLflow read them here.

In: a trial and its attempt records. Out: seconds times processes. It asks no scheduler; what the
accounting of Slurm says is `launch.scheduler.billing.billed_seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jepa_cluster.records import AttemptRecord
from jepa_cluster.trial.directory import TrialDir


def process_seconds(
    trial: TrialDir,
    attempts: Sequence[AttemptRecord],
    kind: str = "",
    running: bool = False,
) -> float:
    """Return the process-seconds of all attempts, or of those of one kind: `slurm` or `local`.

    An attempt whose record has no end counts up to its last write: of its spool, and of the
    heartbeat if it is the newest.

    running: the scheduler runs the newest attempt, which counts up to now.
    """
    total = 0.0
    for record in attempts:
        if "started" not in record or kind not in ("", record.get("kind")):
            continue
        started = record["started"] / 1000
        ended = (record.get("ended") or 0) / 1000
        if not ended:
            is_newest = record is attempts[-1]
            ended = time.time() if running and is_newest else last_sign(trial, record, is_newest)
        total += max(ended - started, 0) * int(record.get("world") or 1)
    return total


def last_sign(trial: TrialDir, record: AttemptRecord, is_newest: bool) -> float:
    """Return when an attempt last wrote to its spool or, if it is the newest, its heartbeat."""
    spool = modified(trial.metrics(record["attempt"]))
    return max(spool, modified(trial.heartbeat)) if is_newest else spool


def modified(path: Path) -> float:
    """Return when a file was last written, in Unix seconds; 0 when it cannot be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
