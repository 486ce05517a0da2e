"""What Slurm jobs printed before an attempt began, and which of them ended without an attempt.

In: a root, array records and a trial. Out: paths, and records that the retry budget counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jepa_cluster.records import AttemptRecord, SweepArray
from jepa_cluster.trial.directory import Root


def task_log(root: Root, array: SweepArray, trial: str) -> Path:
    """Return the output of the batch script of a trial. Slurm makes it when the job starts."""
    task = array["job"]
    if len(array["trials"]) > 1:
        task += f"_{array['trials'].index(trial)}"
    return root.sweep(array["sweep"]).jobs / f"{task}.log"


def lost_jobs(
    root: Root, arrays: Iterable[SweepArray], trial: str, attempts: Sequence[AttemptRecord]
) -> list[AttemptRecord]:
    """Return a record per job of a trial that started after its last attempt and made none."""
    last = attempts[-1] if attempts else None
    since = last.get("started", 0) if last else 0
    lost: list[AttemptRecord] = []
    for array in arrays:
        if trial not in array["trials"] or array["submitted"] < since:
            continue
        if last and array["job"] in (last.get("array_job_id"), last.get("job")):
            continue
        if task_log(root, array, trial).exists():
            lost.append({"attempt": 0, "cause": "not_started", "ended": array["submitted"]})
    return lost


def forgive(root: Root, arrays: Iterable[SweepArray], trial: str) -> None:
    """Rename the output of earlier jobs of a trial, so that they no longer count."""
    for array in arrays:
        if trial in array["trials"]:
            log = task_log(root, array, trial)
            if log.exists():
                log.rename(log.with_suffix(".log.old"))
