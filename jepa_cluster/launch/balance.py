"""What waits for what in a live sweep: one cap on GPUs in flight over all its arrays, and branches behind trunks.

In: a root, a sweep, what squeue says. Out: throttles and dependencies of its arrays, changed in Slurm where they are
not as they should be; what is lowered goes first, so the cap holds at every moment. Called whenever somebody touches
the sweep anyway: `submit`, `throttle`, `watch`, the end of each attempt on its node, and there too when a trunk has
saved a step from which branches begin (Slurm itself can only wait for the end of a job).
"""

from __future__ import annotations

import fcntl
import re
import sys
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch import queue, slurm
from jepa_cluster.launch.arrays import Load, share
from jepa_cluster.launch.slurm import Task
from jepa_cluster.trial.layout import Root, TrialDir, read_json, write_json

Record = Mapping[str, Any]
LOOK = 5.0  # s between looks for a trunk's new checkpoints


def cap(root: Root, sweep: str) -> int | None:
    """What `jepa throttle` said last, else the limit of the sweep's file."""
    plan = read_json(root.sweep(sweep) / "plan.json") or {}
    return said(root, sweep) or plan.get("limits", {}).get("gpus_in_flight")


def said(root: Root, sweep: str) -> int | None:
    return (read_json(root.sweep(sweep) / "throttle.json") or {}).get("gpus_in_flight")


def say(root: Root, sweep: str, gpus: int) -> None:
    write_json(root.sweep(sweep) / "throttle.json", {"gpus_in_flight": gpus})


def live(root: Root, sweep: str, tasks: Iterable[Task]) -> list[tuple[Record, Load]]:
    """Arrays of this sweep that Slurm still holds, in the order of their submission."""
    left: dict[str, int] = {}
    running: dict[str, int] = {}
    for task in tasks:
        state = queue.state_of(task)
        left[task.name] = left.get(task.name, 0) + (state is not None)
        running[task.name] = running.get(task.name, 0) + (state == "running")
    return [
        (r, Load(r["nodes"] * r["procs_per_node"], left[r["name"]], running[r["name"]]))
        for r in queue.array_records(root, sweep)
        if left.get(r["name"])
    ]


def balance(root: Root, sweep: str) -> dict[str, int]:
    """Deal the cap again over the live arrays, and let go the branches whose trunk has saved the step they begin from
    -> array name: tasks at a time. {} where there is neither a cap nor a branch, or no array."""
    plan = read_json(root.sweep(sweep) / "plan.json") or {}
    gpus, branches = cap(root, sweep), [t for t in plan.get("trials", ()) if t.get("trunk")]
    records = queue.array_records(root, sweep)
    if (gpus is None and not branches) or not records:
        return {}
    with (root.sweep(sweep) / ".balance.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that deal at once could together exceed the cap
        tasks = slurm.squeue(r["name"] for r in records)
        waiting = {t["name"] for t in branches if awaits(root, t)}
        pending: dict[str, list[Task]] = {}
        for task in tasks:
            if queue.state_of(task) in ("queued", "cooling"):
                pending.setdefault(task.name, []).append(task)
        found = [(r, _without(load, r, pending.get(r["name"], ()), waiting)) for r, load in live(root, sweep, tasks)]
        shares = share([load for _, load in found], gpus)
        ordered = sorted(zip(found, shares, strict=True), key=lambda x: x[1] - x[0][0].get("parallel", 0))
        others = {r["job"] for (r, _), n in zip(found, shares, strict=True) if n}
        for (record, _), n in ordered:
            if gpus is not None:
                _throttle(root, record, n)
            _depend(record, pending.get(record["name"], ()), waiting, set() if n else others)
    return {r["name"]: n for (r, _), n in zip(found, shares, strict=True)}


def _without(load: Load, record: Record, pending: Iterable[Task], waiting: Container[str]) -> Load:
    """What an array could run now: branches that wait for their trunk take nothing of the cap."""
    held = sum(record["trials"][t.index or 0] in waiting for t in pending)
    return replace(load, left=load.left - held)


def awaits(root: Root, branch: Mapping[str, Any]) -> bool:
    """Whether a branch (a trial of plan.json) may still begin from its trunk, which has not saved that step yet."""
    trunk = root.trial(branch["trunk"])
    ended = trunk.done.exists() or trunk.failed.exists()
    return not ended and not trunk.checkpoint(branch["begins"]).exists()


def quietly(root: Root, sweep: str) -> bool:
    """As part of something else, which must not fail because Slurm is slow or its programs are not here -> success."""
    try:
        balance(root, sweep)
    except (JepaError, OSError) as e:
        print(f"balance: {e}", file=sys.stderr, flush=True)
        return False
    return True


def let_branches_go(trunk: TrialDir) -> None:
    """Beside a trunk's training, until the last step that branches begin from is saved: each lets its branches go."""
    steps = set(trunk.read_config().runtime.milestones)
    while steps:
        saved = {step for step in steps if trunk.checkpoint(step).exists()}
        if saved and all(quietly(trunk.root, sweep) for sweep in _with_branches_of(trunk)):
            steps -= saved
        time.sleep(LOOK)


def _with_branches_of(trunk: TrialDir) -> list[str]:
    plans = {sweep: read_json(trunk.root.sweep(sweep) / "plan.json") or {} for sweep in trunk.root.sweeps()}
    return [s for s, plan in plans.items() if any(t.get("trunk") == trunk.name for t in plan.get("trials", ()))]


def _throttle(root: Root, record: Record, tasks: int) -> None:
    if tasks and len(record["trials"]) > 1 and record.get("parallel") != tasks:
        try:
            slurm.call("scontrol", "update", f"JobId={record['job']}", f"ArrayTaskThrottle={tasks}")
        except LaunchError as e:
            if "already finished" not in e.what:  # said of its ended tasks; the others have taken it
                raise
        write_json(root.sweep(record["sweep"]) / "arrays" / f"{record['name']}.json", {**record, "parallel": tasks})


def _depend(record: Record, pending: Iterable[Task], awaiting: Container[str], before: set[str]) -> None:
    """Make what is still pending of an array wait for what it should: its canary, the trunks of branches that await
    theirs, and `before`, jobs that leave no room under the cap (Slurm's throttle of 0 means no limit)."""
    trunks, changes = set(record.get("trunks", ())), dict[str, list[Task]]()
    for task in pending:
        now = set(re.findall(r"(after\w+):(\d+(?:_\d+)?)", task.dependency))
        after = {job for kind, job in now if kind == "afterany"}
        wanted = {(kind, job) for kind, job in now if kind != "afterany"}
        if record["trials"][task.index or 0] in awaiting:
            wanted |= {("afterany", job) for job in after & trunks}
        wanted |= {("afterany", job) for job in (before and after - trunks) or before}
        if wanted != now:
            text = ",".join(f"{kind}:{job}" for kind, job in sorted(wanted))
            changes.setdefault(text, []).append(task)
    for text, some in changes.items():
        whole = len(some) == len(record["trials"])
        these = record["job"] if whole else f"{record['job']}_[{','.join(str(t.index) for t in some)}]"
        slurm.call("scontrol", "update", f"JobId={these}", f"Dependency={text}")
