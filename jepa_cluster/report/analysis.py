"""From a sweep's tables to its findings: frontier, laws, hold-out, comparisons.

In: `SweepResults`. Out: `Analysis`, which the terminal, the figures and the pages read, so that
they show the same numbers. Only finished trials are fitted; the others are counted. JEPA's own loss
is never compared between mask settings, because the target moves and its scale depends on the
masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jepa_cluster import labels
from jepa_cluster.errors import TrackingError, suggest
from jepa_cluster.labels import SIZE_AXES
from jepa_cluster.report import comparisons, power_law
from jepa_cluster.report.comparisons import Difference, HoldOut, OptimalSize
from jepa_cluster.report.power_law import Fit, NotEnoughData, PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.tables import CLASS_ERROR, ONLINE_ERROR, Row, Rows, SweepResults

COMPUTE = "flops_total"
REFERENCE_LOSS = "val/reference_loss"  # with masks that all trials share
# what a set without labels has; no setting is better than another one by these
LABEL_FREE = ("probe/rankme", "probe/lidar", "val/loss")
COLLAPSED = 0.25  # of the first value of RankMe or target_std
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
    """Findings over one pair of metrics, each computed when it is first asked for.

    error, compute: the metrics on the y-axis and the x-axis. trials: one row per trial.
    """

    sweep: SweepResults
    error: str
    compute: str
    trials: list[Row]

    @cached_property
    def finished(self) -> list[Row]:
        """Rows of the finished trials that have a known recipe and both coordinates."""
        return list(filter(self._is_usable, self.trials))

    def _is_usable(self, row: Row) -> bool:
        if row["state"] != "done" or not np.isfinite(row["parameters"]):
            return False
        value = row.get(self.error, np.nan)
        if self.is_comparable and value <= 0:
            return False  # a law is fitted to logarithms
        return bool(np.isfinite(value)) and row.get(self.compute, 0.0) > 0

    @property
    def is_comparable(self) -> bool:
        """Whether a lower value is better, in every setting."""
        if self.error == REFERENCE_LOSS:
            return not any(axis.startswith("objective.") for axis in self.sweep.axes)
        return is_error(self.error)

    @cached_property
    def settings(self) -> list[str]:
        """Axes that are neither size nor horizon."""
        return [axis for axis in self.sweep.axes if axis not in SIZE_AXES]

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """Finished rows by setting."""
        return group_by(self.finished, "setting")

    @cached_property
    def best_setting(self) -> str:
        return min(self.groups, key=lambda name: self.mean(self.groups[name]), default=labels.ALL)

    @cached_property
    def frontier(self) -> list[Row]:
        return self.pareto(self.finished) if self.is_comparable else []

    @cached_property
    def law(self) -> Fit:
        """The law over the frontier."""
        return self.fit(self.frontier)

    @cached_property
    def by_setting(self) -> dict[str, Fit]:
        """The law over the frontier of each setting."""
        return {name: self.fit(self.pareto(rows)) for name, rows in self.groups.items()}

    @cached_property
    def by_size(self) -> dict[str, Fit]:
        """The law over the horizons of each model, in the best setting."""
        laws: dict[str, Fit] = {}
        for name, rows in group_by(self.groups.get(self.best_setting, []), "model").items():
            if len(set(tables.column(rows, "steps"))) > 1:
                laws[name] = self.fit(rows)
        return laws

    @cached_property
    def held_out(self) -> HoldOut | NotEnoughData:
        return comparisons.hold_out(*self._columns(self.frontier))

    @cached_property
    def iso_flop(self) -> OptimalSize | NotEnoughData:
        return comparisons.fit_iso_flop(self.finished, self.error, self.compute)

    @cached_property
    def differences(self) -> list[Difference | NotEnoughData]:
        """Each setting against the best one; of many settings, the levels of each axis."""
        if len(self.groups) <= MAX_LISTED_SETTINGS:
            return self._compare_to_best(self.groups)
        found: list[Difference | NotEnoughData] = []
        for axis in self.settings:
            levels: dict[str, list[Row]] = {}
            for value, rows in group_by(self.finished, axis).items():
                levels[labels.axis_word(axis, value, self.settings)] = rows
            found += self._compare_to_best(levels, axis)
        return found

    def _compare_to_best(
        self,
        groups: Mapping[str, Rows],
        axis: str = "",
    ) -> list[Difference | NotEnoughData]:
        """Compare in pairs that agree in all settings but `axis`, or in none without an axis."""
        others = [other for other in self.settings if axis not in ("", other)]
        best, *names = sorted(groups, key=lambda name: self.mean(groups[name])) or [""]
        found: list[Difference | NotEnoughData] = []
        for name in names:
            pair = groups[name], groups[best]
            found.append(comparisons.paired_difference(name, best, *pair, self.error, others))
        return found

    def mean(self, rows: Rows) -> float:
        """Return the mean error of rows."""
        return mean_of(rows, self.error)

    def pareto(self, rows: Rows) -> list[Row]:
        """Return trials whose point, averaged over seeds, no cheaper point beats."""
        points = list(group_by_point(rows).values())
        points.sort(key=lambda seeds: (mean_of(seeds, self.compute), self.mean(seeds)))
        frontier: list[Row] = []
        lowest = float("inf")
        for seeds in points:
            if self.mean(seeds) < lowest:
                lowest = self.mean(seeds)
                frontier += seeds
        return frontier

    def fit(self, rows: Rows) -> Fit:
        """Fit a power law to rows; seeds of a point are bootstrapped together."""
        return power_law.fit(*self._columns(rows))

    def _columns(self, rows: Rows) -> tuple[list[float], list[float], list[str]]:
        """Return compute, error and point of each row."""
        points = list(map(point_label, rows))
        return tables.column(rows, self.compute), tables.column(rows, self.error), points


def analyse(
    sweep: SweepResults,
    error: str | None = None,
    compute: str = COMPUTE,
) -> Analysis:
    """Return the analysis of a sweep. Raises TrackingError when no trial has the metric.

    error: default the metric of predicted.json, else the class probe's error.
    """
    trials = tables.trial_table(sweep)
    predicted = str(sweep.predicted.get("error"))
    if error is None and tables.column(trials, predicted):
        error = predicted
    return Analysis(sweep, choose_metric(trials, error), compute, trials)


def choose_metric(trials: Rows, wanted: str | None) -> str:
    """Return the wanted metric, else the first of `shown_metrics`. Raises TrackingError.

    Where trials differ in what they predict, the online encoder is compared: all of them train it.
    """
    if wanted is None and any("objective.target" in row for row in trials):
        wanted = ONLINE_ERROR if tables.column(trials, ONLINE_ERROR) else None
    if wanted is None:
        return [*shown_metrics(trials), CLASS_ERROR][0]
    if not tables.column(trials, wanted):
        what = f"no trial has the metric '{wanted}' yet"
        raise TrackingError(what, hint=suggest(wanted, _trained_metrics(trials)))
    return wanted


def shown_metrics(trials: Rows) -> list[str]:
    """Return the errors of the probes, the class probe's first; else those of LABEL_FREE."""
    known = _trained_metrics(trials)
    errors = list(filter(is_error, known))
    errors.sort(key=lambda key: key != CLASS_ERROR)
    return errors or [key for key in LABEL_FREE if key in known]


def is_error(metric: str) -> bool:
    """Whether a metric is the error of a probe of the trained encoder."""
    return metric.startswith("probe/") and metric.endswith("_error")


def _trained_metrics(trials: Rows) -> list[str]:
    """Return the metrics of the trained encoder that have a group, such as probe/."""
    known = set[str]().union(*trials)
    return sorted(key for key in known if "/" in key and not key.startswith("initial/"))


# ---- groups of trials


def group_by(rows: Rows, *columns: str) -> dict[str, list[Row]]:
    """Group rows by their cells of some columns, in the order of their first row."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        cells = map(str, map(row.get, columns))
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


def mean_of(rows: Rows, metric: str) -> float:
    """Return the mean of a column."""
    return float(np.mean(tables.column(rows, metric)))


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
    lines += _collapse_lines(s)
    if not s.is_comparable:
        label_free = s.error in (*LABEL_FREE, REFERENCE_LOSS, "loss")
        why = "does not compare settings" if label_free else "is not an error"
        return [*lines, f"{s.error} {why}: no law, and no best setting"]
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


def _collapse_lines(s: Analysis) -> list[str]:
    """Name trials whose features have collapsed, whatever their probes say."""
    lines: list[str] = []
    for metric in ("probe/rankme", "target_std"):
        fallen: list[str] = []
        for row in s.trials:
            value, first = row.get(metric), row.get(f"initial/{metric}")
            if value is not None and first is not None and value < COLLAPSED * first:
                fallen.append(f"{row['label']} ({first:.3g} -> {value:.3g})")
        if fallen:
            more = "" if len(fallen) <= 3 else f", and {len(fallen) - 3} more"
            listed = ", ".join(fallen[:3])
            lines.append(f"{metric} fell below a quarter of its first value: {listed}{more}")
    return lines


def _setting_lines(laws: Mapping[str, Fit]) -> list[str]:
    """The law of each setting; of many settings, the range of their exponents."""
    if len(laws) < 2:
        return []
    if len(laws) <= MAX_LISTED_SETTINGS:
        return [f"{name}: {law}" for name, law in laws.items()]
    exponents: list[float] = []
    for law in laws.values():
        if isinstance(law, PowerLawFit) and not law.unreliable_because:
            exponent = law.parameters["b"]
            exponents.append(exponent.value)
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
