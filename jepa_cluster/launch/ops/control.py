"""Act on trials of a submitted sweep: requeue, cancel, retry, throttle.

In: a root and rows of the status document. Each function works on the local queue and on Slurm,
because a sweep may have been moved from one to the other.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Container, Iterable, Sequence
from operator import itemgetter

from jepa_cluster.errors import LaunchError, plural
from jepa_cluster.launch.scheduler import local, retry_policy, slurm
from jepa_cluster.launch.submit import documents
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.sweep.select_trials import Row
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import user_name, write_atomic
from jepa_cluster.trial.status import ENDED, IN_PROGRESS, NOT_OVER, STARTABLE

# States of the trials on which each verb acts. "held" is no state: a trial whose canary has ended
# without success.
ACTIONABLE = {
    "requeue": ("running",),
    "cancel": NOT_OVER,
    "resume": ("stopped", *STARTABLE),
    "retry": ("failed", "held"),
}


def actionable(verb: str, rows: Sequence[Row], canaries: Iterable[Row]) -> list[Row]:
    """Return the rows on which a verb acts. Raises LaunchError when there is none."""
    states = ACTIONABLE[verb]
    unsuccessful = _column(_in_states(canaries, ENDED), "name")
    found: list[Row] = []
    for row in rows:
        is_held = verb == "retry" and row["canary"] in unsuccessful
        has_job = verb == "cancel" and row["state"] == "stopped" and row["job"]
        if row["state"] in states or is_held or has_job:
            found.append(row)
    if not found:
        present = sorted(set(_column(rows, "state")))
        what = f"none of these trials is {' or '.join(states)}: they are {', '.join(present)}"
        raise LaunchError(what, hint="jepa status")
    return found


def requeue(root: Root, rows: Sequence[Row]) -> list[str]:
    """Ask running trials to save and return to the queue. Returns the names of those reached."""
    reached = local.signal_trials(root, _column(rows, "name"), signal.SIGUSR2)
    queued = list(filter(itemgetter("job"), rows))
    slurm.signal(_column(queued, "job"), "USR2")
    return [*reached, *_column(queued, "name")]


def cancel(root: Root, sweep: str, rows: Sequence[Row], now: bool) -> None:
    """Stop trials until `jepa resume`. now: kill the processes without waiting for a checkpoint."""
    for row in rows:
        trial = root.trial(row["name"])
        if trial.path.exists():
            write_atomic(trial.stop, stop_text())
    local.dequeue(root, _column(rows, "name"))
    states = [*IN_PROGRESS, "unknown", "stopped"]
    if not now:
        states.remove("running")
    slurm.signal(_column(_in_states(rows, states), "job"))
    _stop_idle_canaries(root, sweep)
    if now:
        local.signal_trials(root, _column(rows, "name"), signal.SIGKILL)


def stop_text() -> str:
    return f"stopped by {user_name(os.getuid())} (jepa cancel)\n"


def _stop_idle_canaries(root: Root, sweep: str) -> None:
    """Stop canaries for which no trial waits any more."""
    document = documents.status_document(root, sweep)
    awaited = _column(document["trials"], "canary")
    for canary in _in_states(document["canaries"], IN_PROGRESS):
        if canary["name"] not in awaited:
            write_atomic(root.trial(canary["name"]).stop, stop_text())
            local.dequeue(root, [canary["name"]])
            slurm.signal(_column([canary], "job"))


def forgive(root: Root, rows: Sequence[Row]) -> bool:
    """Remove failures, and take held trials from the queue. Returns whether some were held."""
    held = [row for row in rows if row["state"] != "failed"]
    local.dequeue(root, _column(held, "name"))
    slurm.signal(_column(held, "job"))
    for name in _column(rows, "name"):
        retry_policy.forgive_failure(root.trial(name))
    return bool(held)


def throttle(root: Root, sweep: str, gpus: int) -> dict[str, int]:
    """Store and apply a cap on GPUs in flight. Returns array name -> tasks at a time."""
    rows = documents.status_document(root, sweep)["trials"]
    largest = max([1, *map(itemgetter("world"), _in_states(rows, NOT_OVER))])
    if gpus < largest:
        what = f"a trial of {sweep} takes {plural(largest, 'GPU')}: never in {gpus}"
        raise LaunchError(what, hint="jepa cancel")
    gpu_throttle.store_cap(root, sweep, gpus)
    tasks = gpu_throttle.rebalance(root, sweep)
    if not tasks:
        raise LaunchError(
            f"{sweep} has no live array", hint="the local queue's cap is `slots` in its profile"
        )
    return tasks


def _in_states(rows: Iterable[Row], states: Container[str]) -> list[Row]:
    return [row for row in rows if row["state"] in states]


def _column(rows: Iterable[Row], name: str) -> list[str]:
    """Return the values of a column that are not empty."""
    return list(filter(None, map(itemgetter(name), rows)))
