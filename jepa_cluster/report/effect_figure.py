"""Panels of the PNG that show settings: effect by level, heat maps, importance.

In: an `Analysis` and matplotlib's axes. Every number is that of `Effects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jepa_cluster import labels
from jepa_cluster.report import figure_numbers, figure_style, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.figure_numbers import HeatMap
from jepa_cluster.report.figure_style import GREY, INK, STATE_MARKS, Style, plain
from jepa_cluster.results import tables
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.mixed_model import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MAX_MAPS = 5  # heat maps
LABEL_GAP = 0.05  # of the height of a panel, between labels of lines
TEXT_CELLS = 36  # of a map, above which numbers are left out
STRAIGHT = 3  # levels of a map, above which their labels are turned
RELATIVE_TITLE = "error against the mean of the size [%]"


def draw_effect(
    ax: Axes,
    s: Analysis,
    style: Style,
    axis: Levels,
) -> None:
    """Draw the error of each size at each level, with its band, its name at the end of the line."""
    assert isinstance(s.effects, Effects)
    numbers = axis.numbers
    places = np.arange(len(axis.names), dtype=float) if numbers is None else numbers
    if axis.is_log:
        ax.set_xscale("log")
    ends: dict[str, float] = {}
    for number, model in enumerate(s.effects.models):
        order = figure_numbers.level_order(axis)
        ran = order[axis.has_trials[number][order]]
        draws = 100 * np.expm1(axis.of_model[:, number, ran])
        low, high = power_law.quantiles(draws)
        middle = np.median(draws, 0)
        color = style.by_size[s.effects.sizes[number]]
        ax.fill_between(places[ran], low, high, color=color, alpha=0.12, lw=0)
        ax.plot(places[ran], middle, "-o", color=color, lw=1.6, ms=4)
        ends[model] = float(middle[-1])
    ax.axhline(0, color=GREY, lw=0.8)
    shown = _apart(ax, places)
    ax.set_xticks(places[shown], [plain(axis.names[level]) for level in shown])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=plain(axis.axis), ylabel=RELATIVE_TITLE)
    ax.grid(alpha=0.3)
    _label_ends(ax, ends)


def _apart(
    ax: Axes,
    places: Floats,
) -> list[int]:
    """Return the levels whose ticks are far enough apart, at most figure_style.MAX_TICKS."""
    at = ax.transAxes.inverted().transform(ax.transData.transform([(x, 0) for x in places]))[:, 0]
    shown: list[int] = []
    for level in np.argsort(at):
        if not shown or at[level] - at[shown[-1]] >= 1 / figure_style.MAX_TICKS:
            shown.append(int(level))
    return shown


def _label_ends(
    ax: Axes,
    ends: Mapping[str, float],
) -> None:
    """Write the names of lines right of the panel, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = LABEL_GAP * (high - low)
    models = sorted(ends, key=lambda model: ends[model])
    lines = np.array([ends[model] for model in models])
    steps = gap * np.arange(len(models))
    at = np.maximum.accumulate(lines - steps) + steps
    at += (lines - at).mean()
    for model, height in zip(models, at, strict=True):
        ax.text(
            1.02,
            height,
            plain(model),
            transform=ax.get_yaxis_transform(),
            color=INK,
            va="center",
            fontsize=9,
        )


def draw_lower_row(
    part: SubFigure,
    s: Analysis,
    style: Style,
) -> None:
    """Draw the first heat maps, with one colour scale, and the bars of importance."""
    assert isinstance(s.effects, Effects)
    maps = figure_numbers.heat_maps(s.effects)
    maps = [each for each in maps if (each.x, each.y) == (maps[0].x, maps[0].y)][:MAX_MAPS]
    *left, right = part.subplots(1, len(maps) + 1, squeeze=False)[0].tolist()
    reach = max([float(np.nanmax(np.abs(np.log(each.values)))) for each in maps], default=0.0)
    for number, (ax, found) in enumerate(zip(left, maps, strict=True)):
        _draw_heat_map(ax, s, found, reach)
        if number:
            ax.set(ylabel="", yticks=[])
    if maps:
        bar = part.colorbar(
            left[-1].images[0],
            ax=left,
            pad=0.01,
            aspect=40,
        )
        bar.set_label(RELATIVE_TITLE, fontsize=8)
    _draw_importance(right, s)


def _draw_heat_map(
    ax: Axes,
    s: Analysis,
    found: HeatMap,
    reach: float,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    assert isinstance(s.effects, Effects)
    percent = 100 * (found.values - 1)
    most = 100 * np.expm1(reach) or 1.0
    colors = LinearSegmentedColormap.from_list("heat", figure_style.HEAT_COLORS)
    ax.imshow(percent, cmap=colors, vmin=-most, vmax=most, origin="lower", aspect="auto")
    title = "" if found.size is None else s.effects.models[found.size]
    ax.set_title(plain(title), fontsize=10)
    for axis, levels in ((ax.xaxis, found.x_levels), (ax.yaxis, found.y_levels)):
        step = -(-len(levels) // figure_style.MAX_TICKS)
        shown = range(0, len(levels), step)
        axis.set_ticks(list(shown), [plain(levels[level]) for level in shown], fontsize=8)
    ax.tick_params(axis="x", rotation=45 if len(found.x_levels) > STRAIGHT else 0)
    ax.set_xlabel(plain(labels.last_part(found.x, ())), fontsize=9)
    ax.set_ylabel(plain(labels.last_part(found.y, ())), fontsize=9)
    missing = _missing(s, found)
    if percent.size > TEXT_CELLS:
        return
    for (row, level), value in np.ndenumerate(found.values):
        if found.count[row, level]:
            shown = labels.format_percent(labels.rounded(value) - 1, "+")
            text = f"{shown}\nn={found.count[row, level]}"
            ax.text(level, row, text, ha="center", va="center", fontsize=8)
        elif (row, level) in missing:
            ax.plot(level, row, missing[row, level], color=INK, mfc="none", ms=7)


def _missing(
    s: Analysis,
    found: HeatMap,
) -> dict[tuple[int, int], str]:
    """Return the marker of the cells that have trials, none of which has finished."""
    assert isinstance(s.effects, Effects)
    markers: dict[tuple[int, int], str] = {}
    for row in s.trials:
        own = found.size is None or tables.size_of(row) == s.effects.sizes[found.size]
        x, y = row.get(found.x), row.get(found.y)
        if own and x in found.x_levels and y in found.y_levels:
            place = found.y_levels.index(y), found.x_levels.index(x)
            markers.setdefault(place, STATE_MARKS[row["state"]].marker)
    return markers


def _draw_importance(
    ax: Axes,
    s: Analysis,
) -> None:
    """Draw a bar per axis, with its interval, and that of the seeds last."""
    assert isinstance(s.effects, Effects)
    bars = figure_numbers.importance(s.effects, s.answers)
    names = [labels.last_part(name, ()) for name in bars]
    for number, bar in enumerate(bars.values()):
        color = GREY if number == len(bars) - 1 else INK
        ax.barh(number, 100 * bar.value, color=color, height=0.5)
        ax.hlines(number, 100 * bar.low, 100 * bar.high, color="black", lw=1.2)
    ax.set_yticks(range(len(names)), list(map(plain, names)), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("worst above best level; last: standard deviation [%]", fontsize=9)
    *axes, noise = bars.values()
    ax.set_xlim(0, 110 * max(noise.value, *(bar.high for bar in axes)))
    ax.spines[["top", "right"]].set_visible(False)
