"""Tidy tables of a sweep's results, read from the spools.

In: a root and a sweep's name. Out: `SweepResults`, a table with one row per logged step and a table
with one row per trial. Their columns are the sweep's axes, the model's parameters and the metrics.
Only settled steps are in them unless asked otherwise. This module reads files and nothing else: no
MLflow, no scheduler, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jepa_cluster import labels
from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.errors import JepaError, TrackingError, suggest
from jepa_cluster.ijepa import flops
from jepa_cluster.records import AttemptRecord, SweepPlan
from jepa_cluster.schema import settings_of
from jepa_cluster.trial import calibration, file_facts, provenance, spool, usage
from jepa_cluster.trial.calibration import Calibration
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

Point = Mapping[str, object]  # axis -> value, of one trial
Row = dict[str, Any]  # column -> cell; axes and metrics are columns, so the keys differ by sweep
Rows = Sequence[Row]
Size = tuple[float, str]  # parameters, model

CLASS_ERROR = "probe/class_error"  # of the target encoder, by the mean of its patches
ONLINE_ERROR = "probe/online/class_error"  # where the target encoder is not trained


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep: its point, recipe, history and attempts.

    recipe: None when config.yaml cannot be read.
    gpu_hours: of all attempts, by the scheduler's accounting or by their records. dropped: it was
    edited out of the sweep file while its job waited or worked.
    """

    trial: TrialDir
    label: str
    point: Point
    seed: int
    state: str
    recipe: Recipe | None
    history: spool.History
    attempts: Sequence[AttemptRecord] = ()
    gpu_hours: float = 0.0
    dropped: bool = False

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def trunk(self) -> str:
        """Name of the trial from whose milestone this one started, else ''."""
        for attempt in self.attempts:
            if attempt.get("trunk"):
                return str(attempt.get("trunk"))
        return ""


@dataclass(frozen=True)
class SweepResults:
    """Everything the files of a sweep hold.

    plan: plan.json. trials: those of the sweep file. dropped: those that were edited out of it.
    predicted: predicted.json, which `jepa scaling next` wrote; empty without it. read: Unix ms at
    which reading began. cost: of all these trials and their canaries, in `unit`, as in `status`.
    """

    name: str
    plan: SweepPlan
    trials: list[TrialResult] = field(default_factory=list[TrialResult])
    predicted: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Calibration | None = None
    read: int = 0
    dropped: list[TrialResult] = field(default_factory=list[TrialResult])
    cost: float = 0.0

    @property
    def question(self) -> str:
        return self.plan["question"]

    @property
    def unit(self) -> str:
        """Name of an hour of one process, by the cluster profile."""
        return self.plan["unit"]

    @property
    def axes(self) -> list[str]:
        """Swept settings, in the order of the sweep file."""
        found = dict.fromkeys(self.plan["axes"])
        for trial in self.trials:
            found.update(dict.fromkeys(trial.point))
        found.pop("seed", None)
        return list(found)

    def with_dropped(self) -> SweepResults:
        """Return the results with the dropped trials after the others."""
        return replace(self, trials=[*self.trials, *self.dropped], dropped=[])


def ordered_point(point: Point, axes: Iterable[str]) -> dict[str, object]:
    """Return a point in the order of the sweep's axes, which JSON does not keep."""
    return {axis: point[axis] for axis in (*axes, *point) if axis in point}


# ---- branches


def trunk_gpu_hours(
    result: TrialResult,
    trunk: TrialResult | None,
) -> float:
    """GPU-hours that the trunk of a branch took up to the step at which the branch starts."""
    if trunk is None or not trunk.history.rows:
        return 0.0
    steps = trunk.history.rows[-1].step
    for attempt in result.attempts:
        if attempt.get("trunk") and steps:
            return trunk.gpu_hours * int(attempt.get("start_step") or 0) / steps
    return 0.0


# ---- reading


def read_plan(root: Root, sweep: str) -> SweepPlan:
    """Read plan.json of a sweep. Raises TrackingError when there is none."""
    plan = root.sweep(sweep).read_plan()
    if plan is None:
        hint = "submit one: jepa submit sweeps/demo.yaml"
        if root.sweeps():
            hint = suggest(sweep, root.sweeps())
        what = f"no sweep '{sweep}' was submitted"
        raise TrackingError(what, where=str(root.path), hint=hint)
    return plan


def read_config(trial: TrialDir) -> TrialConfig | None:
    """Read the frozen config; None when it is missing or was edited."""
    try:
        return trial.read_config(older=True)
    except JepaError:
        return None


def load(
    root: Root,
    sweep: str,
    billed: Mapping[str, float] | None = None,
) -> SweepResults:
    """Read all results of a sweep. A trial that cannot be read has an empty history.

    billed: trial -> process-seconds, by the scheduler's accounting. Without it, costs are those of
    the attempt records.
    """
    begun = spool.now_ms()
    plan = read_plan(root, sweep)
    submitted = file_facts.Submissions(root).trials()
    results: list[TrialResult] = []
    total = 0.0
    for canary in root.canaries_of(sweep):
        total += usage.process_seconds(canary, canary.attempts())
    for entry in [*plan["trials"], *plan["dropped"]]:
        trial = root.trial(entry["name"])
        attempts = trial.attempts()
        config = read_config(trial)
        seconds = (billed or {}).get(trial.name)
        if seconds is None:
            seconds = usage.process_seconds(trial, attempts)
        result = TrialResult(
            trial=trial,
            label=entry["label"],
            point=ordered_point(entry["point"], plan["axes"]),
            seed=entry["seed"],
            state=file_facts.state_by_files(trial, attempts, plan["retries"], submitted),
            recipe=config.recipe if config else None,
            history=spool.read(trial),
            attempts=attempts,
            gpu_hours=seconds / 3600,
            dropped=len(results) >= len(plan["trials"]),
        )
        results.append(result)
        total += seconds
    planned = len(plan["trials"])
    return SweepResults(
        name=sweep,
        plan=plan,
        trials=results[:planned],
        predicted=read_json(root.sweep(sweep).predicted) or {},
        calibration=read_calibration(root, sweep),
        read=begun,
        dropped=results[planned:],
        cost=total / 3600,
    )


def read_calibration(
    root: Root,
    sweep: str,
) -> Calibration | None:
    """Return the calibration that a sweep uses, or the one that was made of it.

    A sweep over rates has none.
    """
    if sweep.endswith(labels.LADDERS):
        return None
    folders = map(root.sweep, (sweep, f"{sweep}{labels.LADDERS}"))
    return next(filter(None, (calibration.read(folder.calibration) for folder in folders)), None)


def selectable_rows(sweep: SweepResults) -> list[Row]:
    """Return what `select_trials` selects from: one row per trial, with index and state."""
    entries = [*sweep.plan["trials"], *sweep.plan["dropped"]]
    rows: list[Row] = []
    for index, (entry, result) in enumerate(zip(entries, sweep.trials, strict=False)):
        rows.append({**entry, "index": index, "state": result.state})
    return rows


# ---- tables


def step_table(sweep: SweepResults) -> list[Row]:
    """Return one row per settled, logged step: identity, step, t (Unix ms), attempt, metrics."""
    table: list[Row] = []
    for result in sweep.trials:
        identity = identity_columns(sweep, result)
        for row in result.history.settled_rows:
            position = {"step": row.step, "t": row.t, "attempt": row.attempt}
            table.append({**identity, **position, **row.values})
    return table


def trial_table(sweep: SweepResults) -> list[Row]:
    """Return one row per trial: identity, state, costs and the last settled value of each metric.

    cause: why its newest attempt ended. code: that its attempts ran. gpu_hours: of all attempts.
    gpu_hours_alone: with the trunk's share of a branch added.
    initial/<metric>: the value at step 0, of the untrained encoder; of target_std the first one.
    size: the model, as `size_names` has it.
    """
    by_name = {result.name: result for result in sweep.trials}
    table: list[Row] = []
    for result in sweep.trials:
        shared = trunk_gpu_hours(result, by_name.get(result.trunk))
        row: Row = {
            **identity_columns(sweep, result),
            "state": result.state,
            "cause": _last_cause(result.attempts),
            "code": provenance.code_versions(result.attempts),
            "attempts": len(result.attempts),
            "gpu_hours": result.gpu_hours,
            "gpu_hours_alone": result.gpu_hours + shared,
            "trunk": result.trunk,
            "dropped": result.dropped,
        }
        for step_row in result.history.settled_rows:
            row.update(step_row.values)
            row["step"] = step_row.step
            for metric, value in step_row.values.items():
                if step_row.step == 0 or metric == "target_std":
                    row.setdefault(f"initial/{metric}", value)
        table.append(row)
    names = size_names(table)
    return [{**row, "size": names.get(size_of(row), row["model"])} for row in table]


def _last_cause(
    attempts: Sequence[AttemptRecord],
) -> str:
    """Return why the newest attempt ended; '' while it runs or without one."""
    if not attempts:
        return ""
    return attempts[-1].get("cause") or ""


def identity_columns(
    sweep: SweepResults,
    result: TrialResult,
) -> Row:
    """Return what identifies a trial: labels, axes as text, size and horizon (steps).

    parameters: of the encoder; nan when the recipe is unknown.
    """
    row: Row = {
        "sweep": sweep.name,
        "trial": result.name,
        "label": result.label,
        "setting": labels.setting_label(result.point),
    }
    for axis in sweep.axes:
        row[axis] = labels.format_value(result.point.get(axis, ""))
    row["seed"] = result.seed
    row["model"] = str(result.point.get("model", "?"))
    row["parameters"] = float("nan")
    row["steps"] = None
    if result.recipe:
        row["parameters"], row["model"] = recipe_size(result.recipe)
        row["steps"] = result.recipe.optim.steps
    return row


def recipe_size(
    recipe: Recipe,
) -> Size:
    """Return the parameters of the encoder and the name of the model."""
    return float(flops.parameters(recipe).encoder), recipe.model.name


def fixed_settings(
    sweep: SweepResults,
) -> dict[str, str]:
    """Return the settings of the recipe that all trials share, as `model.patch` -> text.

    With them, a page can compare trials with those of a sweep that varies such a setting.
    """
    shared: set[tuple[str, str]] | None = None
    for result in sweep.trials:
        if result.recipe:
            values = settings_of(result.recipe)
            settings = {(name, labels.format_value(value)) for name, value in values}
            shared = settings if shared is None else shared & settings
    return dict(sorted(shared or ()))


def size_of(
    row: Row,
) -> Size:
    """Return parameters and model of a trial; 0 where the parameters are unknown."""
    parameters = row["parameters"]
    return (parameters if math.isfinite(parameters) else 0.0), row["model"]


def size_names(
    rows: Rows,
) -> dict[Size, str]:
    """Return the name of each size, smallest first.

    It is that of the model, with its parameters where another size has the same name.
    """
    sizes = sorted(set(map(size_of, rows)))
    names: dict[Size, str] = {}
    for parameters, model in sizes:
        alike = [other / 1e6 for other, name in sizes if name == model and other]
        digits = 3
        while len({f"{other:.{digits}g}" for other in alike}) < len(alike):
            digits += 1
        names[parameters, model] = model
        if parameters and len(alike) > 1:
            names[parameters, model] += f" {parameters / 1e6:.{digits}g}M"
    return names


def column(
    table: Rows,
    name: str,
) -> list[Any]:
    """Return the cells of a column, of the rows that have it."""
    return [row[name] for row in table if name in row]
