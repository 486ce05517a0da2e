"""Run one short trial per resource class, which must succeed before the class starts.

A canary is an ordinary trial directory below <root>/canaries. Its config is that of the most
expensive trial of its class, with a small `runtime.stop_after`. On Slurm the arrays of the class
depend on its job (`afterok`); the local runner releases them. What it measures is read from its
attempts, as for any trial.

    <root>/canaries/canary.<sweep>.<class>.<code>.<trial>/
        canary.json    a CanaryRequest: what the class costs by the estimate
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.scheduler import facts, retry_policy
from jepa_cluster.records import CanaryRequest
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.status import IN_PROGRESS

if TYPE_CHECKING:
    from jepa_cluster.launch.submit.plan import Plan

STEPS = 40
MAX_MINUTES = 60  # time limit of a canary's job, at most


def read_request(canary: TrialDir) -> CanaryRequest:
    return cast("CanaryRequest", read_json(canary.canary) or {})


def newest(root: Root, sweep: str) -> list[str]:
    """Return the name of the last submitted canary of each class."""
    by_class: dict[str, str] = {}
    submitted = sorted(root.canaries_of(sweep), key=lambda canary: read_request(canary)["t"])
    for canary in submitted:
        by_class[read_request(canary)["class"]] = canary.name
    return list(by_class.values())


def required(plan: Plan, code: str) -> dict[str, str]:
    """Return class -> name of its canary, for the classes that need one before they start.

    A class needs none if its canary has succeeded with this code. The canary of a class is its most
    expensive trial, because that one uses the most memory.
    """
    most_expensive: dict[str, str] = {}
    for trial in sorted(plan.actions.start, key=lambda name: -plan.estimates[name].hours):
        most_expensive.setdefault(plan.letter(trial), trial)
    needed: dict[str, str] = {}
    for letter, trial in most_expensive.items():
        name = f"canary.{plan.sweep.name}.{letter}.{code}.{trial}"
        if not plan.root.trial(name).succeeded():
            needed[letter] = name
    return needed


def in_progress(root: Root, canaries: Mapping[str, str]) -> dict[str, str]:
    """Return class -> job of its canary, for those that are queued or running.

    canaries: class -> name. The job is '' on this machine.
    """
    trials = facts.query_status(root, canaries.values()).trials
    jobs: dict[str, str] = {}
    for letter, name in canaries.items():
        status = trials[name]
        if status.state in IN_PROGRESS:
            jobs[letter] = status.job
    return jobs


def create(plan: Plan, letter: str, name: str) -> None:
    """Write the directory of a canary that is about to start. Earlier failures are forgiven."""
    canary = plan.root.trial(name)
    trial = plan.trials[name.split(".", 4)[4]]
    attempts = plan.root.trial(trial.name).attempts() + canary.attempts()
    config = retry_policy.halve_micro_batch(trial.config, attempts)
    runtime = replace(config.runtime, stop_after=STEPS, milestones=(), fork_from=None)
    canary.create(replace(config, runtime=runtime))
    canary.stop.unlink(missing_ok=True)
    retry_policy.forgive_failure(canary)

    cost = 0.0
    for other in plan.actions.start:
        if plan.letter(other) == letter:
            cost += plan.remaining(other)
    request: CanaryRequest = {
        "class": letter,
        "about": trial.label,
        "hours": plan.estimates[trial.name].hours,
        "cost": cost,
        "others": plan.used_cost + plan.remaining_cost - cost,
        "limit": plan.sweep.limits.gpu_hours,
        "unit": plan.profile.unit,
        "t": now_ms(),
    }
    write_json(canary.canary, request)


def array(of_class: Array, name: str) -> Array:
    """Return a job for one canary in the shape of its class. Slurm starts a short job sooner."""
    minutes = min(of_class.cls.minutes, MAX_MINUTES)
    cls = replace(of_class.cls, minutes=minutes)
    return replace(of_class, trials=(name,), parallel=1, cls=cls)
