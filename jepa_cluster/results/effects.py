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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_cluster import labels
from jepa_cluster.results import mixed_model
from jepa_cluster.results.mixed_model import Factor, Floats, Index
from jepa_cluster.results.tables import Rows, column

# Prior scales of effects on log error
LEVEL_SCALE = 0.2
SIZE_SCALE = 0.1  # of a level at one size
CELL_SCALE = 0.05
SEED_SCALE = 0.1
MIN_BEYOND = 2  # else a cell cannot be separated from its levels


Block = tuple[str, int | None]  # model, steps


@dataclass(frozen=True)
class Levels:
    """The levels of one axis, and their effects.

    draws: log error at a level [draws, models, levels], up to a constant of its model. has_trials:
    whether a trial of the model has finished at the level [models, levels].
    """

    axis: str
    names: list[str]
    of_row: Index
    draws: Floats
    has_trials: NDArray[np.bool_]

    @property
    def relative(self) -> Floats:
        """Draws of the log error at each level, of the mean model, less the mean of all levels."""
        common = self.draws.mean(1)
        return common - common.mean(1, keepdims=True)

    @property
    def lowest(self) -> Index:
        """The best level in each draw, of those that a model has run [draws, models]."""
        return np.where(self.has_trials, self.draws, np.inf).argmin(2)

    @property
    def best(self) -> Index:
        """The level with the lowest expected error, of those that a model has run [models]."""
        return np.where(self.has_trials, self.draws.mean(0), np.inf).argmin(1)

    @property
    def numbers(self) -> Floats | None:
        """The levels as numbers, an interval by its middle; None where one is a name."""
        numbers = list(map(level_number, self.names))
        return None if None in numbers else np.array(numbers, float)


@dataclass(frozen=True)
class Effects:
    """The fitted model.

    models: by size. parameters: of each model. blocks: (model, steps). block_draws: log error of a
    block without the effects of its settings [draws, blocks]. noise: draws of the standard
    deviation of log error between seeds. missing: why no setting is compared; '' where they are.
    error: the metric.
    """

    rows: Rows
    models: list[str]
    parameters: Floats
    blocks: list[Block]
    block_of_row: Index
    block_draws: Floats
    axes: list[Levels]
    noise: Floats
    missing: str
    error: str

    @property
    def model_of_block(self) -> Index:
        names, _ = zip(*self.blocks, strict=True)
        return np.array(list(map(self.models.index, names)))

    @property
    def best_draws(self) -> Floats:
        """Log error of each block at the best level of every axis [draws, blocks]."""
        total = self.block_draws
        for axis in self.axes:
            best = axis.draws[:, np.arange(len(self.models)), axis.best]
            total = total + best[:, self.model_of_block]
        return total

    def relative(self, shown: Levels | None = None) -> Floats:
        """The error of each row over that of its block at the mean of all levels [rows].

        shown: without what the levels of all other axes do; None: with what all do.
        """
        expected = self.block_draws[:, self.block_of_row]
        model = self.model_of_block[self.block_of_row]
        for axis in self.axes:
            expected = expected + axis.draws.mean(2)[:, model]
            if shown and axis is not shown:
                own = axis.draws - axis.draws.mean(2, keepdims=True)
                expected = expected + own[:, model, axis.of_row]
        errors = np.array(column(self.rows, self.error), float)
        return errors / np.exp(np.median(expected, 0))

    def compute(
        self,
        name: str,
    ) -> Floats:
        """Return the mean compute of each block, of its trials at the best levels if it has any."""
        found: list[float] = []
        values = np.array(column(self.rows, name), float)
        model = self.model_of_block
        for block in range(len(self.blocks)):
            numbers = np.flatnonzero(self.block_of_row == block)
            best = numbers
            for axis in self.axes:
                best = best[axis.of_row[best] == axis.best[model[block]]]
            found.append(values[best if len(best) else numbers].mean())
        return np.array(found)


def fit(
    rows: Rows,
    error: str,
    axes: Iterable[str],
) -> Effects:
    """Fit the model to rows of finished trials with positive errors. axes: settings that vary."""
    size = dict(zip(column(rows, "model"), column(rows, "parameters"), strict=True))
    models = sorted(size, key=lambda name: (size[name], name))
    model = np.array(list(map(models.index, column(rows, "model"))))
    blocks, block = _numbered(zip(column(rows, "model"), column(rows, "steps"), strict=True))
    levels: list[tuple[str, list[str], Index]] = []
    setting = np.zeros_like(block)
    free = len(rows) - len(blocks)
    for axis in axes:
        names, of_row = _levels(column(rows, axis))
        if len(names) > 1:
            levels.append((axis, names, of_row))
            setting = setting * len(names) + of_row
            free -= len(names) - 1
    missing = ""
    if levels and free < 1:
        missing = f"{len(rows)} trials in {len(blocks)} blocks; settings need more trials or seeds"
        levels = []

    factors: list[Factor] = []
    for _, names, of_row in levels:
        factors.append((of_row, LEVEL_SCALE))
        if len(models) > 1:
            factors.append((model * len(names) + of_row, SIZE_SCALE))
    if levels:
        cells, cell = _numbered(zip(block, setting, strict=True))
        seeds, seed = _numbered(zip(block, column(rows, "seed"), strict=True))
        beyond = free - (len(rows) - len(cells))  # cells that the levels do not explain
        if beyond >= MIN_BEYOND and len(cells) < len(rows):
            factors.append((cell, CELL_SCALE))
        if len(blocks) < len(seeds) < len(rows):
            factors.append((seed, SEED_SCALE))
    y = np.log(np.array(column(rows, error), float))
    posterior = mixed_model.sample(y, block, factors, _surface(blocks, size))
    effects = iter(posterior.effects)
    fitted: list[Levels] = []
    for axis, names, of_row in levels:
        draws = np.repeat(next(effects)[:, None], len(models), 1)
        if len(models) > 1:
            draws = draws + _by_model(next(effects), len(models), len(names))
        has_trials = np.zeros((len(models), len(names)), bool)
        has_trials[model, of_row] = True
        fitted.append(Levels(axis, names, of_row, draws, has_trials))
    return Effects(
        rows=rows,
        models=models,
        parameters=np.array(list(map(size.get, models)), float),
        blocks=blocks,
        block_of_row=block,
        block_draws=posterior.blocks,
        axes=fitted,
        noise=posterior.noise,
        missing=missing,
        error=error,
    )


def _by_model(own: Floats, models: int, levels: int) -> Floats:
    """Return effects of a level at a size as [draws, models, levels]; 0 after the last one run."""
    padded = np.zeros((len(own), models * levels))
    padded[:, : own.shape[1]] = own
    return padded.reshape(-1, models, levels)


def _surface(
    blocks: Iterable[Block],
    size: Mapping[str, float],
) -> Floats | None:
    """Return regressors of log error by the logarithms of model size and horizon."""
    log_size: list[float] = []
    log_steps: list[float] = []
    for model, steps in blocks:
        log_size.append(math.log(size[model]))
        log_steps.append(math.log(steps or 1))
    return mixed_model.surface_of(np.array(log_size), np.array(log_steps))


def _numbered(keys: Iterable[Any]) -> tuple[list[Any], Index]:
    """Return the distinct keys in the order of their first use, and the number of each."""
    numbers: dict[Any, int] = {}
    of_row: list[int] = []
    for key in keys:
        of_row.append(numbers.setdefault(key, len(numbers)))  # noqa: PERF401
    return list(numbers), np.array(of_row)


def _levels(cells: Sequence[str]) -> tuple[list[str], Index]:
    """Return the levels of an axis in their order, and the level of each row."""
    names = sorted(set(cells), key=labels.sort_key)
    return names, np.array(list(map(names.index, cells)))


def level_number(text: str) -> float | None:
    """Return the number of an axis value by `labels.format_value`, of an interval its middle."""
    number = labels.number_of(text)
    if number is None and "-" in text:
        ends = list(map(labels.number_of, text.split("-", 1)))
        return None if None in ends else float(np.mean(np.array(ends, float)))
    return number
