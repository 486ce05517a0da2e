"""What a sweep says beside its law: hold-out, iso-FLOP optimum, differences, predictions held.

In: tidy rows of finished trials (one a trial). Out: small frozen answers or a `NotEnoughData` with what is missing.
Differences are taken inside blocks of equal model, horizon and seed, so that size never poses as a mask effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_cluster.report import power_law
from jepa_cluster.report.power_law import Floats, Interval, NotEnoughData

Row = Mapping[str, Any]
SAME_BUDGET = 0.15  # budgets closer than this (in log) are one for an iso-FLOP curve


@dataclass(frozen=True)
class HoldOut:
    """The law without its largest budget, asked for that budget."""

    compute: float
    predicted: Interval  # of a trial there
    actual: float

    @property
    def error(self) -> float:
        """Relative: predicted / actual - 1."""
        return self.predicted.value / self.actual - 1

    def __str__(self) -> str:
        inside = "inside" if self.predicted.low <= self.actual <= self.predicted.high else "OUTSIDE"
        return (
            f"hold-out of the largest budget ({self.compute:.3g}): predicted {self.predicted}, "
            f"measured {self.actual:.3g}, {self.error:+.1%}, {inside} the interval"
        )


def hold_out(compute: Sequence[float], error: Sequence[float], points: Sequence[Any]) -> HoldOut | NotEnoughData:
    """Fit without the largest budget, predict it. Refuses when what is left carries no law."""
    c, e = np.asarray(compute, float), np.asarray(error, float)
    if len(c) == 0:
        return NotEnoughData("nothing is finished")
    largest = np.log(c) > np.log(c.max()) - 0.02
    law = power_law.fit(c[~largest], e[~largest], points=[p for p, out in zip(points, largest, strict=True) if not out])
    if isinstance(law, NotEnoughData):
        return NotEnoughData(f"without the largest budget: {law.reason}")
    at = float(c[largest].mean())
    return HoldOut(at, law.interval(at, trial=True), float(e[largest].mean()))


@dataclass(frozen=True)
class IsoFlop:
    """One budget: error against parameters, and the parabola in log N through it."""

    compute: float
    parameters: Floats
    errors: Floats
    parabola: Floats  # highest power first, of log10 N -> error
    optimum: float | None  # N at the smallest error; None when the parabola has no minimum inside the sizes


@dataclass(frozen=True)
class Frontier:
    """N_opt(C) = scale C^power over the budgets that have an optimum."""

    budgets: list[IsoFlop]
    power: Interval | NotEnoughData
    scale: float = 0.0

    def optimum(self, compute: Any) -> Any:
        """N_opt at a compute; nan where no growth was found."""
        return self.scale * compute**self.power.value if isinstance(self.power, Interval) else np.nan * compute


def iso_flop(rows: Sequence[Row], error: str, compute: str) -> Frontier | NotEnoughData:
    """Parabolas at equal compute and how the best size grows. Wants budgets that at least three sizes share."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: r[compute]):
        if groups and np.log(row[compute] / groups[-1][0][compute]) < SAME_BUDGET:
            groups[-1].append(row)
        else:
            groups.append([row])
    found = [_parabola(g, error, compute) for g in groups if len({r["parameters"] for r in g}) >= 3]
    if not found:
        widest = max((len({r["parameters"] for r in g}) for g in groups), default=0)
        return NotEnoughData(
            f"no budget is shared by three sizes (at most {widest}): give small models longer horizons, or fork "
            "trunks at equal FLOPs"
        )
    best = [(b.compute, b.optimum) for b in found if b.optimum]
    if len(best) < 3:
        return Frontier(
            found, NotEnoughData(f"{len(best)} budgets have an optimum inside their sizes; N_opt(C) needs 3")
        )
    x, y = np.log([c for c, _ in best]), np.log([n for _, n in best])
    slope, intercept = np.polyfit(x, y, 1)
    spread = np.sqrt(np.sum((y - slope * x - intercept) ** 2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2))
    reach = power_law.student_quantile(len(x) - 2) * float(spread)
    power = Interval(float(slope), float(slope) - reach, float(slope) + reach)
    return Frontier(found, power, float(np.exp(intercept)))


def _parabola(rows: Sequence[Row], error: str, compute: str) -> IsoFlop:
    n = np.array([r["parameters"] for r in rows], float)
    e = np.array([r[error] for r in rows], float)
    curve = np.polyfit(np.log10(n), e, 2)
    at = -curve[1] / (2 * curve[0]) if curve[0] > 0 else np.nan
    inside = np.isfinite(at) and np.log10(n.min()) <= at <= np.log10(n.max())
    budget = float(np.exp(np.log([r[compute] for r in rows]).mean()))
    return IsoFlop(budget, n, e, curve, float(10**at) if inside else None)


@dataclass(frozen=True)
class Difference:
    """Setting `a` against `b`: the ratio of their errors in blocks of equal model, horizon and seed."""

    a: str
    b: str
    ratio: Interval  # error of a / error of b
    blocks: int

    def __str__(self) -> str:
        verdict = "no difference shown" if self.ratio.low <= 1 <= self.ratio.high else "a difference"
        return f"{self.a} against {self.b}: error × {self.ratio:.3f} in {self.blocks} pairs, {verdict}"


def difference(
    a: str, b: str, rows_a: Sequence[Row], rows_b: Sequence[Row], error: str, others: Sequence[str] = ()
) -> Difference | NotEnoughData:
    """Paired log-ratios with Student's interval. Wants two pairs at least. others: axes that pairs must share, too."""
    left, right = (
        {(*block(r), *(r.get(o) for o in others)): float(r[error]) for r in rows} for rows in (rows_a, rows_b)
    )
    pairs = np.array([np.log(left[k] / right[k]) for k in left if k in right])
    if len(pairs) < 2:
        return NotEnoughData(
            f"{a} against {b}: {len(pairs)} pairs of equal model, horizon and seed; an interval needs 2"
        )
    told = power_law.mean(pairs)
    return Difference(a, b, Interval(*(float(np.exp(v)) for v in (told.value, told.low, told.high))), len(pairs))


def block(row: Row) -> tuple[Any, ...]:
    return row["model"], row.get("steps"), row["seed"]


def check_predictions(predicted: Mapping[str, Any], finished: Sequence[Row]) -> list[str]:
    """Compare results with predicted.json, and fit the law of both sweeps together -> sentences."""
    error, compute = str(predicted["error"]), str(predicted["compute"])
    points = {(p["model"], p["steps"]): p for p in predicted["points"]}
    source = f"predicted beforehand from {predicted['source']}"
    rows = [r for r in finished if (r["model"], r["steps"]) in points and r.get(error) is not None]
    if not rows:
        return [f"{source}: none of its {len(points)} points is finished yet"]
    outside: list[str] = []
    for row in rows:
        expected = Interval(**points[row["model"], row["steps"]]["error"])
        if not expected.low <= row[error] <= expected.high:
            off = row[error] / expected.value - 1
            outside.append(f"{row['label']}: predicted {expected}, measured {row[error]:.3g}, {off:+.1%}, OUTSIDE")
    inside = len(rows) - len(outside)
    out = [f"{source}: {inside} of {len(rows)} trials inside their {power_law.LEVEL:.0%} intervals", *outside]
    fitted = [*map(tuple, predicted["fitted"]), *((r[compute], r[error]) for r in rows)]
    law = power_law.fit([c for c, _ in fitted], [e for _, e in fitted])
    if isinstance(law, power_law.PowerLawFit):
        target = float(predicted["target"])
        before = Interval(**predicted["before"])
        out.append(f"at {target:.3g}: before {before}, now {law.interval(target)}")
        out.append(f"both sweeps together: {law}")
    return out
