"""The chart view that an experiment opens with in MLflow, stored as a tag of the experiment.

MLflow keeps a shared view as `mlflow.sharedViewState.<id>`: JSON with the page's state, deflated,
in base64. The state's format is internal to MLflow, so mlflow is pinned and tests/browser opens the
view.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jepa_cluster.results.tables import CLASS_ERROR, Size

VIEW = "jepa-scaling"
COLOR = "mlflow.runColor"  # the tag of a run with its colour
TAG = f"mlflow.sharedViewState.{VIEW}"
COMPUTE = "flops_total_log10"
SCALE = "mid.target_scale"  # params made by run_tags.derived_params
ASPECT = "mid.target_aspect"
SECTIONS = {"Scaling": 2, "Masks": 1, "Settings": 1, "Health": 2}  # name -> columns
# Colours of model sizes, small to large, in MLflow's runs, the page and the PNG; of more or fewer
# sizes, those between. Neighbours differ for the colour blind; contrast with white and dark is 3.
COLORS = ("#0151fb", "#7251c3", "#9e468f", "#ae475d", "#c75a3d", "#e4770b")


def ramp(
    colors: Sequence[str],
    count: int,
) -> list[str]:
    """Return `count` colours from the first to the last, mixed where there are too few."""
    found: list[str] = []
    for number in range(count):
        place = number * (len(colors) - 1) / max(count - 1, 1)
        before = min(int(place), len(colors) - 2)
        ends = zip(_channels(colors[before]), _channels(colors[before + 1]), strict=True)
        mixed = bytes(round(a + (b - a) * (place - before)) for a, b in ends)
        found.append(f"#{mixed.hex()}")
    return found


def _channels(color: str) -> bytes:
    return bytes.fromhex(color.removeprefix("#"))


def size_colors(sizes: Iterable[Size]) -> dict[Size, str]:
    """Return the colour of each model size, small to large."""
    ordered = sorted(set(sizes))
    return dict(zip(ordered, ramp(COLORS, len(ordered)), strict=True))


def relative_link(experiment: str) -> str:
    """Return the address, relative to MLflow's page, that opens an experiment in the chart view."""
    return (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    )


def color(sizes: Collection[Size], own: Size) -> str:
    """Return the colour of a run by its size; '' where one size is swept."""
    return size_colors(sizes).get(own, "") if len(sizes) > 1 else ""


def view_tag() -> str:
    """Return the tag's value. It is equal from call to call."""
    state = json.dumps(page_state(), separators=(",", ":"), sort_keys=True)
    packed = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    view = {"name": "Scaling", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return json.dumps(view)


def page_state() -> dict[str, Any]:
    """Return the state of MLflow's page: its columns, its charts, and runs grouped by model."""
    columns = [
        "params.`model.name`",
        "tags.`jepa.state`",
        "tags.`jepa.gpu_hours`",
        f"metrics.`{CLASS_ERROR}`",
        f"metrics.`initial/{CLASS_ERROR}`",
        f"metrics.`{COMPUTE}`",
        "metrics.`context_fraction`",
    ]
    return {
        "selectedColumns": columns,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": "model.name"}],
        },
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "autoRefreshEnabled": True,
        "hideEmptyCharts": True,
        "useGroupedValuesInCharts": False,
        "compareRunCharts": _charts(),
        "compareRunSections": [_section(name, n) for name, n in SECTIONS.items()],
    }


def _charts() -> list[dict[str, Any]]:
    charts = [
        _line("Scaling", CLASS_ERROR, COMPUTE),
        _card("SCATTER", "Scaling", xaxis=_metric(COMPUTE), yaxis=_metric(CLASS_ERROR)),
        _line("Scaling", "loss", COMPUTE),
        _line("Scaling", "probe/knn_error", COMPUTE),
        _card("SCATTER", "Masks", xaxis=_metric("context_fraction"), yaxis=_metric(CLASS_ERROR)),
        _card(
            "PARALLEL",
            "Settings",
            selectedParams=["model.name", SCALE, ASPECT],
            selectedMetrics=["context_fraction", CLASS_ERROR],
            showAllRuns=True,
        ),
        _line("Health", "target_std", ""),
        _line("Health", "probe/rankme", ""),
        _line("Health", "grad_norm", ""),
        _line("Health", "images_per_s", ""),
    ]
    for number, chart in enumerate(charts):
        chart["uuid"] = f"jepa-{number}"
    return charts


def _section(name: str, columns: int) -> dict[str, Any]:
    return {
        "uuid": f"jepa-{name}",
        "name": name,
        "display": True,
        "isReordered": True,
        "columns": columns,
    }


def _metric(key: str) -> dict[str, str]:
    return {"key": key, "type": "METRIC"}


def _card(kind: str, section: str, **more: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "metricSectionId": f"jepa-{section}",
        "runsCountToCompare": 100,
        **more,
    }


def _line(section: str, metric: str, x: str) -> dict[str, Any]:
    """Return a line chart of a metric over another metric, or over steps when x is empty."""
    return _card(
        "LINE",
        section,
        metricKey=metric,
        selectedMetricKeys=[metric],
        yAxisKey="metric",
        yAxisExpressions=[],
        lineSmoothness=0,
        scaleType="linear",
        xAxisScaleType="linear",
        ignoreOutliers=False,
        useGlobalLineSmoothing=False,
        useGlobalXaxisKey=False,
        xAxisKey="metric" if x else "step",
        selectedXAxisMetricKey=x,
        range={},
    )
