"""Keep the arrays of a sweep within one cap on GPUs, and its branches behind their trunks.

In: a root, a sweep, and what squeue shows. Out: throttles, holds and dependencies of the arrays in
Slurm, changed where they are not as they should be. A throttle of 0 means no limit to Slurm, so an
array for which the cap has no room waits for the end of the others (`afterany`). A branch is held
until its trunk has committed the step where the branch begins, or has ended. The record of an array
lists the trials that are held here, so a hold by the user is left alone. Called by `submit`,
`throttle` and `watch`, at the end of each attempt, and when a trunk has committed a checkpoint.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch.cluster.arrays import ArrayDemand, allocate_tasks
from jepa_cluster.launch.scheduler import array_records, facts, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.records import ArrayRecord
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.status import ENDED

LOCK_SECONDS = 60.0
Arguments = tuple[str, ...]  # of scontrol


@dataclass(frozen=True)
class LiveArray:
    """An array that Slurm still holds.

    tasks: by trial. waiting: trials that are held until their trunk commits a step.
    """

    record: ArrayRecord
    tasks: Mapping[str, Task]
    waiting: Collection[str] = ()

    @property
    def job(self) -> str:
        return self.record["job"]

    @property
    def pending(self) -> list[str]:
        return [name for name, task in self.tasks.items() if facts.state_of(task) != "running"]

    @property
    def releasable(self) -> list[str]:
        """Trials that are held and need not wait any longer."""
        held = self.record.get("held", [])
        return [name for name in held if name in self.tasks and name not in self.waiting]

    @property
    def demand(self) -> ArrayDemand:
        """What the array could run now."""
        world = self.record["nodes"] * self.record["procs_per_node"]
        running = len(self.tasks) - len(self.pending)
        return ArrayDemand(world, len(self.tasks) - len(self.waiting), running)

    def task_ids(self, trials: Iterable[str]) -> str:
        """Return tasks as scontrol takes them: '7_[0,2]', or '7' for a job that is no array."""
        all_trials = self.record["trials"]
        if len(all_trials) == 1:
            return self.job
        indices = sorted(map(all_trials.index, trials))
        return f"{self.job}_[{','.join(map(str, indices))}]"


def gpu_cap(root: Root, sweep: str) -> int | None:
    """Return the cap that `jepa throttle` stored, else the limit of the sweep."""
    plan = root.sweep(sweep).read_plan()
    limits = plan["limits"] if plan else {}
    return stored_cap(root, sweep) or limits.get("gpus_in_flight")


def stored_cap(root: Root, sweep: str) -> int | None:
    return (read_json(root.sweep(sweep).throttle) or {}).get("gpus_in_flight")


def store_cap(root: Root, sweep: str, gpus: int) -> None:
    write_json(root.sweep(sweep).throttle, {"gpus_in_flight": gpus})


def live_arrays(root: Root, sweep: str, tasks: Sequence[Task]) -> list[LiveArray]:
    """Return the arrays of a sweep that Slurm still holds, in the order of their submission."""
    records = array_records.read(root, sweep)
    ended = _ended_trunks(root, records)
    rows = facts.rows_by_job(tasks)
    arrays: list[LiveArray] = []
    for record in records:
        live: dict[str, Task] = {}
        waiting: list[str] = []
        for trial, task in facts.tasks_of(record, rows).items():
            state = facts.state_of(task)
            if not state:
                continue
            live[trial] = task
            # A branch that the user released may run.
            if state != "running" and _waits_for_trunk(root, record, trial):
                trunk, _ = record.get("branches", {})[trial]
                if trunk not in ended:
                    waiting.append(trial)
        if live:
            arrays.append(LiveArray(record, live, waiting))
    return arrays


def _waits_for_trunk(root: Root, record: ArrayRecord, trial: str) -> bool:
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


def _ended_trunks(root: Root, records: Iterable[ArrayRecord]) -> set[str]:
    """Return the trunks of held branches that no job runs any more, with or without a marker."""
    trunks: set[str] = set()
    for record in records:
        branches = record.get("branches", {})
        for trial in branches.keys() & record.get("held", []):
            trunks.add(branches[trial][0])
    if not trunks:
        return trunks
    states = facts.query_status(root, trunks).states
    return {trunk for trunk in trunks if states[trunk] in ENDED}


def decide(
    arrays: Sequence[LiveArray], cap: int | None
) -> list[tuple[LiveArray, int, list[Arguments]]]:
    """Return each array with its tasks at a time and the scontrol commands that it needs.

    0 tasks at a time means none before others have ended. Arrays that are lowered come before those
    that are raised, so the cap is never exceeded.
    """
    if cap is None:
        shares = [array.record["parallel"] or array.demand.tasks for array in arrays]
    else:
        shares = allocate_tasks([array.demand for array in arrays], cap)
    pairs = list(zip(arrays, shares, strict=True))
    jobs = [array.job for array, parallel in pairs if parallel]
    pairs.sort(key=lambda pair: pair[1] - pair[0].record["parallel"])
    return [(array, parallel, _commands(array, parallel, jobs)) for array, parallel in pairs]


def _commands(array: LiveArray, parallel: int, jobs: Sequence[str]) -> list[Arguments]:
    """Return the scontrol commands for an array.

    jobs: those that the array waits for if the cap has no room for it.
    """
    record = array.record
    commands: list[Arguments] = []
    if parallel not in (0, record["parallel"]) and len(record["trials"]) > 1:
        commands.append(("update", f"JobId={array.job}", f"ArrayTaskThrottle={parallel}"))
    throttled = not parallel and bool(jobs)
    changes: dict[str, list[str]] = {}
    for trial in array.pending:
        current = array.tasks[trial].dependency
        if trial not in array.waiting and ("afterany:" in current) != throttled:
            conditions = re.findall(r"afterok:\d+", current)
            if throttled:
                conditions.append(f"afterany:{':'.join(jobs)}")
            changes.setdefault(",".join(conditions), []).append(trial)
    for dependency, trials in changes.items():
        job = f"JobId={array.task_ids(trials)}"
        commands.append(("update", job, f"Dependency={dependency}"))
    if array.releasable:
        commands.append(("release", array.task_ids(array.releasable)))
    return commands


def rebalance(root: Root, sweep: str) -> dict[str, int]:
    """Apply the cap, release the branches that need not wait, and return array -> tasks at a time.

    Returns {} without a live array, and for a sweep that has neither a cap nor a held branch.
    Raises LaunchError, SchedulerDown, filelock.Timeout.
    """
    cap = gpu_cap(root, sweep)
    records = array_records.read(root, sweep)
    if not records or (cap is None and not any(record.get("held") for record in records)):
        return {}
    # Two processes that rebalance at the same time could together exceed the cap.
    with file_lock.acquire(root.sweep(sweep).throttle_lock, LOCK_SECONDS):
        tasks = slurm.squeue(record["name"] for record in records)
        parallel_tasks: dict[str, int] = {}
        for array, parallel, commands in decide(live_arrays(root, sweep, tasks), cap):
            for arguments in commands:
                _scontrol(*arguments)
            record = array.record
            releasable = array.releasable
            held = [trial for trial in record.get("held", []) if trial not in releasable]
            changed: ArrayRecord = {**record, "parallel": parallel, "held": held}
            if changed != record:
                write_json(root.sweep(sweep).array(record["name"]), changed)
            parallel_tasks[record["name"]] = parallel
    return parallel_tasks


def try_rebalance(root: Root, sweep: str) -> bool:
    """Rebalance, and print an error instead of raising it. Returns False after an error."""
    try:
        rebalance(root, sweep)
    except (JepaError, OSError) as e:
        print(f"gpu_throttle: {e}", file=sys.stderr, flush=True)
        return False
    return True


def release_branches(trunk: TrialDir) -> None:
    """Release the branches of a trunk that need not wait any longer, in every sweep.

    Raises no error of Slurm or of the filesystem.
    """
    sweeps: set[str] = set()
    with contextlib.suppress(JepaError, OSError):
        for record in array_records.read(trunk.root):
            for trial in record.get("held", ()):
                name, _ = record.get("branches", {}).get(trial, ("", 0))
                if name != trunk.name or _waits_for_trunk(trunk.root, record, trial):
                    continue
                sweeps.add(record["sweep"])
    for sweep in sorted(sweeps):
        try_rebalance(trunk.root, sweep)


def _scontrol(*arguments: str) -> None:
    try:
        slurm.run_program("scontrol", *arguments)
    except LaunchError as e:
        # Slurm says so of tasks that have ended, and has changed the others.
        if "already finished" not in e.what:
            raise
