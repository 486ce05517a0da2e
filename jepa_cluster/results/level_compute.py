"""What the levels of a setting cost at equal steps, and what that compute alone would do.

A larger batch, image or context takes more compute per step, so at equal steps it has an advantage
that longer training would have, too. In: rows of finished trials as numbers. Out: the log compute
of each level, and the slope of log error over log compute, by which levels are compared at equal
compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_cluster.results.mixed_model import Floats, Index

SAME_COMPUTE = 0.03  # in log: levels that differ by less cost the same


def by_axis(
    axes: Sequence[tuple[int, Index]],
    model: Index,
    block: Index,
    log_compute: Floats,
) -> list[Floats]:
    """Return the log compute of each level at equal steps, for each axis [models, levels].

    axes: number of levels, and the level of each row. model, block, log_compute: of each row. Each
    model has its own; a level that it has not run is as far from the others as in other models. The
    mean over the levels is 0, and all are 0 where they cost the same.
    """
    found = [np.full((model.max() + 1, count), np.nan) for count, _ in axes]
    for number in range(model.max() + 1):
        of_model = model == number
        parts = [np.eye(block.max() + 1)[block[of_model]]]
        parts += [np.eye(count)[of_row[of_model]] for count, of_row in axes]
        additive = np.linalg.lstsq(np.hstack(parts), log_compute[of_model])[0]
        start = block.max() + 1
        for levels, (count, of_row) in zip(found, axes, strict=True):
            ran = np.unique(of_row[of_model])
            levels[number, ran] = additive[start + ran]
            start += count
    return list(map(_filled, found))


def _filled(levels: Floats) -> Floats:
    """Return the levels with those that a model has not run; zeros where they cost the same."""
    ran = np.isfinite(levels)
    model, level = np.nonzero(ran)
    models, count = levels.shape
    additive = np.hstack([np.eye(models)[model], np.eye(count)[level]])
    found = np.linalg.lstsq(additive, levels[ran])[0]
    filled = np.where(ran, levels, found[:models, None] + found[models:])
    filled = filled - filled.mean(1, keepdims=True)
    return filled if np.ptp(filled, 1).max() > SAME_COMPUTE else np.zeros_like(filled)


def slope(
    log_errors: Floats,
    model: Index,
    steps: Floats,
) -> Floats | None:
    """Return draws of d log error / d log compute between the horizons of a model, of all models.

    log_errors: draws of each block [draws, blocks]. model, steps: of each block. None where no
    model has several horizons.
    """
    log_steps = np.log(steps)
    count = np.bincount(model)
    x = log_steps - (np.bincount(model, log_steps) / count)[model]
    total = float(x @ x)
    return log_errors @ x / total if total > SAME_COMPUTE**2 else None
