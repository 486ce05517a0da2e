"""Sweep files of learning-rate ladders: each size and horizon of a sweep at several rates.

In: a sweep and its resolved trials. Out: its cells, one per shape, horizon and batch, and a sweep
over the rates of each. Other settings keep their first level.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jepa_cluster.ijepa import flops
from jepa_cluster.labels import LADDERS, SIZE_AXES
from jepa_cluster.sweep.calibrated import CALIBRATED
from jepa_cluster.sweep.points import HORIZON, Point, Sweep
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.calibration import CellSize

RATE = "optim.lr"
BATCH = "optim.batch"


@dataclass(frozen=True)
class Cell(CellSize):
    """A cell of a sweep. point: its axes. lr: around which its ladder begins."""

    point: Point
    lr: float

    def at(self, rate: float) -> Point:
        """Return the point of a trial. Rates have three digits, but for the first one."""
        rounded = rate if rate == self.lr else float(f"{rate:.3g}")
        return {**self.point, RATE: rounded}


def without_rate(source: Sweep, per: Sequence[str] = ()) -> Sweep:
    """Return a sweep at the rate of its base, one trial per cell: the first one of the source.

    So other settings have their first level, but for those of `per`. Those that all cells share
    are in its base.
    """
    cells: dict[str, Point] = {}
    for point, _ in source.points():
        point.pop(RATE, None)
        cell = {axis: value for axis, value in point.items() if _is_of_cell(axis, per)}
        if source.fork:
            point |= source.fork.settings(point[HORIZON])
        cells.setdefault(json.dumps(cell), point)
    points = list(cells.values())
    shared: Point = {}
    for axis, value in points[0].items() if points else ():
        if not _is_of_cell(axis, per) and all(point.get(axis) == value for point in points):
            shared[axis] = value
    for point, axis in itertools.product(points, shared):
        del point[axis]
    base = list(source.base)
    if f"{RATE}={CALIBRATED}" in base:
        base.remove(f"{RATE}={CALIBRATED}")
    if source.fork:
        base.append(source.fork.base)
    base += [f"{axis}={_hydra(value)}" for axis, value in shared.items()]
    return replace(
        source,
        base=tuple(base),
        grid={},
        zip={},
        list=tuple(filter(None, points)),
        fork=None,
        where="",
        expect_best={},
        claims=(),
        calibration=None,
        ladder_per=tuple(per),
        seeds=source.seeds[:1],
    )


def _is_of_cell(axis: str, per: Sequence[str]) -> bool:
    section = axis.partition(".")[0]
    return axis in (*SIZE_AXES, BATCH, *per) or section in ("model", "predictor")


def _hydra(value: object) -> str:
    """Return a value in the grammar of an override."""
    return value if isinstance(value, str) else json.dumps(value)


def cells_of(trials: Sequence[Trial], per: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of the trials of `without_rate`, the cheapest first."""
    cells: list[Cell] = []
    for trial in trials:
        recipe = trial.config.recipe
        size = CellSize.of(recipe, float(flops.parameters(recipe).encoder), per)
        cells.append(Cell(**vars(size), point=trial.point, lr=recipe.optim.lr))
    return sorted(cells, key=lambda cell: cell.size)


def ladder_points(
    cells: Sequence[Cell],
    rates: int,
    factor: float,
) -> list[Point]:
    """Return the points of a ladder of each cell, around its rate; the largest cell first."""
    below = (rates - 1) // 2
    points: list[Point] = []
    for cell in reversed(cells):
        for step in range(-below, rates - below):
            points.append(cell.at(cell.lr * factor**step))  # noqa: PERF401
    return points


def ladder_sweep(
    source: Sweep,
    points: Sequence[Point],
    seeds: Sequence[int],
) -> Sweep:
    """Return the sweep over rates. source: of `without_rate`."""
    return replace(
        source,
        name=f"{source.name}{LADDERS}",
        question=f"Which learning rate is the best one for each size and horizon of {source.name}?",
        expect="",
        scale_lr=True,
        list=tuple(points),
        seeds=tuple(seeds),
        limits=replace(source.limits, gpu_hours=None),
    )


def first_seeds(source: Sweep, count: int) -> list[int]:
    """Return seeds: those of the sweep first, so that its finished trials are reused."""
    others = set(range(count + len(source.seeds))).difference(source.seeds)
    return [*source.seeds, *sorted(others)][:count]
