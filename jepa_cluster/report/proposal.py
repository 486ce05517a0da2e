"""What to run next: the trials that narrow a law most for the GPU-hours one has, and what they will show.

In: a Study and a budget. Out: a `Proposal`: points (size, horizon, seeds) with their bill, the sweep file that asks
for them, and predictions made before anything is trained; or a `NotEnoughData`. Sizes are those of the study: at each
compute the one its frontier, or its iso-FLOP optimum, would take. A trial's price is this study's own GPU-hours per
unit of compute; the bill that counts is the one of `jepa plan`. Later, `contrasts.held` puts results beside them.

Which trials narrow the law: the bootstrap's replicates say how the law's value at the target moves together with its
value at every affordable compute, and a trial there, with the noise this study has, takes that share of the variance
away. Trials are taken one after the other, the best for its price (or the best outright, where that ends narrower).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jepa_cluster.errors import many
from jepa_cluster.report.power_law import Floats, Interval, NotEnoughData, PowerLawFit
from jepa_cluster.report.scaling import SIZE_AXES, Row, Study, group, law_of, pareto, setting
from jepa_cluster.sweep.definition import HORIZON, Limits, Sweep

REACH = 10.0  # the target, times the largest compute fitted, unless one is given
CANDIDATES = 32  # budgets looked at between the smallest fitted and the target
MOST = 64  # trials in a proposal
ENOUGH = 0.005  # share of the variance below which another trial is not worth a line


@dataclass(frozen=True)
class Point:
    """One size and horizon. error: predicted for one trial. gpu_hours: of all its seeds."""

    model: str
    steps: int
    compute: float
    seeds: int
    error: Interval
    gpu_hours: float


@dataclass(frozen=True)
class Proposal:
    """before, after: the law's interval at the target, now and as expected. fitted: (compute, error) behind it."""

    source: str
    setting: str
    error: str
    compute: str
    target: float
    budget: float
    points: tuple[Point, ...]
    before: Interval
    after: Interval
    fitted: tuple[tuple[float, float], ...]
    settings: Mapping[str, Any]  # axis -> value of the setting the trials are to have
    first_seed: int
    note: str = ""

    @property
    def gpu_hours(self) -> float:
        return sum(p.gpu_hours for p in self.points)


@dataclass(frozen=True)
class _Size:
    model: str
    per_step: float  # compute of one step
    hours: float  # GPU-hours per unit of compute


def propose(s: Study, gpu_hours: float, target: float | None = None) -> Proposal | NotEnoughData:
    """The best affordable trials for this study's law, on the best setting. Refuses without a law or a price."""
    chosen = s.best_setting
    rows = [r for r in s.finished if setting(r, s.settings) == chosen]
    edge = pareto(rows, s.error, s.compute)
    law = law_of(edge, s.error, s.compute)
    if isinstance(law, NotEnoughData):
        return NotEnoughData(f"{law.reason}; nothing says yet which trials would narrow the law of {chosen}")
    sizes = _sizes(rows, s.compute)
    if not sizes:
        return NotEnoughData("no finished trial has GPU-hours, so no trial has a price")
    target = target or REACH * law.span[1]
    shortest = min(int(r["steps"]) for r in rows)
    budgets = np.geomspace(law.span[0], max(target, law.span[1]), CANDIDATES)
    menu = [(float(c), _size_at(s, rows, sizes, float(c))) for c in budgets]
    menu = [(c, z) for c, z in menu if c >= shortest * z.per_step and c * z.hours <= gpu_hours]
    if not menu:
        cheapest = min(shortest * z.per_step * z.hours for z in sizes.values())
        return NotEnoughData(f"{gpu_hours:g} GPU-hours buy no trial; the cheapest costs {cheapest:.3g}")
    counts, left = choose(
        law, target, np.array([c for c, _ in menu]), np.array([c * z.hours for c, z in menu]), gpu_hours
    )
    low, high = law.band(target)
    value, width = float(law.predict(target)[0]), np.sqrt(left)
    before = Interval(value, float(low[0]), float(high[0]))
    after = Interval(value, value * (before.low / value) ** width, value * (before.high / value) ** width)
    points = tuple(_point(law, c, z, n) for (c, z), n in zip(menu, counts, strict=True) if n)
    first = max(int(r["seed"]) for r in s.finals) + 1
    values = next(c.point for c in s.sweep.curves if c.name == rows[0]["trial"])
    kept = {k: v for k, v in values.items() if k not in (*SIZE_AXES, "seed")}
    pairs = tuple((float(r[s.compute]), float(r[s.error])) for r in edge)
    return Proposal(s.sweep.name, chosen, s.error, s.compute, float(target), gpu_hours, points, before, after, pairs,
                    kept, first, _beyond(s, target))  # fmt: skip


def sweep_of(p: Proposal, source: Sweep, name: str) -> Sweep:
    """The proposal as a sweep file's content: the source's base and resources, the points written out."""
    listed: list[dict[str, Any]] = [{"model": q.model, **p.settings, HORIZON: q.steps} for q in p.points]
    base = source.base
    if source.fork:
        base = (*base, "optim.schedule=wsd")
        listed = [{**q, "optim.cooldown_steps": source.fork.cooldown_steps(q[HORIZON])} for q in listed]
    most = max(q.seeds for q in p.points)
    where = " or ".join(
        f"(model == '{q.model}' and {HORIZON} == {q.steps} and seed < {p.first_seed + q.seeds})" for q in p.points
    )
    return replace(
        source,
        name=name,
        question=f"What is {p.error} at {p.target:.3g} {p.compute}? (continues {p.source})",
        expect=f"{p.after}; before these trials {p.before}. " + " ".join(told(q) for q in p.points),
        base=base,
        grid={},
        zip={},
        list=tuple(listed),
        random={},
        fork=None,
        where=where if any(q.seeds < most for q in p.points) else "",
        seeds=tuple(range(p.first_seed, p.first_seed + most)),
        limits=Limits(p.budget, source.limits.gpus_in_flight),
    )


def told(q: Point) -> str:
    return f"{q.model} {q.steps} steps: {q.error}."


def lines(p: Proposal) -> list[str]:
    """The proposal in sentences."""
    return [
        f"to narrow {p.error} at {p.target:.3g} {p.compute} (setting: {p.setting}): {sum(q.seeds for q in p.points)} "
        f"trials, about {p.gpu_hours:.3g} of {p.budget:g} GPU-hours by what {p.source} took",
        f"90 % interval there: now {p.before}, expected afterwards {p.after}",
        *([p.note] if p.note else []),
        *(f"predicted: {told(q)} {many(q.seeds, 'seed')}, {q.gpu_hours:.3g} GPU-hours" for q in p.points),
    ]


def _sizes(rows: Sequence[Row], compute: str) -> dict[str, _Size]:
    """What each size's finished trials took, a step and a unit of compute."""
    found: dict[str, _Size] = {}
    for model, members in group(rows, ["model"]).items():
        paid = [r["gpu_hours_alone"] / r[compute] for r in members if r["gpu_hours_alone"] > 0]
        if paid:
            steps = float(np.median([r[compute] / r["steps"] for r in members]))
            found[model] = _Size(str(members[0]["model"]), steps, float(np.median(paid)))
    return found


def _size_at(s: Study, rows: Sequence[Row], sizes: Mapping[str, _Size], compute: float) -> _Size:
    """The size for a compute: nearest to the iso-FLOP optimum where that is known, else the frontier's."""
    priced = {z.model: z for z in sizes.values()}
    pool = [r for r in rows if r["model"] in priced]
    best = _optimum(s, compute)
    if best:
        return priced[min(pool, key=lambda r: abs(np.log(r["parameters"] / best)))["model"]]
    edge = pareto(pool, s.error, s.compute)
    return priced[min(edge, key=lambda r: abs(np.log(r[s.compute] / compute)))["model"]]


def _optimum(s: Study, compute: float) -> float | None:
    """N_opt at a compute; None where no growth law was found."""
    if isinstance(s.iso_flop, NotEnoughData) or isinstance(s.iso_flop.power, NotEnoughData):
        return None
    return float(s.iso_flop.optimum(compute))


def _beyond(s: Study, target: float) -> str:
    best, largest = _optimum(s, target), max(float(r["parameters"]) for r in s.finished)
    if best is None or best < 1.5 * largest:
        return ""
    return f"at the target the best size is {best:.3g} parameters, the largest here {largest:.3g}: add a size"


def choose(law: PowerLawFit, target: float, at: Floats, cost: Floats, budget: float) -> tuple[list[int], float]:
    """Trials to take at each compute, and the share of the variance at the target that is then left."""
    told = np.log(np.maximum(law.bootstrap_predictions(np.append(target, at)), 1e-12))
    shared = np.cov(told.T)
    plans = [_greedy(shared.copy(), cost, budget, law.scale**2, power) for power in (1.0, 0.0)]
    return min(plans, key=lambda plan: plan[1])


def _greedy(shared: Floats, cost: Floats, budget: float, noise: float, power: float) -> tuple[list[int], float]:
    """One trial after the other: the largest fall of the target's variance over cost**power that can be paid."""
    counts, whole = [0] * len(cost), float(shared[0, 0])
    for _ in range(MOST):
        fall = shared[0, 1:] ** 2 / (np.diag(shared)[1:] + noise)
        worth = np.where(cost <= budget, fall / cost**power, 0.0)
        i = int(np.argmax(worth))
        if worth[i] <= 0 or fall[i] < ENOUGH * shared[0, 0]:
            break
        column = shared[:, i + 1].copy()
        shared -= np.outer(column, column) / (column[i + 1] + noise)
        counts[i] += 1
        budget -= float(cost[i])
    return counts, float(shared[0, 0]) / whole if whole > 0 else 1.0


def _point(law: PowerLawFit, compute: float, z: _Size, seeds: int) -> Point:
    steps = max(round(compute / z.per_step), 1)
    at = steps * z.per_step
    low, high = law.band(at, trial=True)
    error = Interval(float(law.predict(at)[0]), float(low[0]), float(high[0]))
    return Point(z.model, steps, at, seeds, error, seeds * at * z.hours)
