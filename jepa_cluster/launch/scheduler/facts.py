"""Gather the facts from which `trial/status.py` decides the state of trials.

In: a root and names of trials. Out: a `StatusSnapshot`. It asks the files, the local queue, squeue
once for all trials, and sacct once for those that left the queue. Only the newest array that names
a trial counts. Nothing is stored. When Slurm does not answer, the trials that it may hold are
`unknown`, and the snapshot names the problem.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import array_records, local, slurm
from jepa_cluster.launch.scheduler.array_records import arrays_of, before_submission
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.records import ArrayRecord, AttemptRecord, SweepArray
from jepa_cluster.trial import file_facts
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.failures import exhausted_budget
from jepa_cluster.trial.files import owner
from jepa_cluster.trial.status import (
    NO_ANSWER,
    NO_ROW,
    RUNNING_STATES,
    SlurmAnswer,
    State,
    TrialFacts,
    TrialStatus,
    status_from,
)

HOUR = 3600
HIDDEN = "Slurm hides the jobs of other users (PrivateData)"

CANARY_NOTES: Mapping[State, str] = {
    "done": "its canary succeeded",
    "failed": "held: its canary failed, see jepa why",
    "stopped": "held: its canary was stopped, see jepa why",
    "interrupted": "held: its canary was lost, see jepa why",
}


@dataclass(frozen=True)
class StatusSnapshot:
    """The states of trials and of their canaries at one moment.

    problem: why some of them are not known, else ''. hint: what to do about it. tasks: pending and
    running.
    """

    trials: Mapping[str, TrialStatus]
    problem: str = ""
    hint: str = ""
    tasks: tuple[Task, ...] = field(default=(), repr=False)

    @property
    def states(self) -> dict[str, State]:
        """States of the trials, without canaries."""
        found: dict[str, State] = {}
        for name, status in self.trials.items():
            if not name.startswith("canary."):
                found[name] = status.state
        return found


def query_status(root: Root, names: Iterable[str]) -> StatusSnapshot:
    """Return the state of these trials, and of the canaries that they wait for."""
    arrays, torn = array_records.read_with_torn(root)
    queued = local.list_trials(root)
    wanted = dict.fromkeys(names)
    canaries = [queued[name].canary for name in wanted if name in queued]
    canaries += [array.get("canary", "") for array in arrays_of(arrays, set(wanted))]
    facts: dict[str, TrialFacts] = {}
    undecided: set[str] = set()
    for name in wanted | dict.fromkeys(filter(None, canaries)):
        known = file_facts.marker_facts(root.trial(name))
        if name in queued:
            state, canary = queued[name]
            known = replace(known, local=state, canary=canary)
        elif not (known.done or known.failed):
            undecided.add(name)
        facts[name] = known
    query = SlurmQuery(root, arrays_of(arrays, undecided))
    facts |= query.complete({name: facts[name] for name in undecided})
    statuses = {name: status_from(known) for name, known in facts.items()}
    if not any(status.refuses for status in statuses.values()):
        query.problem = ""  # what is not known decides nothing
    live = tuple(task for task in query.tasks if state_of(task))
    problem, hint = query.problem, query.hint
    torn_record = _torn_record(root, torn, wanted)
    if torn_record and not problem:
        problem, hint = torn_record, "that user can submit the sweep"
    return StatusSnapshot(_with_canary_notes(statuses), problem, hint, live)


def _torn_record(root: Root, torn: Iterable[Path], wanted: Collection[str]) -> str:
    """Return the problem if a torn record is of a sweep that has one of the wanted trials."""
    for path in torn:
        sweep = path.parents[1].name
        if any(trial["name"] in wanted for trial in root.sweep(sweep).planned()):
            record = path.relative_to(root.path)
            return f"{record} cannot be read: jepa submit by {owner(path)} repairs it"
    return ""


def _with_canary_notes(statuses: Mapping[str, TrialStatus]) -> dict[str, TrialStatus]:
    """Note at each trial that waits for a canary whether that canary can still succeed."""
    noted = dict(statuses)
    for name, status in statuses.items():
        if status.canary in statuses:
            state = statuses[status.canary].state
            note = CANARY_NOTES.get(state, "waits for its canary")
            noted[name] = replace(status, note=note, held=note.startswith("held"))
    return noted


# ---- Slurm


class SlurmQuery:
    """What squeue and sacct say about trials.

    arrays: those that name the trials, oldest first. tasks: rows of squeue. problem: why Slurm was
    not heard, or ''. hint: what to do about it.
    """

    def __init__(self, root: Root, arrays: Sequence[SweepArray]) -> None:
        self.root, self.arrays = root, arrays
        self.arrays_of: dict[str, list[SweepArray]] = {}
        for array in arrays:
            for trial in array["trials"]:
                self.arrays_of.setdefault(trial, []).append(array)
        self.newest = {trial: found[-1] for trial, found in self.arrays_of.items()}
        self.tasks: list[Task] = []
        self.problem = ""
        self.hint = "try again when Slurm answers"
        self._maintenance = ""
        self._retries: dict[str, dict[str, int]] = {}  # by sweep

    def complete(self, facts: Mapping[str, TrialFacts]) -> dict[str, TrialFacts]:
        """Return the facts with what Slurm says, and with the attempts where those matter."""
        try:
            self.tasks = slurm.squeue(array["name"] for array in self.arrays)
        except JepaError as e:
            self.problem = e.what
        rows = _tasks_by_trial(self.arrays, self.tasks)
        hidden = self._hidden_arrays()
        found: dict[str, TrialFacts] = {}
        gone: set[str] = set()
        asked: set[str] = set()
        for name, known in facts.items():
            if name in self.newest:
                answer = NO_ANSWER if self.newest[name]["name"] in hidden else NO_ROW
                known = self._with_queue_row(name, known, rows.get(name), answer)
                if not known.squeue.is_live:  # it may have ended since its files were read
                    markers = file_facts.marker_facts(self.root.trial(name))
                    known = replace(markers, job=known.job, squeue=known.squeue)
                    if known.squeue != NO_ANSWER and not known.has_marker:
                        asked.add(name)
            if not known.squeue.is_live:
                gone.add(name)
            found[name] = known
        accounts = self._accounting(asked)
        for name in gone:
            found[name] = self._with_attempts(
                name, replace(found[name], sacct=accounts.get(name, NO_ROW))
            )
        return found

    def _hidden_arrays(self) -> set[str]:
        """Return the arrays that squeue may not show: no answer, or jobs of another user."""
        names = {array["name"] for array in self.arrays}
        if self.problem:
            return names
        names -= {task.name for task in self.tasks}
        hidden: set[str] = set()
        for array in self.arrays:
            if array["name"] in names and not self._is_own(array):
                hidden.add(array["name"])
        if hidden and os.getuid() and slurm.hides_jobs():
            self.problem = HIDDEN
            self.hint = "the user who submitted these trials can submit the sweep"
            return hidden
        return set()

    def _is_own(self, array: SweepArray) -> bool:
        """Return whether this user submitted the array: the intent is never written again."""
        sweep = self.root.sweep(array["sweep"])
        intent = sweep.intent(array["name"])
        return not intent.exists() or intent.stat().st_uid == os.getuid()

    def _with_queue_row(
        self, name: str, known: TrialFacts, task: Task | None, without: SlurmAnswer
    ) -> TrialFacts:
        array = self.newest[name]
        known = replace(known, job=file_facts.task_id(array, name), squeue=without)
        if task is None:
            return known
        answer = self._queue_answer(task, known.job)
        is_ours = name in array.get("held", ()) and "JobHeldUser" in task.reason
        if is_ours:
            answer = replace(answer, reason="waits for its trunk")
        canary, has_attempt = "", False
        if task.reason.startswith("Dependency"):
            canary = array.get("canary", "")
        if answer.begin_time:
            has_attempt = file_facts.attempts_of(array, self.root.trial(name).attempts())
        return replace(
            known, squeue=answer, is_ours=is_ours, canary=canary, has_attempt=has_attempt
        )

    def _queue_answer(self, task: Task, job: str) -> SlurmAnswer:
        if task.state in RUNNING_STATES:
            return SlurmAnswer(state=task.state, reason=_running_note(task))
        if not state_of(task):
            return SlurmAnswer(state=task.state, ended=slurm.clock_time(task.end))
        reason = slurm.explain_reason(task.reason)
        begin_time, start = task.reason.startswith("BeginTime"), slurm.clock_time(task.start)
        text = reason.text.format(job=job)
        if begin_time and start:
            text = f"starts again at {start}"
        if "maintenance" in text:
            self._maintenance = self._maintenance or slurm.maintenance()
            text = self._maintenance
        return SlurmAnswer(state=task.state, reason=text, held=reason.held, begin_time=begin_time)

    def _accounting(self, names: Collection[str]) -> dict[str, SlurmAnswer]:
        """Return what sacct says of trials whose job is not in the queue."""
        asked = {self.newest[name]["name"] for name in names}
        arrays = [array for array in self.arrays if array["name"] in asked]
        if not arrays:
            return {}
        try:
            tasks = slurm.sacct(asked, before_submission(arrays)) or []
        except JepaError as e:
            self.problem = e.what
            return dict.fromkeys(names, NO_ANSWER)
        found: dict[str, SlurmAnswer] = {}
        for name, task in _tasks_by_trial(arrays, tasks).items():
            if task and name in names:
                state = _with_user_name(task.state)
                found[name] = SlurmAnswer(state=state, ended=slurm.clock_time(task.end))
        return found

    def _with_attempts(self, name: str, known: TrialFacts) -> TrialFacts:
        """Add the facts about attempts, heartbeat and retry budget of a trial without live job."""
        trial, array = self.root.trial(name), self.newest.get(name)
        attempts = trial.attempts() if known.attempts else []
        heartbeat = file_facts.is_beating(trial, attempts)
        known = replace(known, heartbeat=heartbeat)
        if array is None:
            return known
        sweep = self.root.sweep(array["sweep"])
        has_attempt = file_facts.attempts_of(array, attempts)
        silent = file_facts.seconds_silent(trial) > HOUR
        exhausted, cause = "", ""
        if not heartbeat:
            tries = [*attempts, *self._lost_tasks(name, known, attempts)]
            tries.sort(key=lambda attempt: attempt.get("started", 0))
            retries = self._retry_budget(array["sweep"])
            exhausted, cause = exhausted_budget(tries, retries, known.end, known.is_gone)
        return replace(
            known,
            has_attempt=has_attempt,
            has_begun=has_attempt or file_facts.has_log(sweep, array, name),
            silent=silent and array["submitted"] / 1000 < time.time() - HOUR,
            exhausted=exhausted,
            cause=cause,
        )

    def _lost_tasks(
        self, name: str, known: TrialFacts, attempts: Sequence[AttemptRecord]
    ) -> list[AttemptRecord]:
        """Return a record for each task that ended without an attempt, since the last resume."""
        lost: list[AttemptRecord] = []
        for array in self.arrays_of[name]:
            if array.get("resumed"):
                lost.clear()
            has_log = file_facts.has_log(self.root.sweep(array["sweep"]), array, name)
            has_ended = known.end or (has_log and known.is_gone)
            is_newest = array is self.newest[name]
            if file_facts.attempts_of(array, attempts) or (is_newest and not has_ended):
                continue
            record: AttemptRecord = {
                "attempt": 0,
                "started": array["submitted"],
                "job_id": file_facts.task_id(array, name),
            }
            if has_log:
                record["cause"] = "not_started"
            lost.append(record)
        return lost

    def _retry_budget(self, sweep: str) -> dict[str, int]:
        if sweep not in self._retries:
            plan = self.root.sweep(sweep).read_plan()
            self._retries[sweep] = plan["retries"] if plan else {}
        return self._retries[sweep]


def state_of(task: Task) -> State | None:
    """Return 'queued' or 'running'; None for a task that has ended.

    squeue shows tasks that have ended for some minutes.
    """
    answer = SlurmAnswer(state=task.state)
    if answer.is_running:
        return "running"
    return "queued" if answer.is_pending else None


Rows = dict[tuple[str, str], dict[int | None, Task]]  # by name and id of a job, and by index


def rows_by_job(tasks: Iterable[Task]) -> Rows:
    """Return the last row of each task."""
    rows: Rows = {}
    for task in tasks:
        rows.setdefault((task.name, task.job), {})[task.index] = task
    return rows


def tasks_of(array: ArrayRecord, rows: Rows) -> dict[str, Task]:
    """Return the rows of an array by trial.

    A row without an index is about every task of its array that has no row of its own.
    """
    of_job = rows.get((array["name"], array["job"]), {})
    found: dict[str, Task] = {}
    for index, trial in enumerate(array["trials"]):
        task = of_job.get(index) or of_job.get(None)
        if task:
            found[trial] = task
    return found


def _tasks_by_trial(arrays: Iterable[SweepArray], tasks: Iterable[Task]) -> dict[str, Task | None]:
    """Return the row of each trial in the newest array that names it. arrays: oldest first."""
    rows = rows_by_job(tasks)
    found: dict[str, Task | None] = {}
    for array in arrays:
        found |= dict.fromkeys(array["trials"])
        found |= tasks_of(array, rows)
    return found


def _running_note(task: Task) -> str:
    notes = [f"on {task.node}" if task.node else ""]
    if task.state == "COMPLETING":
        notes.append(f"ends since {slurm.clock_time(task.end)}")
    if task.state in ("SUSPENDED", "STOPPED"):
        notes.append("suspended")
    return "; ".join(filter(None, notes))


def _with_user_name(state: str) -> str:
    """'CANCELLED by 1000' -> 'CANCELLED by alice'."""
    word, by, user = state.partition(" by ")
    try:
        return f"{word}{by}{pwd.getpwuid(int(user)).pw_name}"
    except (KeyError, ValueError):
        return state
