"""Keep the arrays of a sweep within one cap on GPUs, and its branches behind their trunks.

In: a root, a sweep, and what squeue shows. Out: throttles, holds and dependencies of the arrays in Slurm, changed where
they are not as they should be. Slurm takes a throttle of 0 for no limit, so an array for which the cap has no room
waits for the end of the others (`afterany`). A branch is held until its trunk has committed the step where the branch
begins, or has ended. The record of an array lists the trials that are held here, so a hold by the user is left alone.
Called by `submit`, `throttle` and `watch`, at the end of each attempt, and when a trunk has committed a checkpoint.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch.cluster.arrays import ArrayDemand, allocate_tasks
from jepa_cluster.launch.scheduler import facts, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.records import SweepArray
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json

LOCK_SECONDS = 60.0
Record = SweepArray
Words = tuple[str, ...]  # of scontrol


@dataclass(frozen=True)
class LiveArray:
    """An array that Slurm still holds. tasks: by trial. waiting: trials that are held because of their trunk."""

    record: Record
    tasks: Mapping[str, Task]
    waiting: Collection[str] = ()

    @property
    def pending(self) -> list[str]:
        return [trial for trial, task in self.tasks.items() if facts.state_of(task) != "running"]

    @property
    def due(self) -> list[str]:
        """Trials that are held and need not wait any longer."""
        return [trial for trial in self.record.get("held", ()) if trial in self.tasks and trial not in self.waiting]

    @property
    def load(self) -> ArrayDemand:
        """What the array could run now."""
        world = self.record["nodes"] * self.record["procs_per_node"]
        running = len(self.tasks) - len(self.pending)
        return ArrayDemand(world, len(self.tasks) - len(self.waiting), running)


def gpu_cap(root: Root, sweep: str) -> int | None:
    """The cap that `jepa throttle` stored, else the limit of the sweep's file."""
    plan = root.sweep(sweep).read_plan()
    return stored_cap(root, sweep) or (plan["limits"].get("gpus_in_flight") if plan else None)


def stored_cap(root: Root, sweep: str) -> int | None:
    return (read_json(root.sweep(sweep).throttle) or {}).get("gpus_in_flight")


def store_cap(root: Root, sweep: str, gpus: int) -> None:
    write_json(root.sweep(sweep).throttle, {"gpus_in_flight": gpus})


def live_arrays(root: Root, sweep: str, tasks: Iterable[Task]) -> list[LiveArray]:
    """Arrays of this sweep that Slurm still holds, in the order of their submission."""
    by_name: dict[str, list[Task]] = {}
    for task in tasks:
        if facts.state_of(task):
            by_name.setdefault(task.name, []).append(task)
    found: list[LiveArray] = []
    records = facts.array_records(root, sweep)
    ended = _ended_trunks(root, records)
    for record in records:
        live = {record["trials"][task.index or 0]: task for task in by_name.get(record["name"], ())}
        if live:
            pending = LiveArray(record, live).pending  # a branch that the user released runs
            held = [trial for trial in pending if facts.waits_for_trunk(root, record, trial)]
            waiting = [trial for trial in held if record.get("branches", {})[trial][0] not in ended]
            found.append(LiveArray(record, live, waiting))
    return found


def _ended_trunks(root: Root, records: Iterable[Record]) -> set[str]:
    """Trunks of held branches that no job works on any more, although they left neither DONE.json nor FAILED.json."""
    trunks: set[str] = set()
    for record in records:
        for trial in record.get("held", ()):
            if trial in record.get("branches", {}):
                trunks.add(record.get("branches", {})[trial][0])
    if not trunks:
        return set()
    states = facts.query_status(root, trunks).states
    return {trunk for trunk in trunks if states[trunk] in ("interrupted", "stopped", "failed", "done")}


def decide(arrays: Sequence[LiveArray], cap: int | None) -> list[tuple[LiveArray, int, list[Words]]]:
    """Each array with its tasks at a time (0: none before others have ended) and the scontrol commands it needs.

    Arrays that are lowered come before those that are raised, so the cap is never exceeded.
    """
    shares = [array.record["parallel"] or array.load.tasks for array in arrays]
    if cap is not None:
        shares = allocate_tasks([array.load for array in arrays], cap)
    ahead = [array.record["job"] for array, tasks in zip(arrays, shares, strict=True) if tasks]
    pairs = sorted(zip(arrays, shares, strict=True), key=lambda pair: pair[1] - pair[0].record["parallel"])
    return [(array, tasks, _commands(array, tasks, ahead)) for array, tasks in pairs]


def _commands(array: LiveArray, parallel: int, ahead: Sequence[str]) -> list[Words]:
    """ahead: jobs whose end the array waits for when the cap has no room for it."""
    record, found = array.record, list[Words]()
    if parallel not in (0, record["parallel"]) and len(record["trials"]) > 1:
        found.append(("update", f"JobId={record['job']}", f"ArrayTaskThrottle={parallel}"))
    before = [] if parallel or not ahead else [f"afterany:{':'.join(ahead)}"]
    changes: dict[str, list[str]] = {}
    for trial in array.pending:
        current = array.tasks[trial].dependency
        if trial not in array.waiting and ("afterany:" in current) != bool(before):
            canary = re.findall(r"afterok:\d+", current)
            changes.setdefault(",".join(canary + before), []).append(trial)
    for dependency, trials in changes.items():
        found.append(("update", f"JobId={_ids(record, trials)}", f"Dependency={dependency}"))
    if array.due:
        found.append(("release", _ids(record, array.due)))
    return found


def rebalance(root: Root, sweep: str) -> dict[str, int]:
    """Apply the cap and release the branches that need not wait any longer -> array name: tasks at a time.

    {} where there is neither a cap nor a held branch, or no live array.
    """
    cap, records = gpu_cap(root, sweep), facts.array_records(root, sweep)
    if not records or (cap is None and not any(record.get("held") for record in records)):
        return {}
    # two at once could together exceed the cap
    with file_lock.acquire(root.sweep(sweep).throttle_lock, LOCK_SECONDS):
        tasks = slurm.squeue(record["name"] for record in records)
        decided = decide(live_arrays(root, sweep, tasks), cap)
        for array, parallel, commands in decided:
            for words in commands:
                _scontrol(*words)
            held = [trial for trial in array.record.get("held", ()) if trial not in array.due]
            changed = {**array.record, "parallel": parallel, "held": held}
            if changed != array.record:
                write_json(root.sweep(sweep).array(array.record["name"]), changed)
    return {array.record["name"]: parallel for array, parallel, _ in decided}


def try_rebalance(root: Root, sweep: str) -> bool:
    """Rebalance as a part of something that must not fail because Slurm does not answer -> success."""
    try:
        rebalance(root, sweep)
    except (JepaError, OSError) as e:
        print(f"balance: {e}", file=sys.stderr, flush=True)
        return False
    return True


def release_branches(trunk: TrialDir) -> None:
    """Release the branches of a trunk that need not wait any longer, in every sweep. Errors are printed at most."""
    due: set[str] = set()
    with contextlib.suppress(JepaError, OSError):
        for record in facts.array_records(trunk.root):
            held = [t for t in record.get("held", ()) if record.get("branches", {}).get(t, [""])[0] == trunk.name]
            if not all(facts.waits_for_trunk(trunk.root, record, trial) for trial in held):
                due.add(record["sweep"])
    for sweep in sorted(due):
        try_rebalance(trunk.root, sweep)


def _scontrol(*words: str) -> None:
    try:
        slurm.run_program("scontrol", *words)
    except LaunchError as e:
        if "already finished" not in e.what:  # Slurm says so of tasks that have ended, and has changed the others
            raise


def _ids(record: Record, trials: Sequence[str]) -> str:
    """Tasks of an array as scontrol takes them: '7_[0,2]'; '7' for a job that is no array."""
    if len(record["trials"]) == 1:
        return str(record["job"])
    indices = sorted(record["trials"].index(trial) for trial in trials)
    return f"{record['job']}_[{','.join(map(str, indices))}]"
