"""The chart view an experiment opens with in MLflow's own pages, shipped as a tag of the experiment.

MLflow keeps a shared view as `mlflow.sharedViewState.<id>`: JSON with the page's state, deflated, in base64. The
shape of the state is MLflow's own and undocumented: mlflow is pinned, and tests/browser opens the view.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

VIEW = "jepa-scaling"
TAG = f"mlflow.sharedViewState.{VIEW}"
SCALE, ASPECT = "mid.target_scale", "mid.target_aspect"  # params made by notes.numbers
SECTIONS = ("Scaling", "Masks", "Health")


def link(base: str, experiment: str) -> str:
    """The address that opens an experiment in the shipped view."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    )


def tag(error: str = "probe/class_error", created: int = 0) -> str:
    """The tag's value. created: Unix ms; a constant keeps the tag equal from round to round."""
    state = json.dumps(page_state(error), separators=(",", ":"), sort_keys=True)
    packed = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    return json.dumps({"name": "Scaling", "createdAt": created, "updatedAt": created, "state": f"deflate;{packed}"})


def page_state(error: str) -> dict[str, Any]:
    """Grouped by model size: probe and loss against FLOPs, a contour of scale x aspect, parallel coordinates."""
    cards = [
        _line("Scaling", error, "flops_total_log10"),
        _card("SCATTER", "Scaling", xaxis=_metric("flops_total_log10"), yaxis=_metric(error)),
        _line("Scaling", "loss", "flops_total_log10"),
        _card(
            "CONTOUR",
            "Masks",
            xaxis=_param("mid.target_scale"),
            yaxis=_param("mid.target_aspect"),
            zaxis=_metric(error),
        ),
        _card("SCATTER", "Masks", xaxis=_metric("context_fraction"), yaxis=_metric(error)),
        _card(
            "PARALLEL",
            "Masks",
            selectedParams=["model.name", SCALE, ASPECT, "mask.targets"],
            selectedMetrics=["context_fraction", error],
            showAllRuns=True,
        ),
        _line("Health", "target_std", ""),
        _line("Health", "probe/rankme", ""),
        _line("Health", "images_per_s", ""),
    ]
    return {
        "selectedColumns": [
            "params.`model.name`", "tags.`jepa.state`", "tags.`jepa.gpu_hours`", f"metrics.`{error}`",
            f"metrics.`initial/{error}`", "metrics.`flops_total`", "metrics.`context_fraction`", "metrics.`loss`",
        ],
        "groupBy": {
            "aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "model.name"}],
        },
        "groupsExpanded": {}, "runsExpanded": {}, "runsPinned": [], "runsHidden": [], "runsHiddenMode": "SHOWALL",
        "runListHidden": False, "viewMaximized": False, "isAccordionReordered": True, "autoRefreshEnabled": True,
        "hideEmptyCharts": True, "useGroupedValuesInCharts": False,
        "compareRunCharts": cards,
        "compareRunSections": [
            {"uuid": f"jepa-{s}", "name": s, "display": True, "isReordered": True, "deleted": False,
             "isGenerated": False, "columns": 2} for s in SECTIONS
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
