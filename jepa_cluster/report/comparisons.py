"""What a sweep says beside its law: hold-out, iso-FLOP optimum, predictions.

In: rows of finished trials, one per trial. Out: small frozen answers, or `NotEnoughData` with what
is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.report import power_law
from jepa_cluster.report.power_law import (
    Floats,
    Interval,
    NotEnoughData,
    PowerLawFit,
)
from jepa_cluster.report.size_law import SizeLaw
from jepa_cluster.results.tables import Row, Rows, column

SAME_BUDGET = 0.15  # in log: budgets closer than this are one for an iso-FLOP curve


@dataclass(frozen=True)
class HoldOut:
    """The law without its largest budget, evaluated at that budget."""

    compute: float
    predicted: Interval  # of a trial there
    actual: float

    @property
    def error(self) -> float:
        """Relative: predicted / actual - 1."""
        return self.predicted.value / self.actual - 1

    def __str__(self) -> str:
        inside = "inside" if self.actual in self.predicted else "OUTSIDE"
        budget = format_number(self.compute, FITTED)
        return (
            f"of the largest budget ({budget}): predicted {self.predicted}, "
            f"measured {format_number(self.actual)}, {self.error:+.1%}, {inside} the interval"
        )


@dataclass(frozen=True)
class IsoFlopCurve:
    """One budget: error against parameters, and the parabola in log N through it.

    parabola: coefficients, highest power first, of log10 N -> error.
    optimum: N at the smallest error; None when the parabola has no minimum inside the sizes.
    """

    compute: float
    parameters: Floats
    errors: Floats
    parabola: Floats
    optimum: float | None


@dataclass(frozen=True)
class OptimalSize:
    """N_opt(C) = scale C^exponent over the budgets that have an optimum."""

    budgets: list[IsoFlopCurve]
    exponent: Interval | NotEnoughData
    scale: float = 0.0

    def __str__(self) -> str:
        best = [curve for curve in self.budgets if curve.optimum]
        sizes = ", ".join(
            f"{(c.optimum or 0) / 1e6:.3g}M at {format_number(c.compute, FITTED)}" for c in best
        )
        growth = f", N_opt ~ C^{self.exponent}"
        if isinstance(self.exponent, NotEnoughData):
            growth = f" ({self.exponent.reason})"
        return f"{sizes or 'no budget has its lowest error inside its sizes'}{growth}"

    def at(
        self,
        compute: float | Floats,
    ) -> Floats:
        """Return N_opt at a compute; nan where no growth was found."""
        c = np.asarray(compute, float)
        if isinstance(self.exponent, NotEnoughData):
            return c * np.nan
        return self.scale * c**self.exponent.value


def compare_sizes(
    parabola: OptimalSize | NotEnoughData,
    law: SizeLaw | NotEnoughData,
) -> str:
    """Return the best sizes by both methods in one sentence; '' where neither is known."""
    found: list[str] = []
    for method, sizes in (("parabola", parabola), ("E(N, D)", law)):
        if not isinstance(sizes, NotEnoughData):
            found.append(f"by {method} {sizes}")
    if differ(parabola, law):
        why = "a parabola is biased where its sizes are not centred on the best one"
        found.append(f"their intervals do not overlap: {why}")
    return "; ".join(found)


def differ(
    parabola: OptimalSize | NotEnoughData,
    law: SizeLaw | NotEnoughData,
) -> bool:
    """Whether the intervals of both exponents are known and do not overlap."""
    if isinstance(parabola, NotEnoughData) or isinstance(law, NotEnoughData):
        return False
    if isinstance(parabola.exponent, NotEnoughData):
        return False
    first, second = sorted((parabola.exponent, law.exponent), key=lambda k: k.low)
    return second.low > first.high


def fit_iso_flop(
    rows: Rows,
    error: str,
    compute: str,
) -> OptimalSize | NotEnoughData:
    """Fit parabolas at equal compute, and how the best size grows.

    Needs budgets that at least three sizes share, and three optima for the growth.
    """
    curves: list[IsoFlopCurve] = []
    most_sizes = 0
    for group in _by_budget(rows, compute):
        sizes = len(set(column(group, "parameters")))
        most_sizes = max(most_sizes, sizes)
        if sizes >= 3:
            curves.append(_parabola(group, error, compute))
    if not curves:
        hint = "give small models longer horizons, or fork trunks at equal FLOPs"
        found = f"no budget is shared by three sizes ({most_sizes} at most)"
        return NotEnoughData(f"{found}: {hint}")
    best = [(curve.compute, curve.optimum) for curve in curves if curve.optimum]
    if len(best) < 3:
        reason = f"N_opt(C) needs three such budgets, and has {len(best)}"
        return OptimalSize(curves, NotEnoughData(reason))
    x, y = np.log(np.array(best, float)).T
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    reach = power_law.student_quantile(len(x) - 2) * float(np.sqrt(covariance[0, 0]))
    exponent = Interval(float(slope), float(slope) - reach, float(slope) + reach)
    return OptimalSize(curves, exponent, float(np.exp(intercept)))


def _by_budget(
    rows: Rows,
    compute: str,
) -> list[list[Row]]:
    """Group rows of about equal compute, smallest first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row[compute]):
        if groups and np.log(row[compute] / groups[-1][0][compute]) < SAME_BUDGET:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _parabola(
    rows: Rows,
    error: str,
    compute: str,
) -> IsoFlopCurve:
    sizes = np.array(column(rows, "parameters"), float)
    errors = np.array(column(rows, error), float)
    log_sizes = np.log10(sizes)
    parabola = np.polyfit(log_sizes, errors, 2)
    budget = float(np.exp(np.log(column(rows, compute)).mean()))
    optimum = None
    if parabola[0] > 0:
        lowest = -parabola[1] / (2 * parabola[0])
        if log_sizes.min() <= lowest <= log_sizes.max():
            optimum = float(10**lowest)
    return IsoFlopCurve(budget, sizes, errors, parabola, optimum)


def check_predictions(
    predicted: Mapping[str, Any],
    finished: Rows,
) -> list[str]:
    """Compare results with predicted.json, and fit the law of both sweeps together.

    Returns sentences.
    """
    error = predicted["error"]
    compute = predicted["compute"]
    points = {(point["model"], point["steps"]): point for point in predicted["points"]}
    source = f"predicted beforehand from {predicted['source']}"
    outside: list[str] = []
    pairs = list(map(tuple, predicted["fitted"]))
    for row in finished:
        point = points.get((row["model"], row["steps"]))
        if point is None:
            continue
        pairs.append((row[compute], row[error]))
        expected = Interval(**point["error"])
        if row[error] not in expected:
            off = row[error] / expected.value - 1
            measured = (
                f"predicted {expected}, measured {format_number(row[error])}, {off:+.1%}, OUTSIDE"
            )
            outside.append(f"{row['label']}: {measured}")
    checked = len(pairs) - len(predicted["fitted"])
    if not checked:
        return [f"{source}: none of its {len(points)} points is finished yet"]

    inside = f"{checked - len(outside)} of {checked} trials"
    lines = [
        f"{source}: {inside} inside their {power_law.LEVEL:.0%} intervals",
        *outside,
    ]
    law = power_law.fit_trials(*np.array(pairs, float).T)
    if isinstance(law, PowerLawFit):
        target = predicted["target"]
        before = Interval(**predicted["before"])
        lines.append(
            f"at {format_number(target, FITTED)}: before {before}, now {law.interval(target)}"
        )
        lines.append(f"both sweeps together: {law}")
    return lines
