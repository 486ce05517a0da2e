"""Learning rates of trials beside the best ones of a calibration.

In: results of a sweep with its calibration. Out: columns of the trial table, and sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jepa_cluster import labels
from jepa_cluster.errors import ConfigError, plural
from jepa_cluster.labels import FITTED, format_number, format_percent
from jepa_cluster.results import tables
from jepa_cluster.results.mixed_model import Floats, Index
from jepa_cluster.results.tables import Row, Rows, SweepResults
from jepa_cluster.sweep.calibrated import rate_of
from jepa_cluster.sweep.points import CalibrationUse
from jepa_cluster.trial.calibration import NEAR

RELATIVE = "lr/relative"  # of a trial: its rate over the best one
EXCESS = "lr/excess_error"  # what its rate costs, relative; absent where that is not known
SOURCE = "lr/source"  # of the best rate: a calibration, or its law
IS_NEAR = "lr/is_near"  # 1 where the rate is known to be within NEAR of the best one, else 0
MAX_LISTED = 4
ANY = CalibrationUse("", other_sizes="law", other_data="use")


def with_rates(
    sweep: SweepResults,
    rows: Rows,
) -> list[Row]:
    """Return rows of trials with these columns, if the sweep has a calibration."""
    if sweep.calibration is None:
        return list(rows)
    wider: list[Row] = []
    for result, row in zip(sweep.trials, rows, strict=True):
        wider.append({**row, IS_NEAR: 0.0})
        if result.recipe is None:
            continue
        try:
            best = rate_of(sweep.calibration, result.recipe, ANY)
        except ConfigError:
            continue
        lr = result.recipe.optim.lr
        wider[-1] |= {RELATIVE: lr / best.lr, SOURCE: best.source}
        if best.optimum:
            wider[-1][IS_NEAR] = float(best.optimum.is_near(lr))
            wider[-1][EXCESS] = best.optimum.excess(lr)
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
        is_ladder = sweep.name.endswith(labels.LADDERS)
        command = f"jepa calibrate {sweep.name.removesuffix(labels.LADDERS)}"
        return [] if is_ladder else [f"learning rates: not calibrated ({command})"]
    blocks: dict[tuple[str, object], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["size"], row["steps"]), []).append(row)
    near, off = 0, list[tuple[float, str]]()
    for (size, steps), members in blocks.items():
        if all(tables.column(members, IS_NEAR)):
            near += 1
            continue
        distance = _distance(members, calibration.metric == error)
        if distance:
            cost = float(np.mean(tables.column(members, EXCESS) or 0.0))
            off.append((-cost, f"{size} {steps} steps: {distance}"))
    found = (
        f"learning rates by {calibration.sweep}, for {calibration.metric}: {near} of "
        f"{plural(len(blocks), 'block')} known to be within a factor of {NEAR} of the best rate"
    )
    if near + len(off) < len(blocks):
        found += "; the best rates of others are not known that well"
    listed = [text for _, text in sorted(off)[:MAX_LISTED]]
    if len(off) > MAX_LISTED:
        listed.append(f"and {plural(len(off) - MAX_LISTED, 'more block')} at other rates")
    return [found, *listed]


def _distance(
    rows: Sequence[Row],
    with_cost: bool,
) -> str:
    """Return how far the rates of a block are from the best one; '' where they are that one."""
    relative = tables.column(rows, RELATIVE)
    if len(relative) < len(rows):
        return "the best rate is not known"
    if max(relative) <= NEAR and min(relative) >= 1 / NEAR:
        return ""
    low, high = (format_number(end, FITTED) for end in (min(relative), max(relative)))
    text = f"{low if low == high else f'{low} to {high}'} of the best rate"
    costs = tables.column(rows, EXCESS)
    if costs and with_cost:
        text += f", which costs about {format_percent(float(np.mean(costs)))} %"
    return text
