"""What the files of a root say about a trial, for `trial/status.py`.

In: a trial directory and its attempt records. Out: the part of its `TrialFacts` that needs no
scheduler. It writes nothing, but for the file that `clock_offset` makes and removes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jepa_cluster.errors import TrialError
from jepa_cluster.records import ArrayRecord, AttemptRecord
from jepa_cluster.trial.directory import Root, SweepDir, TrialDir
from jepa_cluster.trial.failures import exhausted_budget
from jepa_cluster.trial.files import clock_offset, read_json
from jepa_cluster.trial.status import NOT_ASKED, State, TrialFacts, status_from
from jepa_cluster.trial.usage import modified

HEARTBEAT_SECONDS = 180  # a younger heartbeat shows that a rank is alive
LOG_SLACK = 3600  # seconds that two clocks may be apart; older logs are of an earlier job


def marker_facts(trial: TrialDir) -> TrialFacts:
    """Return what the markers say, and the number of attempts."""
    error, stopped_by = "", ""
    done = trial.done.exists() or (trial.canary.exists() and trial.succeeded())
    failed = not done and trial.failed.exists()
    if failed:
        marker = read_json(trial.failed) or {}
        error = " ".join(str(marker.get("error", "")).split())[:100]
    with contextlib.suppress(FileNotFoundError):  # `jepa resume` removes STOP
        author = trial.stop.read_text().strip() or "stopped by a STOP file"
        since = time.localtime(modified(trial.stop))
        stopped_by = f"{author}, {time.strftime('%d %b %H:%M', since)}"
    return TrialFacts(
        done=done,
        failed=failed,
        stopped=bool(stopped_by),
        error=error,
        stopped_by=stopped_by,
        attempts=trial.newest_attempt(),
    )


def seconds_silent(trial: TrialDir) -> float:
    """Return the age of the heartbeat by the file server's clock."""
    return time.time() + clock_offset(trial.root.path) - modified(trial.heartbeat)


def is_beating(trial: TrialDir, attempts: Sequence[AttemptRecord]) -> bool:
    """Return whether the newest attempt is open and its heartbeat is young."""
    is_open = attempts and attempts[-1].keys().isdisjoint(("ended", "cause"))
    return bool(is_open) and seconds_silent(trial) < HEARTBEAT_SECONDS


def task_id(array: ArrayRecord, trial: str) -> str:
    """Return the id of a trial's task, as Slurm writes it: '7_1', or '7' for a job of one trial."""
    if len(array["trials"]) == 1:
        return array["job"]
    return f"{array['job']}_{array['trials'].index(trial)}"


def job_of(record: AttemptRecord) -> str:
    """Return the job of an attempt, or the array of its task."""
    return record.get("array_job_id") or record.get("job_id", "")


def attempts_of(array: ArrayRecord, attempts: Sequence[AttemptRecord]) -> bool:
    """Return whether a job of this array opened one of the attempts."""
    return array["job"] in map(job_of, attempts)


def job_output(sweep: SweepDir, array: ArrayRecord, trial: str) -> Path:
    """Return the output of the batch script of a trial. Slurm makes it when the job starts."""
    return sweep.jobs / f"{task_id(array, trial)}.log"


def has_log(sweep: SweepDir, array: ArrayRecord, trial: str) -> bool:
    """Return whether the task of a trial wrote a log. Slurm may reuse ids; older logs do not count.

    The submitter's clock and the node's may be apart.
    """
    oldest = array["submitted"] / 1000 - LOG_SLACK
    return modified(job_output(sweep, array, trial)) > oldest


class Submissions:
    """Which trials of a root an array or the local queue names. Reads each array record once."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._arrays: dict[Path, list[str]] = {}

    def trials(self) -> set[str]:
        names = {path.stem for path in self.root.local.glob("running/*.json")}
        names |= {path.stem.split("-", 3)[3] for path in self.root.local.glob("queue/*.json")}
        for path in self.root.path.glob("sweeps/*/arrays/*.json"):
            if path not in self._arrays:
                with contextlib.suppress(TrialError):  # a crash of the machine has torn it
                    self._arrays[path] = (read_json(path) or {}).get("trials", [])
            names.update(self._arrays.get(path, ()))
        return names


def state_by_files(
    trial: TrialDir,
    attempts: Sequence[AttemptRecord],
    retries: Mapping[str, int],
    submitted: Container[str],
) -> State:
    """Return the state for the collector, which asks no scheduler. submitted: see Submissions."""
    exhausted, _ = exhausted_budget(attempts, retries)
    facts = replace(
        marker_facts(trial),
        job=trial.name if trial.name in submitted else "",
        heartbeat=is_beating(trial, attempts),
        exhausted=exhausted,
        squeue=NOT_ASKED,
    )
    return status_from(facts).state
