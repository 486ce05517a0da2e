"""Exclude a failing node at a requeue, and the nodes with the worst record at submit.

`exclude_failed_node` runs inside the job, after Slurm has requeued it, and updates the ExcNodeList
of that job alone. A chained job gets the list of `plan`. The result is recorded once Slurm has
accepted or refused the list. If Slurm refuses it, the trial runs again without. For `submit`,
`bad_nodes_to_exclude` returns what it passes to --exclude besides the profile's list.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jepa_cluster.errors import JepaError, LaunchError, NotInstalled, SchedulerDown, TrialError
from jepa_cluster.launch.scheduler import node_health, retry_policy, slurm
from jepa_cluster.launch.worker.slurm_rank import launch_of
from jepa_cluster.records import AttemptRecord
from jepa_cluster.trial import failures
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.provenance import node_name

if TYPE_CHECKING:
    from jepa_cluster.launch.cluster.profile import Profile

TOO_FEW_NODES = "too few nodes would be left"
# One in so many of a partition's usable nodes may be excluded for a trial, and one always may.
MAX_SHARE = 4
# Seconds in which Slurm must have accepted the list, because it is about to kill this process.
UPDATE_TIMEOUT = 5.0
# An attempt with one of these keys needs no exclusion any more.
RECORDED = ("excluded", "exclude_refused", "forgiven")


def suspect_nodes(attempts: Sequence[AttemptRecord]) -> list[str]:
    """Return the node that is to blame for the end of the newest attempt.

    Returns [] for most ends, where the node is one of several, and once an exclusion was tried for
    this attempt.
    """
    last = attempts[-1] if attempts else {}
    if "ended" not in last or any(key in last for key in RECORDED):
        return []
    if not failures.classify_attempt(last).rule.exclude_node:
        return []
    nodes = node_health.accused_node(last)
    return nodes if len(nodes) == 1 else []


def excludable(
    nodes: Iterable[str],
    *,
    excluded: Collection[str],
    usable: Collection[str],
    nodes_needed: int,
    excluded_by_us: int = 0,
) -> list[str]:
    """Return those of `nodes` that may be excluded too.

    Never more than a share of the usable nodes, and never so many that the trial could not run.

    excluded: nodes that are excluded already. nodes_needed: of the trial. excluded_by_us: for this
    trial, earlier.
    """
    limit = max(1, len(usable) // MAX_SHARE) - excluded_by_us
    remaining = set(usable) - set(excluded)
    chosen: list[str] = []
    for node in nodes:
        if node in excluded:
            continue
        remaining.discard(node)
        if len(chosen) >= limit or len(remaining) < nodes_needed:
            break
        chosen.append(node)
    return chosen


class Exclusion(NamedTuple):
    """What a job that runs next excludes. nodes: all of them, [] if no node is added.

    record: `excluded` with the added nodes, or `exclude_refused` with the reason, or nothing.
    """

    nodes: list[str]
    record: dict[str, Any]


def plan(
    trial: TrialDir,
    job: str,
    launch: str,
) -> Exclusion:
    """Return how to exclude the node that failed the start or the newest attempt.

    job: the trial's own job; launch: of this start of it. An error is printed.
    """
    try:
        nodes = _failed_nodes(trial, launch)
        if not nodes:
            return Exclusion([], {})
        try:
            added, excluded = _extended_list(trial, job, nodes)
        except JepaError as e:
            return Exclusion([], {"exclude_refused": f"{nodes[0]}: {e.what}"})
    except (JepaError, OSError) as e:
        _print(e)
        return Exclusion([], {})
    return Exclusion(excluded, {"excluded": added})


def save(
    trial: TrialDir,
    launch: str,
    record: Mapping[str, Any],
) -> None:
    """Record the result of an exclusion in the start or the newest attempt. An error is printed."""
    try:
        if record and trial.read_start(launch):
            trial.amend_start(launch, record)
        elif record and trial.newest_attempt():
            trial.amend(trial.newest_attempt(), record)
    except (JepaError, OSError) as e:
        _print(e)


def exclude_failed_node(
    trial: TrialDir,
    job: str,
    launch: str = "",
) -> list[str]:
    """Exclude the node that failed, once Slurm has requeued the job, and record the result.

    Repeats it for some seconds while Slurm refuses, as because the job is not pending. Returns all
    nodes that the job excludes; [] if no node was added.
    """
    deadline = time.monotonic() + UPDATE_TIMEOUT
    while True:
        nodes, record = plan(trial, job, launch)
        if nodes:
            try:
                slurm.exclude(job, nodes)
            except JepaError as e:
                nodes, record = [], {"exclude_refused": f"{record['excluded'][0]}: {e.what}"}
        is_final = nodes or not record or TOO_FEW_NODES in record["exclude_refused"]
        if is_final or time.monotonic() > deadline:
            save(trial, launch, record)
            return nodes
        time.sleep(0.5)


def fail_start(
    trial: TrialDir,
    job: str,
    env: Mapping[str, str],
) -> bool:
    """Fail the trial if its start may be repeated only without this node, and that cannot be.

    Returns whether it has failed; False where files cannot be read. Raises SchedulerDown while
    Slurm does not answer.
    """
    launch = launch_of(env)
    with contextlib.suppress(TrialError, OSError):
        start = trial.read_start(launch)
        nodes = _failed_nodes(trial, launch) if start else []
        exhausted = retry_policy.exhausted_starts(trial, env) if nodes else ""
        if not exhausted:
            return False
        try:
            _extended_list(trial, job, nodes)
        except LaunchError as e:
            if isinstance(e, SchedulerDown) and not isinstance(e, NotInstalled):
                raise
            save(trial, launch, {"exclude_refused": f"{nodes[0]}: {e.what}"})
            retry_policy.fail_start(trial, start, exhausted)
            return True
    return False


def bad_nodes_to_exclude(bad: Sequence[str], profile: Profile, nodes_needed: int) -> list[str]:
    """Return those of the bad nodes that may be excluded besides the profile's."""
    if not bad:
        return []
    usable = slurm.usable_nodes(profile.partition or "")
    excluded = node_health.expand_node_list(profile.exclude or "")
    return excludable(bad, excluded=excluded, usable=usable, nodes_needed=nodes_needed)


def _extended_list(
    trial: TrialDir, job: str, nodes: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the nodes to add to the job's list, and the list with them.

    Raises LaunchError, SchedulerDown.
    """
    by_us: set[str] = set()
    for record in trial.attempts_and_bad_starts():
        by_us.update(record.get("excluded", ()))
    placement = slurm.placement(job)
    before = node_health.expand_node_list(placement.excluded)
    added = excludable(
        nodes,
        excluded=before,
        usable=slurm.usable_nodes(placement.partition),
        nodes_needed=placement.nodes,
        excluded_by_us=len(by_us.difference(nodes)),
    )
    if not added:
        raise LaunchError(TOO_FEW_NODES)
    return added, [*before, *added]


def _failed_nodes(trial: TrialDir, launch: str) -> list[str]:
    """Return the node to exclude, [] without one. Raises TrialError, OSError."""
    start = trial.read_start(launch)
    if start:
        is_due = start.get("cause") == "node" and start.keys().isdisjoint(RECORDED)
        return [start["node"]] if is_due else []
    if not os.access(trial.path, os.W_OK):  # this node could not record its start
        return [node_name()]
    return suspect_nodes(trial.attempts())


def _print(error: Exception) -> None:
    print(f"node_exclusion: {error}", file=sys.stderr, flush=True)
