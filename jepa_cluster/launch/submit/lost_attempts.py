"""Write the end of attempts of which no rank was left to write it.

In: the states of trials. Out: attempts/NNNN.end.json with the cause, by what Slurm says of that run
of the job. `submit` and `watch` do this. An end is created once: one by a rank is never replaced.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import array_records, diagnosis, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.records import AttemptRecord, SweepArray
from jepa_cluster.trial import file_facts, usage
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import classify_attempt
from jepa_cluster.trial.status import SlurmAnswer, TrialStatus

CLOCK_SLACK = 60.0  # seconds that the clock of a node and that of Slurm may be apart
LATEST = 7200.0  # seconds after an attempt began in which its run may begin, by clocks apart
Runs = Mapping[tuple[str, int | None], list[Task]]  # by job and index: rows of sacct, oldest first


@dataclass(frozen=True)
class OpenAttempt:
    """An attempt without an end. status: of its trial. is_newest: no other attempt follows it."""

    trial: TrialDir
    record: AttemptRecord
    status: TrialStatus
    is_newest: bool

    @property
    def job(self) -> str:
        return file_facts.job_of(self.record)

    def end_by_slurm(self, runs: Runs) -> str | None:
        """Return Slurm's word for the end, '' if it has none; None if a rank may be alive."""
        index = self.record.get("array_task_id")
        rows = runs.get((self.job, int(index) if index else None), [])
        run = self._run(rows)
        is_beating = self.is_newest and file_facts.is_beating(self.trial, [self.record])
        is_its_job = self.is_newest and self.status.job.partition("_")[0] == self.job
        word = self.status.slurm_state if is_its_job else ""
        if run:
            word = run.state
            if run is rows[-1] and word != "REQUEUED" and not SlurmAnswer(state=word).is_terminal:
                return None
        # A node that Slurm has lost may still run the rank
        is_unsure = word in ("", "NODE_FAIL") and is_beating
        return None if is_unsure else word

    def _run(self, rows: Sequence[Task]) -> Task | None:
        """Return the run of the job in which the attempt began, if Slurm has its row.

        Its number is the restart count. Time decides where Slurm has fewer rows than runs: it has
        purged the first ones, or does not have the last one yet.
        """
        restarts = int(self.record.get("restart_count", 0))
        newest = restarts
        for record in self.trial.attempts():
            if file_facts.job_of(record) == self.job:
                newest = max(newest, int(record.get("restart_count", 0)))
        started = self.record.get("started", 0) / 1000
        begun = [row for row in rows if slurm.timestamp(row.start)]
        if len(begun) > newest:
            begin = slurm.timestamp(begun[restarts].start) or 0.0
            if begin < started + LATEST:  # else runs without an attempt replace purged ones
                return begun[restarts]
        for row in reversed(rows[: restarts + 1]):
            start, end = slurm.timestamp(row.start), slurm.timestamp(row.end)
            if start and start - CLOCK_SLACK < started < (end or math.inf) + CLOCK_SLACK:
                return row
        return None


def find(root: Root, trials: Mapping[str, TrialStatus]) -> list[OpenAttempt]:
    """Return the attempts of Slurm jobs that have no end, except those that run."""
    found: list[OpenAttempt] = []
    for name, status in trials.items():
        trial = root.trial(name)
        may_run = status.state in ("running", "unknown")
        for number in trial.open_attempts() if status.attempts else ():
            if number > status.attempts:  # it began after the states were read
                continue
            record = trial.read_attempt(number)
            is_newest = number == status.attempts
            is_open = record.keys().isdisjoint(("ended", "cause"))
            if is_open and record.get("kind") == "slurm" and not (is_newest and may_run):
                found.append(OpenAttempt(trial, record, status, is_newest))
    return found


def find_ended(root: Root, trials: Mapping[str, TrialStatus]) -> list[tuple[OpenAttempt, str]]:
    """Return the attempts without an end that have ended, with Slurm's word for it.

    Returns [] if sacct does not answer.
    """
    lost = find(root, trials)
    ended: list[tuple[OpenAttempt, str]] = []
    with contextlib.suppress(JepaError):
        runs = _runs(array_records.read(root), {attempt.job for attempt in lost}) if lost else {}
        for attempt in lost:
            word = attempt.end_by_slurm(runs)
            if word is not None:
                ended.append((attempt, word))
    return ended


def write_ends(root: Root, trials: Mapping[str, TrialStatus]) -> None:
    """Write the ends of the attempts that have ended."""
    for attempt, word in find_ended(root, trials):
        with contextlib.suppress(OSError):  # of a user whose folders are closed
            _write_end(root, attempt, word)


def _runs(arrays: Iterable[SweepArray], jobs: set[str]) -> Runs:
    arrays = [array for array in arrays if array["job"] in jobs]
    runs: dict[tuple[str, int | None], list[Task]] = {}
    if arrays:
        names = map(itemgetter("name"), arrays)
        for task in slurm.sacct(names, array_records.before_submission(arrays)) or ():
            runs.setdefault((task.job, task.index), []).append(task)
    return runs


def _write_end(root: Root, attempt: OpenAttempt, word: str) -> None:
    trial, record = attempt.trial, attempt.record
    number = record["attempt"]
    # An older line of the log, of a save that failed, does not explain what Slurm has seen.
    log = diagnosis.log_tail(root, trial, number) if word in ("", "FAILED") else []
    failure = classify_attempt(record, word, "\n".join(log))
    cause = failure.cause
    if attempt.is_newest and trial.done.exists():
        cause = "done"
    elif cause == "unknown" and word:  # Slurm saw it end
        cause = "killed"
    ended = max(usage.last_sign(trial, record, attempt.is_newest), record.get("started", 0) / 1000)
    end = {"ended": round(1000 * ended), "cause": cause, "slurm_state": word}
    if cause != "done":
        end["error"] = failure.evidence
    trial.end_attempt(number, end)
