"""Sweep files of learning-rate ladders: each size and horizon of a sweep at several rates.

In: a sweep and its resolved trials. Out: its cells, one per size and horizon, and a sweep over the
rates of each. Other settings keep their first level.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jepa_cluster.ijepa import flops
from jepa_cluster.labels import LADDERS, SIZE_AXES
from jepa_cluster.sweep.calibrated import CALIBRATED
from jepa_cluster.sweep.points import HORIZON, Point, Sweep
from jepa_cluster.sweep.resolve import Trial

RATE = "optim.lr"
BATCH = "optim.batch"


@dataclass(frozen=True)
class Cell:
    """A size at a horizon. point: its axes. lr: the rate around which its ladder begins."""

    point: Point
    model: str
    parameters: float
    steps: int
    batch: int
    lr: float

    @property
    def key(self) -> tuple[float, int, int]:
        return (self.parameters, self.steps, self.batch)

    def at(self, rate: float) -> Point:
        """Return the point of a trial. Rates have three digits, but for the first one."""
        rounded = rate if rate == self.lr else float(f"{rate:.3g}")
        return {**self.point, RATE: rounded}


def without_rate(source: Sweep) -> Sweep:
    """Return a sweep at the rate of its presets, and with the first level of its settings.

    So it has one trial per cell and seed.
    """
    cell_axes = set(filter(_is_of_cell, source.axes))
    base = list(source.base)
    if f"{RATE}={CALIBRATED}" in base:
        base.remove(f"{RATE}={CALIBRATED}")
    fixed: dict[str, object] = {}
    points: dict[str, Point] = {}
    for point, _ in source.points():
        cell: Point = {}
        for axis, value in point.items():
            if axis in cell_axes:
                cell[axis] = value
            elif axis != RATE:
                fixed.setdefault(axis, value)
        if source.fork:
            cell["optim.cooldown_steps"] = source.fork.cooldown_steps(point[HORIZON])
        points.setdefault(json.dumps(cell), cell)
    if source.fork:
        fixed["optim.schedule"] = "wsd"
    base += [f"{axis}={_hydra(value)}" for axis, value in fixed.items()]
    return replace(
        source,
        base=tuple(base),
        grid={},
        zip={},
        list=tuple(filter(None, points.values())),
        fork=None,
        where="",
        expect_best={},
        calibration=None,
        seeds=source.seeds[:1],
    )


def _is_of_cell(axis: str) -> bool:
    section = axis.partition(".")[0]
    return axis in (*SIZE_AXES, BATCH) or section in ("model", "predictor")


def _hydra(value: object) -> str:
    """Return a value in the grammar of an override."""
    return value if isinstance(value, str) else json.dumps(value)


def cells_of(trials: Sequence[Trial]) -> list[Cell]:
    """Return the cells of the trials of `without_rate`, the cheapest first."""
    cells: list[Cell] = []
    for trial in trials:
        recipe = trial.config.recipe
        cell = Cell(
            point=trial.point,
            model=recipe.model.name,
            parameters=float(flops.parameters(recipe).encoder),
            steps=recipe.optim.steps or 1,
            batch=recipe.optim.batch,
            lr=recipe.optim.lr,
        )
        cells.append(cell)
    return sorted(cells, key=lambda cell: cell.key)


def ladder_points(
    cells: Sequence[Cell],
    rates: int,
    factor: float,
) -> list[Point]:
    """Return the points of a ladder of each cell, around its rate; the dearest cell first."""
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
    return Sweep(
        name=f"{source.name}{LADDERS}",
        question=f"Which learning rate is the best one for each size and horizon of {source.name}?",
        base=source.base,
        scale_lr=True,
        list=tuple(points),
        seeds=tuple(seeds),
        resources=source.resources,
        limits=replace(source.limits, gpu_hours=None),
        retries=source.retries,
    )


def first_seeds(source: Sweep, count: int) -> list[int]:
    """Return seeds: those of the sweep first, so that its finished trials are reused."""
    others = set(range(count + len(source.seeds))).difference(source.seeds)
    return [*source.seeds, *sorted(others)][:count]
