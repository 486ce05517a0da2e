"""calibration.json: the best learning rate of each size and horizon, with their law.

`jepa calibrate` writes it into the folder of the sweep over rates, and `submit` copies it into that
of a sweep that uses it. A file that was damaged or edited is one ConfigError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any

from jepa_cluster.config import Recipe
from jepa_cluster.errors import ConfigError
from jepa_cluster.schema import build_dataclass, settings_of, to_dict
from jepa_cluster.trial.files import read_json, write_json

VERSION = 1
NEAR = 1.5  # factor: rates and horizons that count as equal
NORMAL = 1.645  # standard deviations, half of a 90 % interval

# Settings of a section that are no part of a shape: rates, and what a cell has beside its shape
BESIDE = ("optim.lr", "optim.start_lr", "optim.final_lr", "optim.steps", "optim.batch")
AGAIN = "make it again: jepa calibrate"

Key = tuple[str, int, int]  # shape, steps, batch


@dataclass(frozen=True)
class CellSize:
    """A cell: a shape of model and predictor, at a horizon and a batch."""

    model: str
    shape: str
    parameters: float
    steps: int
    batch: int

    @classmethod
    def of(cls, recipe: Recipe, parameters: float, per: Collection[str]) -> CellSize:
        """Return the cell of a recipe. parameters: of the encoder. per: as of `Calibration`."""
        optim = recipe.optim
        shape = shape_of(recipe, per)
        return CellSize(recipe.model.name, shape, parameters, optim.steps or 1, optim.batch)

    @property
    def key(self) -> Key:
        return (self.shape, self.steps, self.batch)

    @property
    def size(self) -> tuple[float, int, int]:
        """The columns of a law of the rate."""
        return (self.parameters, self.steps, self.batch)


@dataclass(frozen=True)
class RateOptimum(CellSize):
    """The best learning rate of a cell.

    low, high: ends of its interval. below, above: what half and twice the rate cost: error over
    that of the optimum, less one. problem: why it must not be used; '' if it may.
    """

    lr: float
    low: float
    high: float
    below: float
    above: float
    problem: str

    def excess(self, lr: float) -> float:
        """Return what another rate costs: its error over that of this one, less one."""
        octaves = math.log2(lr / self.lr)
        cost = self.below if octaves < 0 else self.above
        return math.expm1(math.log1p(cost) * octaves**2)

    def is_near(self, lr: float) -> bool:
        """Whether a rate is known to be within NEAR of the best one."""
        return lr / NEAR <= self.low and self.high <= lr * NEAR


@dataclass(frozen=True)
class RateLaw:
    """log lr = terms @ (1, log of each column), with the covariance of the terms.

    off_law: standard deviation of log lr of a cell around the law.
    """

    columns: tuple[str, ...]
    terms: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    off_law: float

    def predict(self, values: Mapping[str, float]) -> tuple[float, float, float]:
        """Return the rate with the ends of its interval. values: of the columns."""
        row = [1.0, *map(math.log, map(values.__getitem__, self.columns))]
        middle = sum(map(mul, self.terms, row))
        variance = self.off_law**2
        for x, line in zip(row, self.covariance, strict=True):
            variance += x * sum(map(mul, line, row))
        reach = NORMAL * variance**0.5
        return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


@dataclass(frozen=True)
class Calibration:
    """The best rates of the cells of a sweep, and their law.

    sweep: of the ladders. metric: the error that chose. conditions: settings that all share. per:
    settings whose levels have rates of their own; they count as part of the shape.
    """

    version: int
    sweep: str
    metric: str
    conditions: Mapping[str, Any]
    optima: tuple[RateOptimum, ...]
    law: RateLaw | None
    per: tuple[str, ...] = ()

    def write(self, file: Path) -> None:
        write_json(file, to_dict(self))


def read(file: Path) -> Calibration | None:
    """Return a calibration, None where there is no file. Raises ConfigError for another content."""
    document = read_json(file)
    if document is None:
        return None
    try:
        found = build_dataclass(Calibration, document, "calibration")
    except ConfigError as e:
        raise ConfigError(f"{file}: {e.what}", where=str(file), hint=AGAIN) from e
    if found.version != VERSION:
        what = f"{file} has version {found.version}, and this code reads {VERSION}"
        raise ConfigError(what, where=str(file), hint=AGAIN)
    return found


def shape_of(recipe: Recipe, per: Collection[str]) -> str:
    """Return 12 hex digits of the settings of model and predictor, but for the model's name.

    per: more settings, or sections of them.
    """
    settings = to_dict([recipe.model, recipe.predictor])
    settings[0].pop("name")
    for name, value in settings_of(recipe):
        if is_part(name, per) and name not in BESIDE:
            settings.append((name, value))
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_part(setting: str, of: Collection[str]) -> bool:
    """Whether a setting is one of some settings, or part of one of some sections."""
    return setting in of or setting.partition(".")[0] in of
