"""Tags, params and notes of a sweep and its trials, as MLflow's pages show them.

Pure functions from what is on disk to text. `mlflow_runs` finds and writes the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jepa_cluster import labels
from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.ijepa import flops
from jepa_cluster.records import AttemptRecord, PlannedTrial, SweepPlan
from jepa_cluster.results import tables
from jepa_cluster.schema import to_dict
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import History

HORIZON = ("optim.steps", "optim.epochs")  # a tag, no param: it may change while the run stays one


def experiment_tags() -> dict[str, str]:
    """Return the tags of an experiment: its kind is model training."""
    return {"mlflow.experimentKind": "custom_model_development", "jepa.kind": "sweep"}


def trial_tags(
    axes: Sequence[str],
    entry: PlannedTrial,
    config: TrialConfig | None,
    attempts: Sequence[AttemptRecord],
    state: str,
    gpu_hours: float,
    history: History,
) -> dict[str, str]:
    """Return the tags of a trial's run: axes, state, attempts, costs. Empty ones are left out."""
    tags: dict[str, str] = {}
    point = entry.get("point") or {}
    for axis, value in point.items():
        tags[f"axis.{axis}"] = labels.format_value(value)
    tags["jepa.setting"] = labels.setting_label(tables.ordered_point(point, axes))
    tags["jepa.id"] = entry.get("id", "")
    tags["jepa.state"] = state
    tags["jepa.attempts"] = str(len(attempts))
    tags["jepa.gpu_hours"] = f"{gpu_hours:.4g}"
    tags["jepa.damaged_lines"] = str(history.damaged)
    last: AttemptRecord = attempts[-1] if attempts else {"attempt": 0}
    for key in ("cause", "error", "code", "host", "job"):
        tags[f"jepa.{key}"] = str(last.get(key) or "")
    versions = sorted((last.get("versions") or {}).items())
    tags["jepa.versions"] = ", ".join(f"{name} {version}" for name, version in versions)
    tags["jepa.seconds"] = phase_seconds(attempts)
    if config:
        tags["jepa.horizon"] = str(config.recipe.optim.steps)
    return {key: value for key, value in tags.items() if value}


def phase_seconds(attempts: Sequence[AttemptRecord]) -> str:
    """Return the seconds of all attempts by phase: 'train 812, probe 40, init 9'."""
    total: dict[str, float] = {}
    for attempt in attempts:
        for phase, seconds in (attempt.get("seconds") or {}).items():
            total[phase] = total.get(phase, 0.0) + float(seconds)
    longest_first = sorted(total.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in longest_first)


def run_params(config: TrialConfig | None) -> dict[str, str]:
    """Return the recipe without its horizon, and the derived params."""
    if config is None:
        return {}
    params = dict(_flatten(to_dict(config.recipe)))
    for key in HORIZON:
        params.pop(key, None)
    return params | derived_params(config.recipe)


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{'model': {'width': 64}} -> ('model.width', '64')."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(cast("Mapping[str, object]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def derived_params(recipe: Recipe) -> dict[str, str]:
    """Return params for chart axes: encoder parameters and the middle of each mask interval."""
    mask = recipe.mask
    return {
        "parameters": str(flops.parameters(recipe).encoder),
        "mid.target_scale": f"{sum(mask.target_scale) / 2:.6g}",
        "mid.target_aspect": f"{sum(mask.target_aspect) / 2:.6g}",
        "mid.context_scale": f"{sum(mask.context_scale) / 2:.6g}",
    }


def planned_gpu_hours(plan: SweepPlan) -> float:
    """Return the cost estimate at the time of submission."""
    hours = 0.0
    for entry in plan.get("trials") or ():
        hours += float(entry.get("hours") or 0) * int(entry.get("world") or 1)
    return hours


def parent_tags(
    plan: SweepPlan,
    states: Mapping[str, int],
    gpu_hours: float,
    document: Path,
    charts: str,
) -> dict[str, str]:
    """Return tags and note of a sweep's parent run.

    gpu_hours: spent so far. document: scaling.json, whose findings go into the note.
    charts: link to the chart view.
    """
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    axes = plan.get("axes") or []
    planned = planned_gpu_hours(plan)
    note = [plan.get("question") or plan.get("sweep") or ""]
    if plan.get("expect"):
        note.append(f"**We expect:** {plan.get('expect')}")
    note += [
        f"**Axes:** {', '.join(axes) or 'none'}",
        f"**Trials:** {counts}",
        f"**Cost:** {gpu_hours:.3g} GPU-hours spent, {planned:.3g} planned",
    ]
    findings = read_findings(document)
    if findings:
        note.append("\n".join(["**Findings:**", *(f"- {line}" for line in findings)]))
    page = f"/scaling/#sweeps={plan.get('sweep')}"
    note.append(
        f"[Charts]({charts}) · [Scaling page]({page}) (under `jepa ui`); "
        "the same figure is the artifact `scaling.html` of the parent run."
    )
    return {
        "mlflow.note.content": "\n\n".join(note)[:5000],
        "jepa.question": plan.get("question") or "",
        "jepa.expect": plan.get("expect") or "",
        "jepa.axes": json.dumps(axes),
        "jepa.states": counts,
        "jepa.code": plan.get("code") or "",
        "jepa.gpu_hours": f"{gpu_hours:.4g}",
        "jepa.gpu_hours_planned": f"{planned:.4g}",
    }


def read_findings(document: Path) -> list[str]:
    """Return the sentences of scaling.json over total FLOPs; none before the first fit."""
    found: Mapping[str, Any] = read_json(document) or {}
    fit = found.get("laws", {}).get(f"{found.get('error')}|flops_total", {})
    return fit.get("summary", [])
