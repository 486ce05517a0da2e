"""A sweep as it would be submitted now: what is wanted, what is seen, what would start, what that costs.

In: a sweep, a profile, a root. Out: a `Proposal`, the one thing that plan, submit and --dry-run look at. It
changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.cluster import cost as price
from jepa_cluster.launch.cluster.arrays import Array, ArrayDemand, make_arrays
from jepa_cluster.launch.cluster.cost import CostEstimate
from jepa_cluster.launch.cluster.profile import Profile, ResourceClass, class_letters, class_of
from jepa_cluster.launch.scheduler import facts
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import canary
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.sweep.reconcile import Actions, reconcile
from jepa_cluster.sweep.resolve import Trial, resolve
from jepa_cluster.trial import progress
from jepa_cluster.trial.directory import Root


@dataclass(frozen=True)
class Plan:
    """What submit would do, with its price. trials: by name, in the sweep's order."""

    root: Root
    sweep: Sweep
    profile: Profile
    trials: Mapping[str, Trial]
    seen: StatusSnapshot
    plan: Actions
    prices: Mapping[str, CostEstimate]

    @functools.cached_property
    def classes(self) -> dict[str, ResourceClass]:
        return {name: class_of(t) for name, t in self.trials.items()}

    @functools.cached_property
    def letters(self) -> dict[ResourceClass, str]:
        return class_letters(self.classes.values())

    @property
    def gpu_hours(self) -> float:
        """Of what would start."""
        return sum(self.left(n) for n in self.plan.start)

    @property
    def committed(self) -> float:
        """GPU-hours still to come: of what would start and of what is already at work."""
        return self.gpu_hours + sum(self.left(n) for n in self.plan.keep)

    @functools.cached_property
    def gpus(self) -> int | None:
        """Most GPUs in flight: what `jepa throttle` said last, else the sweep's limit."""
        return gpu_throttle.stored_cap(self.root, self.sweep.name) or self.sweep.limits.gpus_in_flight

    @functools.cached_property
    def spent(self) -> float:
        """GPU-hours that these trials and their canaries have used so far, every attempt counted."""
        tried = [self.root.trial(n) for n, s in self.seen.trials.items() if s.attempts and n in self.trials]
        return sum(map(progress.seconds_used, [*tried, *canary.of_sweep(self.root, self.sweep.name)])) / 3600

    def left(self, name: str) -> float:
        """GPU-hours that a trial still needs: its price without the steps that are done."""
        horizon = max(self.trials[name].config.recipe.optim.steps or 0, 1)
        return self.prices[name].gpu_hours * (1 - self._steps.get(name, 0) / horizon)

    @functools.cached_property
    def _steps(self) -> dict[str, int]:
        """Newest step of the trials that somebody has worked on."""
        tried = (n for n, s in self.seen.trials.items() if s.attempts and n in self.trials)
        return {n: int(progress.latest_metrics(self.root.trial(n)).get("step", 0)) for n in tried}

    def arrays(self, longest: int, live: Sequence[ArrayDemand] = ()) -> list[Array]:
        start = {n: self.classes[n] for n in self.plan.start}
        branches = {n for n in start if self.trials[n].trunk}
        return make_arrays(start, self.letters, longest, self.gpus, live, branches)


def make_plan(sweep: Sweep, profile: Profile, root: Root) -> Plan:
    """Resolve, look, reconcile, price. Changes nothing."""
    trials = {t.config.name: t for t in resolve(sweep, profile.default_request, profile.runtime)}
    before = root.sweep(sweep.name).read_plan()
    seen = facts.query_status(root, {*trials, *(t["name"] for t in (before["trials"] if before else ()))})
    cost = price.estimate_costs(root, profile, trials.values())
    return Plan(root, sweep, profile, trials, seen, reconcile(trials, seen.states), cost)


def check(p: Plan) -> None:
    """Refuse what cannot or may not be started. Raises LaunchError."""
    cap = p.sweep.limits.gpu_hours
    if cap is not None and p.plan.start and p.spent + p.committed > cap:
        parts = f"{p.spent:,.2f} spent and {p.committed:,.2f} to come" if p.spent else f"{p.committed:,.2f}"
        raise LaunchError(
            f"{parts} {p.profile.unit} are more than the sweep's limit of {cap:,g}",
            where=p.sweep.source.location("limits", "gpu_hours"),
            hint="thin the sweep, or raise limits.gpu_hours",
        )
    for name in p.plan.start:
        cls = p.classes[name]
        if p.profile.kind == "local" and cls.world > p.profile.slots:
            raise LaunchError(
                f"{p.trials[name].label} wants {cls.world} processes, this machine has {p.profile.slots} slots",
                where=p.profile.file,
                hint="lower procs_per_node, or set slots in the profile",
            )
        if p.gpus is not None and cls.world > p.gpus:
            where = p.sweep.source.location("limits", "gpus_in_flight")
            raise LaunchError(
                f"a trial of {cls.world} GPUs never fits into {p.gpus} in flight", where=where, hint="jepa throttle"
            )
