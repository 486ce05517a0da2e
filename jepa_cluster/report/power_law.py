"""Power laws with bootstrap intervals: E = a (C + d)^-b + c and its nested forms.

In: compute C and error E of some trials. Out: a `PowerLawFit` with intervals for its parameters and
its predictions, or `NotEnoughData`. Source of the form: Zhai et al. 2106.04560. Residuals are those
of log E under Huber's loss. One batched Levenberg-Marquardt fits all starts and all bootstrap
replicates together: `scipy.optimize.least_squares`, which fits one at a time, takes ten times as
long per replicate (benchmarks/RESULTS.md). Pure arithmetic: no files, no figures, no sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]

FORMS: dict[str, tuple[bool, bool]] = {  # name -> (has c, has d)
    "a C^-b": (False, False),
    "a C^-b + c": (True, False),
    "a (C+d)^-b + c": (True, True),
}
LEVEL = 0.90
NORMAL_QUANTILE = 1.645  # half the width of a LEVEL interval of a normal mean, in standard errors
MAX_INTERVAL_RATIO = 10.0  # a law whose interval spans this factor inside its own data says nothing
HUBER = 1.345  # in units of the residuals' robust scale: 95 % efficient under normal noise
_LOW = np.array([-30.0, np.log(1e-3), -25.0, -25.0])  # bounds of (log a, log b, log c, log d), C in units of its mean
_HIGH = np.array([30.0, np.log(5.0), 5.0, 12.0])


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

    def __format__(self, spec: str) -> str:
        value, low, high = (format(v, spec or ".3g") for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def student_quantile(degrees: int) -> float:
    """Half the width of a LEVEL interval of a mean, in standard errors."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def mean(values: Sequence[float] | Floats) -> Interval:
    """The mean with Student's interval at LEVEL; low and high are nan for a single value."""
    v = np.asarray(values, float)
    middle = float(v.mean())
    if len(v) < 2:
        return Interval(middle, float("nan"), float("nan"))
    reach = student_quantile(len(v) - 1) * float(v.std(ddof=1)) / len(v) ** 0.5
    return Interval(middle, middle - reach, middle + reach)


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
        has_c, has_d = FORMS[self.form]

        def interval_of(column: int, power: Any = 0.0) -> Interval:
            def natural(rows: Floats) -> Floats:
                b = np.exp(rows[:, 1])
                values = np.where(rows[:, column] > _LOW[column] + 0.01, np.exp(rows[:, column]), 0.0)
                return values * self.compute_scale ** (b if power == "b" else power)

            low, high = quantiles(natural(self.draws))
            return Interval(float(natural(self.theta[None])[0]), float(low), float(high))

        out = {"a": interval_of(0, "b"), "b": interval_of(1)}
        if has_c:
            out["c"] = interval_of(2)
        if has_d:
            out["d"] = interval_of(3, 1.0)
        return out

    def predict(self, compute: float | Floats) -> Floats:
        """E at C, shape of C."""
        c = np.atleast_1d(np.asarray(compute, float))
        return np.exp(_log_error(self.theta[None], c / self.compute_scale, *FORMS[self.form])[0])

    def bootstrap_predictions(self, compute: float | Floats) -> Floats:
        """E at C by every bootstrap replicate: [draws, len C]."""
        c = np.atleast_1d(np.asarray(compute, float))
        return np.exp(_log_error(self.draws, c / self.compute_scale, True, True))

    def band(self, compute: float | Floats, trial: bool = False) -> tuple[Floats, Floats]:
        """The interval of the law at C; of a new trial's E there when `trial`."""
        errors = np.log(self.bootstrap_predictions(compute))
        if trial:
            errors = errors + np.random.default_rng(1).normal(0, self.scale, errors.shape)
        low, high = quantiles(errors)
        return np.exp(low), np.exp(high)

    def interval(self, compute: float, trial: bool = False) -> Interval:
        """The law at one C with its interval; with that of a new trial there when `trial`."""
        low, high = self.band(compute, trial)
        return Interval(float(self.predict(compute)[0]), float(low[0]), float(high[0]))

    @property
    def unreliable_because(self) -> str:
        """Why the law must not be drawn: its interval is too wide. '' where the data determine it."""
        if self.parameters["b"].low <= np.exp(_LOW[1]):
            return "the interval of b includes 0"
        low, high = self.band(np.array(self.span))
        wide = float(np.max(high / low))
        return f"its interval spans a factor of {wide:.3g} inside the data" if wide > MAX_INTERVAL_RATIO else ""

    def __str__(self) -> str:
        values = ", ".join(f"{k} = {v}" for k, v in self.parameters.items())
        law = f"E = {self.form}: {values} ({LEVEL:.0%} bootstrap intervals, {self.points} trials)"
        return f"no law: {self.unreliable_because}; {law}" if self.unreliable_because else law


def quantiles(draws: Floats) -> tuple[Floats, Floats]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def fit(
    compute: Sequence[float] | Floats,
    error: Sequence[float] | Floats,
    forms: Sequence[str] = tuple(FORMS),
    draws: int = 400,
    seed: int = 0,
    points: Sequence[Any] | None = None,
) -> PowerLawFit | NotEnoughData:
    """Fit all forms the data can carry, bootstrap the chosen one over points, all seeds of a point together.

    points: which point each trial is a seed of; None: every trial is a point of its own.

    A form with k parameters asks for k + 1 distinct budgets; equal budgets of several seeds count once. Chosen is
    the form with the offset c as soon as it can be carried, whatever its AICc: a smaller form that fits as well
    would only hide what we do not know of c (its intervals held the truth in a third of synthetic studies). The
    shift d is taken where it has the smaller AICc, and both forms share the replicates by Akaike's weights, so that
    the intervals know that the choice was one.
    """
    c, e = np.asarray(compute, float), np.asarray(error, float)
    missing = missing_data(c, e)
    if missing:
        return missing
    compute_scale = float(np.exp(np.log(c).mean()))
    x, y = c / compute_scale, np.log(e)
    carried = [f for f in forms if budgets(c) > 2 + sum(FORMS[f])]
    if not carried:
        need = min(3 + sum(FORMS[f]) for f in forms)
        return NotEnoughData(f"{budgets(c)} distinct budgets; the form needs {need}")
    fits: dict[str, tuple[Floats, float]] = {}
    aicc: dict[str, float] = {}
    for form in carried:
        theta = _multistart(x, y, form)
        residual = y - _log_error(theta[None], x, *FORMS[form])[0]
        fits[form] = theta, robust_scale(residual, 2 + sum(FORMS[form]))
        aicc[form] = _aicc(residual, 2 + sum(FORMS[form]))
    base = max(carried[:2], key=lambda f: sum(FORMS[f]))
    shares = _weights({f: aicc[f] for f in dict.fromkeys((base, *carried[2:])) if f == base or np.isfinite(aicc[base])})
    chosen = max(shares, key=lambda f: shares[f])
    theta, scale = fits[chosen]
    draws = min(draws, max(100, 40_000 // len(c)))  # a thousand trials need fewer replicates for the same patience
    _, where = np.unique([str(p) for p in points] if points else np.arange(len(c)), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = {f: round(w * draws) for f, w in shares.items()}
    replicas = np.vstack([_bootstrap(x, y, where, fits[f][0], f, n, rng) for f, n in counts.items() if n])
    return PowerLawFit(chosen, theta, replicas, compute_scale, scale, len(c), aicc, (float(c.min()), float(c.max())))


def _weights(aicc: dict[str, float]) -> dict[str, float]:
    """Akaike's: the part of the replicates that each form gets."""
    raw = {f: 1.0 if len(aicc) == 1 else float(np.exp((min(aicc.values()) - a) / 2)) for f, a in aicc.items()}
    return {f: w / sum(raw.values()) for f, w in raw.items()}


def missing_data(c: Floats, e: Floats) -> NotEnoughData | None:
    """What is missing for any form; None where one can be fitted."""
    if len(c) != len(e) or not np.all(np.isfinite(c) & np.isfinite(e) & (c > 0) & (e > 0)):
        return NotEnoughData("some trials have no positive compute and error yet")
    if budgets(c) < 3:
        return NotEnoughData(
            f"{budgets(c)} distinct budgets; a power law needs 3, and an offset 4: add sizes or horizons"
        )
    if c.max() / c.min() < 2:
        return NotEnoughData(
            f"the budgets span a factor of {c.max() / c.min():.2f}; a law needs 2 at least, 10 to be of use"
        )
    if np.ptp(np.log(e)) < 1e-6:
        return NotEnoughData("the error is the same everywhere")
    if np.polyfit(np.log(c), np.log(e), 1)[0] >= 0:
        return NotEnoughData("the error does not fall with compute in these trials")
    return None


def budgets(c: Floats) -> int:
    """Distinct budgets; two within 2 % are one."""
    order = np.sort(np.log(c))
    return int(1 + np.sum(np.diff(order) > 0.02)) if len(order) else 0


def robust_scale(residual: Floats, used: int) -> float:
    """Standard deviation from the median absolute residual, corrected for the parameters used."""
    n = len(residual)
    mad = 1.4826 * float(np.median(np.abs(residual)))
    rms = float(np.sqrt(np.mean(residual**2)))
    return max(min(mad, rms) if n > 12 else rms, 1e-9) * np.sqrt(n / max(n - used, 1))


def _aicc(residual: Floats, k: int) -> float:
    n = len(residual)
    k = k + 1  # the noise's own scale
    return (
        n * float(np.log(np.mean(residual**2) + 1e-18))
        + 2 * k
        + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf)
    )


def _log_error(theta: Floats, x: Floats, has_c: bool, has_d: bool) -> Floats:
    """[B,4] parameters, [n] or [B,n] compute -> [B,n] log E."""
    x = np.broadcast_to(x, (len(theta), x.shape[-1]))
    shifted = np.log(x + np.exp(theta[:, 3:4])) if has_d else np.log(x)
    term = theta[:, 0:1] - np.exp(theta[:, 1:2]) * shifted
    return np.logaddexp(term, theta[:, 2:3]) if has_c else term


def _jacobian(theta: Floats, x: Floats, has_c: bool, has_d: bool) -> tuple[Floats, Floats]:
    """-> (log E [B,n], its derivative [B,n,4]); columns of absent parameters are zero."""
    b = np.exp(theta[:, 1:2])
    total = x + np.exp(theta[:, 3:4]) if has_d else np.broadcast_to(x, (len(theta), x.shape[-1]))
    term = theta[:, 0:1] - b * np.log(total)
    value = np.logaddexp(term, theta[:, 2:3]) if has_c else term
    share = np.exp(term - value)
    zero = np.zeros_like(value)
    columns = [share, -share * b * np.log(total)]
    columns.append(np.exp(theta[:, 2:3] - value) if has_c else zero)
    columns.append(-share * b * np.exp(theta[:, 3:4]) / total if has_d else zero)
    return value, np.stack(columns, -1)


def minimise(theta: Floats, x: Floats, y: Floats, form: str, delta: float, steps: int = 60) -> tuple[Floats, Floats]:
    """Levenberg-Marquardt on Huber's loss for B problems at once. theta [B,4], y [n] or [B,n] -> (theta, loss [B])."""
    has = FORMS[form]
    free = np.flatnonzero([True, True, *has])
    theta, y = theta.copy(), np.broadcast_to(y, (len(theta), x.shape[-1]))
    damping = np.full(len(theta), 1e-2)
    loss = _huber(y - _log_error(theta, x, *has), delta)
    going = np.arange(len(theta))
    for _ in range(steps):
        now, data = theta[going], y[going]
        value, jac = _jacobian(now, x, *has)
        jac, residual = jac[:, :, free], data - value
        weighted = jac * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-12))[:, :, None]
        jtj = weighted.transpose(0, 2, 1) @ jac
        grad = (weighted * residual[:, :, None]).sum(1)
        lift = damping[going, None] * np.maximum(np.einsum("bii->bi", jtj), 1e-8)
        step = np.linalg.solve(jtj + lift[:, :, None] * np.eye(len(free)), grad[..., None])[..., 0]
        trial = now.copy()
        trial[:, free] = np.clip(now[:, free] + np.clip(step, -2, 2), _LOW[free], _HIGH[free])
        new = _huber(data - _log_error(trial, x, *has), delta)
        better = new < loss[going]
        settled = better & (loss[going] - new < 1e-7 * loss[going])
        theta[going[better]], loss[going[better]] = trial[better], new[better]
        damping[going] = np.where(better, damping[going] / 5, damping[going] * 5)
        going = going[~settled & (damping[going] < 1e7)]
        if not len(going):
            break
    return theta, loss


def _huber(residual: Floats, delta: float) -> Floats:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta)).sum(-1)


def _starts(x: Floats, y: Floats, form: str) -> Floats:
    """A grid of (b, c, d); a follows from the mean."""
    has_c, has_d = FORMS[form]
    floor = float(y.min())
    rows: list[Floats] = []
    for b in (0.05, 0.2, 0.5, 1.0, 2.0):
        for c in (0.1, 0.5, 0.8, 0.95) if has_c else (0.0,):
            for d in (1e-3, 0.1, 1.0) if has_d else (0.0,):
                rest = np.log(np.maximum(np.exp(y) - c * np.exp(floor), 1e-9))
                a = float(np.median(rest + b * np.log(x + d)))
                rows.append(np.array([a, np.log(b), np.log(c) + floor if c else 0.0, np.log(d) if d else 0.0]))
    return np.clip(np.array(rows), _LOW, _HIGH)


def _multistart(x: Floats, y: Floats, form: str) -> Floats:
    """Least squares first, for the scale; then Huber at HUBER times that scale."""
    theta, loss = minimise(_starts(x, y, form), x, y, form, delta=1e9)
    best = theta[np.argmin(loss)]
    delta = HUBER * robust_scale(y - _log_error(best[None], x, *FORMS[form])[0], 2 + sum(FORMS[form]))
    theta, loss = minimise(np.vstack([best[None], theta]), x, y, form, delta)
    return theta[np.argmin(loss)]


def _bootstrap(
    x: Floats, y: Floats, where: NDArray[np.intp], theta: Floats, form: str, draws: int, rng: np.random.Generator
) -> Floats:
    """Residual bootstrap over points, residuals blown up for their leverage -> [draws, 4].

    What is drawn is the mean residual of a point's seeds: what they share (a size that lies off the law) is no noise
    that more seeds would average away. where: [n] index of each trial's point.
    """
    value, jac = _jacobian(theta[None], x, *FORMS[form])
    free = [0, 1, *([2] if FORMS[form][0] else []), *([3] if FORMS[form][1] else [])]
    j = jac[0][:, free]
    hat = np.einsum("ni,ij,nj->n", j, np.linalg.pinv(j.T @ j), j)
    seeds = np.bincount(where)
    residual = y - value[0]
    means = np.bincount(where, residual) / seeds
    deviation = residual - means[where]
    means = means / np.sqrt(np.clip(1 - np.bincount(where, hat), 0.1, 1))
    degrees = max(len(means) - len(free), 1)
    means = (means - means.mean()) * student_quantile(degrees) / NORMAL_QUANTILE
    delta = HUBER * robust_scale(means[where] + deviation, 0)
    again = value + rng.choice(means, (draws, len(means)))[:, where] + deviation
    starts = np.vstack([theta[None], _nearby(theta, x, y, form, delta)])
    many = minimise(np.repeat(starts, draws, 0), x, np.tile(again, (len(starts), 1)), form, delta)
    best = many[1].reshape(len(starts), draws).argmin(0)
    chosen = many[0].reshape(len(starts), draws, 4)[best, np.arange(draws)]
    absent = [i for i in range(4) if i not in free]
    chosen[:, absent] = _LOW[absent]
    return chosen


def _nearby(theta: Floats, x: Floats, y: Floats, form: str, delta: float) -> Floats:
    """Other ends of the valley in which c, d and b trade against each other, as further starts: [k, 4]."""
    has_c, has_d = FORMS[form]
    if not has_c:
        return np.empty((0, 4))
    floor = float(y.min())
    rows: list[Floats] = []
    for c, d in ((0.02, 1e-3), (0.8, 1e-3), (0.8, 0.5), (0.02, 0.5))[: 4 if has_d else 2]:
        rest = np.log(np.maximum(np.exp(y) - c * np.exp(floor), 1e-9))
        slope, level = np.polyfit(np.log(x + (d if has_d else 0.0)), rest, 1)
        rows.append(np.array([level, np.log(max(-slope, 1e-2)), np.log(c) + floor, np.log(d) if has_d else theta[3]]))
    return np.clip(np.array(rows), _LOW, _HIGH)
