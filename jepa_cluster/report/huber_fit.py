"""Fit E = a (C + d)^-b + c and its nested forms under Huber's loss, many problems at once.

In: starts [B, 4], compute [n] and log E. Out: parameters and losses. Parameters are (log a, log b,
log c, log d). A form is the number of them that it has; the others stay at LOW, where they are 0
within rounding. One batched Levenberg-Marquardt fits all starts
and all replicates together: `scipy.optimize.least_squares`, which fits one at a time,
takes ten times as long per replicate (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FORMS = {"a C^-b": 2, "a C^-b + c": 3, "a (C+d)^-b + c": 4}  # -> number of parameters
HUBER = 1.345  # in units of the residuals' robust scale: 95 % efficient under normal noise
# bounds of (log a, log b, log c, log d), with C in units of its mean
LOW = np.array([-30.0, np.log(1e-3), -25.0, -25.0])
HIGH = np.array([30.0, np.log(5.0), 5.0, 12.0])

C_STARTS = (0.1, 0.5, 0.8, 0.95)  # in units of the smallest error
D_STARTS = (1e-3, 0.1, 1.0)
ABSENT = (1e-11,)
# (c, d) at other ends of the valley in which c, d and b trade off; the first two: without d
FAR_STARTS = ((0.02, 1e-3), (0.8, 1e-3), (0.8, 0.5), (0.02, 0.5))


def log_error(
    theta: Floats,
    x: Floats,
) -> Floats:
    """Return log E [B, n] for parameters [B, 4] and compute [n]."""
    return jacobian(theta, x)[0]


def jacobian(
    theta: Floats,
    x: Floats,
) -> tuple[Floats, Floats]:
    """Return log E [B, n] and its derivative [B, n, 4]."""
    log_a, log_b, log_c, log_d = np.hsplit(theta, 4)
    b = np.exp(log_b)
    d = np.exp(log_d)
    shifted = x + d
    fall = b * np.log(shifted)
    power_law = log_a - fall
    offset = np.exp(log_c - power_law)  # c over a (C + d)^-b
    by_a = 1 / (1 + offset)
    derivative = np.stack([by_a, -by_a * fall, offset * by_a, -by_a * b * d / shifted], -1)
    return power_law + np.log1p(offset), derivative


@dataclass(frozen=True)
class Form:
    """A model of log E.

    jacobian: of parameters [B, k] and coordinates: log E [B, n] and its derivative [B, n, k]. low,
    high: bounds of the parameters [k].
    """

    jacobian: Callable[[Floats, Floats], tuple[Floats, Floats]]
    low: Floats
    high: Floats


POWER_LAW = Form(jacobian, LOW, HIGH)


def huber_loss(
    residual: Floats,
    delta: float,
    weights: Floats,
) -> Floats:
    """Sum Huber's loss over the last axis."""
    size = np.abs(residual)
    linear = delta * (size - 0.5 * delta)
    return (weights * np.where(size <= delta, 0.5 * residual**2, linear)).sum(-1)


def robust_scale(
    residual: Floats,
    weights: Floats,
    used: int,
) -> float:
    """Return the standard deviation; of many residuals that from their median, if it is smaller.

    used: number of parameters fitted, for which it is corrected.
    """
    n = float(weights.sum())
    scale = float(np.sqrt(np.average(residual**2, weights=weights)))
    if n > 12:
        scale = min(scale, 1.4826 * float(np.median(np.abs(residual[weights > 0.5]))))
    return max(scale, 1e-9) * np.sqrt(n / max(n - used, 1.0))


def minimise(
    theta: Floats,
    x: Floats,
    y: Floats,
    weights: Floats,
    size: int,
    delta: float,
    form: Form = POWER_LAW,
    steps: int = 60,
) -> tuple[Floats, Floats]:
    """Minimise Huber's loss of B problems over the first `size` parameters.

    theta: starts [B, k]. y: log E [n] or [B, n]. weights: [n]. Returns parameters [B, k] and losses
    [B].
    """
    theta = theta.copy()
    y = np.broadcast_to(y, (len(theta), len(x)))
    damping = np.full(len(theta), 1e-2)
    value, derivative = form.jacobian(theta, x)
    residual = y - value
    loss = huber_loss(residual, delta, weights)
    active = np.arange(len(theta))
    for _ in range(steps):
        trial = theta[active]
        step = _step(
            residual[active], derivative[active, :, :size], weights, delta, damping[active]
        )
        trial[:, :size] += np.clip(step, -2, 2)
        trial = np.clip(trial, form.low, form.high)

        value, trial_derivative = form.jacobian(trial, x)
        trial_residual = y[active] - value
        trial_loss = huber_loss(trial_residual, delta, weights)
        old_loss = loss[active]
        better = trial_loss < old_loss
        converged = better & (old_loss - trial_loss < 1e-7 * old_loss)
        moved = active[better]
        theta[moved] = trial[better]
        loss[moved] = trial_loss[better]
        residual[moved] = trial_residual[better]
        derivative[moved] = trial_derivative[better]
        damping[active] *= np.where(better, 1 / 5, 5)
        active = active[~converged & (damping[active] < 1e7)]
        if not len(active):
            break
    return theta, loss


def _step(
    residual: Floats,
    derivative: Floats,
    weights: Floats,
    delta: float,
    damping: Floats,
) -> Floats:
    """Return one Levenberg-Marquardt step of the parameters [B, size]."""
    robust = weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-12))
    weighted = derivative * robust[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ derivative
    gradient = (weighted * residual[:, :, None]).sum(1)
    diagonal = np.maximum(np.einsum("bii->bi", normal), 1e-8)
    lift = (damping[:, None] * diagonal + 1e-9)[:, :, None] * np.eye(derivative.shape[2])
    return np.linalg.solve(normal + lift, gradient[..., None])[..., 0]


def fit_from_grid(
    x: Floats,
    y: Floats,
    weights: Floats,
    size: int,
) -> Floats:
    """Return the best parameters [4] from a grid of starts.

    Least squares first, for the scale of the residuals; then Huber's loss at HUBER times it.
    """
    c_starts = C_STARTS if size > 2 else ABSENT
    d_starts = D_STARTS if size > 3 else ABSENT
    grid = starts(x, y, size, itertools.product(c_starts, d_starts))
    theta, loss = minimise(grid, x, y, weights, size, delta=1e9)
    best = theta[np.argmin(loss)]
    residual = y - log_error(best[None], x)[0]
    delta = HUBER * robust_scale(residual, weights, size)
    theta, loss = minimise(theta, x, y, weights, size, delta)
    return theta[np.argmin(loss)]


def starts(
    x: Floats,
    y: Floats,
    size: int,
    pairs: Iterable[tuple[float, float]],
) -> Floats:
    """Return starts [k, 4] from pairs (c / min E, d), with a and b by linear regression."""
    rows: list[list[float]] = []
    for c, d in pairs:
        rest = np.maximum(np.exp(y) - c * np.exp(y.min()), 1e-9)
        slope, level = np.polyfit(np.log(x + d), np.log(rest), 1)
        log_b = np.log(max(-slope, 1e-2))
        rows.append([level, log_b, np.log(c) + y.min(), np.log(d)])
    theta = np.clip(np.reshape(rows, (-1, 4)), LOW, HIGH)
    theta[:, size:] = LOW[size:]
    return theta
