"""The chart view an experiment opens with in MLflow's own pages, shipped as a tag of the experiment.

MLflow keeps a shared view as `mlflow.sharedViewState.<id>`: JSON with the page's state, deflated, in base64. The
shape of the state is MLflow's own and undocumented: mlflow is pinned, and tests/browser opens the view.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from typing import Any

VIEW = "jepa-scaling"
TAG = f"mlflow.sharedViewState.{VIEW}"
SCALE, ASPECT = "mid.target_scale", "mid.target_aspect"  # params made by notes.numbers
SECTIONS = {"Scaling": 2, "Masks": 2, "Settings": 1, "Health": 2}  # columns
# the palette of MLflow's runs, the page and the PNG: cool is small, legible on white and on dark
COLORS = ("#6a51c7", "#3b78c2", "#1f9aa0", "#3aa655", "#b59a00", "#e07b2a", "#d1495b", "#8c6d46")


def link(base: str, experiment: str) -> str:
    """The address that opens an experiment in the shipped view."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    )


def color(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str]:
    """The tag that colours a trial's run by its model, in the order of the sweep file; none where no model is swept."""
    models = list(dict.fromkeys(str(_model(t)) for t in plan.get("trials") or ()))
    mine = _model(entry)
    return {"mlflow.runColor": COLORS[models.index(str(mine)) % len(COLORS)]} if mine and len(models) > 1 else {}


def _model(entry: Mapping[str, Any]) -> Any:
    return (entry.get("point") or {}).get("model")


def tag(axes: Collection[str], error: str = "probe/class_error", created: int = 0) -> str:
    """The tag's value. axes: the sweep's. created: Unix ms; a constant keeps the tag equal from round to round."""
    state = json.dumps(page_state(axes, error), separators=(",", ":"), sort_keys=True)
    packed = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    return json.dumps({"name": "Scaling", "createdAt": created, "updatedAt": created, "state": f"deflate;{packed}"})


def page_state(axes: Collection[str], error: str) -> dict[str, Any]:
    """Grouped by model size: probe and loss against FLOPs, a contour of scale x aspect, parallel coordinates. A
    contour needs both axes swept; with one of them its place is taken by a scatter."""
    both = {"mask.target_scale", "mask.target_aspect"} <= set(axes)
    over = ASPECT if "mask.target_aspect" in axes else SCALE
    cards = [
        _line("Scaling", error, "flops_total_log10"),
        _card("SCATTER", "Scaling", xaxis=_metric("flops_total_log10"), yaxis=_metric(error)),
        _line("Scaling", "loss", "flops_total_log10"),
        _line("Scaling", "probe/knn_error", "flops_total_log10"),
        _card("CONTOUR", "Masks", xaxis=_param(SCALE), yaxis=_param(ASPECT), zaxis=_metric(error))
        if both
        else _card("SCATTER", "Masks", xaxis=_param(over), yaxis=_metric(error)),
        _card("SCATTER", "Masks", xaxis=_metric("context_fraction"), yaxis=_metric(error)),
        _card(
            "PARALLEL",
            "Settings",
            selectedParams=["model.name", SCALE, ASPECT],
            selectedMetrics=["context_fraction", error],
            showAllRuns=True,
        ),
        _line("Health", "target_std", ""),
        _line("Health", "probe/rankme", ""),
        _line("Health", "grad_norm", ""),
        _line("Health", "images_per_s", ""),
    ]
    return {
        "selectedColumns": [
            "params.`model.name`", "tags.`jepa.state`", "tags.`jepa.gpu_hours`", f"metrics.`{error}`",
            f"metrics.`initial/{error}`", "metrics.`flops_total_log10`", "metrics.`context_fraction`",
        ],
        "groupBy": {
            "aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "model.name"}],
        },
        "groupsExpanded": {}, "runsExpanded": {}, "runsPinned": [], "runsHidden": [], "runsHiddenMode": "SHOW_ALL",
        "runListHidden": False, "viewMaximized": False, "isAccordionReordered": True, "autoRefreshEnabled": True,
        "hideEmptyCharts": True, "useGroupedValuesInCharts": False,
        "compareRunCharts": cards,
        "compareRunSections": [
            {"uuid": f"jepa-{s}", "name": s, "display": True, "isReordered": True, "deleted": False,
             "isGenerated": False, "columns": columns} for s, columns in SECTIONS.items()
        ],
    }  # fmt: skip


def _metric(key: str) -> dict[str, str]:
    return {"key": key, "type": "METRIC"}


def _param(key: str) -> dict[str, str]:
    return {"key": key, "type": "PARAM"}


def _card(kind: str, section: str, **more: Any) -> dict[str, Any]:
    name = "-".join(str(v.get("key") if isinstance(v, dict) else "") for v in more.values())  # pyright: ignore
    return {
        "uuid": f"jepa-{kind}-{section}-{name}", "type": kind, "metricSectionId": f"jepa-{section}", "deleted": False,
        "isGenerated": False, "runsCountToCompare": 100, **more,
    }  # fmt: skip


def _line(section: str, metric: str, x: str) -> dict[str, Any]:
    """A line chart of a metric over another metric, or over steps when x is empty."""
    card = _card(
        "LINE", section, metricKey=metric, selectedMetricKeys=[metric], yAxisKey="metric", yAxisExpressions=[],
        lineSmoothness=0, scaleType="linear", xAxisScaleType="linear", ignoreOutliers=False,
        useGlobalLineSmoothing=False, useGlobalXaxisKey=False, xAxisKey="metric" if x else "step",
        selectedXAxisMetricKey=x, range={},
    )  # fmt: skip
    return {**card, "uuid": f"jepa-LINE-{section}-{metric}"}
