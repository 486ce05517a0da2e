"""What MLflow's pages say of a sweep and a trial, as tags: pure functions from what is on disk to words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.ijepa import flops
from jepa_cluster.results import tables
from jepa_cluster.trial.layout import read_json
from jepa_cluster.trial.spool import History


def experiment() -> dict[str, str]:
    """Tags of an experiment: one of training. MLflow 3.17 goes by the visitor's choice (report/mlflow_app.py)."""
    return {"mlflow.experimentKind": "custom_model_development", "jepa.kind": "sweep"}


def trial(
    entry: Mapping[str, Any],
    config: TrialConfig | None,
    attempts: Sequence[Mapping[str, Any]],
    state: str,
    history: History,
) -> dict[str, str]:
    """Tags of a trial's run. Horizon, attempts and place are tags: they may change while the run stays one."""
    point: Mapping[str, Any] = entry.get("point") or {}
    last: Mapping[str, Any] = attempts[-1] if attempts else {}
    tags = {f"axis.{k}": tables.text(v) for k, v in point.items()}
    tags |= {
        "jepa.id": str(entry.get("id", "")),
        "jepa.state": state,
        "jepa.attempts": str(len(attempts)),
        "jepa.gpu_hours": f"{tables.gpu_hours(attempts):.4g}",
        "jepa.damaged_lines": str(history.damaged),
        "jepa.cause": str(last.get("cause") or ""),
        "jepa.error": str(last.get("error") or ""),
        "jepa.code": str(last.get("code") or ""),
        "jepa.host": str(last.get("host") or ""),
        "jepa.job": str(last.get("job") or ""),
        "jepa.versions": ", ".join(f"{k} {v}" for k, v in sorted((last.get("versions") or {}).items())),
        "jepa.seconds": seconds(attempts),
    }
    if config:
        tags["jepa.horizon"] = str(config.recipe.optim.steps)
    return {k: v for k, v in tags.items() if v}


def seconds(attempts: Sequence[Mapping[str, Any]]) -> str:
    """Where the time of all attempts went: 'train 812, probe 40, init 9'."""
    total: dict[str, float] = {}
    for attempt in attempts:
        for phase, spent in (attempt.get("seconds") or {}).items():
            total[phase] = total.get(phase, 0.0) + float(spent)
    return ", ".join(f"{phase} {spent:.0f}" for phase, spent in sorted(total.items(), key=lambda x: -x[1]))


def numbers(recipe: Recipe) -> dict[str, str]:
    """Params MLflow's charts can put on an axis: encoder parameters and the middle of each mask interval."""
    mask = recipe.mask
    return {
        "parameters": str(flops.parameters(recipe).encoder),
        "mid.target_scale": f"{sum(mask.target_scale) / 2:.6g}",
        "mid.target_aspect": f"{sum(mask.target_aspect) / 2:.6g}",
        "mid.context_scale": f"{sum(mask.context_scale) / 2:.6g}",
    }


def cost(plan: Mapping[str, Any]) -> float:
    """GPU-hours the plan was priced at when it was submitted."""
    return sum(float(t.get("hours") or 0) * int(t.get("world") or 1) for t in plan.get("trials") or ())


def parent(
    plan: Mapping[str, Any], states: Mapping[str, int], spent: float, document: Path, charts: str
) -> dict[str, str]:
    """Tags and note of a sweep's parent run. spent: GPU-hours. document: scaling.json, whose findings go into the
    note once it is. charts: the link to the shipped chart view."""
    told = ", ".join(f"{n} {s}" for s, n in sorted(states.items()))
    found: Mapping[str, Any] = read_json(document) or {}
    first = found.get("laws", {}).get(f"{found.get('error')}|flops_total", {})
    note = [
        str(plan.get("question") or plan.get("sweep")),
        f"**We expect:** {plan['expect']}" if plan.get("expect") else "",
        f"**Axes:** {', '.join(map(str, plan.get('axes') or ())) or 'none'}",
        f"**Trials:** {told}",
        f"**Cost:** {spent:.3g} GPU-hours spent, {cost(plan):.3g} planned",
        "**Findings:**\n" + "\n".join(f"- {line}" for line in first["summary"]) if first else "",
        f"[Charts]({charts}) · [Scaling page](/scaling/#sweeps={plan.get('sweep')}) (under `jepa ui`); "
        "the same figure is the artifact `scaling.html` of the parent run.",
    ]
    return {
        "mlflow.note.content": "\n\n".join(line for line in note if line)[:5000],
        "jepa.question": str(plan.get("question") or ""),
        "jepa.expect": str(plan.get("expect") or ""),
        "jepa.axes": json.dumps(plan.get("axes") or []),
        "jepa.states": told,
        "jepa.code": str(plan.get("code") or ""),
        "jepa.gpu_hours": f"{spent:.4g}",
        "jepa.gpu_hours_planned": f"{cost(plan):.4g}",
    }
