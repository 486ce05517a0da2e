"""Fit E = a (C + d)^-b + c and its nested forms under Huber's loss, many problems at once.

In: starts [B, 4], compute [n] and log E. Out: parameters and losses. Parameters are (log a, log b,
log c, log d); an absent c or d stays at its start. One batched Levenberg-Marquardt fits all starts
and all bootstrap replicates together: `scipy.optimize.least_squares`, which fits one at a time,
takes ten times as long per replicate (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HUBER = 1.345  # in units of the residuals' robust scale: 95 % efficient under normal noise
# bounds of (log a, log b, log c, log d), with C in units of its mean
LOW = np.array([-30.0, np.log(1e-3), -25.0, -25.0])
HIGH = np.array([30.0, np.log(5.0), 5.0, 12.0])

B_STARTS = (0.05, 0.2, 0.5, 1.0, 2.0)
C_STARTS = (0.1, 0.5, 0.8, 0.95)  # in units of the smallest error
D_STARTS = (1e-3, 0.1, 1.0)
FAR_STARTS = (
    (0.02, 1e-3),
    (0.8, 1e-3),
    (0.8, 0.5),
    (0.02, 0.5),
)  # (c, d), for `other_starts`


@dataclass(frozen=True)
class Form:
    """Which of the parameters c and d a form has."""

    has_c: bool
    has_d: bool

    @property
    def size(self) -> int:
        """Number of parameters."""
        return 2 + self.has_c + self.has_d

    @property
    def free(self) -> NDArray[np.intp]:
        """Columns of its parameters."""
        return np.flatnonzero([True, True, self.has_c, self.has_d])


FORMS = {
    "a C^-b": Form(has_c=False, has_d=False),
    "a C^-b + c": Form(has_c=True, has_d=False),
    "a (C+d)^-b + c": Form(has_c=True, has_d=True),
}


def log_error(
    theta: Floats,
    x: Floats,
    form: Form,
) -> Floats:
    """Return log E [B, n] for parameters [B, 4] and compute [n] or [B, n]."""
    return _evaluate(theta, x, form)[2]


def _evaluate(
    theta: Floats,
    x: Floats,
    form: Form,
) -> tuple[Floats, Floats, Floats]:
    """Return C + d, the log of the power law and log E, each [B, n]."""
    log_a, log_b, log_c, log_d = np.hsplit(theta, 4)
    shifted = np.broadcast_to(x, (len(theta), x.shape[-1]))
    if form.has_d:
        shifted = shifted + np.exp(log_d)
    power_law = log_a - np.exp(log_b) * np.log(shifted)
    if not form.has_c:
        return shifted, power_law, power_law
    return shifted, power_law, np.logaddexp(power_law, log_c)


def jacobian(
    theta: Floats,
    x: Floats,
    form: Form,
) -> tuple[Floats, Floats]:
    """Return log E [B, n] and its derivative [B, n, 4]; columns of absent parameters are zero."""
    _, log_b, log_c, log_d = np.hsplit(theta, 4)
    shifted, power_law, value = _evaluate(theta, x, form)
    by_a = np.exp(power_law - value)
    by_b = -by_a * np.exp(log_b) * np.log(shifted)
    by_c = np.zeros_like(value)
    by_d = np.zeros_like(value)
    if form.has_c:
        by_c = np.exp(log_c - value)
    if form.has_d:
        by_d = -by_a * np.exp(log_b) * np.exp(log_d) / shifted
    return value, np.stack([by_a, by_b, by_c, by_d], -1)


def huber_loss(residual: Floats, delta: float) -> Floats:
    """Sum Huber's loss over the last axis."""
    size = np.abs(residual)
    linear = delta * (size - 0.5 * delta)
    return np.where(size <= delta, 0.5 * residual**2, linear).sum(-1)


def robust_scale(residual: Floats, used: int) -> float:
    """Return the standard deviation from the median absolute residual.

    used: number of parameters fitted, for which it is corrected.
    """
    n = len(residual)
    scale = float(np.sqrt(np.mean(residual**2)))
    if n > 12:
        scale = min(scale, 1.4826 * float(np.median(np.abs(residual))))
    return max(scale, 1e-9) * np.sqrt(n / max(n - used, 1))


def minimise(
    theta: Floats,
    x: Floats,
    y: Floats,
    form: Form,
    delta: float,
    steps: int = 60,
) -> tuple[Floats, Floats]:
    """Minimise Huber's loss of B problems with Levenberg-Marquardt.

    theta: starts [B, 4]. y: log E [n] or [B, n]. Returns parameters [B, 4] and losses [B].
    """
    free = form.free
    theta = theta.copy()
    y = np.broadcast_to(y, (len(theta), x.shape[-1]))
    damping = np.full(len(theta), 1e-2)
    loss = huber_loss(y - log_error(theta, x, form), delta)
    active = np.arange(len(theta))
    for _ in range(steps):
        start = theta[active]
        target = y[active]
        step = _step(start, x, target, form, delta, damping[active])
        trial = start.copy()
        moved = start[:, free] + np.clip(step, -2, 2)
        trial[:, free] = np.clip(moved, LOW[free], HIGH[free])

        trial_loss = huber_loss(target - log_error(trial, x, form), delta)
        old_loss = loss[active]
        better = trial_loss < old_loss
        converged = better & (old_loss - trial_loss < 1e-7 * old_loss)
        theta[active[better]] = trial[better]
        loss[active[better]] = trial_loss[better]
        damped = damping[active]
        damping[active] = np.where(better, damped / 5, damped * 5)
        active = active[~converged & (damping[active] < 1e7)]
        if not len(active):
            break
    return theta, loss


def _step(
    theta: Floats,
    x: Floats,
    y: Floats,
    form: Form,
    delta: float,
    damping: Floats,
) -> Floats:
    """Return one Levenberg-Marquardt step of the free parameters [B, k]."""
    value, derivative = jacobian(theta, x, form)
    derivative = derivative[:, :, form.free]
    residual = y - value
    weights = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-12))
    weighted = derivative * weights[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ derivative
    gradient = (weighted * residual[:, :, None]).sum(1)
    diagonal = np.maximum(np.einsum("bii->bi", normal), 1e-8)
    lift = (damping[:, None] * diagonal)[:, :, None] * np.eye(form.size)
    return np.linalg.solve(normal + lift, gradient[..., None])[..., 0]


def fit_from_grid(
    x: Floats,
    y: Floats,
    form: Form,
) -> Floats:
    """Return the best parameters [4] from a grid of starts.

    Least squares first, for the scale of the residuals; then Huber's loss at HUBER times it.
    """
    theta, loss = minimise(_grid(x, y, form), x, y, form, delta=1e9)
    best = theta[np.argmin(loss)]
    residual = y - log_error(best[None], x, form)[0]
    delta = HUBER * robust_scale(residual, form.size)
    theta, loss = minimise(np.vstack([best[None], theta]), x, y, form, delta)
    return theta[np.argmin(loss)]


def _grid(
    x: Floats,
    y: Floats,
    form: Form,
) -> Floats:
    """Return starts [k, 4] over a grid of b, c and d; a follows from the median."""
    floor = float(y.min())
    rows: list[list[float]] = []
    for b in B_STARTS:
        for c in C_STARTS if form.has_c else (0.0,):
            for d in D_STARTS if form.has_d else (0.0,):
                rest = _log_without_offset(y, c)
                a = float(np.median(rest + b * np.log(x + d)))
                log_c = np.log(c) + floor if c else 0.0
                log_d = np.log(d) if d else 0.0
                rows.append([a, np.log(b), log_c, log_d])
    return np.clip(np.array(rows), LOW, HIGH)


def other_starts(
    theta: Floats,
    x: Floats,
    y: Floats,
    form: Form,
) -> Floats:
    """Return starts [k, 4] at other ends of the valley in which c, d and b trade off."""
    if not form.has_c:
        return np.empty((0, 4))
    floor = float(y.min())
    rows: list[list[float]] = []
    pairs = FAR_STARTS if form.has_d else FAR_STARTS[:2]
    for c, d in pairs:
        shift = d if form.has_d else 0.0
        slope, level = np.polyfit(np.log(x + shift), _log_without_offset(y, c), 1)
        log_b = np.log(max(-slope, 1e-2))
        log_d = np.log(d) if form.has_d else theta[3]
        rows.append([level, log_b, np.log(c) + floor, log_d])
    return np.clip(np.array(rows), LOW, HIGH)


def _log_without_offset(y: Floats, c: float) -> Floats:
    """Return log (E - c min E)."""
    return np.log(np.maximum(np.exp(y) - c * np.exp(y.min()), 1e-9))
