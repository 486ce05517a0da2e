"""Colours, markers, axis titles and legend of the figure; the browser's page shares them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jepa_cluster.labels import axis_word, last_part, sort_key
from jepa_cluster.report import points, power_law, rates
from jepa_cluster.report.analysis import Analysis, is_error
from jepa_cluster.results.tables import Row, size_names, size_of
from jepa_cluster.tracking.chart_view import ramp, size_colors
from jepa_cluster.trial.status import State

if TYPE_CHECKING:
    from matplotlib.axis import Axis
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
# Plotly's name -> matplotlib's; filled, of settings
SHAPES = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "cross": "P",
    "diamond": "D",
    "pentagon": "p",
    "star": "*",
    "hexagon": "h",
}
MARKERS = tuple(SHAPES.values())
# Colours of what is not a size, such as settings and sweeps, in their order
OTHER_COLORS = ("#737503", "#697b54", "#578181", "#2f85aa", "#238cd3", "#3693ff")
# Colours of heat maps: an error below the mean of the size, at it, above it. Text on them is dark.
HEAT_COLORS = ("#4a90d9", "#f4f4f2", "#e4861b")
GREY = "#888"
INK = "#444444"
MAX_TICKS = 6  # of an axis
TICK_DIGITS = (1, 2, 5)  # first digits of ticks, and steps between them


class Mark(NamedTuple):
    """How the trials of a state are marked: Plotly's symbol, matplotlib's, and a letter."""

    symbol: str
    marker: str
    glyph: str


_WAITS = Mark("diamond-open", "D", "◇")
# A finished trial may have the shape of its setting instead; all other marks are not filled.
STATE_MARKS: Mapping[State, Mark] = {
    "done": Mark("circle", "o", "●"),
    "running": Mark("circle-open", "o", "◌"),
    "new": _WAITS,
    "queued": _WAITS,
    "requeued": _WAITS,
    "interrupted": _WAITS,
    "stopped": Mark("square-open", "s", "□"),
    "failed": Mark("x-thin-open", "x", "×"),
    "unknown": Mark("hexagram-open", "*", "☆"),
}


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


def log_ticks(
    low: float,
    high: float,
    room: int = MAX_TICKS,
) -> list[float]:
    """Return ticks of a logarithmic axis: 1, 2 and 5 of each decade, or powers of ten.

    room: how many fit side by side. Where fewer than two of these are inside, multiples of 1, 2
    or 5.
    """
    most = min(room, MAX_TICKS)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, gap in ((TICK_DIGITS, 0.3), ((1, 5), 0.3), ((1,), 1.0)):
        found = [digit * 10.0**power for power in decades for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) < 2:
            return linear_ticks(low, high, most)
        if len(found) <= most and gap * (room + 1) >= math.log10(high / low):
            return found
    return found[:: math.ceil(len(found) / most)]


def linear_ticks(
    low: float,
    high: float,
    most: int = MAX_TICKS,
) -> list[float]:
    """Return multiples of a step that begins with 1, 2 or 5."""
    power = math.floor(math.log10((high - low) / most))
    steps = [digit * 10.0**decade for decade in (power, power + 1) for digit in TICK_DIGITS]
    for step in steps:
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        if last - first < most:
            return [number * step for number in range(first, last + 1)]
    return []


def tick_text(tick: float) -> str:
    """Return '0.2', or '2×10⁹' as matplotlib's math."""
    if not tick or 1e-3 <= abs(tick) < 1e5:
        return f"{tick:.4g}"
    digits, power = f"{tick:.3e}".split("e")
    factor = f"{float(digits):g}"
    times = "" if factor == "1" else rf"{factor}{{\times}}"
    return f"${times}10^{{{int(power)}}}$"


def set_ticks(
    axis: Axis,
    room: int = MAX_TICKS,
) -> None:
    """Place the ticks of a logarithmic axis within its limits. room: how many fit."""
    low, high = axis.get_view_interval()
    ticks = log_ticks(low, high, room)
    axis.set_ticks(ticks, list(map(tick_text, ticks)))
    axis.set_ticks([], minor=True)


class Style:
    """Colour by model size, small to large, and marker by setting; of one size, colour by setting.

    setting: the first axis, masks before others, that has several values, and no more than there
    are markers; '' without one. The page chooses the same. names: of its values. sizes, models:
    small to large, and their names. states: that have marks.
    """

    def __init__(self, s: Analysis) -> None:
        names = size_names(s.trials)
        self.sizes, self.models = list(names), list(names.values())
        self.by_size = size_colors(self.sizes)
        self.setting = ""
        self.markers: dict[str, str] = {}
        self.by_setting: dict[str, str] = {}
        values = self._choose_setting(s)
        if len(self.sizes) > 1:
            self.markers = dict(zip(values, MARKERS, strict=False))
        else:
            self.by_setting = dict(zip(values, ramp(OTHER_COLORS, len(values)), strict=True))
        self.names = {value: axis_word(self.setting, value, s.sweep.axes) for value in values}
        self.states = sorted({row["state"] for row in s.trials if s.error in row})
        named = set(map(points.point_label, s.trials))
        self.has_seeds = len(s.trials) > len(named)
        self.has_off_rates = any(map(is_off, s.trials))

    def _choose_setting(self, s: Analysis) -> list[str]:
        """Find the axis that marker or colour shows, and return its values in their order."""
        for axis in sorted(s.settings, key=lambda axis: not axis.startswith("mask.")):
            values = sorted({row[axis] for row in s.trials}, key=sort_key)
            if 1 < len(values) <= len(MARKERS):
                self.setting = axis
                return values
        return []

    def color(self, row: Row) -> str:
        return self.by_setting.get(row.get(self.setting, "")) or self.by_size[size_of(row)]

    @property
    def title(self) -> str:
        """What colour and shape mean, for the legend."""
        setting = last_part(self.setting, ()).replace("_", " ")
        if self.markers:
            return f"colour: model, shape: {setting}"
        return f"colour: {setting if self.by_setting else 'model'}"

    def mark(self, row: Row) -> dict[str, Any]:
        """Return marker and filling of a trial, for matplotlib."""
        color = self.color(row)
        if row["state"] == "done":
            marker = self.markers.get(row.get(self.setting, ""), MARKERS[0])
            edge = {"mec": INK, "mew": 1.4} if is_off(row) else {}
            return {"marker": marker, "color": color, **edge}
        return {
            "marker": STATE_MARKS[row["state"]].marker,
            "color": color,
            "mfc": "none",
        }


def is_off(row: Row) -> bool:
    """Whether a calibration exists, and a rate is not known to be near its best one."""
    return row["state"] == "done" and row.get(rates.IS_NEAR) == 0


def legend_handles(
    style: Style,
    has_whiskers: bool,
) -> list[Line2D]:
    """Return what the legend explains: sizes, settings, states, and the marks of seeds."""
    from matplotlib.lines import Line2D

    handles: list[Line2D] = []

    def add(label: str, color: str = INK, **more: Any) -> None:
        handles.append(Line2D([], [], color=color, label=plain(label), **more))

    if len(style.sizes) > 1:
        for name, color in zip(style.models, style.by_size.values(), strict=True):
            add(name, color)
    for value, name in style.names.items():
        color, marker = style.by_setting.get(value, INK), style.markers.get(value, MARKERS[0])
        add(name, color, ls="", marker=marker)
    by_marker: dict[str, list[str]] = {}
    for state in style.states:
        if state != "done":
            by_marker.setdefault(STATE_MARKS[state].marker, []).append(state)
    for marker, states in by_marker.items():
        add(", ".join(states), ls="", marker=marker, mfc="none")
    if style.has_off_rates:
        label = "learning rate not known to be near the best one"
        add(label, GREY, ls="", marker="o", mec=INK, mew=1.4)
    if style.has_seeds:
        add("a seed", ls="", marker="o", ms=4, mec="white", mew=0.6)
    if has_whiskers:
        add(f"{power_law.LEVEL:.0%} interval, by the noise of all seeds", ls="", marker="|", ms=14)
    return handles
