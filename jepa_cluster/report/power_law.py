"""Power laws with bootstrap intervals: E = a (C + d)^-b + c and its nested forms.

In: compute C and error E of some trials. Out: a `PowerLawFit` with intervals for its parameters and
its predictions, or `NotEnoughData`. Source of the form: Zhai et al. 2106.04560. Residuals are those
of log E under Huber's loss. Pure arithmetic: no files, no figures, no sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jepa_cluster.report import huber_fit
from jepa_cluster.report.huber_fit import FORMS, HUBER, LOW, Floats, log_error, robust_scale
from jepa_cluster.results import student

LEVEL = 0.90
NORMAL_QUANTILE = 1.645  # half the width of a LEVEL interval of a normal mean, in standard errors
MAX_INTERVAL_RATIO = 10.0  # a law whose interval is wider than this inside its data is not drawn


@dataclass(frozen=True)
class NotEnoughData:
    """Why no law is drawn, and which data would be enough."""

    reason: str

    def __str__(self) -> str:
        return f"no fit: {self.reason}"


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


def student_quantile(degrees: int) -> float:
    """Half the width of a LEVEL interval of a mean, in standard errors."""
    return student.quantile(degrees, LEVEL)


def mean(values: Sequence[float] | Floats) -> Interval:
    """Return the mean with Student's interval at LEVEL; its ends are nan for a single value."""
    v = np.asarray(values, float)
    middle = float(v.mean())
    if len(v) < 2:
        return Interval(middle, float("nan"), float("nan"))
    deviation = float(v.std(ddof=1))
    reach = student_quantile(len(v) - 1) * deviation / len(v) ** 0.5
    return Interval(middle, middle - reach, middle + reach)


def quantiles(draws: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the LEVEL interval over the first axis."""
    ends = np.array([1 - LEVEL, 1 + LEVEL]) / 2
    low, high = np.quantile(draws, ends, axis=0)
    return low, high


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted form.

    theta: (log a, log b, log c, log d), compute in units of compute_scale.
    draws: the same of every bootstrap replicate, one row each.
    """

    form: str
    theta: Floats
    draws: Floats
    compute_scale: float
    scale: float  # robust standard deviation of log E around the law
    points: int
    aicc: dict[str, float]  # of every form that was tried, for the reader
    span: tuple[float, float]  # smallest and largest C fitted

    @property
    def parameters(self) -> dict[str, Interval]:
        """a, b and, where the form has them, c and d, in the units of C and E."""
        values = self._natural(self.theta[None])[0]
        ends = quantiles(self._natural(self.draws))
        names = "abcd"[: FORMS[self.form]]
        return dict(zip(names, map(Interval, values, *ends), strict=False))

    def _natural(self, theta: Floats) -> Floats:
        """Return a, b, c and d of each row [B, 4]; 0 at the lower bound."""
        values = np.where(theta > LOW + 0.01, np.exp(theta), 0.0)
        values[:, 0] *= self.compute_scale ** np.exp(theta[:, 1])
        values[:, 3] *= self.compute_scale
        return values

    def predict(self, compute: float | Floats) -> Floats:
        """Return E at C, in the shape of C."""
        return np.exp(log_error(self.theta[None], self._scaled(compute)))[0]

    def _scaled(self, compute: float | Floats) -> Floats:
        return np.atleast_1d(compute) / self.compute_scale

    def band(self, compute: float | Floats, trial: bool = False) -> tuple[Floats, Floats]:
        """Return the interval of the law at C, or of a new trial's E there when `trial`."""
        errors = log_error(self.draws, self._scaled(compute))
        if trial:
            errors = errors + np.random.default_rng(1).normal(0, self.scale, errors.shape)
        low, high = quantiles(errors)
        return np.exp(low), np.exp(high)

    def interval(self, compute: float, trial: bool = False) -> Interval:
        """Return the law at one C with its interval, or that of a new trial when `trial`."""
        low, high = self.band(compute, trial)
        value = self.predict(compute)
        return Interval(value.item(), low.item(), high.item())

    @property
    def unreliable_because(self) -> str:
        """Why the law must not be drawn: its interval is too wide. '' where the data suffice."""
        if self.parameters["b"].low <= np.exp(LOW[1]):
            return "the interval of b includes 0"
        low, high = self.band(np.array(self.span))
        ratio = float(np.max(high / low))
        if ratio > MAX_INTERVAL_RATIO:
            return f"its interval spans a factor of {ratio:.3g} inside the data"
        return ""

    def __str__(self) -> str:
        values = ", ".join(f"{name} = {value}" for name, value in self.parameters.items())
        source = f"{LEVEL:.0%} bootstrap intervals, {self.points} trials"
        law = f"E = {self.form}: {values} ({source})"
        if self.unreliable_because:
            return f"no law: {self.unreliable_because}; {law}"
        return law


Fit = PowerLawFit | NotEnoughData


def fit(
    compute: Sequence[float] | Floats,
    error: Sequence[float] | Floats,
    points: Sequence[object] = (),
    forms: Sequence[str] = tuple(FORMS),
    draws: int = 400,
    seed: int = 0,
) -> Fit:
    """Fit all forms that the data determine, and bootstrap the chosen one over points.

    points: the point each trial is a seed of; none: every trial is a point. Seeds stay together.

    A form with k parameters asks for k + 1 distinct budgets; equal budgets of several seeds count
    once. The form with the offset c is chosen as soon as it can be fitted, whatever its AICc: a
    smaller form that fits as well would hide what is unknown about c (its intervals held the truth
    in a third of synthetic studies). The shift d is taken where it has the smaller AICc. Both forms
    share the replicates by Akaike's weights, so that the intervals include the choice of the form.
    """
    c = np.asarray(compute, float)
    e = np.asarray(error, float)
    missing = missing_data(c, e)
    if missing:
        return missing
    compute_scale = float(np.exp(np.log(c).mean()))
    x = c / compute_scale
    y = np.log(e)
    count = budgets(c)
    possible = [name for name in forms if count > FORMS[name]]
    if not possible:
        need = 1 + min(FORMS[name] for name in forms)
        return NotEnoughData(f"{count} distinct budgets; the form needs {need}")

    thetas: dict[str, Floats] = {}
    residuals: dict[str, Floats] = {}
    aicc: dict[str, float] = {}
    for name in possible:
        thetas[name] = huber_fit.fit_from_grid(x, y, FORMS[name])
        residuals[name] = y - log_error(thetas[name][None], x)[0]
        aicc[name] = _aicc(residuals[name], FORMS[name])
    weights = _form_weights(possible, aicc)
    chosen = max(weights, key=lambda name: weights[name])
    draws = min(draws, max(100, 40_000 // len(c)))  # a thousand trials need fewer replicates
    group = _group_of(points, len(c))
    rng = np.random.default_rng(seed)
    replicates: list[Floats] = []
    for name, weight in weights.items():
        n = round(weight * draws)
        if n:
            replicates.append(_bootstrap(x, y, group, thetas[name], FORMS[name], n, rng))
    return PowerLawFit(
        form=chosen,
        theta=thetas[chosen],
        draws=np.vstack(replicates),
        compute_scale=compute_scale,
        scale=robust_scale(residuals[chosen], FORMS[chosen]),
        points=len(c),
        aicc=aicc,
        span=(float(c.min()), float(c.max())),
    )


def _group_of(points: Sequence[object], n: int) -> NDArray[np.intp]:
    """Return the index of each trial's point."""
    if not points:
        return np.arange(n)
    return np.unique(list(map(str, points)), return_inverse=True)[1]


def _form_weights(possible: Sequence[str], aicc: dict[str, float]) -> dict[str, float]:
    """Return Akaike's weights: the share of the replicates that each form gets."""
    names = [name for name in possible if FORMS[name] > 2] or list(possible)
    if not np.isfinite(aicc[names[0]]):
        return {names[0]: 1.0}
    scores = np.array([aicc[name] for name in names])
    weights = np.exp((scores.min() - scores) / 2)
    return dict(zip(names, weights / weights.sum(), strict=True))


def missing_data(c: Floats, e: Floats) -> NotEnoughData | None:
    """Return what is missing for any form; None where one can be fitted."""
    numbers = np.concatenate([c, e])
    if len(c) != len(e) or not np.all(np.isfinite(numbers) & (numbers > 0)):
        return NotEnoughData("some trials have no positive compute and error yet")
    if budgets(c) < 3:
        need = "a power law needs 3, and an offset 4: add sizes or horizons"
        return NotEnoughData(f"{budgets(c)} distinct budgets; {need}")
    ratio = c.max() / c.min()
    if ratio < 2:
        need = "a law needs 2 at least, 10 to be of use"
        return NotEnoughData(f"the budgets span a factor of {ratio:.2f}; {need}")
    if np.ptp(np.log(e)) < 1e-6:
        return NotEnoughData("the error is the same everywhere")
    slope, _ = np.polyfit(np.log(c), np.log(e), 1)
    if slope >= 0:
        return NotEnoughData("the error does not fall with compute in these trials")
    return None


def budgets(c: Floats) -> int:
    """Count distinct budgets; two within 2 % are one."""
    if not len(c):
        return 0
    gaps = np.diff(np.sort(np.log(c)))
    return int(1 + np.sum(gaps > 0.02))


def _aicc(residual: Floats, size: int) -> float:
    """Return Akaike's criterion for small samples of a form with `size` parameters."""
    n = len(residual)
    k = size + 1  # the scale of the noise is a parameter too
    if n <= k + 1:
        return np.inf
    fit_term = n * float(np.log(np.mean(residual**2) + 1e-18))
    return fit_term + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _bootstrap(
    x: Floats,
    y: Floats,
    group: NDArray[np.intp],
    theta: Floats,
    size: int,
    draws: int,
    rng: np.random.Generator,
) -> Floats:
    """Bootstrap the residuals over points, corrected for their leverage: [draws, 4].

    Drawn is the mean residual of a point's seeds: what they share (a size that lies off the law) is
    not noise that more seeds would average away. group: index [n] of each trial's point.
    """
    value, derivative = huber_fit.jacobian(theta[None], x)
    j = derivative[0][:, :size]
    leverage = np.einsum("ni,ij,nj->n", j, np.linalg.pinv(j.T @ j), j)
    residual = y - value[0]
    means = np.bincount(group, residual) / np.bincount(group)
    deviation = residual - means[group]
    free_share = np.clip(1 - np.bincount(group, leverage), 0.1, 1)
    means = means / np.sqrt(free_share)
    degrees = max(len(means) - size, 1)
    means = (means - means.mean()) * student_quantile(degrees) / NORMAL_QUANTILE

    delta = HUBER * robust_scale(means[group] + deviation, 0)
    drawn = rng.choice(means, (draws, len(means)))[:, group]
    replicates = value + drawn + deviation
    far = huber_fit.starts(x, y, size, huber_fit.FAR_STARTS[: 2 * (size - 2)])
    starts = np.vstack([theta[None], far])
    fits, losses = huber_fit.minimise(
        theta=np.repeat(starts, draws, 0),
        x=x,
        y=np.tile(replicates, (len(starts), 1)),
        size=size,
        delta=delta,
    )
    best = losses.reshape(len(starts), draws).argmin(0)
    return fits.reshape(len(starts), draws, 4)[best, np.arange(draws)]
