"""Exclude a failing node at a requeue, and the nodes with the worst record at submit.

`exclude_failed_node` runs inside the job. It updates the ExcNodeList of that job alone, or returns
the list for a chained job. If Slurm rejects it, the reason is recorded in the attempt and the trial
is requeued without it. `bad_nodes_to_exclude` returns what `submit` passes to --exclude besides the
profile's list.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch.scheduler import node_health, slurm
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


def plan_exclusion(trial: TrialDir, env: Mapping[str, str], nodes: Sequence[str]) -> dict[str, Any]:
    """Return what the record says of the exclusion of `nodes`: `excluded`, or `exclude_refused`.

    Changes nothing: Slurm takes the list only of a job that waits.
    """
    try:
        return {"excluded": _extended_list(trial, slurm.own_job(env), nodes)[0]}
    except (JepaError, OSError) as e:
        return {"exclude_refused": f"{nodes[0]}: {str(e).splitlines()[0]}"}


def exclude_failed_node(
    trial: TrialDir, job: str, launch: str = "", chained: bool = False
) -> list[str]:
    """Exclude the node that failed the start or the newest attempt, and record the result there.

    job: the trial's own job, which Slurm has just requeued; launch: of this start of it. chained: a
    chained job replaces the job, so it is not updated. Returns all nodes that the job that runs
    next excludes; [] if no node was added.
    """
    excluded: list[str] = []
    try:
        attempts = trial.attempts()
        starts = [start for start in trial.ended_starts() if start.get("launch") == launch]
        nodes = suspect_nodes(attempts)
        if starts:
            nodes = starts[0].get("excluded", [])
        elif not os.access(trial.path, os.W_OK):  # this node could not record its start
            nodes = [node_name()]
        if not nodes:
            return []
        try:
            added, excluded = _extended_list(trial, job, nodes)
            if not chained:
                _update_job(job, excluded)
            record: dict[str, Any] = {"excluded": added}
        except JepaError as e:
            record = {"exclude_refused": f"{nodes[0]}: {e.what}"}
            excluded = []
        if starts:  # it was planned to exclude the node
            trial.amend_start(launch, {"excluded": [], **record})
        elif attempts:
            trial.amend(attempts[-1]["attempt"], record)
    except (JepaError, OSError) as e:
        print(f"node_exclusion: {e}", file=sys.stderr, flush=True)
    return excluded


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


def _update_job(job: str, excluded: Iterable[str]) -> None:
    """Set the job's ExcNodeList. Repeats it while Slurm refuses because the job is not pending."""
    deadline = time.monotonic() + UPDATE_TIMEOUT
    while True:
        try:
            slurm.exclude(job, excluded)
            return
        except JepaError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
