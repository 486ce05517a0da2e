"""Work out what `jepa submit` would do with a sweep now, and what that costs.

In: a sweep, a cluster profile and a root. Out: a `Plan`, which `plan`, `submit` and `--dry-run`
share. Changes nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster.arrays import Array, ArrayDemand, make_arrays
from jepa_cluster.launch.cluster.cost import CostEstimate
from jepa_cluster.launch.cluster.profile import Profile, ResourceClass, class_letters, class_of
from jepa_cluster.launch.scheduler import facts, node_health
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.records import ClassRecord, FinishedCost, PlannedTrial
from jepa_cluster.sweep import calibrated
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.sweep.reconcile import Actions, reconcile
from jepa_cluster.sweep.resolve import Trial, resolve
from jepa_cluster.trial import progress
from jepa_cluster.trial.calibration import Calibration
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.usage import process_seconds


def class_record(letter: str, cls: ResourceClass) -> ClassRecord:
    return {
        "class": letter,
        "nodes": cls.nodes,
        "procs_per_node": cls.procs_per_node,
        "minutes": cls.minutes,
    }


@dataclass(frozen=True)
class Plan:
    """What submit would do. Every cost is in GPU-hours.

    trials: by name, in the order of the sweep. status: also of trials that the sweep had before.
    estimates: cost of the whole trial, by name. calibration: of the learning rates.
    resumed: the user named the trials to start, so their earlier failures do not count. selected:
    only these start; None: all.
    """

    root: Root
    sweep: Sweep
    profile: Profile
    trials: Mapping[str, Trial]
    status: StatusSnapshot
    actions: Actions
    estimates: Mapping[str, CostEstimate]
    calibration: Calibration | None = None
    resumed: bool = False
    selected: frozenset[str] | None = None

    def select(self, names: Collection[str]) -> Plan:
        """Return the plan that starts only these trials, and the trunks of those that are branches.

        The others are left alone until a later submit.
        """
        trunks = filter(None, (self.trials[name].trunk for name in names))
        plan = replace(self, selected=frozenset(names).union(trunks))
        return replace(plan, actions=plan.allowed(self.actions))

    def allowed(self, actions: Actions) -> Actions:
        """Return the actions, of which only the selected ones start."""
        if self.selected is None:
            return actions
        return actions.changed(set(actions.start) - self.selected, "leave")

    @functools.cached_property
    def classes(self) -> dict[str, ResourceClass]:
        """Resource class by trial."""
        return {name: class_of(trial) for name, trial in self.trials.items()}

    @functools.cached_property
    def class_letters(self) -> dict[ResourceClass, str]:
        return class_letters(self.classes.values())

    def letter(self, name: str) -> str:
        """Return the letter of a trial's class."""
        return self.class_letters[self.classes[name]]

    def class_records(self) -> list[ClassRecord]:
        letters = self.class_letters
        return [class_record(letters[cls], cls) for cls in sorted(letters)]

    @functools.cached_property
    def planned(self) -> dict[str, PlannedTrial]:
        """What plan.json holds of each trial, by name."""
        found: dict[str, PlannedTrial] = {}
        for name, trial in self.trials.items():
            found[name] = {
                "name": name,
                "id": trial.config.id,
                "label": trial.label,
                "point": dict(trial.point),
                "seed": trial.seed,
                "class": self.letter(name),
                "world": self.classes[name].world,
                "steps": trial.config.recipe.optim.steps or 0,
                "hours": self.estimates[name].hours,
                "trunk": trial.trunk,
                "begins": trial.begins,
            }
        return found

    @functools.cached_property
    def gpu_cap(self) -> int | None:
        """Most GPUs in flight: what `jepa throttle` stored, else the limit of the sweep."""
        stored = gpu_throttle.stored_cap(self.root, self.sweep.name)
        return stored or self.sweep.limits.gpus_in_flight

    @functools.cached_property
    def bad_nodes(self) -> list[str]:
        """Nodes that often failed, the worst first."""
        return node_health.bad_nodes(self.root)

    @functools.cached_property
    def used_cost(self) -> float:
        """Cost of all attempts: of these trials, of those edited out, and of canaries."""
        seconds = 0.0
        for canary in self.root.canaries_of(self.sweep.name):
            seconds += process_seconds(canary, canary.attempts())
        return seconds / 3600 + sum(self._used.values())

    @functools.cached_property
    def _used(self) -> dict[str, float]:
        """Cost of all attempts of each trial that has some, as in `jepa status`."""
        states = self.status.states
        used: dict[str, float] = {}
        for name in filter(self._has_attempts, states):
            trial, running = self.root.trial(name), states[name] == "running"
            used[name] = process_seconds(trial, trial.attempts(), running=running) / 3600
        return used

    @functools.cached_property
    def finished(self) -> FinishedCost:
        """Cost of the trials that are done, and what the last submit estimated for them."""
        done = set(self.actions.trials("done"))
        cost: FinishedCost = {"planned": 0.0, "took": 0.0}
        for entry in self.root.sweep(self.sweep.name).planned():
            if entry["name"] in done:
                cost["planned"] += remaining_gpu_hours(entry, 0)
                cost["took"] += self._used.get(entry["name"], 0.0)
        return cost

    @functools.cached_property
    def start_cost(self) -> float:
        """Cost of what would start."""
        return sum(map(self.remaining, self.actions.start))

    @functools.cached_property
    def in_progress_cost(self) -> float:
        """What the trials that are queued or running still need."""
        return sum(map(self.remaining, self.actions.trials("keep")))

    @property
    def remaining_cost(self) -> float:
        return self.start_cost + self.in_progress_cost

    def remaining(self, name: str) -> float:
        """Return what a trial still needs."""
        step = 0
        if self._has_attempts(name):
            step = progress.latest_metrics(self.root.trial(name)).get("step", 0)
        return remaining_gpu_hours(self.planned[name], step)

    def _has_attempts(self, name: str) -> bool:
        return self.status.trials[name].attempts > 0

    def arrays(self, longest: int = sys.maxsize, live: Sequence[ArrayDemand] = ()) -> list[Array]:
        """Return the job arrays of what would start; `make_arrays` explains the arguments."""
        start = {name: self.classes[name] for name in self.actions.start}
        branches = {name for name in start if self.trials[name].trunk}
        return make_arrays(start, self.class_letters, longest, self.gpu_cap, live, branches)


def make_plan(sweep: Sweep, profile: Profile, root: Root) -> Plan:
    """Resolve the sweep, query the status of its trials, and estimate their cost."""
    request, runtime = profile.default_request, profile.runtime
    read = functools.cache(functools.partial(calibrated.read, root, sweep))
    names_by_id = root.names_by_id()
    resolved = resolve(sweep, request, runtime, names=names_by_id, calibration=read)
    is_calibrated = any(trial.config.runtime.lr_source for trial in resolved)
    trials = {trial.name: trial for trial in resolved}
    names = set(trials)
    names.update(map(itemgetter("name"), root.sweep(sweep.name).planned()))
    status = facts.query_status(root, names)
    return Plan(
        root=root,
        sweep=sweep,
        profile=profile,
        trials=trials,
        status=status,
        actions=reconcile(trials, status.states),
        estimates=cost.estimate_costs(root, profile, resolved),
        calibration=read() if is_calibrated else None,
    )


def remaining_gpu_hours(trial: PlannedTrial, step: int) -> float:
    """Return what a trial needs after `step`. A branch trains only the steps after `begins`."""
    done = max(step - trial["begins"], 0) / max(trial["steps"] - trial["begins"], 1)
    return trial["hours"] * trial["world"] * (1 - done)


def check(plan: Plan) -> None:
    """Raise LaunchError if the limits of the sweep or of this machine forbid what would start."""
    limit = plan.sweep.limits.gpu_hours
    if limit is not None and plan.actions.start and plan.used_cost + plan.remaining_cost > limit:
        total = f"{plan.remaining_cost:,.2f}"
        if plan.used_cost:
            total = f"{plan.used_cost:,.2f} spent and {total} to come"
        raise LaunchError(
            f"{total} {plan.profile.unit} are more than the sweep's limit of {limit:,g}",
            where=plan.sweep.source.location("limits.gpu_hours"),
            hint="thin the sweep, or raise limits.gpu_hours",
        )
    for name in plan.actions.start:
        world = plan.classes[name].world
        if plan.profile.kind == "local" and world > plan.profile.slots:
            label = plan.trials[name].label
            raise LaunchError(
                f"{label} needs {world} processes, this machine has {plan.profile.slots} slots",
                where=plan.profile.file,
                hint="lower procs_per_node, or set slots in the profile",
            )
        if plan.gpu_cap is not None and world > plan.gpu_cap:
            raise LaunchError(
                f"a trial of {world} GPUs never fits into {plan.gpu_cap} in flight",
                where=plan.sweep.source.location("limits.gpus_in_flight"),
                hint="jepa throttle",
            )
