"""From a sweep's tables to its findings: frontier, laws, hold-out, comparisons.

In: `SweepResults`. Out: `Analysis`, which the terminal, the figures and the pages read, so that
they show the same numbers. Only finished trials are fitted; the others are counted. JEPA's own loss
is never compared between mask settings, because the target moves and its scale depends on the
masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from jepa_cluster import labels
from jepa_cluster.errors import TrackingError, suggest
from jepa_cluster.labels import SIZE_AXES
from jepa_cluster.report import answers, comparisons, frontier, power_law, rates, size_law
from jepa_cluster.report.answers import Answer
from jepa_cluster.report.comparisons import HoldOut, OptimalSize
from jepa_cluster.report.points import group_by, mean_of
from jepa_cluster.report.power_law import Fit, Floats, NotEnoughData
from jepa_cluster.report.size_law import SizeLaw
from jepa_cluster.results import effects, tables
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import CLASS_ERROR, ONLINE_ERROR, Row, Rows, SweepResults

COMPUTE = "flops_total"
COMPUTES = (COMPUTE, "flops_encoder", "images_seen", "gpu_hours_alone")
REFERENCE_LOSS = "val/reference_loss"  # with masks that all trials share
# what a set without labels has; no setting is better than another one by these
LABEL_FREE = ("probe/rankme", "probe/lidar", "val/loss")
MAX_LISTED_SETTINGS = 6  # up to which the law of each setting is fitted
MASK_FRACTIONS = (
    "context_fraction",
    "target_fraction",
    "union_fraction",
)  # measured


@dataclass(frozen=True)
class Analysis:
    """Findings over one pair of metrics, each computed when it is first asked for.

    error, compute: the metrics on the y-axis and the x-axis. trials: one row per trial. fitted: the
    models so far, by error and trials.
    """

    sweep: SweepResults
    error: str
    compute: str
    trials: list[Row]
    fitted: dict[Hashable, Effects] = field(default_factory=dict[Hashable, Effects], repr=False)

    @cached_property
    def finished(self) -> list[Row]:
        """Rows of the finished trials that have a known recipe and an error."""
        return list(filter(self._is_usable, self.trials))

    @cached_property
    def measured(self) -> list[Row]:
        """Finished rows with a known compute, for all that has compute as a coordinate."""
        return [row for row in self.finished if row.get(self.compute, 0.0) > 0]

    def _is_usable(
        self,
        row: Row,
    ) -> bool:
        if row["state"] != "done" or not np.isfinite(row["parameters"]):
            return False
        value = row.get(self.error, np.nan)
        if self.is_comparable and value <= 0:
            return False  # a law is fitted to logarithms
        return bool(np.isfinite(value))

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
    def _measured_effects(self) -> Effects | NotEnoughData:
        """The model of the trials with a known compute: that of all trials where it is known."""
        return self._effects(self.measured)

    @cached_property
    def effects(self) -> Effects | NotEnoughData:
        """The model of all finished trials, from which every number below comes."""
        return self._effects(self.finished)

    def _effects(
        self,
        rows: Rows,
        smooth: bool = True,
    ) -> Effects | NotEnoughData:
        """Return the model of some rows; it is computed once for all compute metrics."""
        if not rows or not self.is_comparable:
            return NotEnoughData("nothing is finished")
        key = (self.error, smooth, *tables.column(rows, "trial"))
        if key not in self.fitted:
            self.fitted[key] = effects.fit(rows, self.error, self.settings, smooth)
        return self.fitted[key]

    @cached_property
    def answers(self) -> list[Answer]:
        """What each setting does, by size."""
        if isinstance(self.effects, NotEnoughData):
            return []
        found = partial(answers.answer, self.effects, self.sweep.axes)
        return list(map(found, self.effects.axes))

    @cached_property
    def best_setting(self) -> str:
        """The setting that has run, and whose levels have the lowest error over all sizes."""
        if isinstance(self.effects, NotEnoughData):
            return labels.ALL
        total = np.zeros(len(self.finished))
        for axis in self.effects.axes:
            total += axis.relative.mean(0)[axis.of_row]
        return str(self.finished[int(total.argmin())]["setting"])

    @cached_property
    def frontier(self) -> list[Row]:
        """Trials with the best setting of each block that no cheaper block beats."""
        e = self._measured_effects
        if isinstance(e, NotEnoughData):
            return []
        compute, _, weights = self._frontier(e)
        chosen = e.is_best & frontier.chosen(compute, weights)[e.block_of_row]
        return list(itertools.compress(e.rows, chosen.tolist()))

    @cached_property
    def frontier_line(self) -> tuple[Floats, Floats]:
        """Compute and error of the frontier's blocks at their best levels, by compute."""
        e = self._measured_effects
        if isinstance(e, NotEnoughData):
            return np.zeros(0), np.zeros(0)
        compute, log_errors, weights = self._frontier(e)
        order = np.argsort(compute)
        order = order[frontier.chosen(compute, weights)[order]]
        errors = np.exp(np.median(log_errors[:, order], 0))
        return compute[order], np.minimum.accumulate(errors)

    def _frontier(
        self,
        e: Effects,
        lost: Floats | float = 0.0,
    ) -> tuple[Floats, Floats, Floats]:
        """Return compute, draws of log error less `lost`, and weight on the frontier of blocks."""
        compute, log_errors = e.compute(self.compute), e.best_draws - lost
        return compute, log_errors, frontier.weights_of(compute, log_errors)

    @cached_property
    def law(self) -> Fit:
        """The law over the frontier, at the best levels of each size."""
        return self._law(self._measured_effects)

    @cached_property
    def law_at_best_rates(self) -> Fit | None:
        """The law if every block had its best learning rate; None where that is not known."""
        e = self._measured_effects
        calibration = self.sweep.calibration
        if isinstance(e, NotEnoughData) or not calibration or calibration.metric != self.error:
            return None
        lost = rates.lost(e.rows, e.block_of_row)
        return None if lost is None or not lost.any() else self._law(e, lost)

    def _law(
        self,
        e: Effects | NotEnoughData,
        lost: Floats | float = 0.0,
    ) -> Fit:
        """Return the law of blocks whose log error is lower by `lost`."""
        if isinstance(e, NotEnoughData):
            return e
        compute, log_errors, weights = self._frontier(e, lost)
        trials = np.bincount(e.block_of_row).astype(float)
        noise = float(np.median(e.noise))
        return power_law.fit(compute, log_errors, trials, weights, noise)

    @cached_property
    def by_setting(self) -> dict[str, Fit]:
        """The law of each setting, from its own trials; none of many settings."""
        groups = group_by(self.measured, "setting")
        if not 1 < len(groups) <= MAX_LISTED_SETTINGS:
            return {}
        return {name: self._law(self._effects(rows)) for name, rows in groups.items()}

    @cached_property
    def by_size(self) -> dict[str, Fit]:
        """The law over the horizons of each size, at its best levels."""
        laws: dict[str, Fit] = {}
        names = tables.size_names(self.measured)
        for size, name in names.items():
            rows = [row for row in self.measured if tables.size_of(row) == size]
            if len(set(tables.column(rows, "steps"))) > 1:
                laws[name] = self._law(self._effects(rows))
        return laws

    @cached_property
    def held_out(self) -> HoldOut | NotEnoughData:
        """The law without the blocks of the largest budget, evaluated there."""
        e = self._measured_effects
        if isinstance(e, NotEnoughData):
            return e
        compute, _, weights = self._frontier(e)
        chosen = frontier.chosen(compute, weights)
        most = compute[chosen].max() * (1 - power_law.SAME_COMPUTE)
        is_small = (compute <= most)[e.block_of_row]
        law = self._law(self._effects(list(itertools.compress(e.rows, is_small.tolist()))))
        if isinstance(law, NotEnoughData):
            return NotEnoughData(f"without the largest budget: {law.reason}")
        is_largest = e.is_best & chosen[e.block_of_row] & ~is_small
        largest = list(itertools.compress(e.rows, is_largest.tolist()))
        budget = mean_of(largest, self.compute)
        actual = float(np.exp(np.mean(np.log(tables.column(largest, self.error)))))
        # The law is that of the best levels, which may not have run there.
        factor = float(np.exp(e.excess[is_largest].mean()))
        return HoldOut(budget, law.interval(budget, trial=True).times(factor), actual)

    @cached_property
    def iso_flop(self) -> OptimalSize | NotEnoughData:
        return comparisons.fit_iso_flop(self.measured, self.error, self.compute)

    @cached_property
    def size_law(self) -> SizeLaw | NotEnoughData:
        """The best size at each compute by E(N, D), beside `iso_flop`."""
        e = self._measured_effects
        if isinstance(e, NotEnoughData):
            return e
        missing = size_law.missing_data(e)
        if missing:
            return missing
        # The law is the surface here: a quadratic one would move its exponents.
        free = self._effects(self.measured, smooth=False)
        return free if isinstance(free, NotEnoughData) else size_law.fit(free, self.compute)


def analyse(
    sweep: SweepResults,
    error: str | None = None,
    compute: str = COMPUTE,
) -> Analysis:
    """Return the analysis of a sweep. Raises TrackingError when no trial has the metric.

    error: default the metric of predicted.json, else the class probe's error.
    """
    trials = rates.with_rates(sweep, tables.trial_table(sweep))
    predicted = str(sweep.predicted.get("error"))
    if error is None and tables.column(trials, predicted):
        error = predicted
    metric = choose_metric(trials, error)
    if not tables.column(trials, compute):
        hint = suggest(compute, COMPUTES)
        raise TrackingError(f"no trial has the compute '{compute}' yet", hint=hint)
    return Analysis(sweep, metric, compute, trials)


def choose_metric(
    trials: Rows,
    wanted: str | None,
) -> str:
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
