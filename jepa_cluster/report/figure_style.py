"""Colours, markers, axis titles and legend of the figure; the browser's page shares them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from jepa_cluster.labels import sort_key
from jepa_cluster.report import points, power_law
from jepa_cluster.report.analysis import Analysis, is_error
from jepa_cluster.results.tables import Row
from jepa_cluster.tracking.chart_view import COLORS

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

AXIS_TITLES = {
    "flops_total": "compute, total [FLOP]",
    "flops_encoder": "compute, encoder [FLOP]",
    "images_seen": "images seen",
    "gpu_hours_alone": "GPU-hours, its trunk's share included",
    "parameters": "encoder parameters",
    "context_fraction": "context, share of patches",
    "target_fraction": "one target, share of patches",
    "union_fraction": "all targets, share of patches",
    "loss": "training loss (one setting only)",
    "val/loss": "validation loss, own masks (one setting only)",
    "val/reference_loss": "validation loss, shared masks",
    "probe/rankme": "RankMe, effective rank",
    "probe/lidar": "LiDAR, effective rank",
    "probe/class_error": "class probe error (1 − top-1)",
    "probe/knn_error": "k-NN error (1 − top-1)",
}
# Plotly's name -> matplotlib's
SHAPES = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "cross": "P",
    "triangle-down": "v",
    "pentagon": "p",
    "star": "*",
    "hexagon": "h",
}
MARKERS = tuple(SHAPES.values())
GREY = "#888"
INK = "#444"
LINE_STYLES = ("-", "--", ":", "-.")


def plain(text: str) -> str:
    """Escape a text of the user, in which matplotlib would read math between two dollars."""
    return text.replace("$", r"\$")


def axis_title(metric: str) -> str:
    """Return an axis title with its unit."""
    if metric in AXIS_TITLES:
        return AXIS_TITLES[metric]
    if is_error(metric):
        label = metric.removeprefix("probe/").removesuffix("_error")
        return plain(f"{label} probe error")
    return plain(metric)


class Style:
    """Colour by model size (small to large), or by setting of a single size; marker by setting.

    models: small to large. markers: by setting while there are enough of them, else none.
    color_by: the column that `colors` has the values of.
    """

    def __init__(self, s: Analysis) -> None:
        sizes = {row["model"]: row["parameters"] for row in s.trials}
        self.models = sorted(sizes, key=lambda model: (sizes[model], model))
        keys: dict[str, list[tuple[float, str]]] = {}
        for row in s.trials:
            keys[row["setting"]] = [sort_key(row[axis]) for axis in s.settings]
        self.settings = sorted(keys, key=lambda setting: keys[setting])
        self.markers: dict[str, str] = {}
        if len(self.settings) <= len(MARKERS):
            self.markers = dict(zip(self.settings, MARKERS, strict=False))
        self.color_by = "model"
        names = self.models
        if len(self.models) == 1 and self.markers:
            self.color_by = "setting"
            names = self.settings
        self.colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
        named = set(map(points.point_label, s.trials))
        self.has_seeds = len(s.trials) > len(named)

    def color(self, row: Row) -> str:
        return self.colors[row[self.color_by]]

    def marker(self, row: Row) -> str:
        return self.markers.get(row["setting"], MARKERS[0])


def legend_handles(style: Style) -> list[Line2D]:
    """Return what the legend explains: models, settings, and the marks of seeds."""
    from matplotlib.lines import Line2D

    handles: list[Line2D] = []

    def add(label: str, color: str = INK, **more: Any) -> None:
        handles.append(Line2D([], [], color=color, label=plain(label), **more))

    if len(style.models) > 1:
        for model in style.models:
            add(model, style.colors[model])
    for name, marker in style.markers.items():
        add(name, style.colors.get(name, INK), ls="", marker=marker)
    if style.has_seeds:
        add("a seed", ls="", marker="o", ms=4, mec="white", mew=0.6)
        add(f"{power_law.LEVEL:.0%} interval of their mean", ls="", marker="|", ms=14)
    return handles
