"""Resolve a sweep: each point and seed becomes a composed, checked, frozen config.

In: a `Sweep`, the `conf/` folder, and the defaults of the cluster profile. Out: one `Trial` per
point and seed. Every derived value is filled in before the recipe is hashed, so that no later
default can change it. Unknown settings and impossible values are rejected here. It knows no
scheduler and imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.config_ranges import check_timm_values, no_effect
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import schedules
from jepa_cluster.labels import directory_name, format_value, label_words, point_label
from jepa_cluster.schema import ConfigDict
from jepa_cluster.sweep import claims
from jepa_cluster.sweep.calibrated import CALIBRATED, rate_of
from jepa_cluster.sweep.compose import Composer, Override, conf_dir, parse_override
from jepa_cluster.sweep.expression import Expression
from jepa_cluster.sweep.freeze import freeze
from jepa_cluster.sweep.points import HORIZON, Fork, Point, ResourceRequest, Sweep
from jepa_cluster.trial.calibration import Calibration

SET_BY_SWEEP = {  # settings that other keys of a sweep file set -> what to write
    "seed": "seeds: [{}]",
    "runtime.nodes": "resources: [{{nodes: {}}}]",
    "runtime.procs_per_node": "resources: [{{procs_per_node: {}}}]",
}


@dataclass(frozen=True)
class Trial:
    """One point and seed, resolved. name: of its directory. minutes: time limit of a job."""

    name: str
    point: Point
    seed: int
    config: TrialConfig
    minutes: int

    @property
    def label(self) -> str:
        """'vit_s ts=.15-.2 s0'."""
        return point_label(self.point, self.seed)

    @property
    def trunk(self) -> str | None:
        """Name of the trial that this one branches from."""
        return self.config.runtime.fork_from

    @property
    def begins(self) -> int:
        """Step at which a branch leaves its trunk; 0 for other trials."""
        optim = self.config.recipe.optim
        if not self.trunk:
            return 0
        return (optim.steps or 0) - optim.cooldown_steps


def resolve(
    sweep: Sweep,
    default_request: ResourceRequest,
    runtime: Mapping[str, Any],
    composer: Composer | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    calibration: Callable[[], Calibration] | None = None,
) -> list[Trial]:
    """Return every trial of the sweep, in its order.

    default_request: what a trial gets when no rule of `resources` holds; complete.
    runtime: settings of the cluster profile, which the sweep's overrides replace.
    names: id -> name of the directories that exist: equal trials of two sweeps share one.
    calibration: reads that of `sweep.calibration`.
    Raises ConfigError with setting, hint and line of the sweep file; DataError without a manifest.
    """
    composer = composer or Composer(conf_dir(), runtime)
    resolver = _Resolver(sweep, default_request, composer, names, calibration)
    trials: list[Trial] = []
    seen: dict[str, str] = {}  # id -> label
    for point, seed in sweep.points():
        trial = resolver.trial(point, seed)
        trial_id = trial.config.id
        if trial_id in seen:
            both = f"'{seen[trial_id]}' and '{trial.label}'"
            what = f"two points are the same trial {trial_id}: {both}"
            hint = "drop one of them, or the axis that changes nothing"
            raise sweep.source.error(what, hint=hint)
        seen[trial_id] = trial.label
        trials.append(trial)
    if not trials:
        raise sweep.source.error("no point is left", "where", hint="loosen `where`")
    resolver.check_base()
    if sweep.claims:
        claims.check(sweep, [(trial.point, trial.config.recipe) for trial in trials])
    if sweep.fork and not sweep.fork.from_zero:
        return link_forks(sweep, trials)
    return trials


class _Resolver:
    """What all points of a sweep share, parsed once: base overrides and rules of `resources`."""

    def __init__(
        self,
        sweep: Sweep,
        default_request: ResourceRequest,
        composer: Composer,
        names: Mapping[str, str],
        calibration: Callable[[], Calibration] | None,
    ) -> None:
        self.sweep = sweep
        self.calibration = calibration
        self.composer = composer
        self.names = names
        self.base: list[Override] = []
        fork_base = (Fork.base,) if sweep.fork else ()
        for i, text in enumerate((*sweep.base, *fork_base)):
            override = parse_override(text, sweep.source.location(f"base[{i}]"))
            if override.key in SET_BY_SWEEP:
                what = f"base cannot set '{override.key}'"
                hint = SET_BY_SWEEP[override.key].format(override.value)
                raise ConfigError(what, where=override.where, hint=hint)
            self.base.append(override)
        self.rules: list[tuple[ResourceRequest, Expression]] = []
        for i, request in enumerate((*sweep.resources, default_request)):
            path = f"resources[{i}].when"
            when = Expression(request.when or "True", sweep.source, path)
            given = {key: value for key, value in vars(request).items() if value}
            complete = dataclasses.replace(default_request, **given)
            self.rules.append((complete, when))
        # settings of the base that have an effect at some trial, and those without one at a new one
        self.used: set[str] = set()
        self.unused: dict[str, ConfigError] = {}

    def trial(self, point: Point, seed: int) -> Trial:
        sweep = self.sweep
        overrides = list(self.base)
        forked = sweep.fork.settings(point[HORIZON]) if sweep.fork else {}
        for axis, value in {**point, **forked}.items():
            overrides.append(Override(axis, value, sweep.source.location_of(axis)))
        config = self.composer.compose(overrides)
        config["seed"] = seed
        request = self._request(config, {**point, "seed": seed})
        config["runtime"].update(nodes=request.nodes, procs_per_node=request.procs_per_node)
        try:
            self._set_rate(config, overrides)
            frozen = self._freeze(config, overrides)
            is_new = frozen.id not in self.names  # a trial that exists goes on as it was planned
            self._note_effects(config, is_new)
            if is_new:
                check_timm_values(frozen.recipe.model.timm)
                self._check_axes(point, config)
        except ConfigError as e:
            values = [f"{axis}={format_value(value)}" for axis, value in point.items()]
            where = f"{_source_of(sweep, e.what)}: {'; '.join(values) or 'the only point'}"
            raise ConfigError(e.what, where=where, hint=e.hint) from e
        name = self.names.get(frozen.id) or new_name(point, seed, frozen)
        return Trial(name, point, seed, frozen, request.minutes or 60)

    def _set_rate(self, config: ConfigDict, overrides: Sequence[Override]) -> None:
        """Replace a calibrated learning rate by its value; scale the rates before and after it."""
        optim = config["optim"]
        is_calibrated = optim["lr"] == CALIBRATED
        if not is_calibrated and not self.sweep.scale_lr:
            return
        # the rate to which the others belong: that of the base, else that of the preset
        others = [o for o in self.base if o.value != CALIBRATED]
        others += [o for o in overrides[len(self.base) :] if o.key != "optim.lr"]
        preset = self.composer.compose(others)["optim"]["lr"]
        if is_calibrated:
            use = self.sweep.calibration
            if use is None or self.calibration is None:
                what = f"optim.lr={CALIBRATED} names no calibration"
                raise ConfigError(what, hint="calibration: {sweep: NAME_lr} in the sweep file")
            recipe = freeze({**config, "optim": {**optim, "lr": preset}}).recipe
            rate = rate_of(self.calibration(), recipe, use)
            optim["lr"] = rate.lr
            config["runtime"]["lr_source"] = str(rate)
        for name in ("start_lr", "final_lr"):
            optim[name] *= optim["lr"] / preset

    def _freeze(self, config: ConfigDict, overrides: Sequence[Override]) -> TrialConfig:
        """Raises ConfigError when a new trial would read other data than the environment names."""
        is_of_profile = "data_root" in self.composer.runtime
        data_root = config["runtime"]["data_root"]
        conflict = _data_root_conflict(data_root, overrides, is_of_profile)
        try:
            frozen = freeze(config)
        except DataError:
            if conflict:
                raise conflict from None
            raise
        if frozen.recipe.optim.momentum_steps is not None:
            # A trial of an earlier version, which rounded this horizon, goes on as it was planned.
            optim = dataclasses.replace(frozen.recipe.optim, momentum_steps=None)
            recipe = dataclasses.replace(frozen.recipe, optim=optim)
            earlier = dataclasses.replace(frozen, recipe=recipe)
            if earlier.id in self.names:
                return earlier
        if conflict and frozen.id not in self.names:
            raise conflict
        return frozen

    def _check_axes(self, point: Point, config: ConfigDict) -> None:
        """Raise ConfigError for an axis without an effect."""
        for axis, value in point.items():
            error = no_effect(axis, config)
            if error and value is not None:
                raise ConfigError(error.what, hint=f"leave the point out by `where`; {error.hint}")

    def _note_effects(self, config: ConfigDict, is_new: bool) -> None:
        for override in self.base:
            error = no_effect(override.key, config)
            if error is None:
                self.used.add(override.key)
            elif is_new and override.value is not None:  # null says that it is not used
                where = override.where
                self.unused[override.key] = ConfigError(error.what, where=where, hint=error.hint)

    def check_base(self) -> None:
        """Raise ConfigError for a setting of the base that has no effect at any trial."""
        for key, error in self.unused.items():
            if key not in self.used:
                raise error

    def _request(self, config: ConfigDict, point: Point) -> ResourceRequest:
        """Return the first request whose rule holds. Names are axes, else settings."""
        values = {**_flat(config), **point}
        return next(request for request, when in self.rules if when(values, "setting"))


def _data_root_conflict(
    data_root: str,
    overrides: Sequence[Override],
    is_of_profile: bool,
) -> ConfigError | None:
    """Return an error when the cluster profile or a preset names other data than the environment.

    A setting of the sweep may.
    """
    wanted = os.environ.get("JEPA_DATA")
    keys = [override.key for override in overrides]
    named = is_of_profile or "runtime" in keys
    if not wanted or "runtime.data_root" in keys or not named:
        return None
    if Path(data_root).expanduser().absolute() == Path(wanted).expanduser().absolute():
        return None
    reader = "the cluster profile"
    if not is_of_profile:
        presets = [override.value for override in overrides if override.key == "runtime"]
        reader = f"runtime={presets[-1]}"
    return ConfigError(
        f"{reader} reads {data_root}, but JEPA_DATA={wanted}",
        hint=f"add runtime.data_root={data_root} or runtime.data_root={wanted}",
    )


def new_name(point: Point, seed: int, config: TrialConfig) -> str:
    """Return the name of a directory by model, the sweep's other axes, seed and id."""
    words = label_words(point, seed)
    words.pop("model", None)
    return directory_name(config.recipe.model.name, words.values(), config.id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the value of each setting by its dotted name, and of each section its `name`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        values[name] = value
        if isinstance(value, dict):
            values |= _flat(value, f"{name}.")
            values[name] = value.get("name")
    return values


def _source_of(sweep: Sweep, what: str) -> str:
    """Return file and line of the axis or base override that an error is about, else of an axis.

    It is the one that the error begins with, or names, or one of the same section.
    """
    locations = {"calibration": sweep.source.location("calibration")}
    for axis in sweep.axes:
        locations[axis] = sweep.source.location_of(axis)
    for i, text in enumerate(sweep.base):
        key = text.partition("=")[0]
        locations[key] = sweep.source.location(f"base[{i}]")
    names = sorted(locations, key=len, reverse=True)
    section = what.partition(".")[0]
    fitting = [name for name in names if re.match(rf"{re.escape(name)}(\W|$)", what)]
    fitting += [name for name in names if re.search(rf"\b{re.escape(name)}\b", what)]
    fitting += [name for name in locations if name.startswith(f"{section}.")]  # axes first
    if fitting:
        return locations[fitting[0]]
    first = next(iter(sweep.axes), "")
    return sweep.source.location_of(first) or sweep.name


# ---- forks


def link_forks(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    """Let trials that differ only in their horizon, the number of steps, share their training.

    The longest trial of a point and seed is the trunk. It keeps a checkpoint, a milestone, at the
    step where the learning rate of each shorter one, a branch, begins to fall. A branch starts from
    that checkpoint. The order of the trials stays.
    Raises SweepFileError when a branch would differ from its trunk before that step.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        key = json.dumps([{**trial.point, HORIZON: None}, trial.seed])
        groups.setdefault(key, []).append(trial)
    linked: dict[str, Trial] = {}
    for members in groups.values():
        *branches, trunk = sorted(members, key=lambda trial: trial.point[HORIZON])
        milestones: list[int] = []
        for branch in branches:
            branch = _with_runtime(branch, fork_from=trunk.name)
            _check_branch(sweep, branch, trunk)
            milestones.append(branch.begins)
            linked[branch.name] = branch
        linked[trunk.name] = _with_runtime(trunk, milestones=tuple(milestones))
    return [linked[trial.name] for trial in trials]


def _check_branch(sweep: Sweep, branch: Trial, trunk: Trial) -> None:
    optim = branch.config.recipe.optim
    if schedules.shared_prefix_steps(trunk.config.recipe.optim, optim) != branch.begins:
        what = f"'{branch.label}' and its trunk '{trunk.label}' part before step {branch.begins}"
        hint = (
            "base: [optim=wsd]; decay and momentum must not move, or share nothing: from_zero: true"
        )
        raise sweep.source.error(what, "fork", hint=hint)


def _with_runtime(trial: Trial, **changes: Any) -> Trial:
    runtime = dataclasses.replace(trial.config.runtime, **changes)
    config = TrialConfig(trial.config.recipe, runtime)
    return dataclasses.replace(trial, config=config)
