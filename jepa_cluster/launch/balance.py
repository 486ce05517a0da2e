"""One cap on GPUs in flight over all live arrays of a sweep, moved while they run.

In: a root, a sweep, what squeue says. Out: throttles and dependencies of its arrays, changed in Slurm where they are
not as they should be; what is lowered goes first, so the cap holds at every moment. Called whenever somebody touches
the sweep anyway: `submit`, `throttle`, `watch`, and the end of each attempt on its node.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch import queue, slurm
from jepa_cluster.launch.arrays import Load, share
from jepa_cluster.launch.slurm import Task
from jepa_cluster.trial.layout import Root, read_json, write_json

Record = Mapping[str, Any]


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
    """Deal the cap again over the live arrays -> array name: tasks at a time. {} where there is no cap or no array."""
    gpus = cap(root, sweep)
    records = queue.array_records(root, sweep)
    if gpus is None or not records:
        return {}
    with (root.sweep(sweep) / ".balance.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that deal at once could together exceed the cap
        tasks = slurm.squeue(r["name"] for r in records)
        found = live(root, sweep, tasks)
        shares = share([load for _, load in found], gpus)
        ordered = sorted(zip(found, shares, strict=True), key=lambda x: x[1] - x[0][0].get("parallel", 0))
        waits = {t.name: t.dependency for t in tasks if t.dependency not in ("", "(null)")}
        others = [r["job"] for (r, _), n in zip(found, shares, strict=True) if n]
        for (record, load), n in ordered:
            _set(root, record, n, waits.get(record["name"], "") if load.running < load.left else None, others)
    return {r["name"]: n for (r, _), n in zip(found, shares, strict=True)}


def quietly(root: Root, sweep: str) -> None:
    """As part of something else, which must not fail because Slurm is slow or its programs are not here."""
    try:
        balance(root, sweep)
    except (JepaError, OSError) as e:
        print(f"balance: {e}", file=sys.stderr, flush=True)


def _set(root: Root, record: Record, tasks: int, waits: str | None, others: list[str]) -> None:
    """Make an array's throttle `tasks`; 0 puts what waits of it behind the others, for Slurm's 0 means no limit.

    waits: the dependencies of what is still pending; None when nothing is.
    """
    job = record["job"]
    if tasks and len(record["trials"]) > 1 and record.get("parallel") != tasks:
        try:
            slurm.call("scontrol", "update", f"JobId={job}", f"ArrayTaskThrottle={tasks}")
        except LaunchError as e:
            if "already finished" not in e.what:  # said of its ended tasks; the others have taken it
                raise
        write_json(root.sweep(record["sweep"]) / "arrays" / f"{record['name']}.json", {**record, "parallel": tasks})
    if waits is not None and bool(tasks) == ("afterany" in waits):
        wanted = [f"afterok:{record['after']}"] if "afterok" in waits else []
        wanted += [] if tasks or not others else [f"afterany:{':'.join(others)}"]
        slurm.call("scontrol", "update", f"JobId={job}", f"Dependency={','.join(wanted)}")
