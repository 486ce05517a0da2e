"""Claims of a sweep file beside the results: does each hold here?

In: an `Analysis` with the claims of its sweep. Out: a `Verdict` for each. The difference comes from
the model of all trials (`results.effects`), with its 90 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jepa_cluster.labels import format_number, format_value
from jepa_cluster.records import ClaimRecord
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.power_law import Interval, NotEnoughData, quantiles
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.mixed_model import Floats
from jepa_cluster.results.tables import Row, column

HOLDS = "holds here"
FAILS = "does not hold here"
UNKNOWN = "cannot be decided"
READOUT = "mean_std_max/"  # of the probe that reads more than the mean of the patches


@dataclass(frozen=True)
class Verdict:
    """claim: as the sweep file has it. difference: of the errors; None where it is not known."""

    claim: ClaimRecord
    verdict: str
    difference: Interval | None
    why: str

    def __str__(self) -> str:
        found = f"{self.claim['claim']}: {self.verdict}"
        if self.difference:
            margin = format_number(self.claim["by"])
            metric = self.claim["metric"]
            found += f": {metric} lower by {self.difference:.3f}, margin {margin}"
        return f"{found} ({self.why})" if self.why else found


def verdicts(s: Analysis) -> list[Verdict]:
    """Return the verdict of each claim of the sweep."""
    return [_verdict(replace(s, error=claim["metric"]), claim) for claim in s.sweep.plan["claims"]]


def _verdict(s: Analysis, claim: ClaimRecord) -> Verdict:
    """s: with the metric of the claim."""
    if isinstance(s.effects, NotEnoughData):
        return Verdict(claim, UNKNOWN, None, s.effects.reason)
    sides: list[Floats] = []
    for side in (claim["lower"], claim["than"]):
        rows = np.array([_is_of(row, side) for row in s.effects.rows])
        if not rows.any():
            levels = ", ".join(f"{axis}={format_value(level)}" for axis, level in side.items())
            return Verdict(claim, UNKNOWN, None, f"no trial with {levels} has finished")
        sides.append(_expected(s.effects)[:, rows].mean(1))
    draws = sides[1] - sides[0]
    low, high = quantiles(draws)
    difference = Interval(float(np.median(draws)), float(low), float(high))
    untrained = _untrained(s)
    if untrained <= float(np.median(sides[0])):
        why = f"an untrained encoder has {format_number(untrained)}"
        return Verdict(claim, UNKNOWN, difference, why)
    verdict = HOLDS if low >= claim["by"] else UNKNOWN
    return Verdict(claim, FAILS if high < claim["by"] else verdict, difference, "")


def _is_of(row: Row, side: Mapping[str, Any]) -> bool:
    return all(format_value(row.get(axis)) == format_value(side[axis]) for axis in side)


def _expected(e: Effects) -> Floats:
    """Return draws of the expected error of each row [draws, rows]."""
    total = e.block_draws[:, e.block_of_row]
    model = e.model_of_block[e.block_of_row]
    for axis in e.axes:
        total = total + axis.draws[:, model, axis.of_row]
    return np.exp(total)


def _untrained(s: Analysis) -> float:
    """Return the lowest mean error of untrained encoders of a size, by this or a richer readout."""
    label = s.error.rpartition("/")[2]
    means: list[float] = [np.inf]
    for metric in (s.error, f"probe/{READOUT}{label}"):
        by_size: dict[object, list[Row]] = {}
        for row in s.finished:
            by_size.setdefault(row["size"], []).append(row)
        for rows in by_size.values():
            found = column(rows, f"initial/{metric}")
            if found:
                means.append(float(np.mean(found)))
    return min(means)
