"""What a sweep answers: for each setting the best level by size, and whether it moves with size.

In: `Effects`. Out: `Answer` per axis, and its sentence. The best level of a model is chosen again
in each draw, so that its interval includes the choice.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jepa_cluster import labels
from jepa_cluster.errors import plural
from jepa_cluster.report.power_law import LEVEL, Interval, quantiles
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.mixed_model import Floats, Index

MAX_AT_END = (1 - LEVEL) / 2  # share of draws at an end, above which the interval reaches it


@dataclass(frozen=True)
class Best:
    """The best level of an axis for one model.

    likely: the levels that hold LEVEL of the draws. optimum: between levels that are numbers, by a
    parabola through the best one and its neighbours; None where there are fewer than three. lowest,
    highest: of the levels that ran; an optimum there may be beyond them.
    """

    model: str
    level: str
    likely: list[str]
    optimum: Interval | None
    lowest: float = -math.inf
    highest: float = math.inf

    @property
    def text(self) -> str:
        """The optimum with its interval, or the level with the others that may be the best one."""
        if self.optimum:
            is_least = math.isclose(self.optimum.low, self.lowest)
            is_most = math.isclose(self.optimum.high, self.highest)
            if is_least and is_most:
                return f"anywhere from {self.lowest:.3g} to {self.highest:.3g}"
            beyond = " or less" * is_least + " or more" * is_most
            if math.isclose(self.optimum.low, self.optimum.high):
                return f"{self.optimum.value:.3g}{beyond}"
            return f"{self.optimum}{beyond}"
        others = ", ".join(name for name in self.likely if name != self.level)
        return self.level + (f" (or {others})" if others else "")


@dataclass(frozen=True)
class Answer:
    """What is known of one axis.

    name: of the axis, as labels have it. moves: "yes", "no", or "" where it is not known. unknown:
    why, where more trials would not help. shift: of the optimum per tenfold parameters, as a factor
    where the levels are spaced by factors. rise: from the best level of the smallest model to that
    of the largest, among those that all ran, where levels are numbers; else None. effect: error at
    the level that is worst for the mean model over that at its best one, less 1. at_equal: how
    levels of different compute are compared; '' where they cost the same.
    """

    axis: str
    name: str
    best: list[Best]
    moves: str
    unknown: str
    shift: Interval | None
    is_log: bool
    rise: float | None
    effect: Interval
    at_equal: str

    @property
    def trend(self) -> str:
        """One of labels.TRENDS; '' where it is not known, or has no direction."""
        if self.moves == "no":
            return "stays"
        rise = self.rise
        if self.shift:
            rise = self.shift.value - (1 if self.is_log else 0)
        if self.moves == "" or not rise:
            return ""
        return "rises" if rise > 0 else "falls"


def answer(
    e: Effects,
    axes: Collection[str],
    axis: Levels,
) -> Answer:
    """Return the answer of an axis. axes: of the sweep."""
    best: list[Best] = []
    for number, model in enumerate(e.models):
        optimum = _optimum(axis, number, axis.has_trials[number])
        level = axis.names[axis.best[number]]
        found = Best(model, level, _likely(axis, number), None)
        if optimum is not None and axis.numbers is not None:
            ran = axis.numbers[axis.has_trials[number]]
            ends = float(ran.min()), float(ran.max())
            found = replace(found, optimum=_natural(axis, optimum), lowest=ends[0], highest=ends[1])
        best.append(found)
    expected = axis.relative.mean(0)
    worst = axis.relative[:, expected.argmax()] - axis.relative[:, expected.argmin()]
    moves, shift, unknown = _moves(e, axis)
    rise = None
    common = axis.has_trials.all(0)
    if axis.numbers is not None and common.any():
        best_of_common = axis.compared.mean(0)[:, common].argmin(1)
        levels = axis.numbers[common][best_of_common]
        rise = float(levels[-1] - levels[0])
    return Answer(
        axis=axis.axis,
        name=labels.axis_name(axis.axis, axes),
        best=best,
        moves=moves,
        unknown=unknown,
        shift=shift,
        is_log=axis.is_log,
        rise=rise,
        effect=_interval(np.exp(worst) - 1),
        at_equal=_at_equal(axis),
    )


def _at_equal(axis: Levels) -> str:
    """Return at equal what levels are compared, and how the dearest differs from the cheapest."""
    compute = axis.log_compute.mean(0)
    if not compute.any():
        return ""
    dearest, cheapest = axis.names[compute.argmax()], axis.names[compute.argmin()]
    ratio = f"{dearest} takes ×{np.exp(np.ptp(compute)):.2f} the FLOPs of {cheapest}"
    if axis.slope is None:
        return f"at equal steps, where {ratio} (several horizons would give equal FLOPs)"
    return f"at equal FLOPs (at equal steps {ratio})"


def _interval(draws: Floats) -> Interval:
    low, high = quantiles(draws)
    return Interval(float(np.median(draws)), float(low), float(high))


def _natural(
    axis: Levels,
    draws: Floats,
) -> Interval:
    """Return the interval of draws in the coordinate of the axis, in its own unit."""
    return _interval(10**draws if axis.is_log else draws)


def _likely(
    axis: Levels,
    model: int,
) -> list[str]:
    """Return the fewest levels that are the best one in LEVEL of the draws."""
    lowest = axis.lowest[:, model]
    share = np.bincount(lowest, minlength=len(axis.names)) / len(lowest)
    order = np.argsort(-share, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(share[order]), LEVEL))
    return [axis.names[level] for level in order[:count]]


def _optimum(
    axis: Levels,
    model: int,
    among: NDArray[np.bool_],
) -> Floats | None:
    """Return draws of the level at which the error of a model is lowest, between those in `among`.

    In the coordinate of the axis: the number, or log10 of it where levels are spaced by factors.
    """
    numbers = axis.numbers
    if numbers is None or among.sum() < 3:
        return None
    coordinate = np.log10(numbers) if axis.is_log else numbers
    order = np.flatnonzero(among)[np.argsort(coordinate[among])]
    x, y = coordinate[order], axis.compared[:, model, order]
    row, lowest = np.arange(len(y)), y.argmin(1)
    middle = lowest.clip(1, len(x) - 2)
    x0, x1, x2 = (x[middle + step] for step in (-1, 0, 1))
    left = (y[row, middle] - y[row, middle - 1]) / (x1 - x0)
    right = (y[row, middle + 1] - y[row, middle]) / (x2 - x1)
    bend = right - left
    vertex = (x0 + x1) / 2 - left * (x2 - x0) / 2 / np.maximum(bend, 1e-12)
    vertex = np.clip(vertex, x[np.maximum(lowest - 1, 0)], x[np.minimum(lowest + 1, len(x) - 1)])
    return np.where(bend > 0, vertex, x[lowest])


def _moves(
    e: Effects,
    axis: Levels,
) -> tuple[str, Interval | None, str]:
    """Return whether the best level differs between sizes, and the shift per tenfold parameters.

    The last is why that is not known, where more trials of the same kind would not help.

    Only levels that all models have run are compared. An optimum at an end of them may be beyond:
    then a shift is at least as large, and that nothing moves is not known.
    """
    common = np.array(axis.has_trials.all(0))
    if len(set(e.parameters)) < 2 or common.sum() < 2:
        return "", None, "no two levels that all sizes ran"
    if axis.numbers is None or common.sum() < 3:
        return _moves_between_names(axis, np.flatnonzero(common)), None, ""
    decades = np.log10(e.parameters) - np.log10(e.parameters).mean()
    places = np.log10(axis.numbers[common]) if axis.is_log else axis.numbers[common]
    slopes = np.zeros(len(axis.compared))
    at_end = 0.0  # the largest share of a model's draws
    for model, decade in enumerate(decades):
        optimum = _optimum(axis, model, common)
        if optimum is not None:
            slopes += optimum * decade / (decades @ decades)
            for end in (places.min(), places.max()):
                at_end = max(at_end, float(np.mean(optimum == end)))
    slope = _interval(slopes)
    shift = _natural(axis, slopes)
    if 0 not in slope:
        return "yes", shift, ""
    if at_end > MAX_AT_END:
        why = "a best level is the last one that ran: add levels"
        return "", None, why if at_end > LEVEL else ""
    gap = np.diff(np.sort(places)).min()
    reach = max(abs(slope.low), abs(slope.high)) * np.ptp(decades)
    return "no" if reach < gap else "", shift, ""


def _moves_between_names(
    axis: Levels,
    common: Index,
) -> str:
    """Return whether the smallest and the largest model have other best levels, beyond chance."""
    draws = axis.compared[:, :, common]
    lowest = draws.argmin(2)
    if float(np.mean((lowest == lowest[:, :1]).all(1))) > LEVEL:
        return "no"
    first, *_, last = draws.mean(0).argmin(1)
    contrast = draws[:, :, first] - draws[:, :, last]
    small, large = contrast[:, 0] < 0, contrast[:, -1] > 0
    return "yes" if first != last and min(small.mean(), large.mean()) > LEVEL else ""


def expectation(
    a: Answer,
    wanted: object,
) -> str:
    """Return whether the best level, or how it moves with size, is as expected."""
    text = labels.format_value(wanted)
    if text in labels.TRENDS:
        return f"expected that {a.name} {text}: {_trend_verdict(a, text)}"
    if not all(text in best.likely for best in a.best):
        verdict = "not met"
    else:
        verdict = "met" if all(best.likely == [text] for best in a.best) else "open"
    return f"expected {a.name}={text}: {verdict}"


def _trend_verdict(
    a: Answer,
    wanted: str,
) -> str:
    if len(a.best) < 2:
        return "open: one model"
    if wanted in labels.DIRECTIONS and a.rise is None:
        return "open: its levels have no order"
    if not a.moves:
        return "open"
    return "met" if a.trend == wanted else "not met"


def notes(e: Effects) -> list[str]:
    """Return why settings are not compared, and how far apart seeds are."""
    found = [*e.missing]
    if e.axes:
        noise = labels.format_percent(labels.rounded(float(np.median(e.noise))))
        what = "seeds of a point differ" if e.has_seeds else "trials differ from these effects"
        found.append(f"{what} by {noise} % (standard deviation)")
    return found


def sentence(
    e: Effects,
    a: Answer,
) -> str:
    """Return the best level of each model, whether it moves, and how much the axis matters."""
    best = a.best[0].text
    if len(e.models) > 1:
        best = "; ".join(f"{each.model} {each.text}" for each in a.best)
    if a.at_equal:
        best += f", {a.at_equal}"
    if len(e.models) > 1:
        best += f"; moves with size: {moves(e, a)}"
    return f"{a.name}: best {best}; worst level {effect(a)} above the best"


def moves(
    e: Effects,
    a: Answer,
) -> str:
    """Return whether the best level moves with size, and by how much."""
    more = plural(3 * len(e.rows), "more trial")  # four times as many halve an interval
    why = a.unknown or f"{more} would halve the intervals"
    found = a.moves or f"not known yet ({why})"
    if a.moves == "yes" and a.trend:
        found = a.trend
    if a.shift and a.is_log:
        found += f", ×{a.shift:.3f} per tenfold parameters"
    elif a.shift:
        digits = max(0, 1 - math.floor(math.log10(a.shift.high - a.shift.low + 1e-12)))
        found += f", {a.shift:+.{digits}f} per tenfold parameters"
    return found


def effect(a: Answer) -> str:
    """Return how much the error at the worst level is above that at the best one."""
    ends = map(labels.rounded, (a.effect.value, a.effect.low, a.effect.high))
    value, low, high = map(labels.format_percent, ends)
    return f"{value} % [{low}, {high}]"
