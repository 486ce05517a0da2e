"""The one table that decides the state of a trial.

In: the facts about one trial, gathered by `launch/scheduler/facts.py` or by `results/tables.py`.
Out: its `TrialStatus`. It reads no file, asks no scheduler and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

State = Literal[
    "new",
    "queued",
    "requeued",
    "running",
    "interrupted",
    "stopped",
    "failed",
    "done",
    "unknown",
]
STATES: tuple[State, ...] = get_args(State)
ACTIVE: frozenset[State] = frozenset({"queued", "requeued", "running"})


@dataclass(frozen=True)
class TrialStatus:
    """The state of a trial, and why.

    note: the reason, for the user. job: id of its Slurm job, or ''. attempts: how many there were.
    canary: name of the canary that a queued trial waits for, or ''.
    """

    state: State
    note: str = ""
    job: str = ""
    attempts: int = 0
    canary: str = ""


@dataclass(frozen=True)
class SlurmFacts:
    """What Slurm says about the jobs of one trial.

    answers: False when squeue failed; then no other field is set.
    state, reason: of its pending or running task in squeue; None without one.
    job: id of that task, else of the last one that accounting knows, or ''.
    canary: name of the canary that the task waits for, or ''.
    ended: Slurm's word for the end of its last job, '' when Slurm does not know it.
    exhausted: which retry budget the end of its last job exceeds, or ''.
    """

    answers: bool = True
    state: State | None = None
    reason: str = ""
    job: str = ""
    canary: str = ""
    ended: str = ""
    exhausted: str = ""


@dataclass(frozen=True)
class TrialFacts:
    """What the files and the schedulers say about one trial.

    done, failed, stopped: whether DONE.json, FAILED.json and STOP exist. error: of FAILED.json.
    stopped_by: who wrote STOP, and when. attempts: how many there are.
    last_cause: cause of the newest attempt, '' while it is open; only for a reader of files alone.
    heartbeat: whether the heartbeat is younger than three minutes.
    local, canary: state in the local queue, and the canary that the trial waits for there.
    slurm: None when no array of Slurm names the trial.
    """

    done: bool = False
    failed: bool = False
    stopped: bool = False
    error: str = ""
    stopped_by: str = ""
    attempts: int = 0
    last_cause: str = ""
    heartbeat: bool = False
    local: Literal["", "queued", "running"] = ""
    canary: str = ""
    slurm: SlurmFacts | None = None


def status_from(facts: TrialFacts, files_only: bool = False) -> TrialStatus:
    """Return the state by the first row that holds.

    files_only: no scheduler was asked, as in the collector; the newest attempt decides instead.
    """
    if facts.done:
        return TrialStatus("done", attempts=facts.attempts)
    if facts.failed:
        return TrialStatus("failed", facts.error, attempts=facts.attempts)
    if files_only:
        return TrialStatus(_state_by_attempts(facts), attempts=facts.attempts)
    if facts.local == "running":
        return TrialStatus("running", _local_note(facts), attempts=facts.attempts)
    if facts.slurm and not facts.slurm.answers:
        state = "running" if facts.heartbeat else "unknown"
        return TrialStatus(state, "Slurm does not answer", attempts=facts.attempts)
    if facts.slurm and facts.slurm.state:
        return _in_slurm_queue(facts, facts.slurm, facts.slurm.state)
    if facts.stopped:
        return TrialStatus("stopped", f"{facts.stopped_by}: jepa resume", attempts=facts.attempts)
    if facts.local == "queued":
        return TrialStatus(
            "queued", "waits for a slot", attempts=facts.attempts, canary=facts.canary
        )
    if facts.slurm:
        return _left_slurm_queue(facts, facts.slurm)
    return TrialStatus("interrupted" if facts.attempts else "new", attempts=facts.attempts)


def _state_by_attempts(facts: TrialFacts) -> State:
    if not facts.attempts:
        return "queued"
    if not facts.last_cause:
        return "running"
    if facts.stopped or facts.last_cause == "stopped":
        return "stopped"
    return "requeued"


def _local_note(facts: TrialFacts) -> str:
    if facts.stopped:
        return "stopping"
    return "" if facts.attempts else "starting"


def _in_slurm_queue(facts: TrialFacts, slurm: SlurmFacts, state: State) -> TrialStatus:
    note = slurm.reason
    if state == "running" and not facts.attempts:
        note = f"starting {note}"
    return TrialStatus(state, note, slurm.job, facts.attempts, slurm.canary)


def _left_slurm_queue(facts: TrialFacts, slurm: SlurmFacts) -> TrialStatus:
    """A cancelled job was stopped by the user; any other end interrupts the trial."""
    if slurm.ended.startswith("CANCELLED"):
        note = f"{slurm.ended.lower()} in Slurm: jepa resume"
        return TrialStatus("stopped", note, attempts=facts.attempts)
    if slurm.exhausted:
        return TrialStatus("failed", slurm.exhausted, slurm.job, facts.attempts)
    note = f"Slurm: {slurm.ended}" if slurm.ended else "left Slurm's queue"
    return TrialStatus("interrupted", note, slurm.job, facts.attempts)
