"""The learning rate of a trial by a calibration: `optim.lr: calibrated` in a sweep file.

In: calibration.json, which `jepa calibrate` wrote, and a recipe. Out: a rate with its interval, or
a ConfigError that says why the calibration does not hold for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, cast

from jepa_cluster.config import Optim, Recipe
from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.ijepa import flops
from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.records import Calibration, RateLaw
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json

CALIBRATED = "calibrated"  # as the value of optim.lr
HORIZON_FACTOR = 1.5  # between a trial's horizon and one that was calibrated
CONDITIONS = ("schedule", "momentum", "final_momentum")  # of optim
NEAR = 1.5  # factor: rates that count as the best one
NORMAL = 1.645  # standard deviations, half of a 90 % interval


@dataclass(frozen=True)
class Rate:
    """A learning rate with its interval. source: where it comes from.

    below, above: what half and twice of it cost; nan where that is not known.
    """

    lr: float
    low: float
    high: float
    source: str
    below: float = math.nan
    above: float = math.nan

    def excess(self, lr: float) -> float:
        """Return what another rate costs: its error over that of this one, less one."""
        octaves = math.log2(lr / self.lr)
        cost = self.below if octaves < 0 else self.above
        return math.expm1(math.log1p(cost) * octaves**2)

    def is_near(self, lr: float) -> bool:
        """Whether a rate is known to be within NEAR of the best one."""
        return lr / NEAR <= self.low and self.high <= lr * NEAR

    def __str__(self) -> str:
        digits = partial(format_number, digits=FITTED)
        value, low, high = map(digits, (self.lr, self.low, self.high))
        return f"{value} [{low}, {high}] by {self.source}"


def read(
    root: Root,
    sweep: Sweep,
) -> Calibration:
    """Return the calibration that a sweep names. Raises ConfigError without one.

    It is the copy of a submitted sweep, which stays, else the newest of this root, else NAME.json
    beside the sweep file.
    """
    name = sweep.calibration.sweep if sweep.calibration else ""
    shipped = Path(sweep.source.file).with_name(f"{name}.json")
    for file in (root.sweep(sweep.name).calibration, root.sweep(name).calibration, shipped):
        document = read_json(file)
        if document and document["sweep"] == name:
            return cast("Calibration", document)
    known = [other for other in root.sweeps() if root.sweep(other).calibration.exists()]
    hint = suggest(name, known) if known else "make one: jepa calibrate SWEEP"
    raise ConfigError(f"there is no calibration '{name}'", where=str(root.path), hint=hint)


def conditions_of(optim: Optim) -> dict[str, Any]:
    """Return the settings under which a calibration holds."""
    return {f"optim.{name}": getattr(optim, name) for name in CONDITIONS}


def rate_of(
    calibration: Calibration,
    recipe: Recipe,
    by_law: bool,
) -> Rate:
    """Return the rate of a recipe. by_law: that of a size without a ladder is predicted.

    Raises ConfigError.
    """
    name = calibration["sweep"]
    optim = recipe.optim
    steps = optim.steps or 1
    for setting, value in conditions_of(optim).items():
        known = calibration["conditions"].get(setting)
        if known != value:
            what = f"{name} was calibrated at {setting}={known}, and this trial has {value}"
            raise ConfigError(what, hint="calibrate this sweep: jepa calibrate SWEEP")
    parameters = flops.parameters(recipe).encoder
    found = [o for o in calibration["optima"] if o["parameters"] == parameters]
    if not found:
        if by_law and calibration["law"]:
            values = {"parameters": parameters, "steps": steps, "batch": optim.batch}
            return predict(calibration["law"], values, f"the law of {name}")
        what = f"{name} has no ladder of {recipe.model.name}"
        law = "other_sizes: law" if calibration["law"] else "calibrate it: jepa calibrate SWEEP"
        raise ConfigError(what, hint=law)
    found = [o for o in found if o["batch"] == optim.batch]
    if not found:
        raise ConfigError(f"{name} has no ladder of {recipe.model.name} at batch {optim.batch}")
    nearest = min(found, key=lambda o: abs(math.log(o["steps"] / steps)))
    if abs(math.log(nearest["steps"] / steps)) > math.log(HORIZON_FACTOR):
        what = f"{name} was calibrated at {nearest['steps']} steps, and this trial has {steps}"
        hint = f"horizons up to a factor of {HORIZON_FACTOR} apart share a rate: calibrate this one"
        raise ConfigError(what, hint=hint)
    if nearest["problem"]:
        what = f"{name} has no rate of {recipe.model.name} at {nearest['steps']} steps"
        raise ConfigError(f"{what}: {nearest['problem']}", hint="then: jepa calibrate SWEEP")
    return Rate(
        lr=nearest["lr"],
        low=nearest["low"],
        high=nearest["high"],
        source=name,
        below=nearest["below"],
        above=nearest["above"],
    )


def predict(
    law: RateLaw,
    values: Mapping[str, float],
    source: str,
) -> Rate:
    """Return the rate of a law. values: of its columns."""
    row = [1.0, *map(math.log, map(values.__getitem__, law["columns"]))]
    middle = sum(map(mul, law["terms"], row))
    variance = law["off_law"] ** 2
    for x, line in zip(row, law["covariance"], strict=True):
        variance += x * sum(map(mul, line, row))
    reach = NORMAL * variance**0.5
    return Rate(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), source)
