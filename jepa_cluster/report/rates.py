"""Learning rates of trials beside the best ones of a calibration.

In: results of a sweep with its calibration. Out: columns of the trial table, and sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jepa_cluster.errors import ConfigError
from jepa_cluster.labels import FITTED, format_number, format_percent
from jepa_cluster.results import tables
from jepa_cluster.results.mixed_model import Floats, Index
from jepa_cluster.results.tables import Row, Rows, SweepResults
from jepa_cluster.sweep.calibrated import NEAR, rate_of

RELATIVE = "lr/relative"  # of a trial: its rate over the best one
EXCESS = "lr/excess_error"  # what its rate costs, relative; absent where that is not known
IS_NEAR = "lr/is_near"  # 1 where the rate is known to be within NEAR of the best one, else 0
MAX_LISTED = 4


def with_rates(
    sweep: SweepResults,
    rows: Rows,
) -> list[Row]:
    """Return rows of trials with the three columns, if the sweep has a calibration."""
    if sweep.calibration is None:
        return list(rows)
    wider: list[Row] = []
    for result, row in zip(sweep.trials, rows, strict=True):
        wider.append({**row, IS_NEAR: 0.0})
        if result.recipe is None:
            continue
        try:
            best = rate_of(sweep.calibration, result.recipe, by_law=True)
        except ConfigError:
            continue
        lr = result.recipe.optim.lr
        wider[-1] |= {RELATIVE: lr / best.lr, IS_NEAR: float(best.is_near(lr))}
        if math.isfinite(best.below):
            wider[-1][EXCESS] = best.excess(lr)
    return wider


def lost(
    rows: Rows,
    block: Index,
) -> Floats | None:
    """Return what each block loses to its rates, as log error; None where a trial's is not known.

    block: of each row.
    """
    cells = [row.get(EXCESS, math.nan) for row in rows]
    if not np.isfinite(cells).all():
        return None
    return np.bincount(block, np.log1p(cells)) / np.bincount(block)


def lines(
    sweep: SweepResults,
    rows: Iterable[Row],
    error: str,
) -> list[str]:
    """Return how far the rates of finished trials are from the best ones.

    What that costs is known of the error that chose the rates.
    """
    calibration = sweep.calibration
    if calibration is None:
        return [f"learning rates: not calibrated (jepa calibrate {sweep.name})"]
    blocks: dict[tuple[str, object], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["size"], row["steps"]), []).append(row)
    off = dict(blocks)
    for name, members in blocks.items():
        if all(tables.column(members, IS_NEAR)):
            del off[name]
    found = [
        f"learning rates by {calibration['sweep']}: {len(blocks) - len(off)} of {len(blocks)} "
        f"blocks are known to be within a factor of {NEAR} of the best rate"
    ]
    is_same = calibration["metric"] == error
    if not is_same:
        found[0] += f" for {calibration['metric']}"
    for (size, steps), members in list(off.items())[:MAX_LISTED]:
        found.append(f"{size} {steps} steps: {_distance(members, is_same)}")
    if len(off) > MAX_LISTED:
        found.append(f"and {len(off) - MAX_LISTED} more blocks with other rates")
    return found


def _distance(
    rows: Sequence[Row],
    with_cost: bool,
) -> str:
    """Return how far the rates of a block are from the best one, and what that costs."""
    relative = tables.column(rows, RELATIVE)
    if len(relative) < len(rows):
        return "the best rate is not known"
    low, high = (format_number(end, FITTED) for end in (min(relative), max(relative)))
    text = f"{low if low == high else f'{low} to {high}'} of the best rate"
    costs = tables.column(rows, EXCESS)
    if costs and with_cost:
        text += f", which costs about {format_percent(float(np.mean(costs)))} %"
    return text
