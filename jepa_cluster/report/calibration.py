"""Learning rates from the trials of a sweep over rates, and the trials that are missing for them.

In: results of the ladders (`sweep.ladder`), and the cells of the sweep that is calibrated. Out: the
`Calibration` that `optim.lr: calibrated` reads, its lines for people, and points to add.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jepa_cluster.errors import TrackingError
from jepa_cluster.labels import format_percent, format_value
from jepa_cluster.report import analysis, scatter
from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.power_law import Interval
from jepa_cluster.report.rate_ladder import MIN_TRIALS, Ladder, Optimum, optimum
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Row, SweepResults, TrialResult
from jepa_cluster.sweep.calibrated import conditions_of
from jepa_cluster.sweep.ladder import RATE, Cell
from jepa_cluster.sweep.points import Point, Sweep
from jepa_cluster.trial.calibration import (
    NORMAL,
    VERSION,
    Calibration,
    CellSize,
    Key,
    RateLaw,
    RateOptimum,
)
from jepa_cluster.trial.status import OVER

COLUMNS = ("parameters", "steps", "batch")
MIN_SIZES = 3  # that have an optimum, of a law
WIDENED_BY = 2  # rates
WIDEST_BRACKET = 4.0  # factor between neighbouring rates
DIVERGED = "diverged"


@dataclass(frozen=True)
class CellResult:
    """What the trials of a cell say.

    planned: rates of all its trials. is_over: whether none of them waits or runs.
    """

    cell: Cell
    ladder: Ladder
    optimum: Optimum | str
    planned: Floats
    is_over: bool
    per: Sequence[str]

    @property
    def problem(self) -> str:
        """Why its rate must not be used; '' if it may."""
        if isinstance(self.optimum, str):
            return self.optimum
        return "; ".join(self.optimum.problems)

    def record(self) -> RateOptimum | None:
        """Return the entry of calibration.json; None where nothing is known."""
        found = self.optimum
        if isinstance(found, str):
            return None
        cell = self.cell
        return RateOptimum(
            model=cell.model,
            shape=cell.shape,
            parameters=cell.parameters,
            steps=cell.steps,
            batch=cell.batch,
            lr=found.lr.value,
            low=found.lr.low,
            high=found.lr.high,
            below=found.excess(found.lr.value / 2).value,
            above=found.excess(found.lr.value * 2).value,
            problem=self.problem,
        )

    def __str__(self) -> str:
        point = self.cell.point
        levels = [f" {format_value(point[axis])}" for axis in self.per if axis in point]
        name = f"{self.cell.model}{''.join(levels)} {self.cell.steps} steps"
        finished = len(self.ladder.rates)
        if finished < len(self.planned):
            name += f" ({finished} of {len(self.planned)} trials)"
        if isinstance(self.optimum, str):
            return f"{name}: {self.optimum}"
        lr = self.optimum.lr
        cost = [format_percent(self.optimum.excess(lr.value * by).value) for by in (0.5, 2)]
        text = f"{name}: lr {lr}; half of it costs {cost[0]} %, twice {cost[1]} %"
        return f"{text}; refused: {self.problem}" if self.problem else text


@dataclass(frozen=True)
class LadderResults:
    """What a sweep over rates says so far."""

    document: Calibration
    cells: Sequence[CellResult]

    @property
    def law(self) -> RateLaw | None:
        return self.document.law

    @property
    def is_over(self) -> bool:
        """Whether no trial waits or runs."""
        return all(result.is_over for result in self.cells)

    @property
    def is_usable(self) -> bool:
        """Whether a cell has a rate."""
        return not all(found.problem for found in self.document.optima)

    def lines(self) -> list[str]:
        """Return all findings in sentences."""
        chosen = f"rates with the lowest {self.document.metric}:"
        laws = [] if self.document.per else law_lines(self.law)
        return [chosen, *map(str, self.cells), *laws]


def calibrate(
    sweep: SweepResults,
    per: tuple[str, ...] = (),
    metric: str | None = None,
) -> LadderResults:
    """Return the rates that the trials of a sweep over rates determine.

    per: its `ladder_per`. metric: default the error of the class probe. Raises TrackingError where
    none has it.
    """
    rows = tables.trial_table(sweep)
    metric = analysis.choose_metric(rows, metric)
    if not analysis.is_error(metric):
        what = f"{metric} chooses no rate: it is not the error of a probe"
        raise TrackingError(what, hint="--metric probe/..._error; images without labels have none")
    by_cell: dict[Key, list[tuple[TrialResult, Row]]] = {}
    conditions: dict[str, object] = {}
    for result, row in zip(sweep.trials, rows, strict=True):
        if result.recipe:
            key = CellSize.of(result.recipe, row["parameters"], per).key
            by_cell.setdefault(key, []).append((result, row))
            conditions = conditions or conditions_of(result.recipe, per)
    cells = [_cell_result(trials, metric, per) for trials in by_cell.values()]
    cells.sort(key=lambda result: result.cell.size)
    document = Calibration(
        version=VERSION,
        sweep=sweep.name,
        metric=metric,
        conditions=conditions,
        optima=tuple(filter(None, map(CellResult.record, cells))),
        law=None if per else _law(cells),  # levels may differ by more than a factor
        per=per,
    )
    return LadderResults(document, cells)


def _cell_result(
    trials: Sequence[tuple[TrialResult, Row]],
    metric: str,
    per: Sequence[str],
) -> CellResult:
    """Return what the trials of a cell say."""
    planned: list[float] = []
    finished: list[tuple[float, float, int]] = []
    untrained: list[float] = []
    diverged: list[float] = []
    for result, row in trials:
        assert result.recipe
        rate = result.recipe.optim.lr
        planned.append(rate)
        if row["cause"] == DIVERGED:
            diverged.append(rate)
        if row["state"] == "done" and row.get(metric, 0.0) > 0:
            finished.append((rate, row[metric], result.seed))
            untrained += tables.column([row], f"initial/{metric}")
    first, row = trials[0]
    assert first.recipe
    point = dict(first.point)
    point.pop(RATE, None)
    rates, errors, seeds = np.array(finished, float).reshape(-1, 3).T
    ladder = Ladder(rates, errors, seeds, np.array(untrained), diverged)
    size = CellSize.of(first.recipe, row["parameters"], per)
    cell = Cell(**vars(size), point=point, lr=0.0)
    states = {row["state"] for _, row in trials}
    is_over = states.issubset(OVER)
    return CellResult(cell, ladder, optimum(ladder), np.array(planned), is_over, per)


# ---- the law


def _law(
    cells: Sequence[CellResult],
) -> RateLaw | None:
    """Fit log lr to the logarithms of parameters, steps and batch, as far as they vary."""
    sizes: list[tuple[float, int, int]] = []
    draws: list[Floats] = []
    for result in cells:
        if isinstance(result.optimum, Optimum) and not result.problem:
            sizes.append(result.cell.size)
            draws.append(result.optimum.log2_rate * math.log(2))
    if len({size[0] for size in sizes}) < MIN_SIZES:
        return None
    return fit_law(np.log(np.array(sizes, float)), np.stack(draws, 1))


def fit_law(
    logs: Floats,
    y: Floats,
) -> RateLaw:
    """Fit draws of log lr [draws, cells] to logarithms of the columns [cells, 3] that vary.

    Where cells scatter around the law by more than their draws, all terms are that uncertain, too.
    """
    varied = np.flatnonzero(np.ptp(logs, axis=0))
    x = np.hstack([np.ones((len(logs), 1)), logs[:, varied]])
    weights = 1 / np.maximum(y.var(0), 1e-4)
    weights *= len(logs) / weights.sum()
    solve = np.linalg.pinv(x * weights[:, None] ** 0.5) * weights**0.5
    residual = np.median(y, 0) @ (np.eye(len(logs)) - solve.T @ x.T)
    off_law = scatter.off_law(residual, y, weights, x.shape[1])
    drawn = y + off_law * np.random.default_rng(0).normal(size=y.shape)
    terms = drawn @ solve.T
    return RateLaw(
        columns=tuple(COLUMNS[n] for n in varied),
        terms=tuple(np.median(terms, 0).tolist()),
        covariance=tuple(map(tuple, np.atleast_2d(np.cov(terms.T)).tolist())),
        off_law=off_law,
    )


def law_lines(
    law: RateLaw | None,
) -> list[str]:
    """Return the law in a sentence, or what it needs."""
    if law is None:
        return [f"no law of the rate: {MIN_SIZES} sizes with a rate are needed"]
    powers: list[str] = []
    reaches = NORMAL * np.diag(law.covariance) ** 0.5
    for column, term, reach in zip(law.columns, law.terms[1:], reaches[1:], strict=True):
        power = Interval(term, term - reach, term + reach)
        powers.append(f"{column}^{power:.2f}")
    return [f"law: lr ~ {' '.join(powers)}"]


# ---- what is missing


def missing_points(
    results: LadderResults,
    cells: Sequence[Cell],
    made: Sweep,
) -> list[Point]:
    """Return points to add: rates beyond an edge, and brackets of cells without a ladder.

    A cell gets them when its trials are over, and brackets when all are. made: the sweep over
    rates, with points that may not be submitted yet.
    """
    points: list[Point] = []
    for result in results.cells:
        if isinstance(result.optimum, Optimum) and result.optimum.widen and result.is_over:
            points += _beyond(result.cell, np.unique(result.planned), result.optimum.widen)
    has_points = {json.dumps({**point, RATE: None}, sort_keys=True) for point in made.list}
    for cell in cells:
        is_new = json.dumps({**cell.point, RATE: None}, sort_keys=True) not in has_points
        if results.law and results.is_over and is_new:
            points += _bracket(results.law, cell, 3 if len(made.seeds) > 1 else MIN_TRIALS)
    return [point for point in points if point not in made.list]


def _beyond(
    cell: Cell,
    rates: Floats,
    side: int,
) -> list[Point]:
    """Return WIDENED_BY more rates below or above those of a ladder."""
    edge, inner = (rates[-1], rates[-2]) if side > 0 else (rates[0], rates[1])
    factor = edge / inner
    return [cell.at(float(edge * factor**n)) for n in range(1, WIDENED_BY + 1)]


def _bracket(
    law: RateLaw,
    cell: Cell,
    rates: int,
) -> list[Point]:
    """Return rates around the prediction of the law, the further apart the less it is known."""
    values: dict[str, float] = dict(zip(COLUMNS, cell.size, strict=True))
    lr, low, high = law.predict(values)
    factor = min(max(2.0, (high / low) ** 0.5), WIDEST_BRACKET) ** (2 / (rates - 1))
    steps = range(-(rates // 2), rates // 2 + 1)
    return [cell.at(lr * factor**step) for step in steps]
