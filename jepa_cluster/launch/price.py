"""What trials will cost, in hours: measured where the same model has run in the same shape, else by FLOPs.

In: resolved trials, the profile's peak and MFU, and the attempts that lie below the root. Out: a `Price` each,
with an error bar and its basis. Masks are sampled to count tokens (numpy); nothing else is computed.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jepa_cluster.config import Mask, Recipe, TrialConfig, build, to_plain
from jepa_cluster.errors import JepaError
from jepa_cluster.launch.resources import Profile
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.layout import Root, TrialDir, read_json

SAMPLES = 64  # masks drawn to count tokens
LOOK_BACK = 12  # newest trials of a model that are read for what they measured
FLOPS_SPREAD = 0.3  # relative error of a price by FLOPs alone
LEAST_SPREAD = 0.05  # of a price by twenty steps of a canary


@dataclass(frozen=True)
class Price:
    """hours: wall time of one trial; spread: its error bar; world: processes (GPUs)."""

    hours: float
    spread: float
    world: int
    basis: str

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.world


Shape = tuple[str, int, int]  # model name, image size, processes


def prices(root: Root, profile: Profile, trials: Iterable[Trial]) -> dict[str, Price]:
    """Trial name -> the price of all of it."""
    trials = list(trials)
    rates = measured(root, {_shape(t.config) for t in trials})
    ahead = canaries(root)
    out: dict[str, Price] = {}
    for trial in trials:
        world = trial.config.runtime.nodes * trial.config.runtime.procs_per_node
        work, around = total_flops(trial.config.recipe) * own_share(root, trial), 0.0
        known = rates.get(_shape(trial.config))
        if known:
            mean = statistics.fmean(known)
            spread = statistics.stdev(known) / mean if len(known) > 1 else FLOPS_SPREAD / 2
            basis = f"measured, {len(known)} trial{'s' if len(known) > 1 else ''}"
        elif told := _told(ahead, trial.config):
            mean, spread, around, basis = told
        else:
            mean, spread = profile.peak_tflops * 1e12 * profile.mfu * world, FLOPS_SPREAD
            basis = f"FLOPs at {profile.mfu:.0%} MFU"
        hours = work / mean / 3600 + around
        out[trial.config.name] = Price(hours, hours * spread, world, basis)
    return out


def own_share(root: Root, trial: Trial) -> float:
    """Share of the steps that a trial makes itself: of a branch its cool-down, unless its trunk kept no milestone."""
    steps = trial.config.recipe.optim.steps or 1
    trunk = root.trial(trial.trunk or "")
    lost = trunk.done.exists() and not trunk.checkpoint(trial.begins).exists()
    return 1.0 if trial.trunk and lost else (steps - trial.begins) / steps


def total_flops(recipe: Recipe) -> float:
    """FLOPs of the whole training, from masks as they would be drawn."""
    from jepa_cluster.ijepa.flops import step_flops

    context, targets = _tokens(json.dumps(to_plain(recipe.mask), sort_keys=True), recipe.model.grid)
    return step_flops(recipe, context, targets).total * recipe.optim.batch * (recipe.optim.steps or 0)


def measured(root: Root, shapes: set[Shape]) -> dict[Shape, list[float]]:
    """FLOP/s that attempts of the same model, image and world size reached, one figure a trial."""
    found: dict[Shape, list[float]] = {}
    names = {shape[0] for shape in shapes}
    folders = [p for p in root.trials.glob("*-ts*") if p.name.split("-ts")[0] in names] if names else []
    read: dict[str, int] = {}
    for folder in sorted(folders, key=lambda p: (p / "attempts").stat().st_mtime, reverse=True):
        model = folder.name.split("-ts")[0]
        if read.get(model, 0) >= LOOK_BACK or not any((folder / "attempts").iterdir()):
            continue
        trial = root.trial(folder.name)
        try:
            config = trial.read_config(older=True)
            attempts = trial.attempts()
        except JepaError:
            continue
        read[model] = read.get(model, 0) + 1
        steps, seconds, worlds = _pace(attempts)
        if steps and config.recipe.optim.steps and len(worlds) == 1:
            shape = (model, config.recipe.model.image, worlds.pop())
            rate = total_flops(config.recipe) / config.recipe.optim.steps * steps / seconds
            found.setdefault(shape, []).append(rate)
    return found


Told = tuple[Shape, float, float, float]  # shape, FLOP/s, relative spread, hours around the steps


def canaries(root: Root) -> list[Told]:
    """What canaries that passed below this root have measured, newest first."""
    found: list[tuple[int, Told]] = []
    for path in root.canaries.glob("*/DONE.json"):
        trial, done = TrialDir(path.parent), read_json(path) or {}
        facts = done.get("metrics", {})
        try:
            config = trial.read_config(older=True)
        except JepaError:
            continue
        horizon = config.recipe.optim.steps or 0
        if facts.get("step_seconds") and horizon:
            rate = total_flops(config.recipe) / horizon / facts["step_seconds"]
            around = max(facts["hours"] - horizon * facts["step_seconds"] / 3600, 0.0)
            found.append((done["t"], (_shape(config), rate, max(facts["spread"], LEAST_SPREAD), around)))
    return [told for _, told in sorted(found, reverse=True)]


def _told(ahead: list[Told], config: TrialConfig) -> tuple[float, float, float, str] | None:
    """A canary of this shape, else one of as many processes: its speed in FLOP/s is then a guess for this model."""
    shape = _shape(config)
    for known, rate, spread, around in ahead:
        if known == shape:
            return rate, spread, around, "measured, canary"
    for known, rate, _, around in ahead:
        if known[2] == shape[2]:
            return rate, FLOPS_SPREAD / 2, around, f"FLOPs at the speed of the canary's {known[0]}"
    return None


def _pace(attempts: Iterable[Mapping[str, Any]]) -> tuple[int, float, set[int]]:
    """Steps made, seconds they took with everything around them, world sizes; of attempts that ended in order."""
    steps, seconds, worlds = 0, 0.0, set[int]()
    for a in attempts:
        if a.get("ended") and a.get("started") and (a.get("end_step") or 0) > (a.get("start_step") or 0):
            steps += a["end_step"] - (a.get("start_step") or 0)
            seconds += (a["ended"] - a["started"]) / 1000
            worlds.add(int(a.get("world", 1)))
    return steps, max(seconds, 1e-9), worlds


def _shape(config: TrialConfig) -> Shape:
    return config.recipe.model.name, config.recipe.model.image, config.runtime.nodes * config.runtime.procs_per_node


@functools.cache
def _tokens(mask: str, grid: int) -> tuple[Any, Any]:
    import numpy as np

    from jepa_cluster.ijepa import masks

    index = np.arange(SAMPLES)
    return masks.lengths(masks.sample(build(Mask, json.loads(mask), "mask"), grid, 0, np.zeros_like(index), index))
