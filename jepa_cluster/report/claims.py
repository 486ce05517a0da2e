"""Claims of a sweep file beside the results: does each hold here?

In: an `Analysis` with the claims of its sweep. Out: a `Verdict` for each. Trials are compared that
differ only in what the claim names. Their difference, at equal steps, is that of the means of their
seeds, with the noise of all trials and its 90 % interval (`Effects.setting_draws`).
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.labels import SECOND_READOUT, STEPS, format_number, format_value
from jepa_cluster.records import ClaimRecord
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.power_law import Interval, NotEnoughData, quantiles
from jepa_cluster.results.effects import COOLDOWN, Effects
from jepa_cluster.results.mixed_model import Floats
from jepa_cluster.results.tables import Row, column, size_of
from jepa_cluster.sweep.claims import MODEL, describe, is_of, values_of

HOLDS = "holds here"
FAILS = "does not hold here"
UNKNOWN = "cannot be decided"
Rows = dict[Hashable, list[int]]  # what trials share -> their rows


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
            found += f": {metric} lower by {self.difference:.3f} at equal steps, margin {margin}"
        notes = [self.why] if self.why else []
        if self.claim["finished"]:
            finished = plural(self.claim["finished"], "trial")
            notes.append(f"the claim was written when {finished} of it had finished")
        return f"{found} ({'; '.join(notes)})" if notes else found


def repeat_command(sweep: str, claim: ClaimRecord) -> str:
    """Return the command that runs the trials of a claim again, in an empty root.

    Of a claim whose sides name different settings only the trials that have the lower error.
    """
    lower, than = claim["lower"], claim["than"]
    if lower.keys() != than.keys():
        than = lower
    words = ["jepa", "submit", sweep]
    for key, level in lower.items():
        levels = dict.fromkeys(map(format_value, (level, than[key])))
        words.append(f"{key}={','.join(levels)}")
    return shlex.join(words)


def verdicts(s: Analysis) -> list[Verdict]:
    """Return the verdict of each claim of the sweep."""
    found: list[Verdict] = []
    fitted: dict[str, Analysis] = {}  # by metric: a fit takes time
    for claim in s.sweep.plan["claims"]:
        metric = claim["metric"]
        if metric not in fitted:
            fitted[metric] = replace(s, error=metric)
        found.append(_verdict(fitted[metric], claim))
    return found


def _verdict(s: Analysis, claim: ClaimRecord) -> Verdict:
    """s: with the metric of the claim."""
    if isinstance(s.effects, NotEnoughData):
        return Verdict(claim, UNKNOWN, None, f"no finished trial has {claim['metric']}")
    named = {*claim["lower"], *claim["than"]}
    sides = [_side(s, claim["lower"], named), _side(s, claim["than"], named)]
    for levels, rows in zip((claim["lower"], claim["than"]), sides, strict=True):
        if not rows:
            return Verdict(claim, UNKNOWN, None, f"no trial with {describe(levels)} has finished")
    shared = sorted(sides[0].keys() & sides[1].keys(), key=str)
    if not shared:
        why = "no two finished trials differ only in what the claim names"
        return Verdict(claim, UNKNOWN, None, why)
    if not _is_compared(s.effects, s.finished, named):
        why = "; ".join(s.effects.missing) or "its settings are not compared"
        return Verdict(claim, UNKNOWN, None, why)
    expected = np.exp(s.effects.setting_draws)
    lower, than = (_mean(expected, side, shared) for side in sides)
    low, high = quantiles(than - lower)
    difference = Interval(float(np.median(than - lower)), float(low), float(high))
    if high < claim["by"]:
        return Verdict(claim, FAILS, difference, "")
    if low < claim["by"]:
        return Verdict(claim, UNKNOWN, difference, "")
    chosen = itertools.chain.from_iterable(map(sides[0].__getitem__, shared))
    untrained = _untrained(s, list(chosen))
    if untrained <= float(np.median(lower)):
        why = f"untrained encoders have {format_number(untrained)}"
        return Verdict(claim, UNKNOWN, difference, why)
    return Verdict(claim, HOLDS, difference, "")


def _side(
    s: Analysis,
    levels: Mapping[str, Any],
    named: set[str],
) -> Rows:
    """Return the finished rows with these levels, by all that the claim does not name."""
    results = {result.name: result for result in s.sweep.trials}
    sizes = set(filter(_is_of_size, s.settings))
    others = [axis for axis in s.settings if axis not in named | sizes]
    found: Rows = {}
    for number, row in enumerate(s.finished):
        result = results[row["trial"]]
        if not result.recipe or not is_of(levels, values_of(result.point, result.recipe)):
            continue
        key = list(map(row.__getitem__, others))
        if not any(map(_is_of_size, named)):
            key.append(size_of(row))
        if STEPS not in named:
            key += [row["steps"], row.get(COOLDOWN)]
        found.setdefault(tuple(key), []).append(number)
    return found


def _is_compared(
    e: Effects,
    rows: Sequence[Row],
    named: set[str],
) -> bool:
    """Whether the model separates the levels of the settings that a claim names.

    Also where one of them follows from the others, as a learning rate that each target has.
    """
    known = {STEPS, COOLDOWN, *map(attrgetter("axis"), e.axes)}
    for axis in named:
        if axis in known or _is_of_size(axis):
            continue
        found: dict[Hashable, set[Hashable]] = {}
        for row in rows:
            others = tuple(map(row.get, sorted(named - {axis})))
            found.setdefault(others, set()).add(row.get(axis))
        if len(named) == 1 or max(map(len, found.values())) > 1:
            return False
    return True


def _is_of_size(axis: str) -> bool:
    return axis.partition(".")[0] == MODEL


def _mean(expected: Floats, side: Rows, keys: Collection[Hashable]) -> Floats:
    """Return draws of the mean over keys, each of which counts once."""
    return np.mean([expected[:, side[key]].mean(1) for key in keys], 0)


def _untrained(s: Analysis, rows: Collection[int]) -> float:
    """Return the mean error of the untrained encoders of rows, by this or a richer readout."""
    readout, _, label = s.error.rpartition("/")
    finished = list(map(s.finished.__getitem__, rows))
    means: list[float] = [np.inf]
    for metric in (f"{readout}/{label}", f"probe/{SECOND_READOUT}{label}"):
        found = column(finished, f"initial/{metric}")
        if found:
            means.append(float(np.mean(found)))
    return min(means)
