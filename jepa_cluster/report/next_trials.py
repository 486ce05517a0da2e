"""What to run next: a ladder of budgets beyond the frontier, with predicted errors and a cost.

In: an `Analysis` and GPU-hours. Out: `NextTrials`, from which a sweep file is written, or
`NotEnoughData`. A trial costs what this sweep took per unit of compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import log, log2
from pathlib import Path

from jepa_cluster.errors import plural
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.comparisons import OptimalSize
from jepa_cluster.report.power_law import Interval, NotEnoughData
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import Row, Rows, column
from jepa_cluster.sweep import sweep_file
from jepa_cluster.sweep.points import HORIZON, Limits, Sweep
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_atomic, write_json

REACH = 10.0  # the target, times the largest compute fitted, unless one is given
MAX_SEEDS = 4


@dataclass(frozen=True)
class NextTrials:
    """The trials to run, as predicted.json holds them.

    before: the law at the target. fitted: (compute, error) pairs behind it. settings: axis -> value
    of all trials. trials: model, steps, compute and gpu_hours of one seed. points: the first trial
    of each rung with its error, because the law is of the best size at each compute. cost: of all
    seeds, in `unit`.
    """

    source: str
    error: str
    compute: str
    target: float
    before: Interval
    fitted: list[tuple[float, float]]
    settings: Mapping[str, object]
    trials: list[Row]
    points: list[Row]
    seeds: tuple[int, ...]
    cost: float
    unit: str


def design(
    s: Analysis,
    gpu_hours: float,
    target: float | None,
) -> NextTrials | NotEnoughData:
    """Choose rungs of the best setting, each of twice the compute, within the GPU-hours."""
    if not s.is_comparable:
        return NotEnoughData(f"{s.error} does not compare settings")
    first_seed = 1 + max(column(s.trials, "seed"))
    # The new trials have one setting, so the law is that of its own trials.
    if isinstance(s.effects, Effects) and s.effects.missing:
        return NotEnoughData(f"the best setting is not known: {s.effects.missing[0]}")
    s = replace(s, trials=s.groups.get(s.best_setting, []))
    rows = [row for row in s.trials if row["gpu_hours_alone"] > 0]
    law = s.law
    if isinstance(law, NotEnoughData):
        return law
    if not rows:
        return NotEnoughData("no trial of the best setting has a price")
    target = target or REACH * law.span[1]
    rungs = max(1, int(log2(target / law.span[1])))
    ladder = [_rung(s, rows, law.span[1] * 2.0**n) for n in range(1, rungs + 1)]
    trials: list[Row] = []
    points: list[Row] = []
    for rung in ladder:
        for sizes in (rung, rung[:1]):  # all sizes, else the best one alone
            if sum(column([*trials, *sizes], "gpu_hours")) <= gpu_hours:
                trials += sizes
                error = law.interval(rung[0]["compute"], trial=True)
                points.append({**rung[0], "error": error})
                break
    if not trials:
        cheapest = f"{ladder[0][0]['gpu_hours']:.3g} {s.sweep.unit}"
        return NotEnoughData(f"the cheapest trial costs {cheapest}")
    cost = sum(column(trials, "gpu_hours"))
    seeds = min(MAX_SEEDS, int(gpu_hours / cost))
    (point,) = (trial.point for trial in s.sweep.trials if trial.name == rows[0]["trial"])
    return NextTrials(
        source=s.sweep.name,
        error=s.error,
        compute=s.compute,
        target=target,
        before=law.interval(target),
        fitted=list(zip(column(s.frontier, s.compute), column(s.frontier, s.error), strict=True)),
        settings={axis: point[axis] for axis in s.settings if axis in point},
        trials=trials,
        points=points,
        seeds=tuple(range(first_seed, first_seed + seeds)),
        cost=seeds * cost,
        unit=s.sweep.unit,
    )


def _rung(s: Analysis, rows: Rows, compute: float) -> list[Row]:
    """Return the three sizes nearest to the iso-FLOP optimum, else to the end of the frontier."""
    optimum = max(s.frontier, key=lambda row: row[s.compute])["parameters"]
    if isinstance(s.iso_flop, OptimalSize) and isinstance(s.iso_flop.exponent, Interval):
        optimum = float(s.iso_flop.at(compute))
    longest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        longest[row["model"]] = row
    nearest = sorted(longest.values(), key=lambda row: abs(log(row["parameters"] / optimum)))
    trials: list[Row] = []
    for row in nearest[:3]:
        steps = round(compute * row["steps"] / row[s.compute])
        growth = steps / row["steps"]
        trial = {"model": row["model"], "steps": steps, "compute": growth * row[s.compute]}
        trials.append({**trial, "gpu_hours": growth * row["gpu_hours_alone"]})
    return trials


def describe(n: NextTrials) -> list[str]:
    """Return the predictions and the cost, in sentences."""
    trials = plural(len(n.trials) * len(n.seeds), "trial")
    lines = [
        f"{trials} beyond the frontier of {n.source}, about {n.cost:.3g} {n.unit}",
        f"{n.error} at {n.target:.3g} {n.compute}: {n.before}",
    ]
    predicted = {_name(point): f": {point['error']}" for point in n.points}
    unknown = ": not predicted, beside the best size"
    return lines + [name + predicted.get(name, unknown) for name in map(_name, n.trials)]


def _name(trial: Row) -> str:
    return f"{trial['model']} {trial['steps']} steps"


def write(
    n: NextTrials,
    root: Root,
    path: Path,
    gpu_hours: float,
) -> None:
    """Write the sweep file, with base and resources of the source, and predicted.json."""
    source = sweep_file.load(root.sweep(n.source).sweep_file)
    base = source.base
    points: list[Row] = [{"model": p["model"], **n.settings, HORIZON: p["steps"]} for p in n.trials]
    if source.fork:
        base = (*base, source.fork.base)
        for point in points:
            point |= source.fork.settings(point[HORIZON])
    largest = max(column(n.trials, "compute"))
    sweep = Sweep(
        name=path.stem,
        question=f"What is {n.error} at {largest:.3g} {n.compute}? (continues {n.source})",
        expect=". ".join(describe(n)),
        base=base,
        list=tuple(points),
        scale_lr=source.scale_lr,
        calibration=source.calibration,
        seeds=n.seeds,
        resources=source.resources,
        limits=Limits(gpu_hours, source.limits.gpus_in_flight),
        retries=source.retries,
    )
    write_atomic(path, sweep_file.to_yaml(sweep))
    folder = root.sweep(path.stem)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.predicted, asdict(n))
