"""Tags, params and notes of a sweep and its trials, as MLflow's pages show them.

Pure functions from what is on disk to text. `mlflow_runs` finds and writes the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jepa_cluster import labels
from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.ijepa import flops
from jepa_cluster.records import AttemptRecord, PlannedTrial, SweepPlan
from jepa_cluster.results import tables
from jepa_cluster.schema import settings_of
from jepa_cluster.tracking import chart_view
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import History

HORIZON = ("optim.steps", "optim.epochs")  # a tag, no param: it may change while the run stays one


NOTE = "mlflow.note.content"
# Around our part of a note; the browser does not show them. Text outside is the user's.
NOTE_BEGIN, NOTE_END = "<!-- jepa -->", "<!-- /jepa -->"
MAX_NOTE = 5000  # MLflow's limit for a tag of an experiment
RUNS_PER_PAGE = 100  # that MLflow loads before the user asks for more


def experiment_tags(root: Root, sweep: str) -> dict[str, str]:
    """Return the tags of an experiment: model training, and whose it is."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "jepa.kind": "sweep",
        "jepa.sweep": sweep,
        "jepa.root": root.id(),
        "jepa.root_path": str(root.path),
    }


def merge_note(stored: str, ours: str) -> str:
    """Replace our part of a note, or add it to what the user wrote. Never cuts the user's text.

    Without the end of our part, all that follows its begin may be the user's.
    """
    before, begin, rest = stored.partition(NOTE_BEGIN)
    if before and not begin:
        before += "\n\n"
    _, end, after = rest.partition(NOTE_END)
    after = after if end else rest
    room = MAX_NOTE - len(f"{before}{NOTE_BEGIN}\n\n{NOTE_END}{after}")
    if room < 0:
        return stored
    return f"{before}{NOTE_BEGIN}\n{ours[:room]}\n{NOTE_END}{after}"


def identity_tags(axes: Sequence[str], entry: PlannedTrial, parent: str) -> dict[str, str]:
    """Return the tags that say which trial a run is, and of which sweep. parent: id of its run."""
    tags = {
        "jepa.kind": "trial",
        "jepa.trial": entry["name"],
        "jepa.id": entry["id"],
        "jepa.label": entry["label"],
        "jepa.setting": labels.setting_label(tables.ordered_point(entry["point"], axes)),
        "mlflow.parentRunId": parent,
    }
    for axis, value in entry["point"].items():
        tags[f"axis.{axis}"] = labels.format_value(value)
    return tags


def progress_tags(
    config: TrialConfig | None,
    attempts: Sequence[AttemptRecord],
    state: str,
    gpu_hours: float,
    history: History,
) -> dict[str, str]:
    """Return the tags of a trial's state, attempts and costs. Empty ones are left out."""
    last: AttemptRecord = attempts[-1] if attempts else {"attempt": 0}
    versions = sorted((last.get("versions") or {}).items())
    tags = {
        "jepa.state": state,
        "jepa.attempts": len(attempts),
        "jepa.gpu_hours": f"{gpu_hours:.4g}",
        "jepa.damaged_lines": history.damaged,
        "jepa.versions": ", ".join(f"{name} {version}" for name, version in versions),
        "jepa.seconds": phase_seconds(attempts),
        "jepa.horizon": config.recipe.optim.steps if config else "",
    }
    for key in ("cause", "error", "code", "host", "job"):
        tags[f"jepa.{key}"] = last.get(key)
    return {key: str(value) for key, value in tags.items() if value not in (None, "")}


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
    params = {key: str(value) for key, value in settings_of(config.recipe) if key not in HORIZON}
    return params | derived_params(config.recipe)


def derived_params(recipe: Recipe) -> dict[str, str]:
    """Return params for chart axes: encoder parameters and the middle of each mask interval."""
    params = {"parameters": str(flops.parameters(recipe).encoder)}
    for name in ("target_scale", "target_aspect", "context_scale"):
        params[f"mid.{name}"] = f"{sum(getattr(recipe.mask, name)) / 2:.6g}"
    return params


def planned_gpu_hours(plan: SweepPlan) -> float:
    """Return the cost estimate at the time of submission."""
    return sum(entry["hours"] * entry["world"] for entry in plan["trials"])


def parent_tags(plan: SweepPlan, states: Mapping[str, int], gpu_hours: float) -> dict[str, str]:
    """Return the tags of a sweep's parent run. gpu_hours: spent so far."""
    return {
        "jepa.question": plan["question"],
        "jepa.expect": plan["expect"],
        "jepa.axes": json.dumps(plan["axes"]),
        "jepa.trials": str(len(plan["trials"])),
        "jepa.states": format_states(states),
        "jepa.code": plan["code"],
        "jepa.gpu_hours": f"{gpu_hours:.4g}",
        "jepa.gpu_hours_planned": f"{planned_gpu_hours(plan):.4g}",
    }


def format_states(states: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(states.items()))


def sweep_note(
    plan: SweepPlan,
    states: Mapping[str, int],
    gpu_hours: float,
    document: Path,
    experiment: tuple[str, str],
) -> str:
    """Return our part of the notes of the parent run and the experiment, as Markdown.

    document: scaling.json, whose findings it has. experiment: its id and name.
    Links are relative to MLflow's page, so that they work below a static prefix.
    """
    spent, planned = (
        labels.format_number(hours, labels.FITTED) for hours in (gpu_hours, planned_gpu_hours(plan))
    )
    note = [labels.markdown(plan["question"] or plan["sweep"])]
    if plan["expect"]:
        note.append(f"**We expect:** {labels.markdown(plan['expect'])}")
    note += [
        f"**Axes:** {', '.join(map(labels.markdown, plan['axes'])) or 'none'}",
        f"**Trials:** {format_states(states)}",
        f"**Cost:** {spent} {plan['unit']} spent, {planned} planned",
    ]
    findings = read_findings(document)
    if findings:
        lines = [f"- {labels.markdown(line)}" for line in findings]
        note.append("\n".join(["**Findings:**", *lines]))
    trials = len(plan["trials"])
    if trials >= RUNS_PER_PAGE:
        note.append(
            f"MLflow lists and draws {RUNS_PER_PAGE} runs at first; *Load more* below the list "
            f"adds others. The Scaling page shows all {trials} trials."
        )
    identity, name = experiment
    page = f"scaling/#sweeps={quote(name)}"
    charts = chart_view.relative_link(identity)
    note.append(
        f"[Charts]({charts}) · [Scaling page]({page}) (under `jepa ui`); "
        "the same figure is the artifact `scaling.html` of the parent run."
    )
    return "\n\n".join(note)


def read_findings(document: Path) -> list[str]:
    """Return the sentences of scaling.json over total FLOPs; none before the first fit."""
    found: Mapping[str, Any] = read_json(document) or {}
    fit = found.get("laws", {}).get(f"{found.get('error')}|flops_total", {})
    return fit.get("summary", [])
