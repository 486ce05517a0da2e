"""Canaries: one short trial per resource class, which must succeed before the trials of the class start.

A canary is an ordinary trial directory below <root>/canaries with the config of the most expensive trial of its class
and a small `runtime.stop_after`. On Slurm the arrays of the class depend on its job (`afterok`), on this machine the
runner releases them. What it measures is read from its attempts, as for any trial.

    <root>/canaries/canary.<sweep>.<class>.<code>.<trial>/
        canary.json    {class, about, hours, cost, others, limit, unit, t}: what the class costs without a measurement
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jepa_cluster.launch.cluster import cost as price
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.scheduler import facts, retry_policy
from jepa_cluster.trial import progress
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.status import TrialStatus

if TYPE_CHECKING:
    from jepa_cluster.launch.submit.plan import Plan

STEPS = 40
MINUTES = 60  # longest time limit of a canary's job


def of_sweep(root: Root, sweep: str) -> list[TrialDir]:
    """The canaries of a sweep, in the order of their last submission."""
    found = [TrialDir(path.parent) for path in root.canaries.glob(f"canary.{sweep}.*/canary.json")]
    return sorted(found, key=lambda trial: _request(trial)["t"])


def newest(root: Root, sweep: str) -> dict[str, TrialDir]:
    """Class -> its last canary."""
    return {_request(trial)["class"]: trial for trial in of_sweep(root, sweep)}


def required(p: Plan, code: str) -> dict[str, str]:
    """Class -> name of its canary, for the classes that would start and have no canary that succeeded with this code.

    The canary of a class is its most expensive trial, because that one fills the most memory.
    """
    chosen: dict[str, str] = {}
    for name in sorted(p.plan.start, key=lambda n: p.prices[n].hours, reverse=True):
        chosen.setdefault(p.letters[p.classes[name]], name)
    named = {letter: f"canary.{p.sweep.name}.{letter}.{code}.{name}" for letter, name in chosen.items()}
    return {letter: name for letter, name in named.items() if not p.root.trial(name).succeeded()}


def states(root: Root, names: Mapping[str, str]) -> dict[str, TrialStatus]:
    """Class -> state of its canary, which is in progress or must be started."""
    seen = facts.query_status(root, names.values()).trials
    return {letter: seen[name] for letter, name in names.items()}


def create(p: Plan, letter: str, name: str) -> None:
    """Write the trial directory of a canary that is to start, without the marks of an earlier failure."""
    canary, trial = p.root.trial(name), p.trials[name.split(".", 4)[4]]
    attempts = [*p.root.trial(trial.config.name).attempts(), *canary.attempts()]
    config = retry_policy.halve_micro_batch(trial.config, attempts)
    canary.create(replace(config, runtime=replace(config.runtime, stop_after=STEPS, milestones=(), fork_from=None)))
    canary.stop.unlink(missing_ok=True)
    retry_policy.forgive_failure(canary)
    cost = sum(p.left(n) for n in p.plan.start if p.letters[p.classes[n]] == letter)
    request = {
        "class": letter,
        "about": trial.label,
        "hours": p.prices[trial.config.name].hours,
        "cost": cost,
        "others": p.spent + p.committed - cost,
        "limit": p.sweep.limits.gpu_hours,
        "unit": p.profile.unit,
        "t": now_ms(),
    }
    write_json(canary.canary, request)


def array(like: Array, name: str) -> Array:
    """A job for one canary in the shape of its class; Slurm starts a short one sooner."""
    cls = replace(like.cls, minutes=min(like.cls.minutes, MINUTES))
    return replace(like, trials=(name,), parallel=1, cls=cls)


def document(canary: TrialDir, seen: TrialStatus) -> dict[str, Any]:
    """One canary for `status`: what was expected of its class, its state, and the hours per trial that it measured."""
    return {
        **_request(canary),
        "name": canary.name,
        "state": seen.state,
        "job": seen.job,
        "step": int(progress.latest_metrics(canary).get("step", 0)) if seen.attempts else 0,
        "steps": STEPS,
        "measured_hours": price.measured_hours(canary) if seen.state == "done" else None,
        "gpu_hours": progress.seconds_used(canary, running=seen.state == "running") / 3600 if seen.attempts else 0.0,
    }


def _request(canary: TrialDir) -> dict[str, Any]:
    return read_json(canary.canary) or {}
