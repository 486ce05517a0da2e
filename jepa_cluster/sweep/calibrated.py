"""The learning rate of a trial by a calibration: `optim.lr: calibrated` in a sweep file.

In: calibration.json, which `jepa calibrate` wrote, and a recipe. Out: a rate with its interval, or
a ConfigError that says why the calibration does not hold for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from jepa_cluster.config import Recipe
from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.ijepa import flops
from jepa_cluster.labels import FITTED, LADDERS, format_number
from jepa_cluster.schema import settings_of
from jepa_cluster.sweep.points import CalibrationUse, Sweep
from jepa_cluster.trial import calibration
from jepa_cluster.trial.calibration import NEAR, Calibration, RateOptimum, is_part, shape_of
from jepa_cluster.trial.directory import Root

CALIBRATED = "calibrated"  # as the value of optim.lr
WIDEST_LAW = 10.0  # factor between the ends of a prediction that may be used
DATA = "data.digest"
CONDITIONS = (  # under which a rate holds
    DATA,
    "objective.target",
    "objective.loss",
    "optim.schedule",
    "optim.momentum",
    "optim.final_momentum",
    "optim.weight_decay",
    "optim.final_weight_decay",
    "optim.betas",
    "optim.clip",
    "optim.transfer",
    "optim.base_width.encoder",
    "optim.base_width.predictor",
)


@dataclass(frozen=True)
class Rate:
    """A learning rate with its interval. source: where it comes from. optimum: of its cell."""

    lr: float
    low: float
    high: float
    source: str
    optimum: RateOptimum | None = None

    def __str__(self) -> str:
        digits = partial(format_number, digits=FITTED)
        value, low, high = map(digits, (self.lr, self.low, self.high))
        return f"{value} [{low}, {high}] by {self.source}"


def read(root: Root, sweep: Sweep) -> Calibration:
    """Return the calibration that a sweep names. Raises ConfigError without one.

    A submitted sweep has a copy, whose rates stay. Cells that the copy lacks are those of the
    newest one: that of this root, else NAME.json beside the sweep file. A copy that predicts cells
    by its law gets no further ones, which would change its trials.
    """
    use = sweep.calibration or CalibrationUse("")
    files = [root.sweep(use.sweep).calibration]
    if sweep.source.file:
        files.append(Path(sweep.source.file).with_name(f"{use.sweep}.json"))
    newest = next(filter(None, map(calibration.read, files)), None)
    copy = calibration.read(root.sweep(sweep.name).calibration)
    if copy and copy.sweep == use.sweep:
        if newest is None or (use.other_sizes == "law" and copy.law):
            return copy
        known = set(map(attrgetter("key"), copy.optima))
        more = [found for found in newest.optima if found.key not in known]
        return replace(copy, optima=(*copy.optima, *more))
    if newest:
        return newest
    names = list(filter(lambda name: root.sweep(name).calibration.exists(), root.sweeps()))
    hint = suggest(use.sweep, names) if names else f"make one: {_command(use.sweep)}"
    raise ConfigError(f"there is no calibration '{use.sweep}'", where=str(root.path), hint=hint)


def _command(ladders: str) -> str:
    return f"jepa calibrate {ladders.removesuffix(LADDERS)}, or its file"


def conditions_of(recipe: Recipe, per: Collection[str]) -> dict[str, Any]:
    """Return the settings under which a calibration holds. per: as of `Calibration`."""
    settings = dict(settings_of(recipe))
    return {name: settings[name] for name in CONDITIONS if not is_part(name, per)}


def rate_of(found: Calibration, recipe: Recipe, use: CalibrationUse) -> Rate:
    """Return the rate of a recipe. Raises ConfigError where a calibration is not used for it."""
    is_of_other_data = False
    for setting, value in conditions_of(recipe, found.per).items():
        known = found.conditions.get(setting)
        if known == value:
            continue
        if setting == DATA and use.other_data == "use":
            is_of_other_data = True
            continue
        what = f"{found.sweep} was calibrated at {setting}={known}, and this trial has {value}"
        hint = "calibrate this sweep: jepa calibrate SWEEP"
        if setting == DATA:
            hint += f"; or calibration: {{sweep: {found.sweep}, other_data: use}}"
        raise ConfigError(what, hint=hint)
    rate = _rate_of_shape(found, recipe, use.other_sizes == "law")
    if is_of_other_data:  # how far it is from the best one is not known
        return replace(rate, source=f"{rate.source}, of other images", optimum=None)
    return rate


def _rate_of_shape(found: Calibration, recipe: Recipe, by_law: bool) -> Rate:
    """by_law: the rate of a shape without a ladder is predicted. Raises ConfigError."""
    name, model = found.sweep, recipe.model.name
    steps, batch = recipe.optim.steps or 1, recipe.optim.batch
    shape = shape_of(recipe, found.per)
    cells = [o for o in found.optima if o.shape == shape]
    if not cells:
        if by_law and found.law:
            return _predicted(found, recipe)
        models = dict.fromkeys(map(attrgetter("model"), found.optima))
        also = "".join(map(", {}".format, found.per))
        what = f"{name} has no ladder of model={model} with this shape and predictor{also}; it has "
        what += ", ".join(models) or "none"
        hint = "jepa calibrate a sweep that has it"
        if by_law:
            what += ", and no law"
        elif found.law:
            hint += f", or calibration: {{sweep: {name}, other_sizes: law}}"
        raise ConfigError(what, hint=hint)
    best = _nearest(name, cells, model, steps, batch)
    if best.problem:
        what = f"{name} has no rate of model={model} at {best.steps} steps: {best.problem}"
        raise ConfigError(what, hint=_command(name))
    return Rate(best.lr, best.low, best.high, name, best)


def _nearest(
    name: str,
    cells: Sequence[RateOptimum],
    what: str,
    steps: int,
    batch: int,
) -> RateOptimum:
    """Return the cell of this batch whose horizon is near. Raises ConfigError without one."""
    same = [o for o in cells if o.batch == batch]
    if not same:
        text = f"{name} was calibrated at optim.batch={cells[0].batch} of {what}"
        hint = "jepa calibrate a sweep with this batch"
        raise ConfigError(f"{text}, and this trial has {batch}", hint=hint)
    best = min(same, key=lambda o: abs(math.log(o.steps / steps)))
    if abs(math.log(best.steps / steps)) > math.log(NEAR):
        text = f"{name} was calibrated at optim.steps={best.steps} of {what}"
        hint = f"horizons up to a factor of {NEAR} apart share a rate: jepa calibrate this one"
        raise ConfigError(f"{text}, and this trial has {steps}", hint=hint)
    return best


def _predicted(found: Calibration, recipe: Recipe) -> Rate:
    """Return the prediction of the law for a shape without a ladder. Raises ConfigError."""
    law = found.law
    assert law
    steps, batch = recipe.optim.steps or 1, recipe.optim.batch
    known = [o for o in found.optima if not o.problem]
    # What the law has no column for must be as it was.
    near_steps = steps if "steps" not in law.columns else known[0].steps
    near_batch = batch if "batch" not in law.columns else known[0].batch
    _nearest(found.sweep, known, "all sizes", near_steps, near_batch)
    parameters = flops.parameters(recipe).encoder
    values = {"parameters": parameters, "steps": steps, "batch": batch}
    lr, low, high = law.predict(values)
    if high > WIDEST_LAW * low:
        factor = format_number(high / low, FITTED)
        what = f"the law of {found.sweep} predicts the rate of model={recipe.model.name} within a"
        what += f" factor of {factor}, and {WIDEST_LAW:g} is the largest one that may be used"
        hint = "more rates or seeds of its ladders, or jepa calibrate a sweep that has this size"
        raise ConfigError(what, hint=hint)
    return Rate(lr, low, high, f"the law of {found.sweep}")
