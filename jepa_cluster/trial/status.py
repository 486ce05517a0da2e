"""The one table that decides the state of a trial.

In: the facts about one trial, gathered by `launch/scheduler/facts.py` or `trial/file_facts.py`.
Out: its `TrialStatus`: the first row that holds decides. It reads no file, asks no scheduler and
writes nothing. docs/trial-directory.md shows the rows in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
Action = Literal["submit", "resume", "wait", "keep", "leave", "done"]
Marker = Literal["", "STOP", "FAILED"]


@dataclass(frozen=True)
class StateRule:
    """What a state means for `submit`, for MLflow and for the user.

    mlflow: status of the run; '' leaves it as it is. in_progress: a job waits or works.
    over: nothing starts it by itself.
    """

    submit: Action
    mlflow: str
    in_progress: bool = False
    over: bool = False


RULES: Mapping[State, StateRule] = {
    "new": StateRule("submit", "SCHEDULED"),
    "queued": StateRule("keep", "SCHEDULED", in_progress=True),
    "requeued": StateRule("keep", "SCHEDULED", in_progress=True),
    "running": StateRule("keep", "RUNNING", in_progress=True),
    "interrupted": StateRule("resume", "SCHEDULED"),
    "stopped": StateRule("leave", "KILLED", over=True),
    "failed": StateRule("leave", "FAILED", over=True),
    "done": StateRule("done", "FINISHED", over=True),
    "unknown": StateRule("keep", ""),
}
IN_PROGRESS: tuple[State, ...] = tuple(name for name in STATES if RULES[name].in_progress)
OVER: tuple[State, ...] = tuple(name for name in STATES if RULES[name].over)
NOT_OVER: tuple[State, ...] = tuple(name for name in STATES if not RULES[name].over)
STARTABLE: tuple[State, ...] = ("new", "interrupted")  # what `submit` starts
ENDED: tuple[State, ...] = ("interrupted", *OVER)  # no job works on it, and one did or may not

RUNNING_STATES = (
    "RUNNING",
    "CONFIGURING",
    "SIGNALING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "STAGE_OUT",
)
PENDING_STATES = (
    "PENDING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
    "REQUEUE_FED",
)
LEFT_QUEUE = "left the queue before it began"
RESUME = ": jepa resume"


@dataclass(frozen=True)
class SlurmAnswer:
    """What squeue or sacct says about the task of a trial.

    state: Slurm's word, '' without a row. reason: for the user. held: for a reason that time cannot
    cure. begin_time: it waits for its BeginTime. ended: when it ended, for the user.
    """

    kind: Literal["row", "no row", "no answer", "not asked"] = "row"
    state: str = ""
    reason: str = ""
    held: bool = False
    begin_time: bool = False
    ended: str = ""

    @property
    def is_running(self) -> bool:
        return self.state in RUNNING_STATES

    @property
    def is_pending(self) -> bool:
        return self.state in PENDING_STATES

    @property
    def is_terminal(self) -> bool:
        return bool(self.state) and not self.is_running and not self.is_pending

    @property
    def is_live(self) -> bool:
        return self.is_running or self.is_pending


NO_ROW = SlurmAnswer("no row")
NO_ANSWER = SlurmAnswer("no answer")
NOT_ASKED = SlurmAnswer("not asked")


@dataclass(frozen=True)
class TrialFacts:
    """What the files and the schedulers say about one trial.

    done, failed, stopped: whether DONE.json, FAILED.json and STOP exist. error: of FAILED.json.
    stopped_by: who wrote STOP, and when. local, canary: state in the local queue, and the canary
    that the trial waits for there or in Slurm. attempts: how many there are.
    job: task of the newest array that names the trial, '' without one. has_attempt: this job opened
    an attempt. has_begun: it did, or wrote a log. is_ours: we hold it until its trunk has saved.
    heartbeat: younger than three minutes, of an open attempt. silent: none for an hour.
    exhausted: which retry budget is used up, or ''; cause: of the last failure.
    """

    done: bool = False
    failed: bool = False
    stopped: bool = False
    error: str = ""
    stopped_by: str = ""
    local: Literal["", "queued", "running"] = ""
    canary: str = ""
    attempts: int = 0
    job: str = ""
    has_attempt: bool = False
    has_begun: bool = False
    is_ours: bool = False
    heartbeat: bool = False
    silent: bool = False
    exhausted: str = ""
    cause: str = ""
    squeue: SlurmAnswer = NO_ROW
    sacct: SlurmAnswer = NO_ROW

    @property
    def has_marker(self) -> bool:
        return self.done or self.failed or self.stopped

    @property
    def end(self) -> str:
        """Slurm's word for the end of the job, '' without one.

        squeue does not say who cancelled a job. Without accounting, it was a user.
        """
        if self.sacct.is_terminal:
            return self.sacct.state
        if self.squeue.state.startswith("CANCELLED"):
            return "CANCELLED by a user"
        return self.squeue.state if self.squeue.is_terminal else ""

    @property
    def is_gone(self) -> bool:
        """Whether Slurm answers, and knows no live job."""
        return bool(self.end) or (self.squeue.kind, self.sacct.kind) == ("no row", "no row")


@dataclass(frozen=True)
class TrialStatus:
    """The state of a trial, and why.

    note: the reason, for the user. held: it waits for something that only the user can change.
    job: id of its Slurm job, or ''. attempts: how many there were. canary: name of the canary that
    a queued trial waits for, or ''. cause: of a failure. waits: its job is still in a queue, though
    it is stopped. marker: the file that makes the state last when Slurm has forgotten the job.
    refuses: `submit` starts nothing, because Slurm was not heard. slurm_state: Slurm's word for the
    end of the job of an interrupted trial, or ''.
    """

    state: State
    note: str = ""
    held: bool = False
    job: str = ""
    attempts: int = 0
    canary: str = ""
    cause: str = ""
    waits: bool = False
    marker: Marker = ""
    refuses: bool = False
    slurm_state: str = ""

    @property
    def rule(self) -> StateRule:
        return RULES[self.state]


def status_from(facts: TrialFacts) -> TrialStatus:
    """Return the state by the first row that holds."""
    return replace(_first_row(facts), attempts=facts.attempts)


def _first_row(facts: TrialFacts) -> TrialStatus:
    """Rows 1 to 8: markers, a live job, and the collector, which asks no scheduler."""
    squeue = facts.squeue
    is_waiting = facts.local == "queued" or squeue.is_pending
    if facts.done:
        return TrialStatus("done")
    if facts.failed:
        return TrialStatus("failed", facts.error)
    if facts.local == "running" or squeue.is_running:
        return _running(facts)
    if is_waiting and facts.stopped:
        note = f"{facts.stopped_by}; its job still waits: jepa cancel, or jepa resume"
        return TrialStatus("stopped", note, job=facts.job, waits=True)
    if is_waiting:
        return _waiting(facts)
    if squeue.kind == "not asked":
        return TrialStatus(_state_by_files(facts))
    if facts.stopped:
        return TrialStatus("stopped", facts.stopped_by + RESUME)
    if facts.exhausted and facts.is_gone:
        return TrialStatus(
            "failed", facts.exhausted, job=facts.job, cause=facts.cause, marker="FAILED"
        )
    if not facts.job:
        return _without_job(facts)
    return _left_queue(facts)


def _running(facts: TrialFacts) -> TrialStatus:
    note = facts.squeue.reason
    if not facts.attempts:
        note = f"starting {note}"
    if facts.stopped:
        note += "; stopping"
    job = facts.job if facts.squeue.is_running else ""
    return TrialStatus("running", note.strip("; "), job=job)


def _waiting(facts: TrialFacts) -> TrialStatus:
    """Rows 5 to 7."""
    squeue = facts.squeue
    if facts.local:
        return TrialStatus("queued", "waits for a slot", canary=facts.canary)
    if squeue.begin_time and facts.has_attempt:
        return TrialStatus("requeued", squeue.reason, job=facts.job)
    held = squeue.held and not facts.is_ours
    return TrialStatus("queued", squeue.reason, held, facts.job, canary=facts.canary)


def _state_by_files(facts: TrialFacts) -> State:
    if facts.heartbeat:
        return "running"
    if facts.stopped:
        return "stopped"
    if facts.exhausted:
        return "failed"
    if facts.attempts:
        return "interrupted"
    return "queued" if facts.job else "new"


def _without_job(facts: TrialFacts) -> TrialStatus:
    if facts.heartbeat:
        return TrialStatus("unknown", "its heartbeat is fresh: a rank was started by hand")
    return TrialStatus("interrupted" if facts.attempts else "new")


def _left_queue(facts: TrialFacts) -> TrialStatus:
    """Rows 11 and 13 to 18: squeue shows no live job of the newest array."""
    squeue, sacct = facts.squeue, facts.sacct
    job, has_row = facts.job, squeue.kind == "row"
    if squeue.kind == "no answer" or (not has_row and sacct.kind == "no answer"):
        state = "running" if facts.heartbeat else "unknown"
        return TrialStatus(state, "Slurm does not answer", job=job, refuses=True)
    if not has_row and sacct.is_live:
        note = "accounting knows a job that squeue does not show"
        if not facts.silent:
            return TrialStatus("unknown", note, job=job)
        return TrialStatus("interrupted", f"{note}: sacctmgr show runawayjobs", job=job)
    cancelled, by, user = facts.end.partition(" by ")
    if cancelled == "CANCELLED" and by:
        when = f", {sacct.ended or squeue.ended}".rstrip(", ")
        return TrialStatus("stopped", f"cancelled in Slurm by {user}{when}{RESUME}", marker="STOP")
    if facts.heartbeat and not facts.end:
        note = "its heartbeat is fresh, but squeue does not show it: another cluster?"
        return TrialStatus("unknown", note, job=job)
    if not facts.has_begun and not facts.end:
        note = f"{LEFT_QUEUE}: cancelled, or the queue was lost{RESUME}"
        return TrialStatus("stopped", note, marker="STOP")
    note = f"Slurm: {facts.end}" if facts.end else "left Slurm's queue"
    return TrialStatus("interrupted", note, job=job, slurm_state=facts.end)
