"""Exclude a failing node at a requeue, and the nodes with the worst record at submit.

`exclude` runs inside the job, after Slurm has requeued it: only then squeue shows all partitions of
the job. It updates the ExcNodeList of that job alone. A chained job gets the list of `plan`. The
result is recorded once Slurm has accepted or refused the list. If Slurm refuses it, the trial runs
again without. For `submit`, `bad_nodes_to_exclude` returns what it passes to --exclude besides the
profile's list.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

    record: `excluded` with the added node, or `exclude_refused` with the reason, or nothing.
    attempt: in whose record it belongs: 0 for this start; None where this node cannot write.
    """

    nodes: list[str]
    record: dict[str, Any]
    attempt: int | None = None

    def save(self, trial: TrialDir, launch: str) -> None:
        """Record the result, once it is known. An error is printed."""
        try:
            if self.attempt:
                trial.amend(self.attempt, self.record)
            elif self.attempt == 0:
                trial.amend_start(launch, self.record)
            elif self.record:
                _print(f"not recorded: {self.record}")
        except (JepaError, OSError) as e:
            _print(e)


def plan(
    trial: TrialDir,
    job: str,
    launch: str,
) -> Exclusion:
    """Return how a chained job excludes the node that failed the start or the newest attempt.

    job: the trial's own job; launch: of this start of it. An error is printed.
    """
    return _try_until(0.0, trial, job, launch, lambda nodes: None)


def exclude(
    trial: TrialDir,
    job: str,
    launch: str,
) -> list[str]:
    """Exclude the node that failed, once Slurm has requeued the job, and record the result.

    Repeats it for some seconds while Slurm refuses, as because the job is not pending. Returns all
    nodes that the job excludes; [] if no node was added.
    """
    end = time.monotonic() + UPDATE_TIMEOUT
    found = _try_until(end, trial, job, launch, functools.partial(slurm.exclude, job))
    found.save(trial, launch)
    return found.nodes


def _try_until(
    end: float,
    trial: TrialDir,
    job: str,
    launch: str,
    act: Callable[[list[str]], None],
) -> Exclusion:
    """Find the nodes to exclude, once, and call `act` with them until it raises nothing."""
    node, attempt = "", None
    try:
        node, attempt = _failed_node(trial, launch)
    except (JepaError, OSError) as e:
        _print(e)
    if not node:
        return Exclusion([], {})
    nodes: list[str] = []
    while True:
        try:
            nodes = nodes or _extended_list(trial, job, node)
            act(nodes)
            return Exclusion(nodes, {"excluded": [node]}, attempt)
        except (JepaError, OSError) as e:
            why = e.what if isinstance(e, JepaError) else str(e)
            if why == TOO_FEW_NODES or time.monotonic() > end:
                return Exclusion([], {"exclude_refused": f"{node}: {why}"}, attempt)
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
        node, attempt = _failed_node(trial, launch) if start else ("", None)
        exhausted = retry_policy.exhausted_starts(trial, env) if node else ""
        if not exhausted:
            return False
        try:
            _extended_list(trial, job, node)
        except LaunchError as e:
            if isinstance(e, SchedulerDown) and not isinstance(e, NotInstalled):
                raise
            Exclusion([], {"exclude_refused": f"{node}: {e.what}"}, attempt).save(trial, launch)
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


def _extended_list(trial: TrialDir, job: str, node: str) -> list[str]:
    """Return the nodes that the job excludes, with this one. Raises LaunchError, SchedulerDown."""
    by_us: set[str] = set()
    for record in trial.attempts_and_bad_starts():
        by_us.update(record.get("excluded", ()))
    placement = slurm.placement(job)
    before = node_health.expand_node_list(placement.excluded)
    added = excludable(
        [node],
        excluded=before,
        usable=slurm.usable_nodes(placement.partition),
        nodes_needed=placement.nodes,
        excluded_by_us=len(by_us.difference([node])),
    )
    if not added:
        raise LaunchError(TOO_FEW_NODES)
    return [*before, *added]


def _failed_node(trial: TrialDir, launch: str) -> tuple[str, int | None]:
    """Return the node to exclude, '' without one, and the attempt that it failed.

    As in `Exclusion`. Raises TrialError, OSError.
    """
    start = trial.read_start(launch)
    if start:
        is_due = start.get("cause") == "node" and start.keys().isdisjoint(RECORDED)
        return (start["node"] if is_due else ""), 0
    if not os.access(trial.path, os.W_OK):  # this node could not record its start
        return node_name(), None
    (node,) = suspect_nodes(trial.attempts()) or [""]
    return node, trial.newest_attempt()


def _print(text: object) -> None:
    print(f"node_exclusion: {text}", file=sys.stderr, flush=True)
