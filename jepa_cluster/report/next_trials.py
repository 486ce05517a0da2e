"""What to run next: a ladder of budgets beyond the frontier, with predicted errors and a cost.

In: an `Analysis` and GPU-hours. Out: `NextTrials` and the sweep file that asks for them, or
`NotEnoughData`. Each rung has twice the budget of the one below. It holds the best size at that
budget and the next smaller and larger size of the sweep, so that it carries an iso-FLOP parabola.
A trial costs what this sweep took per unit of compute; the cost that counts is `jepa plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.labels import SIZE_AXES
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.power_law import Interval, NotEnoughData, PowerLawFit
from jepa_cluster.results.tables import Row, Rows, column
from jepa_cluster.sweep import sweep_file
from jepa_cluster.sweep.points import HORIZON, Limits, Sweep
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_atomic, write_json

REACH = 10.0  # the target, times the largest compute fitted, unless one is given
MAX_SEEDS = 4


@dataclass(frozen=True)
class NextTrial:
    """One size and horizon. error, gpu_hours: predicted for one seed."""

    model: str
    steps: int
    compute: float
    error: Interval
    gpu_hours: float

    def __str__(self) -> str:
        return f"{self.model} {self.steps} steps: {self.error}."


@dataclass(frozen=True)
class NextTrials:
    """The trials to run, as predicted.json holds them.

    gpu_hours: the budget. before: the law's interval at the target.
    fitted: (compute, error) pairs behind the law. settings: axis -> value that all trials share.
    """

    source: str
    setting: str
    error: str
    compute: str
    target: float
    gpu_hours: float
    points: tuple[NextTrial, ...]
    seeds: tuple[int, ...]
    before: Interval
    fitted: tuple[tuple[float, float], ...]
    settings: Mapping[str, object]

    @property
    def cost(self) -> float:
        """GPU-hours of all seeds."""
        return len(self.seeds) * _cost(self.points)


def _cost(trials: Sequence[NextTrial]) -> float:
    """Return the GPU-hours of one seed."""
    return sum(trial.gpu_hours for trial in trials)


def design(
    s: Analysis,
    gpu_hours: float,
    target: float | None = None,
) -> NextTrials | NotEnoughData:
    """Choose rungs from the lowest up, in the best setting, within the GPU-hours."""
    if not s.is_comparable:
        return NotEnoughData(f"{s.error} does not compare settings")
    rows = s.groups.get(s.best_setting, [])
    frontier = s.pareto(rows)
    law = s.fit(frontier)
    if isinstance(law, NotEnoughData):
        return NotEnoughData(f"{law.reason}; no error can be predicted in {s.best_setting}")
    sizes = _longest_of_each_size(rows)
    if not sizes:
        return NotEnoughData("no finished trial has GPU-hours, so no trial has a price")

    largest = law.span[1]
    target = target or REACH * largest
    rungs = max(1, int(np.log2(target / largest)))
    budgets = largest * 2.0 ** np.arange(1, rungs + 1)
    ladder = [_rung(s, frontier, law, sizes, float(budget)) for budget in budgets]
    points = _affordable(ladder, gpu_hours)
    if not points:
        cheapest = f"the cheapest costs {ladder[0][0].gpu_hours:.3g}"
        return NotEnoughData(f"{gpu_hours:g} GPU-hours buy no trial; {cheapest}")
    seeds = min(MAX_SEEDS, int(gpu_hours / _cost(points)))
    first_seed = 1 + max(column(s.trials, "seed"))
    return NextTrials(
        source=s.sweep.name,
        setting=s.best_setting,
        error=s.error,
        compute=s.compute,
        target=target,
        gpu_hours=gpu_hours,
        points=tuple(points),
        seeds=tuple(range(first_seed, first_seed + seeds)),
        before=law.interval(target),
        fitted=tuple(zip(column(frontier, s.compute), column(frontier, s.error), strict=True)),
        settings=_setting_values(s, rows[0]),
    )


def _longest_of_each_size(rows: Rows) -> list[Row]:
    """Return the longest trial with known costs of each model, small to large."""
    priced = [row for row in rows if row["gpu_hours_alone"] > 0]
    longest: dict[str, Row] = {}
    for row in sorted(priced, key=lambda row: -row["steps"]):
        longest.setdefault(row["model"], row)
    return sorted(longest.values(), key=lambda row: row["parameters"])


def _setting_values(s: Analysis, row: Row) -> dict[str, object]:
    """Return the axes of a trial that are neither size nor seed."""
    point: Mapping[str, object] = {}
    for result in s.sweep.trials:
        if result.name == row["trial"]:
            point = result.point
    return {axis: point[axis] for axis in point if axis not in (*SIZE_AXES, "seed")}


def _rung(
    s: Analysis,
    frontier: Rows,
    law: PowerLawFit,
    sizes: Rows,
    compute: float,
) -> list[NextTrial]:
    """Return the size nearest to the iso-FLOP optimum, else the frontier's last; its neighbours."""
    optimum = np.nan
    if not isinstance(s.iso_flop, NotEnoughData):
        optimum = float(s.iso_flop.at(compute))
    if not np.isfinite(optimum):
        optimum = max(frontier, key=lambda row: row[s.compute])["parameters"]
    distances = np.abs(np.log(np.array(column(sizes, "parameters")) / optimum))
    best = int(np.argmin(distances))
    smaller = sizes[max(best - 1, 0) : best]
    larger = sizes[best + 1 : best + 2]
    trials: list[NextTrial] = []
    for row in [sizes[best], *smaller, *larger]:
        steps = round(compute * row["steps"] / row[s.compute])
        rounded = row[s.compute] * steps / row["steps"]
        price = row["gpu_hours_alone"] / row[s.compute]
        error = law.interval(rounded, trial=True)
        trials.append(NextTrial(row["model"], steps, rounded, error, price * rounded))
    return trials


def _affordable(ladder: Sequence[Sequence[NextTrial]], gpu_hours: float) -> list[NextTrial]:
    """Return all trials of a rung, else its best size, while the GPU-hours suffice."""
    points: list[NextTrial] = []
    for rung in ladder:
        for trials in (rung, rung[:1]):
            if _cost(trials) <= gpu_hours:
                points += trials
                gpu_hours -= _cost(trials)
                break
    return points


def to_sweep(
    n: NextTrials,
    source: Sweep,
    name: str,
) -> Sweep:
    """Return the trials as a sweep file: base and resources of the source, the points listed."""
    base = source.base
    points = [{"model": p.model, **n.settings, HORIZON: p.steps} for p in n.points]
    if source.fork:
        base = (*base, "optim.schedule=wsd")
        for point, trial in zip(points, n.points, strict=True):
            point["optim.cooldown_steps"] = source.fork.cooldown_steps(trial.steps)
    return replace(
        source,
        name=name,
        question=f"What is {n.error} at {n.target:.3g} {n.compute}? (continues {n.source})",
        expect=f"{n.before} there. " + " ".join(map(str, n.points)),
        base=base,
        grid={},
        zip={},
        list=tuple(points),
        fork=None,
        where="",
        seeds=n.seeds,
        limits=Limits(n.gpu_hours, source.limits.gpus_in_flight),
    )


def describe(n: NextTrials) -> list[str]:
    """Return the trials, their predictions and their cost, for the terminal."""
    trials = plural(len(n.points) * len(n.seeds), "trial")
    cost = f"about {n.cost:.3g} of {n.gpu_hours:g} GPU-hours by what {n.source} took"
    return [
        f"beyond the frontier of {n.source} (setting: {n.setting}): {trials}, {cost}",
        f"{n.error} at {n.target:.3g} {n.compute}: {n.before}",
        *(f"predicted: {p} {p.gpu_hours:.3g} GPU-hours per seed" for p in n.points),
    ]


def write(n: NextTrials, root: Root, path: Path) -> None:
    """Write the sweep file with the cost as a comment, and predicted.json below the root."""
    source = sweep_file.load(root.sweep(n.source).sweep_file)
    text = sweep_file.to_yaml(to_sweep(n, source, path.stem))
    comment = "# Proposed by jepa scaling next.\n"
    cost = f"about {n.cost:.3g} GPU-hours by what {n.source} took"
    cost += "; jepa plan says what they will take here"
    write_atomic(path, f"{comment}cost: {cost}\n{text}")
    folder = root.sweep(path.stem)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.predicted, asdict(n))
