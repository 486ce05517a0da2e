"""Power laws with intervals: E = a (C + d)^-b + c and its nested forms.

In: compute C of some blocks, and draws of their error E. Out: a `PowerLawFit` with intervals for
its parameters and its predictions, or `NotEnoughData`. Source of the form: Zhai et al. 2106.04560.
Residuals are those of log E under Huber's loss. Pure arithmetic: no files, no figures, no sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.report import huber_fit, scatter
from jepa_cluster.report.huber_fit import FORMS, HIGH, HUBER, LOW, Floats, log_error
from jepa_cluster.results import mixed_model, student
from jepa_cluster.results.mixed_model import Index

LEVEL = 0.90
DRAWS = 400  # that are fitted
MIN_WEIGHT = 0.05  # of a block that is fitted
ABSENT = 1e-3  # lower end of an interval over its upper end, below which it reaches its bound
SAME_COMPUTE = 0.02  # relative: budgets that are one
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

    def times(
        self,
        factor: float,
    ) -> Interval:
        return Interval(factor * self.value, factor * self.low, factor * self.high)

    def __contains__(
        self,
        number: float,
    ) -> bool:
        return self.low <= number <= self.high

    def __format__(
        self,
        spec: str,
    ) -> str:
        spec = spec or self._spec()
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def _spec(self) -> str:
        """Return the format that gives all three the decimals of the value's three digits."""
        sizes = np.abs([self.value, self.low, self.high])
        if not 1e-3 <= sizes[0] < 1e4 or not sizes.max() < 1e4:
            return ".3g"
        return f".{max(0, 2 - int(np.floor(np.log10(sizes[0]))))}f"

    def __str__(self) -> str:
        return format(self)


def bounded(
    interval: Interval,
    low: float,
    high: float,
) -> str:
    """Return the interval of a parameter, and at which bounds of the fit it ends."""
    ends = {low: interval.low < 1.01 * low, high: interval.high > 0.99 * high}
    reached = " and ".join(f"{bound:.3g}" for bound, is_reached in ends.items() if is_reached)
    return f"{interval}" + (f" (at its bound {reached})" if reached else "")


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
    draws: the same for each draw of the errors, one row each.
    """

    form: str
    theta: Floats
    draws: Floats
    compute_scale: float
    scale: float  # standard deviation of a trial's log E around the law
    blocks: int
    aicc: dict[str, float]  # of every form that was tried, for the reader
    span: tuple[float, float]  # smallest and largest C fitted

    @property
    def parameters(self) -> dict[str, Interval]:
        """a, b and, where the form has them, c and d, in the units of C and E."""
        values = self._natural(self.theta[None])[0]
        ends = quantiles(self._natural(self.draws))
        names = "abcd"[: FORMS[self.form]]
        return dict(zip(names, map(Interval, values, *ends), strict=False))

    def _natural(
        self,
        theta: Floats,
    ) -> Floats:
        """Return a, b, c and d of each row [B, 4]; 0 at the lower bound."""
        values = np.where(theta > LOW + 0.01, np.exp(theta), 0.0)
        values[:, 0] *= self.compute_scale ** np.exp(theta[:, 1])
        values[:, 3] *= self.compute_scale
        return values

    def predict(
        self,
        compute: float | Floats,
    ) -> Floats:
        """Return E at C, in the shape of C."""
        return np.exp(log_error(self.theta[None], self._scaled(compute)))[0]

    def _scaled(
        self,
        compute: float | Floats,
    ) -> Floats:
        return np.atleast_1d(compute) / self.compute_scale

    def band(
        self,
        compute: float | Floats,
        trial: bool = False,
    ) -> tuple[Floats, Floats]:
        """Return the interval of the law at C, or of a new trial's E there when `trial`."""
        errors = log_error(self.draws, self._scaled(compute))
        if trial:
            errors = errors + np.random.default_rng(1).normal(0, self.scale, errors.shape)
        low, high = quantiles(errors)
        return np.exp(low), np.exp(high)

    def interval(
        self,
        compute: float,
        trial: bool = False,
    ) -> Interval:
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

    def headline(self, compute: str) -> str:
        """How much the error falls with compute, at the end of the data; '' for no law.

        compute: what it is, for the reader.
        """
        if self.unreliable_because:
            return ""
        factor, name = (10.0, "ten times") if self.span[1] >= 10 * self.span[0] else (2.0, "twice")
        end = np.array([self.span[1] / factor, self.span[1]])
        falls = 1 - np.exp(np.diff(log_error(self.draws, self._scaled(end)))[:, 0])
        value = 1 - float(np.divide(*self.predict(end)[::-1]))
        fall = 100 * np.array([value, *quantiles(falls)])
        found = f"{fall[0]:.0f} % [{fall[1]:.0f}, {fall[2]:.0f}]"
        return f"error falls by {found} for {name} {compute}"

    def __str__(self) -> str:
        b, c = self.parameters["b"], self.parameters.get("c")
        known = f"b = {bounded(b, *np.exp([LOW[1], HIGH[1]]))}"
        if c:
            known += f", c = {c}" if c.low > ABSENT * c.high else f", c below {c.high:.3g}"
        law = f"E = {self.form}: {known} ({LEVEL:.0%} intervals, {self.blocks} blocks)"
        if self.unreliable_because:
            return f"no law: {self.unreliable_because}; {law}"
        return law


Fit = PowerLawFit | NotEnoughData


def fit(
    compute: Floats,
    log_errors: Floats,
    trials: Floats,
    weights: Floats | None = None,
    noise: float = 0.0,
    forms: Sequence[str] = tuple(FORMS),
) -> Fit:
    """Fit all forms that the data determine to each draw of the errors.

    compute: of each block [n]. log_errors: draws of log E [draws, n]. trials: number in each block.
    weights: of each block; blocks below MIN_WEIGHT are left out. noise: standard deviation of log E
    between seeds.

    A form with k parameters asks for k + 1 distinct budgets. The form with the offset c is chosen
    as soon as it can be fitted, whatever its AICc: a smaller form that fits as well would hide what
    is unknown about c. The shift d is taken where it has the smaller AICc. Both forms share the
    draws by Akaike's weights, so that the intervals include the choice of the form.
    """
    w = np.ones(len(compute)) if weights is None else weights
    kept = w > MIN_WEIGHT
    missing = missing_data(compute, np.exp(np.median(log_errors, 0)))
    c, w, log_errors, trials = compute[kept], w[kept], log_errors[:, kept], trials[kept]
    y = np.median(log_errors, 0)
    missing = missing or _missing_frontier(compute, c) or missing_data(c, np.exp(y))
    if missing:
        return missing
    compute_scale = float(np.exp(np.log(c).mean()))
    x = c / compute_scale
    count = budgets(c)
    possible = [name for name in forms if count > FORMS[name]]
    thetas, residuals = dict[str, Floats](), dict[str, Floats]()
    aicc: dict[str, float] = {}
    for name in possible:
        thetas[name] = huber_fit.fit_from_grid(x, y, w, FORMS[name])
        residuals[name] = y - log_error(thetas[name][None], x)[0]
        aicc[name] = _aicc(residuals[name], w * trials, noise, FORMS[name])
    shares = _form_weights(possible, aicc)
    chosen = max(shares, key=lambda name: shares[name])
    rng = np.random.default_rng(0)
    replicates: list[Floats] = []
    off_law: dict[str, float] = {}
    for name, share in shares.items():
        size = FORMS[name]
        off_law[name] = scatter.off_law(residuals[name], log_errors, w, size)
        count = round(share * DRAWS)
        if count:
            drawn = scatter.draws(log_errors, off_law[name], w.sum() - size, count, rng)
            replicates.append(_refit(x, drawn, w, thetas[name], size))
    return PowerLawFit(
        form=chosen,
        theta=thetas[chosen],
        draws=np.vstack(replicates),
        compute_scale=compute_scale,
        scale=float(np.hypot(off_law[chosen], noise)),
        blocks=len(c),
        aicc=aicc,
        span=(float(c.min()), float(c.max())),
    )


def fit_trials(
    compute: Sequence[float] | Floats,
    error: Sequence[float] | Floats,
) -> Fit:
    """Fit trials of one setting; those of equal compute are seeds of a block."""
    c, e = np.asarray(compute, float), np.asarray(error, float)
    missing = missing_data(c, e)
    if missing:
        return missing
    budget, block = np.unique(c, return_inverse=True)
    drawn = mixed_model.sample(np.log(e), block)
    return fit(
        budget, drawn.blocks, np.bincount(block).astype(float), noise=float(np.median(drawn.noise))
    )


def _form_weights(
    possible: Sequence[str],
    aicc: dict[str, float],
) -> dict[str, float]:
    """Return Akaike's weights: the share of the draws that each form gets."""
    names = [name for name in possible if FORMS[name] > 2] or list(possible)
    if not np.isfinite(aicc[names[0]]):
        return {names[0]: 1.0}
    scores = np.array([aicc[name] for name in names])
    weights = np.exp((scores.min() - scores) / 2)
    return dict(zip(names, weights / weights.sum(), strict=True))


def missing_data(
    c: Floats,
    e: Floats,
) -> NotEnoughData | None:
    """Return what is missing for any form; None where one can be fitted."""
    numbers = np.concatenate([c, e])
    if len(c) != len(e) or not np.all(np.isfinite(numbers) & (numbers > 0)):
        return NotEnoughData("some trials have no positive compute and error yet")
    if budgets(c) < 3:
        need = "a power law needs 3, and an offset 4: add sizes or horizons"
        return NotEnoughData(f"{plural(budgets(c), 'distinct budget')}; {need}")
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


def _missing_frontier(
    compute: Floats,
    frontier: Floats,
) -> NotEnoughData | None:
    if budgets(frontier) >= 3:
        return None
    beaten = f"{budgets(frontier)} of {budgets(compute)} budgets are on the frontier"
    return NotEnoughData(f"{beaten}: the error hardly falls with compute in these trials")


def budgets(c: Floats) -> int:
    """Count distinct budgets."""
    return len(set(budget_of(c).tolist()))


def budget_of(c: Floats) -> Index:
    """Return the number of each one's budget, from 0; two within 2 % are one."""
    order = np.argsort(c)
    gaps = np.diff(np.log(c[order]), prepend=-np.inf)
    found = np.zeros(len(c), int)
    found[order] = np.cumsum(gaps > SAME_COMPUTE) - 1
    return found


def _aicc(
    residual: Floats,
    trials: Floats,
    noise: float,
    size: int,
) -> float:
    """Return Akaike's criterion for small samples of a form with `size` parameters.

    trials: of each block. noise: their standard deviation around its mean.
    """
    n = float(trials.sum())
    k = size + 1  # the scale of the noise is a parameter too
    if n <= k + 1:
        return np.inf
    variance = np.average(residual**2, weights=trials) + noise**2
    return n * float(np.log(variance + 1e-18)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _refit(
    x: Floats,
    drawn: Floats,
    weights: Floats,
    theta: Floats,
    size: int,
) -> Floats:
    """Fit each draw of log E [draws, n] from several starts; return parameters [draws, 4]."""
    draws = len(drawn)
    far = huber_fit.starts(x, drawn.mean(0), size, huber_fit.FAR_STARTS[: 2 * (size - 2)])
    starts = np.vstack([theta[None], far])
    spread = drawn - log_error(theta[None], x)
    fits, losses = huber_fit.minimise(
        theta=np.repeat(starts, draws, 0),
        x=x,
        y=np.tile(drawn, (len(starts), 1)),
        weights=weights,
        size=size,
        delta=HUBER * float(np.sqrt(np.average((spread**2).mean(0), weights=weights)) + 1e-9),
    )
    best = losses.reshape(len(starts), draws).argmin(0)
    return fits.reshape(len(starts), draws, 4)[best, np.arange(draws)]
