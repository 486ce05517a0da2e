"""Learning rates from the trials of a sweep over rates, and the trials that are missing for them.

In: results of the ladders (`sweep.ladder`), and the cells of the sweep that is calibrated. Out: the
`Calibration` that `optim.lr: calibrated` reads, its lines for people, and points to add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jepa_cluster.labels import format_percent
from jepa_cluster.records import Calibration, RateLaw, RateOptimum
from jepa_cluster.report import analysis, scatter
from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.power_law import Interval
from jepa_cluster.report.rate_ladder import DRAWS, Ladder, Optimum, optimum
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Row, SweepResults, TrialResult
from jepa_cluster.sweep.calibrated import NORMAL, Rate, conditions_of, predict
from jepa_cluster.sweep.ladder import RATE, Cell
from jepa_cluster.sweep.points import Point

Key = tuple[float, int, int]  # parameters, steps, batch: columns of the law
COLUMNS = ("parameters", "steps", "batch")
MIN_SIZES = 3  # that have an optimum, of a law
WIDENED_BY = 2  # rates
DIVERGED = "diverged"


@dataclass(frozen=True)
class CellResult:
    """What the trials of a cell say. planned: number of its trials."""

    cell: Cell
    ladder: Ladder
    optimum: Optimum | str
    planned: int

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
        return {
            "model": cell.model,
            "parameters": cell.parameters,
            "steps": cell.steps,
            "batch": cell.batch,
            "lr": found.lr.value,
            "low": found.lr.low,
            "high": found.lr.high,
            "below": found.excess(found.lr.value / 2).value,
            "above": found.excess(found.lr.value * 2).value,
            "problem": self.problem,
        }

    def __str__(self) -> str:
        name = f"{self.cell.model} {self.cell.steps} steps"
        finished = len(self.ladder.rates)
        done = "" if finished == self.planned else f" ({finished} of {self.planned} trials)"
        if isinstance(self.optimum, str):
            return f"{name}{done}: {self.optimum}"
        lr = self.optimum.lr
        cost = [format_percent(self.optimum.excess(lr.value * by).value) for by in (0.5, 2)]
        found = f"{name}{done}: lr {Rate(lr.value, lr.low, lr.high, '')}".removesuffix(" by ")
        text = f"{found}; half of it costs {cost[0]} %, twice {cost[1]} %"
        return f"{text}; refused: {self.problem}" if self.problem else text


@dataclass(frozen=True)
class LadderResults:
    """What a sweep over rates says so far."""

    document: Calibration
    cells: Sequence[CellResult]

    @property
    def law(self) -> RateLaw | None:
        return self.document["law"]

    def lines(self) -> list[str]:
        """Return all findings in sentences."""
        return [*map(str, self.cells), *law_lines(self.document)]


def calibrate(
    sweep: SweepResults,
    metric: str | None = None,
) -> LadderResults:
    """Return the rates that the trials of a sweep over rates determine.

    metric: default the error of the class probe. Raises TrackingError where none has it.
    """
    rows = tables.trial_table(sweep)
    metric = analysis.choose_metric(rows, metric)
    by_cell: dict[Key, list[tuple[TrialResult, Row]]] = {}
    for result, row in zip(sweep.trials, rows, strict=True):
        if result.recipe:
            optim = result.recipe.optim
            key = (row["parameters"], optim.steps or 1, optim.batch)
            by_cell.setdefault(key, []).append((result, row))
    cells: list[CellResult] = []
    for key in sorted(by_cell):
        cells.append(_cell_result(key, by_cell[key], metric))  # noqa: PERF401
    recipes = [result.recipe for result in sweep.trials if result.recipe]
    document: Calibration = {
        "sweep": sweep.name,
        "metric": metric,
        "conditions": conditions_of(recipes[0].optim) if recipes else {},
        "optima": list(filter(None, map(CellResult.record, cells))),
        "law": _law(cells),
    }
    return LadderResults(document, cells)


def _cell_result(
    key: Key,
    trials: Sequence[tuple[TrialResult, Row]],
    metric: str,
) -> CellResult:
    """Return what the trials of a cell say."""
    rates: list[float] = []
    errors: list[float] = []
    untrained: list[float] = []
    diverged: list[float] = []
    for result, row in trials:
        rate = result.recipe.optim.lr if result.recipe else math.nan
        if row["cause"] == DIVERGED:
            diverged.append(rate)
        if row["state"] == "done" and row.get(metric, 0.0) > 0:
            rates.append(rate)
            errors.append(row[metric])
            untrained += tables.column([row], f"initial/{metric}")
    parameters, steps, batch = key
    first, row = trials[0]
    point = dict(first.point)
    point.pop(RATE, None)
    ladder = Ladder(np.array(rates), np.array(errors), np.array(untrained), diverged)
    cell = Cell(point, row["model"], parameters, steps, batch, lr=0.0)
    return CellResult(cell, ladder, optimum(ladder), len(trials))


# ---- the law


def _law(
    cells: Sequence[CellResult],
) -> RateLaw | None:
    """Fit log lr to the logarithms of parameters, steps and batch, as far as they vary."""
    keys: list[Key] = []
    draws: list[Floats] = []
    for result in cells:
        if isinstance(result.optimum, Optimum) and not result.problem:
            keys.append(result.cell.key)
            draws.append(result.optimum.log2_rate * math.log(2))
    if len({key[0] for key in keys}) < MIN_SIZES:
        return None
    logs = np.log(np.array(keys, float))
    varied = np.flatnonzero(np.ptp(logs, axis=0))
    x = np.hstack([np.ones((len(keys), 1)), logs[:, varied]])
    y = np.stack(draws, 1)
    weights = 1 / np.maximum(y.var(0), 1e-4)
    weights *= len(keys) / weights.sum()
    solve = np.linalg.pinv(x * weights[:, None] ** 0.5) * weights**0.5
    residual = np.median(y, 0) @ (np.eye(len(keys)) - solve.T @ x.T)
    off_law = scatter.off_law(residual, y, weights, x.shape[1])
    degrees = len(keys) - x.shape[1]
    drawn = scatter.draws(y, off_law, degrees, DRAWS, np.random.default_rng(0)) @ solve.T
    return {
        "columns": [COLUMNS[n] for n in varied],
        "terms": np.median(drawn, 0).tolist(),
        "covariance": np.atleast_2d(np.cov(drawn.T)).tolist(),
        "off_law": off_law,
    }


def law_lines(
    document: Calibration,
) -> list[str]:
    """Return the law in a sentence, or what it needs."""
    law = document["law"]
    if law is None:
        return [f"no law of the rate: {MIN_SIZES} sizes with a rate are needed"]
    powers: list[str] = []
    reaches = NORMAL * np.diag(law["covariance"]) ** 0.5
    for column, term, reach in zip(law["columns"], law["terms"][1:], reaches[1:], strict=True):
        power = Interval(term, term - reach, term + reach)
        powers.append(f"{column}^{power:.2f}")
    return [f"law: lr ~ {' '.join(powers)}"]


# ---- what is missing


def missing_points(
    results: LadderResults,
    cells: Sequence[Cell],
) -> list[Point]:
    """Return points to add: rates beyond an edge, and brackets of cells without a ladder."""
    points: list[Point] = []
    for result in results.cells:
        if isinstance(result.optimum, Optimum) and result.optimum.widen:
            points += _beyond(result)
    known = {result.cell.key for result in results.cells}
    for cell in cells:
        if results.law and cell.key not in known:
            points += _bracket(results.law, cell)
    return points


def _beyond(
    result: CellResult,
) -> list[Point]:
    """Return WIDENED_BY more rates below or above a ladder."""
    rates = result.ladder.steps
    side = result.optimum.widen if isinstance(result.optimum, Optimum) else 0
    edge, inner = (rates[-1], rates[-2]) if side > 0 else (rates[0], rates[1])
    factor = edge / inner
    return [result.cell.at(float(edge * factor**n)) for n in range(1, WIDENED_BY + 1)]


def _bracket(
    law: RateLaw,
    cell: Cell,
) -> list[Point]:
    """Return three rates around the prediction of the law."""
    values: dict[str, float] = dict(zip(COLUMNS, cell.key, strict=True))
    rate = predict(law, values, "the law")
    factor = max(2.0, (rate.high / rate.low) ** 0.5)
    return [cell.at(rate.lr * factor**step) for step in (-1, 0, 1)]
