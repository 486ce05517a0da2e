"""Student's t distribution in plain Python: the login node needs no scipy for it."""

import functools
import math

ONE_SIGMA = 0.6827  # probability within one standard deviation of a normal mean


@functools.cache
def quantile(degrees: int, level: float) -> float:
    """Return half the width of an interval that holds a mean with probability `level`.

    degrees: degrees of freedom. The unit is the standard error of the mean.
    """
    low = 0.0
    high = math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _probability(angle, degrees) < level:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(low)


def _probability(angle: float, degrees: int) -> float:
    """Return P(|t| < sqrt(degrees) tan(angle)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    series = math.sin(angle) * total
    return (angle + series) * 2 / math.pi if odd else series
