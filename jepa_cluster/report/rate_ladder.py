"""The best learning rate of a ladder: one size at one horizon, trained at several rates.

In: rates, and the final errors of their trials. Out: the optimum with its interval, and what it
costs to be off. The model is a parabola of log error over log2 rate with a side of its own to the
left and to the right, because the error rises faster on one of them. Its posterior is evaluated on
a grid, so a flat curve gives a wide interval, and not a failure.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jepa_cluster.labels import FITTED, format_number, format_percent
from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.power_law import Interval, quantiles

DRAWS = 400
MIN_TRIALS = 5  # that have finished: the model has four parameters
MIN_RATES = 3
MAX_OCTAVES = 2.0  # of the interval, where being off costs more than seeds scatter
CONVEX_SHARE = 0.9  # of the draws, at least
EDGE_SHARE = 0.75  # of the draws beyond the inner rates
CONCAVE_BY = 2.0  # standard errors
BETTER_BY = 3.0  # standard deviations, than the untrained encoder
ASYMMETRY = np.exp(np.linspace(-3, 3, 13))  # left curvature over right one, on the grid
ASYMMETRY_SCALE = 1.5  # of its logarithm: standard deviation of the prior
OCTAVES_BEYOND = 1.0  # of the grid, on each side of the ladder
GRID = 241


@dataclass(frozen=True)
class Ladder:
    """Finished trials of one size at one horizon.

    rates, errors, seeds: of each trial. untrained: errors before training. diverged: rates at which
    a trial diverged.
    """

    rates: Floats
    errors: Floats
    seeds: Floats
    untrained: Floats
    diverged: Sequence[float] = ()

    @property
    def distinct(self) -> Floats:
        """The distinct rates, ascending."""
        return np.unique(self.rates)


@dataclass(frozen=True)
class Optimum:
    """Draws of the optimum of a ladder.

    log2_rate: of the optimum. left, right: rise of log error per squared octave on each side.
    noise: standard deviation of log error of a trial. error: at the optimum. problems: why it must
    not be used. widen: -1 (lower rates are missing), 1 (higher ones), or 0.
    """

    log2_rate: Floats
    left: Floats
    right: Floats
    noise: float
    error: float
    problems: tuple[str, ...] = ()
    widen: int = 0

    @cached_property
    def lr(self) -> Interval:
        low, high = quantiles(self.log2_rate)
        middle = np.median(self.log2_rate)
        return Interval(*(float(2.0**x) for x in (middle, low, high)))

    def excess(
        self,
        rate: float,
    ) -> Interval:
        """Return what a rate costs: its error over that of the optimum, less one."""
        rise = _rise(np.log2(rate) - self.log2_rate, self.left, self.right)
        low, high = quantiles(rise)
        return Interval(*(float(np.expm1(x)) for x in (np.median(rise), low, high)))


def _rise(
    octaves: Floats,
    left: Floats,
    right: Floats,
) -> Floats:
    """Return how much log error rises at so many octaves from the optimum."""
    return octaves**2 * np.where(octaves < 0, left, right)


def optimum(
    ladder: Ladder,
) -> Optimum | str:
    """Return the optimum of a ladder, or why there is none."""
    rates = ladder.distinct
    trials = len(ladder.rates)
    if trials < MIN_TRIALS or len(rates) < MIN_RATES:
        have = f"{trials} finished at {len(rates)} rates"
        return f"{have}; {MIN_TRIALS} trials at {MIN_RATES} rates are needed"
    x = np.log2(ladder.rates)
    is_bounded = any(rate > rates[-1] for rate in ladder.diverged)
    highest = x.max() + (0.0 if is_bounded else OCTAVES_BEYOND)
    is_same = ladder.seeds[:, None] == ladder.seeds
    centre = np.eye(trials) - is_same / is_same.sum(0)
    y = np.log(ladder.errors)
    found, convex = _posterior(x, y, centre, highest)
    problems, widen = _problems(ladder, found, convex, is_bounded)
    if _is_concave(x, centre @ y):
        problems += ("the error has a maximum over the rate and no minimum: add rates",)
    return replace(found, problems=problems, widen=widen)


def _posterior(
    x: Floats,
    y: Floats,
    centre: Floats,
    highest: float,
) -> tuple[Optimum, float]:
    """Return draws for log2 rates x and log errors y, and the share of them that are convex.

    centre: takes the mean of each seed off, because trials of a seed have much in common.
    highest: log2 rate of the grid.

    For each optimum and asymmetry of a grid, least squares give the rest. The weight of a cell is
    its likelihood with the noise integrated out, times a log-normal prior of the asymmetry.
    """
    place = np.linspace(x.min() - OCTAVES_BEYOND, highest, GRID)
    rise = _rise(
        x - place[:, None, None],
        ASYMMETRY[:, None] ** 0.5,
        ASYMMETRY[:, None] ** -0.5,
    )
    centred = rise @ centre
    squares = (centred**2).sum(-1)
    own = centre @ y
    curvature = (centred @ own) / squares
    explained = np.maximum(curvature, 0.0) ** 2 * squares
    residual = own @ own - explained + 1e-12
    degrees = max(round(np.trace(centre)) - 2, 1)
    log_weight = -degrees / 2 * np.log(residual) - (np.log(ASYMMETRY) / ASYMMETRY_SCALE) ** 2 / 2
    weight = np.exp(log_weight - log_weight.max()).ravel()
    rng = np.random.default_rng(zlib.crc32(x.tobytes() + y.tobytes()))  # its own: see the law
    cell = rng.choice(weight.size, DRAWS, p=weight / weight.sum())
    variance = residual.ravel()[cell] / rng.chisquare(degrees, DRAWS)
    spread = (variance / squares.ravel()[cell]) ** 0.5
    drawn = curvature.ravel()[cell] + spread * rng.normal(size=DRAWS)
    rising = np.maximum(drawn, 0.0)
    row, column = np.unravel_index(cell, residual.shape)
    lowest = y.mean() - rising * rise.mean(-1).ravel()[cell]
    found = Optimum(
        log2_rate=place[row],
        left=rising * ASYMMETRY[column] ** 0.5,
        right=rising * ASYMMETRY[column] ** -0.5,
        noise=float(np.median(variance) ** 0.5),
        error=float(np.exp(np.median(lowest))),
    )
    return found, float((drawn > 0).mean())


def _problems(
    ladder: Ladder,
    found: Optimum,
    convex: float,
    is_bounded: bool,
) -> tuple[tuple[str, ...], int]:
    """Return why the optimum must not be used, with what to add, and which side to widen.

    is_bounded: higher rates diverge.
    """
    rates = ladder.distinct
    problems: list[str] = []
    widen = 0
    before = float(np.log(ladder.untrained).mean()) if len(ladder.untrained) else np.inf
    if before - np.log(found.error) < BETTER_BY * found.noise:
        gain = format_percent(-np.expm1(np.log(found.error) - before))
        problems.append(
            f"the best rate is {gain} % better than the untrained encoder, and seeds scatter by "
            f"{format_percent(found.noise)} %: train longer, or add seeds"
        )
    low, high = np.log2(_inner(rates))
    below, above = (found.log2_rate < low).mean(), (found.log2_rate > high).mean()
    if max(below, 0.0 if is_bounded else above) >= EDGE_SHARE:
        widen = -1 if below > above else 1
        side = "lower" if widen < 0 else "higher"
        problems.append(f"the minimum lies at the edge of the ladder: add {side} rates")
        return tuple(problems), widen
    if max(found.excess(rate).low for rate in rates[[0, -1]]) <= np.expm1(found.noise):
        return tuple(problems), widen  # no rate is shown to cost more than seeds scatter
    width = np.log2(found.lr.high / found.lr.low)
    off = max(found.excess(found.lr.low).low, found.excess(found.lr.high).low)
    if width > MAX_OCTAVES and off > np.expm1(found.noise):
        problems.append(
            f"the interval spans a factor of {format_number(2.0**width, FITTED)}, and its ends "
            f"cost {format_percent(off)} %, more than seeds scatter: add seeds"
        )
    if convex < CONVEX_SHARE:
        problems.append("the error has no minimum over the rate: add seeds")
    return tuple(problems), widen


def _is_concave(
    x: Floats,
    y: Floats,
) -> bool:
    """Whether a parabola through all trials opens downwards, beyond chance."""
    terms, covariance = np.polyfit(x, y, 2, cov=True)
    return bool(terms[0] < -CONCAVE_BY * covariance[0, 0] ** 0.5 - 1e-9)


def _inner(
    rates: Floats,
) -> tuple[float, float]:
    """Return the rates between which a minimum counts: the inner ones.

    Of three rates: the middles between the middle one and its neighbours.
    """
    if len(rates) > 3:
        return float(rates[1]), float(rates[-2])
    return float((rates[0] * rates[1]) ** 0.5), float((rates[1] * rates[2]) ** 0.5)
