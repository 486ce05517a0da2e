"""From a sweep's tidy tables to what one may say of it: finals, frontier, laws, comparisons.

In: `tracking.curves.Sweep`. Out: `Study`, which the terminal, the figures and the pages all read, so that they
tell the same numbers. Only finished trials are fitted; the others are counted. JEPA's own loss is never
compared between mask settings, because the target moves and its scale depends on the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_cluster.errors import TrackingError, suggest
from jepa_cluster.report import comparisons, power_law
from jepa_cluster.results import tables

COMPUTE = "flops_total"
SIZE_AXES = (
    "model",
    "optim.steps",
    "optim.epochs",
    "optim.cooldown_steps",
)  # move along the compute axis; the other axes are settings
FEW = 6  # settings up to which each is told and compared with the best; of more, the levels of each axis are
REALISED = ("context_fraction", "target_fraction", "union_fraction")  # what the masks really left
PER_TRIAL = ("trial", "seed", "state", "attempts", "trunk")  # columns that a point does not have
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """finals: one row a trial (curves.finals); law: over the frontier; by_setting: over each setting's own frontier;
    by_size: over the horizons of each model in the best setting."""

    sweep: tables.Sweep
    error: str  # the metric on the y-axis
    compute: str  # the metric on the x-axis
    finals: list[Row]
    frontier: list[Row]
    law: power_law.PowerLawFit | power_law.NotEnoughData
    by_setting: dict[str, power_law.PowerLawFit | power_law.NotEnoughData]
    by_size: dict[str, power_law.PowerLawFit | power_law.NotEnoughData]
    best_setting: str
    held_out: comparisons.HoldOut | power_law.NotEnoughData
    iso_flop: comparisons.Frontier | power_law.NotEnoughData
    differences: list[comparisons.Difference | power_law.NotEnoughData]

    @property
    def finished(self) -> list[Row]:
        return [r for r in self.finals if usable(r, self.error, self.compute)]

    @property
    def settings(self) -> list[str]:
        """Axes that are no size and no horizon."""
        return [a for a in self.sweep.axes if a not in SIZE_AXES]


def study(sweep: tables.Sweep, error: str | None = None, compute: str = COMPUTE) -> Study:
    """Everything the reports tell, of what was predicted beforehand unless asked otherwise. Raises TrackingError when
    the metric is in no trial."""
    finals = tables.finals(sweep)
    foretold = sweep.predicted.get("error")
    error = choose_error(finals, error or (foretold if any(foretold in r for r in finals) else None))
    done = [r for r in finals if usable(r, error, compute)]
    settings = [a for a in sweep.axes if a not in SIZE_AXES]
    groups = group(done, settings)
    best = pareto(done, error, compute)
    first, *others = sorted(groups, key=lambda g: np.mean([r[error] for r in groups[g]])) or ["all"]
    sizes = group(groups.get(first, []), ["model"])
    return Study(
        sweep,
        error,
        compute,
        finals,
        best,
        law_of(best, error, compute),
        {name: law_of(pareto(rows, error, compute), error, compute) for name, rows in groups.items()},
        {n: law_of(rows, error, compute) for n, rows in sizes.items() if len({r["steps"] for r in rows}) > 1},
        first,
        comparisons.hold_out([r[compute] for r in best], [r[error] for r in best], [point(r) for r in best]),
        comparisons.iso_flop(done, error, compute),
        [comparisons.difference(name, first, groups[name], groups[first], error) for name in others]
        if len(groups) <= FEW
        else levels(done, settings, error),
    )


def levels(
    rows: Sequence[Row], axes: Sequence[str], error: str
) -> list[comparisons.Difference | power_law.NotEnoughData]:
    """For each axis its levels against the best one, in pairs that are equal in everything else."""
    out: list[comparisons.Difference | power_law.NotEnoughData] = []
    for axis in axes:
        groups = group(rows, [axis])
        best, *rest = sorted(groups, key=lambda g: np.mean([r[error] for r in groups[g]]))
        others = [a for a in axes if a != axis]
        out += [comparisons.difference(g, best, groups[g], groups[best], error, others) for g in rest]
    return out


def choose_error(finals: Sequence[Row], wanted: str | None) -> str:
    """The metric to show: the wanted one, else the class probe's error, else the first probe error there is."""
    known = sorted({k for r in finals for k in r if "/" in k and not k.startswith("initial/")})
    if wanted:
        if any(wanted in r for r in finals):
            return wanted
        raise TrackingError(f"no trial has the metric '{wanted}' yet", hint=suggest(wanted, known))
    errors = [k for k in known if k.endswith("_error")]
    ordered = [k for k in ("probe/class_error", *errors) if k in errors]
    return ordered[0] if ordered else "probe/class_error"


def usable(row: Mapping[str, Any], error: str, compute: str) -> bool:
    """A finished trial whose recipe is known, with both coordinates."""
    known = row.get("state") == "done" and np.isfinite(row.get("parameters", 0.0))
    return bool(known) and row.get(error, -1.0) > 0 and row.get(compute, 0.0) > 0


def setting(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    """'target_scale=0.15–0.2': the settings of a row that are no size; 'all' without such axes."""
    return " ".join(f"{a.rsplit('.', 1)[-1]}={row.get(a, '')}" for a in axes) or "all"


def group(rows: Sequence[Row], axes: Sequence[str]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(setting(row, axes), []).append(row)
    return out


def pareto(rows: Sequence[Row], error: str, compute: str) -> list[Row]:
    """Trials whose point, averaged over seeds, no cheaper point beats. All their seeds are returned."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(point(row), []).append(row)
    means = [(np.mean([r[compute] for r in rs]), np.mean([r[error] for r in rs]), rs) for rs in points.values()]
    best: list[Row] = []
    lowest = float("inf")
    for _, mean, members in sorted(means, key=lambda m: (m[0], m[1])):
        if mean < lowest:
            lowest = float(mean)
            best += members
    return best


def point(row: Row) -> str:
    """The label without its seed."""
    return str(row["label"]).rsplit(" s", 1)[0]


def points(finals: Sequence[Row]) -> list[Row]:
    """One row a point: its finished trials' number `n`, the mean of every metric over them and, from two seeds on,
    `low/<metric>` and `high/<metric>`: Student's 90 % interval (power_law.LEVEL) of that mean. Order: of `finals`."""
    groups: dict[str, list[Row]] = {}
    for row in finals:
        if row["state"] == "done":
            groups.setdefault(point(row), []).append(row)
    table: list[Row] = []
    for name, rows in groups.items():
        same = {k: v for k, v in rows[0].items() if k not in PER_TRIAL and not isinstance(v, float)}
        out: Row = {**same, "label": name, "parameters": rows[0]["parameters"], "n": len(rows)}
        for key in dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, float) and k != "parameters"):
            told = power_law.mean([r[key] for r in rows if key in r])
            out[key] = told.value
            if np.isfinite(told.low):
                out |= {f"low/{key}": told.low, f"high/{key}": told.high}
        table.append(out)
    return table


def law_of(rows: Sequence[Row], error: str, compute: str) -> power_law.PowerLawFit | power_law.NotEnoughData:
    return power_law.fit([r[compute] for r in rows], [r[error] for r in rows], points=[point(r) for r in rows])


def summary(s: Study) -> list[str]:
    """The findings in sentences, the same for terminal, page and notes."""
    waiting = len(s.finals) - len(s.finished)
    lines = [f"{len(s.finished)} of {len(s.finals)} trials finished" + (f", {waiting} not" if waiting else "")]
    unread = sum(not np.isfinite(r["parameters"]) for r in s.finals)
    if unread:
        lines.append(f"{unread} trials are left out: their config.yaml is not one that this version froze")
    lines.append(f"frontier ({len(s.frontier)} trials): {s.law}")
    if isinstance(s.law, power_law.PowerLawFit) and np.isfinite(list(s.law.aicc.values())).all():
        lines.append("forms tried, AICc: " + ", ".join(f"{k}: {v:.1f}" for k, v in s.law.aicc.items()))
    lines.append(str(s.held_out) if isinstance(s.held_out, comparisons.HoldOut) else f"hold-out: {s.held_out}")
    if 1 < len(s.by_setting) <= FEW:
        lines += [f"{name}: {law}" for name, law in s.by_setting.items()]
    elif len(s.by_setting) > FEW:
        b = [
            law.parameters["b"].value
            for law in s.by_setting.values()
            if isinstance(law, power_law.PowerLawFit) and not law.unreliable_because
        ]
        told = f"b from {min(b):.3g} to {max(b):.3g}" if b else "none can be fitted"
        lines.append(f"laws of each of {len(s.by_setting)} settings (on the page): {len(b)} fitted, {told}")
    lines += [f"{name}, {s.best_setting}: {law}" for name, law in s.by_size.items()]
    lines += [str(d) for d in s.differences]
    if len(s.differences) > 3:
        lines.append(
            f"{len(s.differences)} differences at {power_law.LEVEL:.0%} each: about one in ten misses by chance"
        )
    if isinstance(s.iso_flop, power_law.NotEnoughData):
        lines.append(f"iso-FLOP: {s.iso_flop}")
    else:
        best = (
            ", ".join(f"{b.optimum:.3g} at {b.compute:.2g}" for b in s.iso_flop.budgets if b.optimum) or "none inside"
        )
        lines.append(f"iso-FLOP: best sizes {best}; N_opt ~ C^{s.iso_flop.power}")
    told = s.sweep.predicted
    if told and (s.error, s.compute) == (told["error"], told["compute"]):
        lines += comparisons.check_predictions(told, s.finished)
    elif told:
        lines.append(f"predicted beforehand: {told['error']} over {told['compute']} (--metric, --compute)")
    return lines
