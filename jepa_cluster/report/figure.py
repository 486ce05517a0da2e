"""The figure of an analysis as a PNG: error over compute with its law, masks, and a heat map.

In: an `Analysis`. Out: a file by matplotlib, for pages that are read without a browser. Only means
for drawing are computed here. Training loss is drawn only where all trials share one mask setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_cluster.labels import sort_key
from jepa_cluster.report import analysis, figure_style, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.figure_style import (
    AXIS_TITLES,
    GREY,
    LINE_STYLES,
    Style,
    axis_title,
)
from jepa_cluster.report.power_law import Floats, PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Row, Rows, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_FRACTIONS = 4  # distinct context fractions below which the error is drawn by size instead
CONTEXT = "context_fraction"
BLOCK = ("model", "steps")  # trials within which errors are compared
RELATIVE = "relative_error"
RELATIVE_TITLE = "error / mean error of its size"
LOG_TICKS = (1, 2, 3, 4, 5, 6, 7, 8)


def draw(s: Analysis, path: Path) -> None:
    """Write the panels that this analysis has, side by side, with one legend below them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heatmap = heatmap_axes(s)
    panels = 3 if heatmap and s.finished else 2
    fig, ax = plt.subplots(1, panels, figsize=(6 * panels, 5.4), layout="constrained")
    style = Style(s)
    _draw_against_compute(ax[0], s, style, s.error)
    _draw_law(ax[0], s)
    if len(style.settings) == 1:
        _draw_against_compute(ax[1], s, style, "loss")
    elif _distinct_context_fractions(s) < MIN_FRACTIONS:
        _draw_by_size(ax[1], s, style)
    else:
        _draw_against_context(ax[1], s, style)
    if heatmap and s.finished:
        _draw_heatmap(ax[2], s, *heatmap)
    handles = figure_style.legend_handles(style)
    if handles:
        columns = min(len(handles), 6)
        fig.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
    fig.suptitle(s.sweep.question or s.sweep.name)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---- numbers to draw


def training_curves(
    s: Analysis,
    y: str,
    x: str,
) -> dict[str, list[Row]]:
    """Return the settled rows that have both values, by trial."""
    curves: dict[str, list[Row]] = {}
    for row in tables.step_table(s.sweep):
        if row.get(x, 0) > 0 and np.isfinite(row.get(y, np.nan)):
            curves.setdefault(row["trial"], []).append(row)
    return curves


def law_curve(s: Analysis, points: int = 80) -> tuple[Floats, Floats, Floats, Floats] | None:
    """Return (C, E, low, high) over the data; None without a reliable law."""
    if not isinstance(s.law, PowerLawFit) or s.law.unreliable_because:
        return None
    c = np.geomspace(*s.law.span, points)
    return c, s.law.predict(c), *s.law.band(c)


def relative_errors(s: Analysis) -> list[Row]:
    """Return finished rows with a column RELATIVE.

    It is the error over the mean of all finished trials of its size and horizon.
    """
    rows: list[Row] = []
    for block in analysis.group_by(s.finished, *BLOCK).values():
        mean = analysis.mean_of(block, s.error)
        rows += [{**row, RELATIVE: row[s.error] / mean} for row in block]
    return rows


def heatmap_axes(s: Analysis) -> tuple[str, str] | None:
    """Return mask scale and aspect where they are swept, else the first two settings."""
    if len(s.settings) < 2:
        return None
    first = min(s.settings, key=lambda axis: "scale" not in axis)
    rest = [axis for axis in s.settings if axis != first]
    return first, min(rest, key=lambda axis: "aspect" not in axis)


def _distinct_context_fractions(s: Analysis) -> int:
    fractions = column(s.finished, CONTEXT)
    return len(set(np.round(fractions, 2)))


# ---- panels


def _draw_against_compute(
    ax: Axes,
    s: Analysis,
    style: Style,
    y: str,
) -> None:
    """Draw training curves and a mark at their end, hollow where the trial is not finished."""
    by_name = {row["trial"]: row for row in s.trials}
    ends: dict[str, list[Row]] = {}
    first: dict[str, Row] = {}
    for name, rows in training_curves(s, y, s.compute).items():
        trial = by_name[name]
        ax.plot(
            column(rows, s.compute),
            column(rows, y),
            color=style.color(trial),
            alpha=0.3,
            lw=1,
        )
        point = name
        if trial["state"] == "done":
            point = analysis.point_label(trial)
        first.setdefault(point, trial)
        ends.setdefault(point, []).append(rows[-1])
    for point, rows in ends.items():
        _draw_point(ax, style, first[point], column(rows, s.compute), column(rows, y))
    ax.set(
        xscale="log",
        xlabel=axis_title(s.compute),
        ylabel=axis_title(y),
    )
    _set_log_ticks(ax)
    ax.grid(alpha=0.3, which="major")


def _set_log_ticks(ax: Axes) -> None:
    """Label more digits of x the fewer decades it spans."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    digits: Sequence[float] = (1,)
    if high < 12 * low:
        digits = (1, 2, 5)
    elif high < 1e3 * low:
        digits = (1, 3)
    label = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9))
    ax.xaxis.set_major_locator(LogLocator(subs=digits))
    ax.xaxis.set_major_formatter(label)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_point(
    ax: Axes,
    style: Style,
    first: Row,
    x: Sequence[float],
    y: Sequence[float],
) -> None:
    """Draw a mark at the mean of a point's trials, hollow where they are not finished.

    Of several seeds, each is a small mark, and a whisker spans the interval of their mean. The axes
    reach no further than to half and twice the seeds.
    """
    from matplotlib.collections import LineCollection

    marker = style.marker(first)
    color = style.color(first)
    mean = power_law.mean(y)
    at = float(np.mean(x))
    if len(y) > 1:
        ax.plot(
            x,
            y,
            marker,
            color=color,
            ms=4,
            mec="white",
            mew=0.6,
            zorder=3,
        )
        ends = [(at, mean.low), (at, mean.high)]
        ax.add_collection(LineCollection([ends], colors=color, linewidths=1.2), autolim=False)
        lowest = max(mean.low, min(y) / 2)
        highest = min(mean.high, max(y) * 2)
        ax.update_datalim([(at, lowest), (at, highest)])
    face = color if first["state"] == "done" else "none"
    ax.plot(
        at,
        mean.value,
        marker,
        color=color,
        ms=7,
        mfc=face,
    )


def _draw_law(ax: Axes, s: Analysis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    initial = f"initial/{s.error}"
    before = column(s.trials, initial)
    if before:
        level = float(np.mean(before))
        ax.axhline(
            level,
            ls=":",
            color=GREY,
            label="randomly initialised encoder",
        )
        high = max(high, level * 1.05)
    if isinstance(s.law, PowerLawFit) and s.law.unreliable_because:
        ax.plot([], [], " ", label=f"no law: {s.law.unreliable_because}")
    curve = law_curve(s)
    if curve is not None:
        c, error, lower, upper = curve
        band = f"{power_law.LEVEL:.0%} band"
        ax.fill_between(
            c,
            lower,
            upper,
            color="#555",
            alpha=0.15,
            lw=0,
            label=band,
        )
        ax.plot(
            c,
            error,
            "--",
            color="#222",
            lw=1.2,
            label="law of the frontier",
        )
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(subs=LOG_TICKS))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize=8)


def _draw_against_context(
    ax: Axes,
    s: Analysis,
    style: Style,
) -> None:
    """Draw the relative error of each point over the context fraction that its masks realised."""
    known = [row for row in relative_errors(s) if CONTEXT in row]
    points = analysis.group_by(known, *BLOCK, "setting")
    for rows in points.values():
        _draw_point(ax, style, rows[0], column(rows, CONTEXT), column(rows, RELATIVE))
    ax.axhline(1, color=GREY, lw=0.8)
    ax.set(xlabel=AXIS_TITLES[CONTEXT], ylabel=RELATIVE_TITLE)
    ax.grid(alpha=0.3)


def _draw_by_size(
    ax: Axes,
    s: Analysis,
    style: Style,
) -> None:
    """Draw the relative error of each setting by size, its points joined by a line.

    Settings are placed side by side within a size.
    """
    groups = analysis.group_by(relative_errors(s), "setting")
    width = 0.4 / max(len(style.settings), 1)
    for rows in groups.values():
        index = style.setting_index(rows[0])
        errors: dict[float, list[float]] = {}
        for point in analysis.group_by(rows, *BLOCK).values():
            size = style.models.index(point[0]["model"])
            at = size + (index + 0.5) * width - 0.2
            y = column(point, RELATIVE)
            _draw_point(ax, style, point[0], [at] * len(y), y)
            errors.setdefault(at, []).append(analysis.mean_of(point, RELATIVE))
        places = sorted(errors)
        means = [float(np.mean(errors[place])) for place in places]
        line = LINE_STYLES[index % len(LINE_STYLES)]
        ax.plot(
            places,
            means,
            color=GREY,
            lw=0.8,
            ls=line,
            zorder=1,
        )
    ax.axhline(1, color=GREY, lw=0.8)
    ax.set_xticks(range(len(style.models)), style.models)
    ax.set_xlim(-0.5, len(style.models) - 0.5)
    ax.set(xlabel="model, small to large", ylabel=RELATIVE_TITLE)
    ax.grid(alpha=0.3, axis="y")


def _draw_heatmap(
    ax: Axes,
    s: Analysis,
    first: str,
    second: str,
) -> None:
    """Draw the relative error by two axes, averaged over all others, with the count per cell."""
    groups = analysis.group_by(relative_errors(s), first, second)
    xs = _values(s.finished, first)
    ys = _values(s.finished, second)
    z = np.full((len(ys), len(xs)), np.nan)
    box: Mapping[str, object] = {
        "facecolor": "white",
        "alpha": 0.75,
        "edgecolor": "none",
        "pad": 1.5,
    }
    for rows in groups.values():
        i = ys.index(str(rows[0][second]))
        j = xs.index(str(rows[0][first]))
        z[i, j] = analysis.mean_of(rows, RELATIVE)
        text = f"{z[i, j]:.3f}\nn = {len(rows)}"
        ax.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            bbox=dict(box),
        )
    image = ax.imshow(
        z,
        cmap="viridis_r",
        aspect="auto",
        origin="lower",
    )
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    ax.set(xlabel=_plain(first), ylabel=_plain(second))
    ax.figure.colorbar(image, ax=ax, label=RELATIVE_TITLE)


def _values(rows: Rows, axis: str) -> list[str]:
    values = set(map(str, column(rows, axis)))
    return sorted(values, key=sort_key)


def _plain(axis: str) -> str:
    return axis.rsplit(".", 1)[-1].replace("_", " ")
