"""What the swept settings do to the error: one model of all finished trials of a sweep.

    log error = block + for each axis (effect of the level + effect of the level at this size)
                + cell + seed + noise

A block is a model at a horizon. A cell is a setting in a block: what its seeds share. A seed is
that of a block: what its settings share. Trials that diverged or were stopped are missing cells;
unlike a mean over settings, the model is not moved by which cells are missing. All effects are
shrunk by as much as the noise asks (mixed_model.py).

In: rows of finished trials. Out: `Effects`, from which laws, page, figure, report and terminal take
their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_cluster import labels
from jepa_cluster.results import level_compute, mixed_model
from jepa_cluster.results.mixed_model import Factor, Floats, Index
from jepa_cluster.results.tables import Rows, Size, column, size_names, size_of

# Prior scales of effects on log error
LEVEL_SCALE = 0.2
SIZE_SCALE = 0.1  # of a level at one size
CELL_SCALE = 0.05
SEED_SCALE = 0.05
MIN_BEYOND = 2  # else a cell cannot be separated from its levels


Swept = tuple[str, list[str], Index]  # axis, its levels, the level of each row
Block = tuple[int, int | None, object]  # number of the size, steps, cooldown
NOT_SET = "not set"  # level of a trial without the axis
FLOPS = "flops_total"
COOLDOWN = "optim.cooldown_steps"
WIDE = 3.0  # largest over smallest level, from which levels are spaced by factors


@dataclass(frozen=True)
class Levels:
    """The levels of one axis, and their effects.

    draws: log error at a level at equal steps [draws, models, levels], up to a constant of its
    model. has_trials: whether a trial of the model has finished at the level [models, levels].
    log_compute: of a level at equal steps, less the mean of the levels of its model [models,
    levels]; 0 where they cost the same. slope: draws of d log error / d log
    steps; None where no model has several horizons.
    """

    axis: str
    names: list[str]
    of_row: Index
    draws: Floats
    has_trials: NDArray[np.bool_]
    log_compute: Floats
    slope: Floats | None

    @cached_property
    def compared(self) -> Floats:
        """Draws of log error as the levels are compared: at equal compute, if that is known."""
        if self.slope is None:
            return self.draws
        return self.draws - self.slope[:, None, None] * self.log_compute

    @cached_property
    def relative(self) -> Floats:
        """Draws of the log error at each level, of the mean model, less the mean of all levels."""
        common = self.compared.mean(1)
        return common - common.mean(1, keepdims=True)

    @cached_property
    def of_model(self) -> Floats:
        """Draws of the log error at each level, less the mean of the levels that the model ran."""
        total = np.where(self.has_trials, self.compared, 0.0).sum(2, keepdims=True)
        return self.compared - total / self.has_trials.sum(1)[:, None]

    @cached_property
    def lowest(self) -> Index:
        """The best level in each draw, of those that a model has run [draws, models]."""
        return np.where(self.has_trials, self.compared, np.inf).argmin(2)

    @cached_property
    def best(self) -> Index:
        """The level with the lowest expected error, of those that a model has run [models]."""
        return np.where(self.has_trials, self.compared.mean(0), np.inf).argmin(1)

    @cached_property
    def numbers(self) -> Floats | None:
        """The levels as different numbers, an interval by its middle; None where one is a name."""
        numbers = labels.level_numbers(self.names)
        return np.array(numbers, float) if numbers else None

    @cached_property
    def is_log(self) -> bool:
        """Whether the levels are spaced by factors, such as learning rates."""
        numbers = self.numbers
        if numbers is None or numbers.min() <= 0:
            return False
        return bool(numbers.max() > WIDE * numbers.min())


@dataclass(frozen=True)
class Effects:
    """The fitted model.

    sizes: small to large. models: their names. block_draws: log error of a block without the
    effects of its settings [draws, blocks]. noise: draws of the standard deviation of log error
    between seeds. cell_draws: what is left of interactions in the cell of each row [draws, cells];
    None where that cannot be separated. has_seeds: whether a point has several. missing: why
    settings are not compared. error: the metric.
    """

    rows: Rows
    sizes: list[Size]
    models: list[str]
    model_of_block: Index
    block_of_row: Index
    block_draws: Floats
    axes: list[Levels]
    noise: Floats
    cell_of_row: Index
    cell_draws: Floats | None
    has_seeds: bool
    missing: list[str]
    error: str

    @cached_property
    def parameters(self) -> Floats:
        """The parameters of each size."""
        return np.array([parameters for parameters, _ in self.sizes])

    @cached_property
    def excess(self) -> Floats:
        """The expected log error of each row's setting, less that of its model's best levels."""
        total = np.zeros(len(self.rows))
        model = self.model_of_block[self.block_of_row]
        for axis in self.axes:
            expected = axis.compared.mean(0)
            total += expected[model, axis.of_row] - expected[model, axis.best[model]]
        return total

    @cached_property
    def is_best(self) -> NDArray[np.bool_]:
        """Whether a row has the setting that is best of those that have run in its block."""
        lowest = np.full(len(self.model_of_block), np.inf)
        np.minimum.at(lowest, self.block_of_row, self.excess)
        return self.excess <= lowest[self.block_of_row]

    @cached_property
    def best_draws(self) -> Floats:
        """Log error of each block at the best level of every axis [draws, blocks].

        It is that at the compute of the best setting that ran.
        """
        total = self.block_draws
        model = self.model_of_block
        _, row = np.unique(self.block_of_row[self.is_best], return_index=True)
        for axis in self.axes:
            ran = axis.of_row[self.is_best][row]
            change = axis.compared[:, model, axis.best[model]] - axis.compared[:, model, ran]
            total = total + axis.draws[:, model, ran] + change
        return total

    @cached_property
    def setting_draws(self) -> Floats:
        """Draws of the expected log error of each row [draws, rows], at its own steps.

        With several seeds it is the mean of those of a setting in its block, which is not shrunk;
        the noise and the effects of seeds are those of all trials. Else it is that of the model.
        """
        if self.has_seeds:
            keys = zip(self.block_of_row, column(self.rows, "seed"), strict=True)
            seeds, seed = _numbered(keys)
            factors: list[Factor] = []
            if len(seeds) < len(self.rows):
                factors.append((seed, SEED_SCALE))
            y = np.log(np.array(column(self.rows, self.error), float))
            drawn = mixed_model.sample(y, self.cell_of_row, factors)
            return drawn.blocks[:, self.cell_of_row]
        total = self.block_draws[:, self.block_of_row]
        model = self.model_of_block[self.block_of_row]
        for axis in self.axes:
            total = total + axis.draws[:, model, axis.of_row]
        return total

    def relative(self, shown: Levels | None = None) -> Floats:
        """The error of each row over that of its block at the mean of all levels [rows].

        It is that at equal compute where the levels of an axis are compared so.
        shown: without what the levels of all other axes do; None: with what all do.
        """
        expected = self.block_draws[:, self.block_of_row]
        model = self.model_of_block[self.block_of_row]
        for axis in self.axes:
            expected = expected + (axis.draws - axis.of_model)[:, model, axis.of_row]
            if shown and axis is not shown:
                expected = expected + axis.of_model[:, model, axis.of_row]
        errors = np.array(column(self.rows, self.error), float)
        return errors / np.exp(np.median(expected, 0))

    def compute(
        self,
        name: str,
    ) -> Floats:
        """Return the mean compute of each block at its best setting."""
        best = self.is_best
        block = self.block_of_row[best]
        values = np.array(column(self.rows, name), float)[best]
        return np.bincount(block, values) / np.bincount(block)


def fit(
    rows: Rows,
    error: str,
    axes: Collection[str],
    smooth: bool = True,
) -> Effects:
    """Fit the model to rows of finished trials with positive errors. axes: settings that vary.

    smooth: blocks scatter around a surface; without it, nothing is known of them but their trials.

    An axis that says nothing beyond the blocks and the axes before it is left out: no block has two
    of its levels, or it changes together with another one.
    """
    names_of_sizes = size_names(rows)
    sizes = list(names_of_sizes)
    model = np.array([sizes.index(size_of(row)) for row in rows])
    keys = [(m, row["steps"], row.get(COOLDOWN)) for m, row in zip(model, rows, strict=True)]
    blocks, block = _numbered(keys)
    levels, missing, free = _swept(rows, axes, block)
    factors: list[Factor] = []
    for _, names, of_row in levels:
        factors.append((of_row, LEVEL_SCALE))
        if len(sizes) > 1:
            factors.append((model * len(names) + of_row, SIZE_SCALE))
    settings = np.stack([block, *(of_row for _, _, of_row in levels)], 1)
    cells, cell = _numbered(map(tuple, settings.tolist()))
    seeds, seed = _numbered(zip(block, column(rows, "seed"), strict=True))
    has_seeds = _points(rows, axes, block) < len(rows)
    beyond = free - (len(rows) - len(cells))  # cells that the levels do not explain
    has_cells = bool(levels) and has_seeds and beyond >= MIN_BEYOND
    if has_cells:
        factors.append((cell, CELL_SCALE))
    has_seed_effects = bool(levels) and len(blocks) < len(seeds) < len(rows)
    if has_seed_effects:
        factors.append((seed, SEED_SCALE))
    y = np.log(np.array(column(rows, error), float))
    surface = _surface(blocks, sizes) if smooth else None
    posterior = mixed_model.sample(y, block, factors, surface)
    noise = posterior.noise
    if has_seed_effects:
        noise = np.hypot(noise, posterior.scales[:, -1])
    model_of_block = np.array([number for number, *_ in blocks])
    steps = np.array([steps or 1 for _, steps, _ in blocks], float)
    compute = _level_compute(rows, levels, model, block)
    slope = level_compute.slope(posterior.blocks, model_of_block, steps)
    return Effects(
        rows=rows,
        sizes=sizes,
        models=list(names_of_sizes.values()),
        model_of_block=model_of_block,
        block_of_row=block,
        block_draws=posterior.blocks,
        axes=_levels_of(levels, posterior.effects, model, compute, slope),
        noise=noise,
        cell_of_row=cell,
        cell_draws=posterior.effects[-1 - has_seed_effects] if has_cells else None,
        has_seeds=has_seeds,
        missing=missing,
        error=error,
    )


def _points(
    rows: Rows,
    axes: Collection[str],
    block: Index,
) -> int:
    """Count the points: trials that differ in more than their seed."""
    points: set[tuple[object, ...]] = set()
    for row, number in zip(rows, block.tolist(), strict=True):
        setting = map(row.get, axes)
        points.add((number, *setting))
    return len(points)


def _levels_of(
    levels: Iterable[Swept],
    drawn: Iterable[Floats],
    model: Index,
    compute: Iterable[Floats],
    slope: Floats | None,
) -> list[Levels]:
    """Return the effects of each axis. model: of each row."""
    models = int(model.max()) + 1
    effects = iter(drawn)
    fitted: list[Levels] = []
    for (axis, names, of_row), log_compute in zip(levels, compute, strict=True):
        draws = np.repeat(next(effects)[:, None], models, 1)
        if models > 1:
            draws = draws + _by_model(next(effects), models, len(names))
        has_trials = np.zeros((models, len(names)), bool)
        has_trials[model, of_row] = True
        fitted.append(Levels(axis, names, of_row, draws, has_trials, log_compute, slope))
    return fitted


def _level_compute(
    rows: Rows,
    levels: Sequence[Swept],
    model: Index,
    block: Index,
) -> list[Floats]:
    """Return the log compute of each level at equal steps; 0 where FLOPs are unknown."""
    known = column(rows, FLOPS)
    if len(known) < len(rows) or min(known) <= 0:
        return [np.zeros((model.max() + 1, len(names))) for _, names, _ in levels]
    axes = [(len(names), of_row) for _, names, of_row in levels]
    return level_compute.by_axis(axes, model, block, np.log(np.array(known, float)))


def _swept(
    rows: Rows,
    axes: Collection[str],
    block: Index,
) -> tuple[list[Swept], list[str], int]:
    """Return the axes that can be compared, why others cannot, and the free trials."""
    levels: list[Swept] = []
    missing: list[str] = []
    known = np.eye(block.max() + 1)[block]
    rank = known.shape[1]
    for axis in axes:
        names, of_row = _levels(column(rows, axis))
        wider = np.hstack([known, np.eye(len(names))[of_row]])
        wider_rank = int(np.linalg.matrix_rank(wider))
        if wider_rank > rank:
            levels.append((axis, names, of_row))
            known, rank = wider, wider_rank
        elif len(names) > 1:
            name = labels.axis_name(axis, axes)
            missing.append(f"{name} is not compared: it changes only together with other axes")
    free = len(rows) - rank
    if levels and free < 1:
        missing.append(f"settings are not compared: {len(rows)} trials; add seeds or horizons")
        levels = []
    return levels, missing, free


def _by_model(
    own: Floats,
    models: int,
    levels: int,
) -> Floats:
    """Return effects of a level at a size as [draws, models, levels]; 0 after the last one run."""
    padded = np.zeros((len(own), models * levels))
    padded[:, : own.shape[1]] = own
    return padded.reshape(-1, models, levels)


def _surface(
    blocks: Iterable[Block],
    sizes: Sequence[Size],
) -> Floats | None:
    """Return regressors of log error by the logarithms of model size and horizon."""
    log_size: list[float] = []
    log_steps: list[float] = []
    for model, steps, _ in blocks:
        log_size.append(math.log(sizes[model][0]))
        log_steps.append(math.log(steps or 1))
    return mixed_model.surface_of(np.array(log_size), np.array(log_steps))


def _numbered(
    keys: Iterable[Any],
) -> tuple[list[Any], Index]:
    """Return the distinct keys in the order of their first use, and the number of each."""
    numbers: dict[Any, int] = {}
    of_row: list[int] = []
    for key in keys:
        of_row.append(numbers.setdefault(key, len(numbers)))  # noqa: PERF401
    return list(numbers), np.array(of_row)


def _levels(cells: Sequence[str]) -> tuple[list[str], Index]:
    """Return the levels of an axis in their order, and the level of each row."""
    cells = [cell or NOT_SET for cell in cells]
    names = sorted(set(cells), key=labels.sort_key)
    return names, np.array(list(map(names.index, cells)))
