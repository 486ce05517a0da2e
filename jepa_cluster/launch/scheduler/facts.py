"""Gather the facts from which `trial/status.py` decides the state of trials.

In: a root and names of trials. Out: a `StatusSnapshot`. It asks the files, the local queue, squeue
once for all trials, and sacct once for those that left the queue. Nothing is stored. When squeue
does not answer, the trials that Slurm may hold are `unknown`, and the snapshot names the problem.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import job_output, local, retry_policy, slurm
from jepa_cluster.launch.scheduler.local import QueuedTrial
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.records import ArrayIntent, ArrayRecord, SweepArray
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.status import SlurmFacts, State, TrialFacts, TrialStatus, status_from
from jepa_cluster.trial.usage import modified, process_seconds

HEARTBEAT_SECONDS = 180  # a younger heartbeat shows that a rank is alive

CANARY_NOTES: Mapping[State, str] = {
    "done": "its canary succeeded",
    "failed": "held: its canary failed, see jepa why",
    "stopped": "held: its canary was stopped, see jepa why",
    "interrupted": "held: its canary was lost, see jepa why",
}
RUNNING_STATES = (
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SIGNALING",
    "STAGE_OUT",
    "SUSPENDED",
    "STOPPED",
)
PENDING_STATES = (
    "PENDING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
    "REQUEUE_FED",
)
_PRECEDENCE: Sequence[State | None] = ("queued", "requeued", "running")


@dataclass(frozen=True)
class StatusSnapshot:
    """The states of trials and of their canaries at one moment.

    problem: why Slurm could not be asked, '' when it answered. tasks: pending and running ones.
    """

    trials: Mapping[str, TrialStatus]
    problem: str = ""
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
    arrays, queued = array_records(root), local.list_trials(root)
    wanted = dict.fromkeys(names)
    canaries = [queued[name].canary for name in wanted if name in queued]
    canaries += [array.get("canary", "") for array in _arrays_of(arrays, set(wanted))]
    facts: dict[str, TrialFacts] = {}
    undecided: set[str] = set()
    for name in wanted | dict.fromkeys(filter(None, canaries)):
        facts[name] = _file_facts(root.trial(name), queued.get(name))
        if status_from(facts[name]).state in ("new", "interrupted", "stopped"):
            undecided.add(name)

    arrays = _arrays_of(arrays, undecided)
    problem, tasks = "", list[Task]()
    try:
        tasks = slurm.squeue(array["name"] for array in arrays)
    except JepaError as e:
        problem = e.what
        by_slurm = dict.fromkeys(_newest_array(arrays), SlurmFacts(answers=False))
    else:
        by_slurm = _slurm_facts(root, undecided, arrays, tasks)
    for name in undecided & by_slurm.keys():
        trial, found = root.trial(name), by_slurm[name]
        if not found.state:  # it may have ended since its files were read
            facts[name] = _file_facts(trial, queued.get(name))
        alive = bool(problem) and time.time() - modified(trial.heartbeat) < HEARTBEAT_SECONDS
        facts[name] = replace(facts[name], slurm=found, heartbeat=alive)

    statuses = {name: status_from(known) for name, known in facts.items()}
    live = tuple(task for task in tasks if state_of(task))
    return StatusSnapshot(_with_canary_notes(statuses), problem, live)


def _arrays_of(arrays: Iterable[SweepArray], names: set[str]) -> list[SweepArray]:
    """Return the arrays that name at least one of these trials."""
    return [array for array in arrays if not names.isdisjoint(array["trials"])]


def _newest_array(arrays: Iterable[SweepArray]) -> dict[str, SweepArray]:
    """Return the last array of each trial. arrays: oldest first."""
    return {trial: array for array in arrays for trial in array["trials"]}


def _with_canary_notes(statuses: Mapping[str, TrialStatus]) -> dict[str, TrialStatus]:
    """Note at each trial that waits for a canary whether that canary can still succeed."""
    noted = dict(statuses)
    for name, status in statuses.items():
        if status.canary in statuses:
            state = statuses[status.canary].state
            noted[name] = replace(status, note=CANARY_NOTES.get(state, "waits for its canary"))
    return noted


# ---- files


def _file_facts(trial: TrialDir, queued: QueuedTrial | None) -> TrialFacts:
    error, stopped_by = "", ""
    done = trial.done.exists() or (trial.canary.exists() and trial.succeeded())
    failed = not done and trial.failed.exists()
    if failed:
        marker = read_json(trial.failed) or {}
        error = " ".join(str(marker.get("error", "")).split())[:100]
    with contextlib.suppress(FileNotFoundError):  # `jepa resume` removes STOP
        author = trial.stop.read_text().strip() or "stopped by the user"
        since = time.localtime(modified(trial.stop))
        stopped_by = f"{author}, {time.strftime('%d %b %H:%M', since)}"
    known = queued or QueuedTrial("")
    return TrialFacts(
        done=done,
        failed=failed,
        stopped=bool(stopped_by),
        error=error,
        stopped_by=stopped_by,
        attempts=trial.newest_attempt(),
        local=known.state,
        canary=known.canary,
    )


def array_records(root: Root, sweep: str = "*") -> list[SweepArray]:
    """Return the arrays that Slurm accepted, of all sweeps or of one, oldest first."""
    found: list[SweepArray] = []
    for path in (root.path / "sweeps").glob(f"{sweep}/arrays/*.json"):
        record = cast("ArrayRecord | None", read_json(path))
        if record:
            found.append({**record, "sweep": path.parents[1].name})
    return sorted(found, key=lambda record: record["submitted"])


def waits_for_trunk(root: Root, record: ArrayRecord, trial: str) -> bool:
    """Return whether a held trial still has to wait for its trunk.

    It waits until the trunk has committed the step where the branch begins, or has ended.
    record: of the array of the trial.
    """
    branches = record.get("branches", {})
    if trial not in record.get("held", ()) or trial not in branches:
        return False
    name, step = branches[trial]
    trunk = root.trial(name)
    ends = (trunk.checkpoint(step), trunk.done, trunk.failed, trunk.stop)
    return not any(path.exists() for path in ends)


# ---- Slurm


def state_of(task: Task) -> State | None:
    """Return 'queued', 'requeued' or 'running'; None for a task that has ended.

    squeue shows tasks that have ended for some minutes.
    """
    if task.state in RUNNING_STATES:
        return "running"
    if task.state in PENDING_STATES:
        return "requeued" if "BeginTime" in task.reason else "queued"
    return None


def _tasks_by_trial(
    arrays: Iterable[SweepArray], tasks: Iterable[Task]
) -> dict[str, list[tuple[SweepArray, Task]]]:
    by_name = {array["name"]: array for array in arrays}
    found: dict[str, list[tuple[SweepArray, Task]]] = {}
    for task in tasks:
        array, index = by_name.get(task.name), task.index or 0
        if array and index < len(array["trials"]):
            found.setdefault(array["trials"][index], []).append((array, task))
    return found


def _slurm_facts(
    root: Root, names: set[str], arrays: Sequence[SweepArray], tasks: Sequence[Task]
) -> dict[str, SlurmFacts]:
    """Return what squeue shows of these trials, and what accounting knows of the others.

    arrays: those that name the trials. tasks: from squeue.
    """
    found: dict[str, SlurmFacts] = {}
    live = [task for task in tasks if state_of(task)]
    for name, rows in _tasks_by_trial(arrays, live).items():
        array, task = max(rows, key=lambda row: _PRECEDENCE.index(state_of(row[1])))
        found[name] = _queue_facts(name, array, task)
    missing = names - found.keys()
    arrays = _arrays_of(arrays, missing)
    if not arrays:
        return found

    # Accounting has no row of a task that was cancelled while it waited, but squeue may have one.
    ended = slurm.sacct((array["name"] for array in arrays), before_submission(arrays)) or []
    ended_by_trial = _tasks_by_trial(arrays, [*ended, *tasks])
    newest = _newest_array(arrays)
    plans = {array["sweep"]: root.sweep(array["sweep"]).read_plan() for array in arrays}
    for name in missing & newest.keys():
        word, job = "", ""
        if name in ended_by_trial:
            rows = sorted(ended_by_trial[name], key=lambda row: row[0]["submitted"])
            word, job = rows[-1][1].state, rows[-1][1].id
        elif _cancelled_before_start(root, name, newest[name], live):
            word = "CANCELLED"
        plan, attempts = plans[newest[name]["sweep"]], root.trial(name).attempts()
        exhausted = ""
        tries = [*attempts, *job_output.lost_jobs(root, arrays, name, attempts)]
        if plan and tries:
            exhausted = retry_policy.exhausted_budget(tries, plan["retries"], word)
        found[name] = SlurmFacts(job=job, ended=word, exhausted=exhausted)
    return found


def _queue_facts(name: str, array: SweepArray, task: Task) -> SlurmFacts:
    state, reason, canary = state_of(task), "", ""
    if state == "running" and task.node:
        reason = f"on {task.node}"
    if state != "running":
        reason = slurm.explain_reason(task.reason)
    if name in array.get("held", ()) and "JobHeldUser" in task.reason:
        reason = "waits for its trunk"
    if task.reason.startswith("Dependency"):
        canary = array.get("canary", "")
    return SlurmFacts(state=state, reason=reason, job=task.id, canary=canary)


def _cancelled_before_start(root: Root, name: str, array: SweepArray, live: Iterable[Task]) -> bool:
    """Return whether a task left the queue before it ever ran.

    Slurm keeps no row of a task that was cancelled while its whole array waited. The task did not
    run when other tasks of the array are still there and it left neither an attempt nor a log.
    """
    if not any(task.name == array["name"] for task in live):
        return False
    for attempt in root.trial(name).attempts():
        if attempt.get("started", 0) >= array["submitted"]:
            return False
    task = f"{array['job']}_{array['trials'].index(name)}"
    return not any((root.sweep(array["sweep"]).jobs / task).glob("*_log.*"))


def before_submission(arrays: Iterable[ArrayIntent]) -> str:
    """Return a time before the first of these was submitted, as sacct takes it."""
    first = min(array["submitted"] for array in arrays) / 1000 - 60
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(first))


# ---- cost


def billed_seconds(root: Root, names: Iterable[str]) -> dict[str, float] | None:
    """Return process-seconds per trial or canary by `sacct -D`, whichever sweep submitted it.

    None without accounting. Attempts on this machine count by their own records.
    """
    wanted = set(names)
    arrays = _arrays_of(array_records(root), wanted)
    if not arrays:
        return None
    tasks = slurm.sacct((array["name"] for array in arrays), before_submission(arrays))
    if tasks is None:
        return None
    total: dict[str, float] = {}
    for name in wanted:
        trial = root.trial(name)
        total[name] = process_seconds(trial, trial.attempts(), kind="local")
    for name, rows in _tasks_by_trial(arrays, tasks).items():
        for array, task in rows:
            if name in total:
                total[name] += task.seconds * array["nodes"] * array["procs_per_node"]
    return total
