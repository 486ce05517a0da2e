"""How far blocks lie off a law, beyond what their own noise explains.

In: residuals of a law, and draws of log E. Out: a standard deviation, and draws that have it.
"""

from __future__ import annotations

import numpy as np

from jepa_cluster.report.huber_fit import Floats


def off_law(
    residual: Floats,
    log_errors: Floats,
    weights: Floats,
    size: int,
) -> float:
    """Return the standard deviation of blocks around the law that their draws do not have."""
    total = float(weights.sum())
    degrees = max(total - size, 1.0)
    around = float(weights @ residual**2) / degrees
    known = float(weights @ log_errors.var(0)) / total
    return max(around - known, 0.0) ** 0.5


def draws(
    log_errors: Floats,
    scale: float,
    degrees: float,
    count: int,
    rng: np.random.Generator,
) -> Floats:
    """Return `count` draws of log E that scatter around the law by `scale`, too.

    degrees: of freedom of that standard deviation, which is uncertain itself.
    """
    drawn = log_errors[rng.integers(len(log_errors), size=count)]
    degrees = max(degrees, 1.0)
    spread = (degrees / rng.chisquare(degrees, (count, 1))) ** 0.5
    return drawn + scale * spread * rng.normal(size=drawn.shape)
