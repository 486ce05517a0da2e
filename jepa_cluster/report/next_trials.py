"""What to run next: a ladder of budgets beyond the frontier, with predicted errors and a cost.

In: a Study and GPU-hours. Out: `NextTrials` and the sweep file that asks for them, or
`NotEnoughData`. Each rung has twice the budget of the one below. It holds the best size at that
budget and the next smaller and larger size of the sweep, so that it carries an iso-FLOP parabola.
A trial costs what this sweep took per unit of compute; the cost that counts is `jepa plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.report.analysis import SIZE_AXES, Row, Study, group, law_of, pareto, setting
from jepa_cluster.report.power_law import Interval, NotEnoughData, PowerLawFit
from jepa_cluster.sweep.points import HORIZON, Limits, Sweep

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
    """before: the law's interval at the target. fitted: (compute, error) pairs behind the law."""

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
    settings: Mapping[str, Any]  # axis -> value, of the setting that the trials have

    @property
    def cost(self) -> float:
        """GPU-hours of all seeds."""
        return len(self.seeds) * sum(p.gpu_hours for p in self.points)


def design(s: Study, gpu_hours: float, target: float | None = None) -> NextTrials | NotEnoughData:
    """Choose rungs from the lowest up, in the best setting, while the GPU-hours pay for them."""
    rows = [r for r in s.finished if setting(r, s.settings) == s.best_setting]
    frontier = pareto(rows, s.error, s.compute)
    law = law_of(frontier, s.error, s.compute)
    if isinstance(law, NotEnoughData):
        return NotEnoughData(f"{law.reason}; no error can be predicted in {s.best_setting}")
    priced = [r for r in rows if r["gpu_hours_alone"] > 0]
    sizes = [max(g, key=lambda r: r["steps"]) for g in group(priced, ["model"]).values()]
    if not sizes:
        return NotEnoughData("no finished trial has GPU-hours, so no trial has a price")
    sizes.sort(key=lambda r: r["parameters"])
    target = target or REACH * law.span[1]
    rungs = max(1, int(np.log2(target / law.span[1])))
    ladder = [_rung(s, frontier, law, sizes, law.span[1] * 2.0**i) for i in range(1, rungs + 1)]
    points: list[NextTrial] = []
    left = gpu_hours
    for rung in ladder:
        for trials in (rung, rung[:1]):
            cost = sum(t.gpu_hours for t in trials)
            if cost <= left:
                points += trials
                left -= cost
                break
    if not points:
        cheapest = f"the cheapest costs {ladder[0][0].gpu_hours:.3g}"
        return NotEnoughData(f"{gpu_hours:g} GPU-hours buy no trial; {cheapest}")
    seeds = min(MAX_SEEDS, int(gpu_hours / sum(p.gpu_hours for p in points)))
    first_seed = max(int(r["seed"]) for r in s.finals) + 1
    values = next(c.point for c in s.sweep.curves if c.name == rows[0]["trial"])
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
        fitted=tuple((float(r[s.compute]), float(r[s.error])) for r in frontier),
        settings={k: v for k, v in values.items() if k not in (*SIZE_AXES, "seed")},
    )


def _rung(
    s: Study,
    frontier: Sequence[Row],
    law: PowerLawFit,
    sizes: Sequence[Row],
    compute: float,
) -> list[NextTrial]:
    """The size nearest to the iso-FLOP optimum, else the frontier's last, then its neighbours."""
    optimum = np.nan
    if not isinstance(s.iso_flop, NotEnoughData):
        optimum = s.iso_flop.optimum(compute)
    if not np.isfinite(optimum):
        optimum = max(frontier, key=lambda r: r[s.compute])["parameters"]
    away = [abs(np.log(row["parameters"] / optimum)) for row in sizes]
    best = int(np.argmin(away))
    trials: list[NextTrial] = []
    for row in [sizes[best], *sizes[max(best - 1, 0) : best], *sizes[best + 1 : best + 2]]:
        steps = round(compute * row["steps"] / row[s.compute])
        at = row[s.compute] * steps / row["steps"]
        price = row["gpu_hours_alone"] / row[s.compute]
        trials.append(NextTrial(row["model"], steps, at, law.interval(at, trial=True), price * at))
    return trials


def sweep_file(n: NextTrials, source: Sweep, name: str) -> Sweep:
    """The trials as a sweep file: base and resources of the source, the points listed."""
    base = source.base
    listed = [{"model": p.model, **n.settings, HORIZON: p.steps} for p in n.points]
    if source.fork:
        base = (*base, "optim.schedule=wsd")
        for point in listed:
            point["optim.cooldown_steps"] = source.fork.cooldown_steps(int(point[HORIZON]))
    return replace(
        source,
        name=name,
        question=f"What is {n.error} at {n.target:.3g} {n.compute}? (continues {n.source})",
        expect=f"{n.before} there. " + " ".join(map(str, n.points)),
        base=base,
        grid={},
        zip={},
        list=tuple(listed),
        random=None,
        fork=None,
        where="",
        seeds=n.seeds,
        limits=Limits(n.gpu_hours, source.limits.gpus_in_flight),
    )


def lines(n: NextTrials) -> list[str]:
    """The trials, their predictions and their cost, for the terminal."""
    trials = plural(len(n.points) * len(n.seeds), "trial")
    cost = f"about {n.cost:.3g} of {n.gpu_hours:g} GPU-hours by what {n.source} took"
    return [
        f"beyond the frontier of {n.source} (setting: {n.setting}): {trials}, {cost}",
        f"{n.error} at {n.target:.3g} {n.compute}: {n.before}",
        *(f"predicted: {p} {p.gpu_hours:.3g} GPU-hours per seed" for p in n.points),
    ]
