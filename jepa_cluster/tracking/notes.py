"""What MLflow's pages say of a sweep and a trial, as tags: pure functions from what is on disk to words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.tracking import curves
from jepa_cluster.trial.spool import History


def experiment() -> dict[str, str]:
    """Tags of an experiment: open the training pages, not the GenAI ones."""
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
    tags = {f"axis.{k}": curves.text(v) for k, v in point.items()}
    tags |= {
        "jepa.id": str(entry.get("id", "")),
        "jepa.state": state,
        "jepa.attempts": str(len(attempts)),
        "jepa.gpu_hours": f"{curves.gpu_hours(attempts):.4g}",
        "jepa.rollbacks": str(sum(e.get("event") == "rollback" for e in history.events)),
        "jepa.damaged_lines": str(history.damaged),
        "jepa.cause": str(last.get("cause") or ""),
        "jepa.error": str(last.get("error") or ""),
        "jepa.code": str(last.get("code") or ""),
        "jepa.host": str(last.get("host") or ""),
        "jepa.job": str(last.get("job") or ""),
    }
    if config:
        tags["jepa.horizon"] = str(config.recipe.optim.steps)
    return {k: v for k, v in tags.items() if v}


def parent(plan: Mapping[str, Any], states: Mapping[str, int]) -> dict[str, str]:
    """Tags and note of a sweep's parent run."""
    told = ", ".join(f"{n} {s}" for s, n in sorted(states.items()))
    note = [
        f"## {plan.get('question') or plan.get('sweep')}",
        f"**We expect:** {plan['expect']}" if plan.get("expect") else "",
        f"**Axes:** {', '.join(map(str, plan.get('axes') or ())) or 'none'}",
        f"**Trials:** {told}",
        "The scaling figure is the artifact `scaling.html` of this run.",
    ]
    return {
        "mlflow.note.content": "\n\n".join(line for line in note if line),
        "jepa.question": str(plan.get("question") or ""),
        "jepa.expect": str(plan.get("expect") or ""),
        "jepa.axes": json.dumps(plan.get("axes") or []),
        "jepa.states": told,
        "jepa.code": str(plan.get("code") or ""),
    }
