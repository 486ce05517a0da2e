"""A sweep's curves as a tidy table, straight from the spools.

In: a root and a sweep's name. Out: `Sweep` with its trials, and two tables of plain rows (one row a logged step,
one row a trial) whose columns are the sweep's axes, the model's parameters and the metrics. Only settled steps
are told unless asked otherwise. It reads files and nothing else: no MLflow, no scheduler, no torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.errors import JepaError, TrackingError, suggest
from jepa_cluster.ijepa import flops
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import Root, TrialDir, read_json

STATES = ("queued", "running", "cool-down", "stopped", "failed", "done")
AXES = "axes"  # of plan.json; a trial's values stand in its `point`


@dataclass(frozen=True)
class Curve:
    """One trial of a sweep: its point, its recipe (None when config.yaml cannot be read) and its history.

    billed: its process-seconds as the scheduler's accounting has them, None where nobody asked or nobody knows.
    """

    sweep: str
    trial: TrialDir
    point: Mapping[str, Any]
    seed: int
    state: str
    recipe: Recipe | None
    history: spool.History
    attempts: Sequence[Mapping[str, Any]] = ()
    billed: float | None = None

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def model(self) -> str:
        return self.recipe.model.name if self.recipe else str(self.point.get("model", "?"))

    @property
    def parameters(self) -> float:
        """Trainable parameters of the encoder; nan when the recipe is unknown."""
        return float(flops.parameters(self.recipe).encoder) if self.recipe else float("nan")

    @property
    def gpu_hours(self) -> float:
        """Seconds of all attempts x their processes / 3600: as billed, else by their records."""
        return gpu_hours(self.attempts) if self.billed is None else self.billed / 3600

    @property
    def trunk(self) -> str | None:
        """The trial whose milestone this one began from."""
        return next((str(a["trunk"]) for a in self.attempts if a.get("trunk")), None)

    def label(self) -> str:
        """A readable name: the point's values and the seed."""
        return f"{short(self.point)} s{self.seed}" if self.point else self.name


@dataclass(frozen=True)
class Sweep:
    """What is known of a sweep on disk. plan: plan.json as it stands; predicted: what `scaling next` wrote before;
    read: Unix ms at which reading began."""

    name: str
    plan: Mapping[str, Any]
    curves: list[Curve] = field(default_factory=list["Curve"])
    predicted: Mapping[str, Any] = field(default_factory=dict[str, Any])
    read: int = 0

    @property
    def question(self) -> str:
        return str(self.plan.get("question") or "")

    @property
    def unit(self) -> str:
        """What an hour of one process is called where it ran."""
        return str(self.plan.get("unit") or "GPU-h")

    @property
    def axes(self) -> list[str]:
        """Swept settings, in the order of the sweep file."""
        found = dict.fromkeys(str(a) for a in self.plan.get(AXES) or ())
        for curve in self.curves:
            found.update(dict.fromkeys(curve.point))
        return [a for a in found if a != "seed"]


def short(point: Mapping[str, Any]) -> str:
    """'vit_ti target_scale=.15-.2': the last word of each key, values without noise."""
    words: list[str] = []
    for key, value in point.items():
        if key == "seed":
            continue
        words.append(text(value) if key == "model" else f"{key.rsplit('.', 1)[-1]}={text(value)}")
    return " ".join(words)


def in_order(point: Mapping[str, Any], axes: Iterable[Any]) -> dict[str, Any]:
    """A point's values in the order of the sweep's axes; JSON does not keep it."""
    return {a: point[a] for a in (*map(str, axes), *point) if a in point}


def text(value: Any) -> str:
    """An axis value for people and for grouping: [0.15, 0.2] -> '0.15–0.2', {'model': 'x'} -> 'model=x'."""
    if isinstance(value, (list, tuple)):
        return "–".join(text(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Mapping):
        return short(value)  # pyright: ignore[reportUnknownArgumentType]
    return f"{value:g}" if isinstance(value, float) else str(value)


def gpu_hours(attempts: Iterable[Mapping[str, Any]]) -> float:
    """From attempt records, ended ones by their clock, an open one not at all."""
    total = 0.0
    for a in attempts:
        if a.get("started") and a.get("ended"):
            total += (float(a["ended"]) - float(a["started"])) / 3.6e6 * int(a.get("world") or 1)
    return total


def inherited(curve: Curve, trunk: Curve | None) -> float:
    """GPU-hours that a branch's trunk took up to where they part."""
    begun = next((int(a.get("start_step") or 0) for a in curve.attempts if a.get("trunk")), 0)
    steps = trunk.history.rows[-1].step if trunk and trunk.history.rows else 0
    return trunk.gpu_hours * begun / steps if trunk and steps else 0.0


def state(trial: TrialDir, attempts: Sequence[Mapping[str, Any]]) -> str:
    """What the files alone say, one of STATES. A cool-down is an ended attempt that nobody followed yet."""
    if trial.done.exists():
        return "done"
    if trial.failed.exists():
        return "failed"
    if not attempts:
        return "queued"
    last = attempts[-1]
    if not last.get("cause"):
        return "running"
    return "stopped" if last["cause"] == "stopped" or trial.stop.exists() else "cool-down"


def plan_of(root: Root, sweep: str) -> dict[str, Any]:
    """plan.json of a sweep. Raises TrackingError when there is none, with the names that exist."""
    plan = read_json(root.sweep(sweep) / "plan.json")
    if plan is None:
        raise TrackingError(
            f"no sweep '{sweep}' was submitted",
            where=str(root.path),
            hint=suggest(sweep, root.sweeps()) if root.sweeps() else "submit one: jepa submit sweeps/demo.yaml",
        )
    return plan


def load(root: Root, sweep: str, bill: Mapping[str, float] | None = None) -> Sweep:
    """Everything on disk about a sweep. A trial that cannot be read is told with its history empty, never dropped.

    bill: trial -> process-seconds, as `launch.queue.billed` has them; without it costs are those of attempt records.
    """
    begun = spool.now_ms()
    plan = plan_of(root, sweep)
    curves: list[Curve] = []
    for entry in plan.get("trials") or ():
        trial = root.trial(str(entry["name"]))
        attempts = trial.attempts()
        config = config_of(trial)
        seed = config.recipe.seed if config else int(entry.get("seed") or 0)
        point = in_order(entry.get("point") or {}, plan.get(AXES) or ())
        curves.append(
            Curve(
                sweep,
                trial,
                point,
                seed,
                state(trial, attempts),
                config.recipe if config else None,
                spool.read(trial),
                attempts,
                (bill or {}).get(trial.name),
            )
        )
    return Sweep(sweep, plan, curves, read_json(root.sweep(sweep) / "predicted.json") or {}, begun)


def config_of(trial: TrialDir) -> TrialConfig | None:
    """The frozen config; None when it cannot be read (a person edited it, or it is gone)."""
    try:
        return trial.read_config(older=True)
    except JepaError:
        return None


def rows(sweep: Sweep, settled: bool = True) -> list[dict[str, Any]]:
    """The tidy table: one row a logged step. Columns: identity(), step, t (Unix ms), attempt, metrics."""
    table: list[dict[str, Any]] = []
    for curve in sweep.curves:
        who = identity(sweep, curve)
        history = curve.history.settled_rows if settled else curve.history.rows
        table += [{**who, "step": r.step, "t": r.t, "attempt": r.attempt, **r.values} for r in history]
    return table


def finals(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a trial: identity(), state, attempts, gpu_hours (paid), gpu_hours_alone (a branch's with its share of
    the trunk), trunk, the last settled value of every metric and, as `initial/<metric>`, the value at
    step 0 (the freshly initialised encoder)."""
    table: list[dict[str, Any]] = []
    by_name = {c.name: c for c in sweep.curves}
    for curve in sweep.curves:
        row: dict[str, Any] = {
            **identity(sweep, curve),
            "state": curve.state,
            "attempts": len(curve.attempts),
            "gpu_hours": curve.gpu_hours,
            "gpu_hours_alone": curve.gpu_hours + inherited(curve, by_name.get(curve.trunk or "")),
            "trunk": curve.trunk or "",
        }
        for r in curve.history.settled_rows:
            row.update(r.values)
            row["step"] = r.step
            if r.step == 0:
                row.update({f"initial/{k}": v for k, v in r.values.items()})
        table.append(row)
    return table


def identity(sweep: Sweep, curve: Curve) -> dict[str, Any]:
    """sweep, trial, label, the axes' values as text, seed, model, parameters, steps (the horizon)."""
    return {
        "sweep": sweep.name,
        "trial": curve.name,
        "label": curve.label(),
        **{axis: text(curve.point[axis]) if axis in curve.point else "" for axis in sweep.axes},
        "seed": curve.seed,
        "model": curve.model,
        "parameters": curve.parameters,
        "steps": curve.recipe.optim.steps if curve.recipe else None,
    }


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Any of the tables above as CSV; columns are the union of all rows', empty where a row has none."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
