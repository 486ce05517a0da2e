"""What page and PNG draw of the effects beside the levels: whiskers, heat maps, importance.

In: `Effects`. Out: numbers and labels; nothing is drawn here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from jepa_cluster.report import power_law
from jepa_cluster.report.answers import Answer
from jepa_cluster.report.power_law import Interval
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.mixed_model import Floats, Index

SEEDS, UNEXPLAINED = "seeds", "unexplained"  # the bar of the noise, with and without seeds


@dataclass(frozen=True)
class HeatMap:
    """The error at each pair of levels over the mean of its size.

    size: number of the model; None where y is the model. values, low, high: nan without a finished
    trial [y, x]. count: finished trials.
    """

    x: str
    y: str
    size: int | None
    x_levels: Sequence[str]
    y_levels: Sequence[str]
    values: Floats
    low: Floats
    high: Floats
    count: Index


def seed_reach(e: Effects) -> float:
    """Return half the interval (power_law.LEVEL) of a trial's log error between seeds.

    That of the mean of n seeds is smaller by the root of n. nan where no point has several seeds.
    """
    if not e.has_seeds:
        return float("nan")
    return NormalDist().inv_cdf((1 + power_law.LEVEL) / 2) * float(np.median(e.noise))


def importance(
    e: Effects,
    answers: Sequence[Answer],
) -> dict[str, Interval]:
    """Return by how much the worst level of each axis is above its best one, and the noise last."""
    bars = {answer.axis: answer.effect for answer in answers}
    bars = dict(sorted(bars.items(), key=lambda bar: -bar[1].value))
    low, high = power_law.quantiles(e.noise)
    bars[SEEDS if e.has_seeds else UNEXPLAINED] = Interval(
        float(np.median(e.noise)), float(low), float(high)
    )
    return bars


def ordered_axes(e: Effects) -> list[Levels]:
    """Return the axes, those of masks first."""
    return sorted(e.axes, key=lambda axis: not axis.axis.startswith("mask."))


def level_order(axis: Levels) -> Index:
    """Return the levels by their numbers; names as they are."""
    if axis.numbers is None:
        return np.arange(len(axis.names))
    return np.argsort(axis.numbers, kind="stable")


def heat_maps(e: Effects) -> list[HeatMap]:
    """Return a map per pair of axes and model; of a single axis, one of levels and models."""
    axes = ordered_axes(e)
    if len(axes) == 1 and len(e.models) > 1:
        return [_by_model(e, axes[0])]
    found: list[HeatMap] = []
    for x, y in itertools.combinations(axes, 2):
        found += _of_pair(e, x, y)
    return found


def _of_pair(
    e: Effects,
    x: Levels,
    y: Levels,
) -> Iterator[HeatMap]:
    model = e.model_of_block[e.block_of_row]
    for number in range(len(e.models)):
        draws = y.of_model[:, number, :, None] + x.of_model[:, number, None, :]
        mine = model == number
        place = y.of_row[mine], x.of_row[mine]
        count = np.zeros(draws.shape[1:], int)
        np.add.at(count, place, 1)
        if e.cell_draws is not None:
            cells = np.zeros(draws.shape)
            of_trials = e.cell_draws[:, e.cell_of_row[mine]].T
            for row, column, own in zip(*place, of_trials, strict=True):
                cells[:, row, column] += own
            draws = draws + cells / np.maximum(count, 1)
        order = level_order(y)
        names = [y.names[level] for level in order]
        yield _heat_map(x, y.axis, number, names, draws[:, order], count[order])


def _by_model(
    e: Effects,
    x: Levels,
) -> HeatMap:
    count = np.zeros(x.has_trials.shape, int)
    np.add.at(count, (e.model_of_block[e.block_of_row], x.of_row), 1)
    return _heat_map(x, "model", None, e.models, x.of_model, count)


def _heat_map(
    x: Levels,
    y: str,
    size: int | None,
    y_levels: Sequence[str],
    draws: Floats,
    count: Index,
) -> HeatMap:
    order = level_order(x)
    count = count[:, order]
    draws = np.where(count > 0, draws[:, :, order], np.nan)
    ends = np.array([(1 - power_law.LEVEL) / 2, 0.5, (1 + power_law.LEVEL) / 2])
    low, middle, high = np.exp(np.quantile(draws, ends, axis=0))
    return HeatMap(
        x=x.axis,
        y=y,
        size=size,
        x_levels=[x.names[level] for level in order],
        y_levels=y_levels,
        values=middle,
        low=low,
        high=high,
        count=count,
    )
