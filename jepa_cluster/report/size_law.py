"""The best size at each compute, from E(N, D) = E0 + A N^-alpha + B D^-beta.

In: `Effects`: the draws of the error of each block, its parameters N, images D and compute. Out: a
`SizeLaw`, or `NotEnoughData`. A parabola at equal compute is biased where the sizes are not centred
on the best one and alpha differs from beta; this law is not, as long as its form holds. Source:
Hoffmann et al. 2203.15556, approach 3. Residuals are those of log E under Huber's loss.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.report import huber_fit, power_law, scatter
from jepa_cluster.report.huber_fit import HUBER, Floats, Form
from jepa_cluster.report.power_law import Interval, NotEnoughData
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import column

IMAGES = "images_seen"
NAMES = ("E0", "A", "alpha", "B", "beta")
# logarithms of E0, A, alpha, B, beta, with N and D in units of their means
LOW = np.array([-25.0, -25.0, np.log(1e-2), -25.0, np.log(1e-2)])
HIGH = np.array([5.0, 5.0, np.log(5.0), 5.0, np.log(5.0)])
MIN_LEVELS = 3  # sizes, and horizons
MIN_POWER = 0.05  # of compute in N, below which no size is the best one
MAX_DEVIATION = 0.05  # of compute per image, above which it is printed
E0_STARTS = (0.02, 0.4, 0.8)  # in units of the smallest error
EXPONENT_STARTS = (0.2, 0.5, 1.0)
FAR = 10.0  # times beyond the sizes that ran: no best size is given there


@dataclass(frozen=True)
class Surface:
    """E(N, D) of the blocks.

    theta: logarithms of NAMES, with N and D in units of `scale`. draws: the same for each draw of
    the errors [draws, 5]. log_size, log_images: of each block.
    """

    theta: Floats
    draws: Floats
    scale: Floats
    log_size: Floats
    log_images: Floats

    @cached_property
    def exponents(self) -> dict[str, Interval]:
        """alpha and beta."""
        found: dict[str, Interval] = {}
        for name in ("alpha", "beta"):
            place = NAMES.index(name)
            low, high = power_law.quantiles(np.exp(self.draws[:, place]))
            found[name] = Interval(float(np.exp(self.theta[place])), float(low), float(high))
        return found


@dataclass(frozen=True)
class PerImage:
    """Compute per image, exp(level) (N + offset)^power. worst: how far, in log, a size is off."""

    level: float
    power: float
    offset: float = 0.0
    worst: float = 0.0

    def log(self, log_size: Floats) -> Floats:
        return self.level + self.power * np.log(np.exp(log_size) + self.offset)

    def slope(self, log_size: Floats) -> Floats:
        """Return d log compute / d log N."""
        size = np.exp(log_size)
        return self.power * size / (size + self.offset)

    def deviation(self, log_size: Floats, log_compute: Floats) -> float:
        return float(np.abs(self.log(log_size) - log_compute).max())

    def __str__(self) -> str:
        size = "N" if abs(self.power - 1) < 0.005 else f"N^{self.power:.2f}"
        if abs(self.offset) > 1:
            size = f"(N {self.offset / 1e6:+.3g}M)"
        off = f", within {100 * np.expm1(self.worst):.0f} %" if self.worst > MAX_DEVIATION else ""
        return f"compute ~ {size} D{off}"


@dataclass(frozen=True)
class SizeLaw:
    """N_opt(C) by E(N, D). span: smallest and largest compute of the blocks."""

    surface: Surface
    per_image: PerImage
    span: tuple[float, float]

    def at(
        self,
        compute: float | Floats,
    ) -> Floats:
        """Return N_opt at a compute."""
        return np.exp(self._best(self.surface.theta[None], np.log(compute)))[0]

    @cached_property
    def exponent(self) -> Interval:
        """The exponent of N_opt ~ C^k, from the smallest to the largest compute."""
        ends = np.log(self.span)
        slopes = np.diff(self._best(self.surface.draws, ends))[:, 0] / np.ptp(ends)
        value = np.diff(self._best(self.surface.theta[None], ends)).item() / np.ptp(ends)
        low, high = power_law.quantiles(slopes)
        return Interval(float(value), float(low), float(high))

    def _best(
        self,
        theta: Floats,
        log_compute: Floats,
    ) -> Floats:
        """Return log N_opt [B, n].

        At the best size, dE/dN = 0 at constant C = N^g D: alpha A N^-alpha = g beta B D^-beta. So
        each N is the best one at one D, and at one C. g: slope of log compute per image.
        """
        smallest, largest = self.surface.log_size.min(), self.surface.log_size.max()
        inside = np.linspace(smallest, largest, 100)
        inside = np.concatenate([[smallest], inside, [largest]])
        log_size = inside.copy()  # beyond the sizes the slope stays, so log C is linear in log N
        log_size[[0, -1]] += [-100, 100]
        slope = self.per_image.slope(inside)
        per_image = self.per_image.log(inside) + slope * (log_size - inside)
        _, log_a, log_alpha, log_b, log_beta = np.hsplit(theta, 5)
        log_n, log_d = self.surface.scale
        of_size = log_alpha + log_a - np.exp(log_alpha) * (log_size - log_n)
        of_images = np.log(slope) + log_beta + log_b
        compute = per_image + log_d + (of_images - of_size) * np.exp(-log_beta)
        compute = np.maximum.accumulate(compute, 1)
        best = [np.interp(np.atleast_1d(log_compute), row, log_size) for row in compute]
        return np.array(best)

    def __str__(self) -> str:
        sizes = zip(self.at(np.array(self.span)), self.span, strict=True)
        ends = " to ".join(f"{n / 1e6:.3g}M at {format_number(c, FITTED)}" for n, c in sizes)
        known = f"{ends}, N_opt ~ C^{self.exponent} ({self.per_image}"
        for name, interval in self.surface.exponents.items():
            place = NAMES.index(name)
            bounds = np.exp(LOW[place]), np.exp(HIGH[place])
            known += f", {name} {power_law.bounded(interval, *bounds)}"
        return f"{known})"


def jacobian(
    theta: Floats,
    x: Floats,
) -> tuple[Floats, Floats]:
    """Return log E [B, n] and its derivative [B, n, 5]. x: log N and log D [n, 2]."""
    log_e0, log_a, log_alpha, log_b, log_beta = np.hsplit(theta, 5)
    alpha, beta = np.exp(log_alpha), np.exp(log_beta)
    of_size = log_a - alpha * x[:, 0]
    of_images = log_b - beta * x[:, 1]
    value = np.logaddexp(np.logaddexp(of_size, of_images), log_e0)
    by_size, by_images = np.exp(of_size - value), np.exp(of_images - value)
    parts = [
        np.exp(log_e0 - value),
        by_size,
        -by_size * alpha * x[:, 0],
        by_images,
        -by_images * beta * x[:, 1],
    ]
    return value, np.stack(parts, -1)


FORM = Form(jacobian, LOW, HIGH)


def missing_data(e: Effects) -> NotEnoughData | None:
    """Return what is missing for E(N, D); None where it can be fitted."""
    log_images = _log_images(e)
    for count, what in ((len(e.models), "size"), (_distinct(log_images), "horizon")):
        if count < MIN_LEVELS:
            return NotEnoughData(f"{plural(count, what)}; E(N, D) needs {MIN_LEVELS}")
    if len(log_images) <= len(NAMES):
        return NotEnoughData(f"{len(log_images)} sizes at horizons; E(N, D) needs {len(NAMES) + 1}")
    return None


def fit(
    e: Effects,
    compute: str,
) -> SizeLaw | NotEnoughData:
    """Fit E(N, D), and return the best size at each compute. compute: a column of the trials."""
    return _growth(_fit_surface(e), e.compute(compute))


def _log_images(e: Effects) -> Floats:
    """Return the logarithm of the images of each block; of its steps where they are not known."""
    images = IMAGES if len(column(e.rows, IMAGES)) == len(e.rows) else "steps"
    return np.log(e.compute(images))


def _fit_surface(e: Effects) -> Surface:
    """Fit E(N, D) to each draw of the blocks at their best levels."""
    log_size = np.log(e.parameters[e.model_of_block])
    log_images = _log_images(e)
    blocks = len(log_size)
    scale = np.array([log_size.mean(), log_images.mean()])
    x = np.stack([log_size, log_images], 1) - scale
    y = np.median(e.best_draws, 0)
    weights = np.ones(blocks)
    starts = _starts(y)
    theta, loss = _minimise(starts, x, y, 1e9)
    residual = y - jacobian(theta[[loss.argmin()]], x)[0][0]
    delta = HUBER * huber_fit.robust_scale(residual, weights, len(NAMES))
    theta, loss = _minimise(theta, x, y, delta)
    best = theta[loss.argmin()]
    residual = y - jacobian(best[None], x)[0][0]
    off_law = scatter.off_law(residual, e.best_draws, weights, len(NAMES))
    drawn = scatter.draws(
        e.best_draws,
        off_law,
        blocks - len(NAMES),
        power_law.DRAWS,
        np.random.default_rng(0),
    )
    spread = (drawn - jacobian(best[None], x)[0]).std()
    far = np.vstack([best[None], starts[[0, len(starts) // 2, -1]]])
    draws = len(drawn)
    fits, losses = _minimise(
        np.repeat(far, draws, 0), x, np.tile(drawn, (len(far), 1)), HUBER * float(spread + 1e-9)
    )
    chosen = losses.reshape(len(far), draws).argmin(0)
    fits = fits.reshape(len(far), draws, len(NAMES))[chosen, np.arange(draws)]
    return Surface(best, fits, scale, log_size, log_images)


def _minimise(
    theta: Floats,
    x: Floats,
    y: Floats,
    delta: float,
) -> tuple[Floats, Floats]:
    return huber_fit.minimise(theta, x, y, np.ones(len(x)), len(NAMES), delta, form=FORM)


def _distinct(log_values: Floats) -> int:
    return power_law.budgets(np.exp(log_values))


def _starts(y: Floats) -> Floats:
    """Return starts [k, 5]: what exceeds E0 is shared equally by size and images."""
    rows: list[list[float]] = []
    lowest = y.min()
    rest = np.exp(y).mean()
    for e0, alpha, beta in itertools.product(E0_STARTS, EXPONENT_STARTS, EXPONENT_STARTS):
        half = np.log((rest - e0 * np.exp(lowest)) / 2)
        rows.append([np.log(e0) + lowest, half, np.log(alpha), half, np.log(beta)])
    return np.array(rows)


def _growth(
    surface: Surface,
    compute: Floats,
) -> SizeLaw | NotEnoughData:
    """Return the law of the best size. compute: of each block."""
    if compute.max() < 2 * compute.min():
        return NotEnoughData("the budgets span less than a factor of 2")
    of_block = np.log(compute) - surface.log_images
    sizes = np.unique(surface.log_size)
    means = np.array([of_block[surface.log_size == size].mean() for size in sizes])
    per_image = _per_image(sizes, means)
    if per_image.power < MIN_POWER:
        return NotEnoughData("this compute does not grow with the size of the model")
    law = SizeLaw(surface, per_image, (float(compute.min()), float(compute.max())))
    best = np.log(law.at(np.array(law.span)))
    is_below = best.min() < sizes[0] - np.log(FAR)
    if is_below or best.max() > sizes[-1] + np.log(FAR):
        side = "below" if is_below else "above"
        return NotEnoughData(f"the best sizes are far {side} those that ran")
    return law


def _per_image(
    log_size: Floats,
    log_compute: Floats,
) -> PerImage:
    """Return the power of N or the straight line that is nearer to the compute per image."""
    power, level = np.polyfit(log_size, log_compute, 1)
    found = PerImage(level, power)
    size, compute = np.exp(log_size), np.exp(log_compute - log_compute.max())
    terms = np.stack([1 / compute, size / compute], 1)
    fixed, by_size = np.linalg.lstsq(terms, np.ones(len(size)))[0]
    if by_size > 0 and (fixed + by_size * size).min() > 0:
        line = PerImage(float(np.log(by_size)) + log_compute.max(), 1.0, fixed / by_size)
        found = min(found, line, key=lambda each: each.deviation(log_size, log_compute))
    return replace(found, worst=found.deviation(log_size, log_compute))
