"""Colours, markers, axis titles and legend of the figure; the browser's page shares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jepa_cluster.report import analysis, power_law
from jepa_cluster.report.analysis import Analysis
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
LINE_STYLES = ("-", "--", ":", "-.")


def axis_title(metric: str) -> str:
    """Return an axis title with its unit."""
    if metric in AXIS_TITLES:
        return AXIS_TITLES[metric]
    if metric.endswith("_error"):
        label = metric.removeprefix("probe/").removesuffix("_error")
        return f"{label} probe error (1 − top-1)"
    return metric


class Style:
    """Colour by model size (small to large), or by setting of a single size; marker by setting."""

    def __init__(self, s: Analysis) -> None:
        self.analysis = s
        sizes = {row["model"]: row["parameters"] for row in s.trials}
        self.models = sorted(sizes, key=lambda model: (sizes[model], model))
        groups = analysis.group_by_setting(s.trials, s.settings)
        self.settings = sorted(groups, key=lambda name: self._setting_key(groups[name][0]))

    def _setting_key(self, row: Row) -> list[tuple[float, str]]:
        return [sort_key(str(row.get(axis, ""))) for axis in self.analysis.settings]

    def color(self, row: Row) -> str:
        if len(self.models) > 1 or not self.has_markers:
            return self.palette(self.models.index(row["model"]))
        return self.palette(self.setting_index(row))

    def palette(self, index: int) -> str:
        return COLORS[index % len(COLORS)]

    def setting_index(self, row: Row) -> int:
        return self.settings.index(analysis.setting_label(row, self.analysis.settings))

    def marker(self, row: Row) -> str:
        """A marker per setting while there are enough of them, else one for all."""
        if not self.has_markers:
            return MARKERS[0]
        return MARKERS[self.setting_index(row)]

    @property
    def has_markers(self) -> bool:
        return len(self.settings) <= len(MARKERS)


def sort_key(value: str) -> tuple[float, str]:
    """Sort a setting by its number, by the middle of '0.15–0.2', or a name as 0."""
    try:
        middle = float(np.mean([float(end) for end in value.split("–")]))
    except ValueError:
        middle = 0.0
    return middle, value


def legend_handles(style: Style) -> list[Line2D]:
    """Return what the legend explains: models, settings, and the marks of seeds."""
    from matplotlib.lines import Line2D

    handles: list[Line2D] = []
    several = len(style.models) > 1
    if several:
        for i, model in enumerate(style.models):
            handles.append(Line2D([], [], color=style.palette(i), label=model))
    if style.has_markers:
        for i, name in enumerate(style.settings):
            color = "#555" if several else style.palette(i)
            handles.append(
                Line2D(
                    [],
                    [],
                    color=color,
                    ls="",
                    marker=MARKERS[i],
                    label=name,
                )
            )
    trials = style.analysis.trials
    if len(trials) > len(set(map(analysis.seedless_label, trials))):
        mean = f"{power_law.LEVEL:.0%} interval of their mean"
        seed = Line2D(
            [],
            [],
            color="#555",
            ls="",
            marker="o",
            ms=4,
            label="a seed",
        )
        seed.set(markeredgecolor="white", markeredgewidth=0.6)
        handles.append(seed)
        handles.append(
            Line2D(
                [],
                [],
                color="#555",
                ls="",
                marker="|",
                ms=14,
                label=mean,
            )
        )
    return handles
