"""From a sweep's tables to its findings: frontier, laws, hold-out, comparisons.

In: `SweepResults`. Out: `Analysis`, which the terminal, the figures and the pages read, so that
they show the same numbers. Only finished trials are fitted; the others are counted. JEPA's own loss
is never compared between mask settings, because the target moves and its scale depends on the
masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jepa_cluster import labels
from jepa_cluster.errors import TrackingError, suggest
from jepa_cluster.labels import SIZE_AXES
from jepa_cluster.report import comparisons, power_law
from jepa_cluster.report.comparisons import Difference, HoldOut, OptimalSize
from jepa_cluster.report.power_law import Fit, NotEnoughData, PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Row, Rows, SweepResults

COMPUTE = "flops_total"
CLASS_ERROR = "probe/class_error"
MAX_LISTED_SETTINGS = 6  # up to which each setting is listed and compared with the best one
MASK_FRACTIONS = (
    "context_fraction",
    "target_fraction",
    "union_fraction",
)  # measured
# columns that the mean of a point's seeds does not have
TRIAL_COLUMNS = ("trial", "seed", "state", "attempts", "trunk")


@dataclass(frozen=True)
class Analysis:
    """Findings over one pair of metrics.

    error, compute: the metrics on the y-axis and the x-axis. trials: one row per trial.
    frontier: rows that no cheaper point beats. law: over the frontier.
    by_setting: law over the frontier of each setting.
    by_size: law over the horizons of each model, in the best setting.
    """

    sweep: SweepResults
    error: str
    compute: str
    trials: list[Row]
    frontier: list[Row]
    law: Fit
    by_setting: dict[str, Fit]
    by_size: dict[str, Fit]
    best_setting: str
    held_out: HoldOut | NotEnoughData
    iso_flop: OptimalSize | NotEnoughData
    differences: list[Difference | NotEnoughData]

    @property
    def finished(self) -> list[Row]:
        return usable_rows(self.trials, self.error, self.compute)

    @property
    def settings(self) -> list[str]:
        """Axes that are neither size nor horizon."""
        return setting_axes(self.sweep)

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Finished rows by setting."""
        return group_by(self.finished, "setting")


def analyse(
    sweep: SweepResults,
    error: str | None = None,
    compute: str = COMPUTE,
) -> Analysis:
    """Compute all findings. Raises TrackingError when no trial has the metric.

    error: default the metric of predicted.json, else the class probe's error.
    """
    trials = tables.trial_table(sweep)
    predicted = str(sweep.predicted.get("error"))
    if error is None and tables.column(trials, predicted):
        error = predicted
    error = choose_metric(trials, error)
    finished = usable_rows(trials, error, compute)
    settings = setting_axes(sweep)
    groups = group_by(finished, "setting")
    best_setting = labels.ALL
    if groups:
        best_setting = min(groups, key=lambda name: mean_of(groups[name], error))
    frontier = pareto_frontier(finished, error, compute)

    by_setting: dict[str, Fit] = {}
    for name, rows in groups.items():
        by_setting[name] = fit_law(pareto_frontier(rows, error, compute), error, compute)
    by_size: dict[str, Fit] = {}
    for name, rows in group_by(groups.get(best_setting, []), "model").items():
        if len(set(tables.column(rows, "steps"))) > 1:
            by_size[name] = fit_law(rows, error, compute)

    return Analysis(
        sweep=sweep,
        error=error,
        compute=compute,
        trials=trials,
        frontier=frontier,
        law=fit_law(frontier, error, compute),
        by_setting=by_setting,
        by_size=by_size,
        best_setting=best_setting,
        held_out=comparisons.hold_out(*_columns(frontier, error, compute)),
        iso_flop=comparisons.fit_iso_flop(finished, error, compute),
        differences=setting_differences(groups, finished, settings, error),
    )


def setting_axes(sweep: SweepResults) -> list[str]:
    return [axis for axis in sweep.axes if axis not in SIZE_AXES]


def choose_metric(trials: Rows, wanted: str | None) -> str:
    """Return the wanted metric, else the class probe's error, else the first probe error."""
    known: set[str] = set().union(*trials)
    if wanted in known:
        return wanted
    if wanted:
        metrics = [key for key in sorted(known) if "/" in key and not key.startswith("initial/")]
        what = f"no trial has the metric '{wanted}' yet"
        raise TrackingError(what, hint=suggest(wanted, metrics))
    errors = sorted(filter(is_error, known))
    if not errors or CLASS_ERROR in errors:
        return CLASS_ERROR
    return errors[0]


def is_error(key: str) -> bool:
    """Whether a column holds the error of a probe of the trained encoder."""
    return key.endswith("_error") and not key.startswith("initial/")


def usable_rows(
    rows: Rows,
    error: str,
    compute: str,
) -> list[Row]:
    return [row for row in rows if is_usable(row, error, compute)]


def is_usable(
    row: Row,
    error: str,
    compute: str,
) -> bool:
    """Whether a trial is finished, has a known recipe and both coordinates."""
    if row.get("state") != "done" or not np.isfinite(row.get("parameters", 0.0)):
        return False
    return row.get(error, -1.0) > 0 and row.get(compute, 0.0) > 0


# ---- groups of trials


def group_by(rows: Rows, *columns: str) -> dict[str, list[Row]]:
    """Group rows by their cells of some columns, in the order of their first row."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        cells = [str(row.get(column, "")) for column in columns]
        groups.setdefault(" ".join(cells), []).append(row)
    return groups


def group_by_point(rows: Rows) -> dict[str, list[Row]]:
    """Group the seeds of each point, by the point's label."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(point_label(row), []).append(row)
    return groups


def point_label(row: Row) -> str:
    """Return the label of a trial without its seed."""
    *words, _ = str(row["label"]).split()
    return " ".join(words) or labels.ALL


def pareto_frontier(
    rows: Rows,
    error: str,
    compute: str,
) -> list[Row]:
    """Return trials whose point, averaged over seeds, no cheaper point beats."""
    points = list(group_by_point(rows).values())
    points.sort(key=lambda seeds: (mean_of(seeds, compute), mean_of(seeds, error)))
    frontier: list[Row] = []
    lowest = float("inf")
    for seeds in points:
        if mean_of(seeds, error) < lowest:
            lowest = mean_of(seeds, error)
            frontier += seeds
    return frontier


def point_table(trials: Rows) -> list[Row]:
    """Return one row per point: means over its finished trials, in the order of `trials`.

    n: number of trials. low/<metric>, high/<metric>, from two seeds on: Student's interval
    (power_law.LEVEL) of that mean.
    """
    done = [row for row in trials if row["state"] == "done"]
    return list(map(_mean_row, group_by_point(done).values()))


def _mean_row(rows: Rows) -> Row:
    """Return the row of a point from those of its finished trials."""
    point: Row = {}
    metrics: list[str] = []
    for key in dict.fromkeys(itertools.chain(*rows)):
        cells = tables.column(rows, key)
        if key == "parameters":
            continue
        if isinstance(cells[0], float):
            metrics.append(key)
        elif key not in TRIAL_COLUMNS and key in rows[0]:
            point[key] = cells[0]
    point["label"] = point_label(rows[0])
    point["parameters"] = rows[0]["parameters"]
    point["n"] = len(rows)
    for metric in metrics:
        mean = power_law.mean(tables.column(rows, metric))
        point[metric] = mean.value
        if np.isfinite(mean.low):
            point[f"low/{metric}"] = mean.low
            point[f"high/{metric}"] = mean.high
    return point


# ---- laws and differences


def fit_law(
    rows: Rows,
    error: str,
    compute: str,
) -> Fit:
    """Fit a power law to rows; seeds of a point are bootstrapped together."""
    c, e, points = _columns(rows, error, compute)
    return power_law.fit(c, e, points=points)


def _columns(
    rows: Rows,
    error: str,
    compute: str,
) -> tuple[list[float], list[float], list[str]]:
    """Return compute, error and point of each row."""
    points = list(map(point_label, rows))
    return tables.column(rows, compute), tables.column(rows, error), points


def mean_of(rows: Rows, metric: str) -> float:
    """Return the mean of a column."""
    return float(np.mean(tables.column(rows, metric)))


def setting_differences(
    groups: Mapping[str, Rows],
    finished: Rows,
    settings: Sequence[str],
    error: str,
) -> list[Difference | NotEnoughData]:
    """Compare each setting with the best one; of many settings, the levels of each axis."""
    if len(groups) <= MAX_LISTED_SETTINGS:
        return _differences_to_best(groups, error)
    found: list[Difference | NotEnoughData] = []
    for axis in settings:
        others = [other for other in settings if other != axis]
        levels: dict[str, list[Row]] = {}
        for value, rows in group_by(finished, axis).items():
            levels[labels.axis_word(axis, value, settings)] = rows
        found += _differences_to_best(levels, error, others)
    return found


def _differences_to_best(
    groups: Mapping[str, Rows],
    error: str,
    others: Sequence[str] = (),
) -> list[Difference | NotEnoughData]:
    names = sorted(groups, key=lambda name: mean_of(groups[name], error))
    found: list[Difference | NotEnoughData] = []
    for name in names[1:]:
        best = names[0]
        pair = groups[name], groups[best]
        found.append(comparisons.paired_difference(name, best, *pair, error, others))
    return found


# ---- sentences


def summary(s: Analysis) -> list[str]:
    """Return the findings in sentences, the same for terminal, page and notes."""
    finished = len(s.finished)
    lines = [f"{finished} of {len(s.trials)} trials finished"]
    if finished < len(s.trials):
        lines[0] += f", {len(s.trials) - finished} not"
    unread = np.count_nonzero(np.isnan(tables.column(s.trials, "parameters")))
    if unread:
        reason = "their config.yaml is not one that this version froze"
        lines.append(f"{unread} trials are left out: {reason}")
    lines.append(f"frontier ({len(s.frontier)} trials): {s.law}")
    if isinstance(s.law, PowerLawFit) and np.isfinite(list(s.law.aicc.values())).all():
        tried = ", ".join(f"{form}: {aicc:.1f}" for form, aicc in s.law.aicc.items())
        lines.append(f"forms tried, AICc: {tried}")
    if isinstance(s.held_out, HoldOut):
        lines.append(str(s.held_out))
    else:
        lines.append(f"hold-out: {s.held_out}")
    lines += _setting_lines(s.by_setting)
    lines += [f"{name}, {s.best_setting}: {law}" for name, law in s.by_size.items()]
    lines += map(str, s.differences)
    if len(s.differences) > 3:
        level = f"{len(s.differences)} differences at {power_law.LEVEL:.0%} each"
        lines.append(f"{level}: about one in ten misses by chance")
    lines.append(_iso_flop_line(s.iso_flop))
    predicted = s.sweep.predicted
    if predicted and (s.error, s.compute) == (
        predicted["error"],
        predicted["compute"],
    ):
        lines += comparisons.check_predictions(predicted, s.finished)
    elif predicted:
        metrics = f"{predicted['error']} over {predicted['compute']}"
        lines.append(f"predicted beforehand: {metrics} (--metric, --compute)")
    return lines


def _setting_lines(laws: Mapping[str, Fit]) -> list[str]:
    """The law of each setting; of many settings, the range of their exponents."""
    if len(laws) < 2:
        return []
    if len(laws) <= MAX_LISTED_SETTINGS:
        return [f"{name}: {law}" for name, law in laws.items()]
    fits = [law for law in laws.values() if isinstance(law, PowerLawFit)]
    reliable = [law for law in fits if not law.unreliable_because]
    exponents = [law.parameters["b"].value for law in reliable]
    found = "none can be fitted"
    if exponents:
        found = f"b from {min(exponents):.3g} to {max(exponents):.3g}"
    head = f"laws of each of {len(laws)} settings (on the page)"
    return [f"{head}: {len(exponents)} fitted, {found}"]


def _iso_flop_line(iso_flop: OptimalSize | NotEnoughData) -> str:
    if isinstance(iso_flop, NotEnoughData):
        return f"iso-FLOP: {iso_flop}"
    best = [curve for curve in iso_flop.budgets if curve.optimum]
    sizes = ", ".join(f"{curve.optimum:.3g} at {curve.compute:.2g}" for curve in best)
    return f"iso-FLOP: best sizes {sizes or 'none inside'}; N_opt ~ C^{iso_flop.exponent}"
