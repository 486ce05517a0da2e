"""What a sweep answers: for each setting the best level by size, and whether it moves with size.

In: `Effects`. Out: `Answer` per axis, and its sentence. Every choice of a best level is made again
in each draw, so that intervals include it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jepa_cluster import labels
from jepa_cluster.errors import plural
from jepa_cluster.report.power_law import LEVEL, Interval, NotEnoughData, quantiles
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.mixed_model import Floats


@dataclass(frozen=True)
class Best:
    """The best level of an axis for one model.

    likely: the levels that hold LEVEL of the draws. optimum: between levels that are numbers, by a
    parabola through the best one and its neighbours; None where there are fewer than three.
    """

    model: str
    level: str
    likely: list[str]
    optimum: Interval | None

    def __str__(self) -> str:
        if self.optimum:
            return f"{self.model} {self.optimum:.2g}"
        others = ", ".join(name for name in self.likely if name != self.level)
        return f"{self.model} {self.level}" + (f" (or {others})" if others else "")


@dataclass(frozen=True)
class Answer:
    """What is known of one axis.

    moves: "yes", "no", or "" where it is not known. shift: of the optimum per tenfold parameters.
    effect: worst level over best level, less 1.
    """

    axis: str
    best: list[Best]
    moves: str
    shift: Interval | None
    effect: Interval


def answer(
    e: Effects,
    axis: Levels,
) -> Answer:
    """Return the answer of an axis."""
    optima = [_optimum(axis, number) for number in range(len(e.models))]
    best: list[Best] = []
    for number, (model, optimum) in enumerate(zip(e.models, optima, strict=True)):
        found = None if optimum is None else _interval(optimum, float(np.median(optimum)))
        level = axis.names[axis.best[number]]
        best.append(Best(model, level, _likely(axis, number), found))
    spread = np.exp(np.ptp(axis.relative, 1)) - 1
    moves, shift = _moves(e, axis, [each for each in optima if each is not None])
    return Answer(axis.axis, best, moves, shift, _interval(spread, float(np.median(spread))))


def _interval(
    draws: Floats,
    value: float,
) -> Interval:
    low, high = quantiles(draws)
    return Interval(value, float(low), float(high))


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
) -> Floats | None:
    """Return draws of the number at which the error of a model is lowest."""
    numbers = axis.numbers
    there = axis.has_trials[model]
    if numbers is None or there.sum() < 3:
        return None
    order = np.flatnonzero(there)[np.argsort(numbers[there])]
    x, y = numbers[order], axis.draws[:, model, order]
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
    optima: Sequence[Floats],
) -> tuple[str, Interval | None]:
    """Return whether the best level differs between sizes, and the shift per tenfold parameters."""
    numbers = axis.numbers
    if len(set(e.parameters)) < 2:
        return "", None
    if numbers is not None and len(optima) == len(e.models):
        decades = np.log10(e.parameters) - np.log10(e.parameters).mean()
        slopes = np.stack(optima, 1) @ decades / (decades @ decades)
        shift = _interval(slopes, float(np.median(slopes)))
        if 0 not in shift:
            return "yes", shift
        reach = max(abs(shift.low), abs(shift.high)) * np.ptp(decades)
        return "no" if reach < np.diff(np.sort(numbers)).min() else "", shift
    lowest = axis.lowest
    same = float(np.mean((lowest == lowest[:, :1]).all(1)))
    return ("no" if same > LEVEL else "yes" if same < 1 - LEVEL else ""), None


def expectation(
    a: Answer,
    wanted: object,
) -> str:
    """Return whether the best level, or how it moves with size, is as expected."""
    text = labels.format_value(wanted)
    if text in labels.TRENDS:
        verdict = "open" if not a.moves else "met" if _trend(a) == text else "not met"
    elif not all(text in best.likely for best in a.best):
        verdict = "not met"
    else:
        verdict = "met" if all(best.likely == [text] for best in a.best) else "open"
    name = labels.ABBREVIATIONS.get(a.axis, a.axis)
    return f"expected: {name} {text}: {verdict}"


def _trend(a: Answer) -> str:
    if a.moves == "no":
        return "stays"
    if a.shift is None:
        return "moves"
    return "rises" if a.shift.value > 0 else "falls"


def lines(e: Effects | NotEnoughData, answers: Sequence[Answer]) -> list[str]:
    """Return a sentence per axis, and how far apart seeds are."""
    if isinstance(e, NotEnoughData):
        return []
    if e.missing:
        return [f"settings are not compared: {e.missing}"]
    found = list(map(partial(sentence, e), answers))
    if found:
        noise = 100 * float(np.median(e.noise))
        found.append(f"seeds of a point differ by {noise:.1f} % (standard deviation)")
    return found


def sentence(e: Effects, a: Answer) -> str:
    """Return the best level of each model, whether it moves, and how much the axis matters."""
    name = labels.ABBREVIATIONS.get(a.axis, a.axis)
    more = plural(3 * len(e.rows), "more trial")  # four times as many halve an interval
    moves = {
        "yes": "moves with size",
        "no": "does not move with size",
        "": f"moves with size: not known yet ({more} would halve the intervals)",
    }[a.moves]
    if a.shift:
        moves += f", {a.shift:+.2g} per tenfold parameters"
    effect = " to ".join(f"{100 * end:.1f}" for end in (a.effect.low, a.effect.high))
    best = "; ".join(map(str, a.best))
    if len(e.models) < 2:
        best = best.removeprefix(f"{e.models[0]} ")
    moves = f"; {moves}" if len(e.models) > 1 else ""
    return f"{name}: best {best}{moves}; worst level {effect} % above the best"
