"""Which blocks no cheaper block beats.

In: compute and draws of log error of each block. Out: weights and a choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.power_law import SAME_COMPUTE, budget_of

IN_MOST = 0.5  # share of the draws in which a budget of the frontier has the lowest error so far


def weights_of(compute: Floats, log_errors: Floats) -> Floats:
    """Return for each block the share of the draws in which no cheaper block has a lower error."""
    order = np.argsort(compute)
    lowest = np.minimum.accumulate(log_errors[:, order], 1)
    cheaper = np.searchsorted(compute[order], compute * (1 + SAME_COMPUTE), "right") - 1
    return (log_errors <= lowest[:, cheaper]).mean(0)


def chosen(compute: Floats, weights: Floats) -> NDArray[np.bool_]:
    """Whether a block is that of its budget in the frontier: the one with the largest weight.

    weights: of `weights_of`. A budget that no block improves in most draws has none.
    """
    budget = budget_of(compute)
    total = np.bincount(budget, weights)
    largest = np.zeros(len(total))
    np.maximum.at(largest, budget, weights)
    return (weights >= largest[budget]) & (total > IN_MOST)[budget]
