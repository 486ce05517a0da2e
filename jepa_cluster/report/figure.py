"""The figure of an analysis as a PNG: error over compute with its law, and by mask setting.

In: an `Analysis`. Out: a file by matplotlib, for pages that are read without a browser. Only means
for drawing are computed here. Training loss is drawn only where all trials share one mask setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_cluster.report import figure_style, points, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.figure_style import (
    AXIS_TITLES,
    GREY,
    INK,
    LINE_STYLES,
    Style,
    axis_title,
    plain,
)
from jepa_cluster.report.power_law import PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import Row, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_FRACTIONS = 4  # distinct context fractions below which the error is drawn by size instead
CONTEXT = "context_fraction"
BLOCK = ("model", "steps")  # trials within which errors are compared
RELATIVE = "relative_error"
RELATIVE_TITLE = "error / mean error of its size"


def draw(s: Analysis, path: Path) -> None:
    """Write the panels that this analysis has, side by side, with one legend below them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    style = Style(s)
    _draw_against_compute(left, s, style, s.error)
    _draw_law(left, s)
    fractions = np.round(column(s.finished, CONTEXT), 2)
    if not s.is_comparable:
        right.set_axis_off()  # nothing that compares settings
    elif len(style.settings) == 1:
        _draw_against_compute(right, s, style, "loss")
    elif len(set(fractions)) < MIN_FRACTIONS:
        _draw_by_size(right, s, style)
    else:
        _draw_against_context(right, s, style)
    handles = figure_style.legend_handles(style)
    if handles:
        fig.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 6),
            fontsize=8,
            frameon=False,
        )
    fig.suptitle(plain(s.sweep.question or s.sweep.name))
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ---- numbers to draw


def relative_errors(s: Analysis) -> list[Row]:
    """Return finished rows with a column RELATIVE.

    It is the error over that of the size and horizon at the mean of all settings, by the model of
    all trials: which settings are missing there does not matter.
    """
    rows: list[Row] = []
    if isinstance(s.effects, Effects):
        for row, relative in zip(s.effects.rows, s.effects.relative().tolist(), strict=True):
            rows.append({**row, RELATIVE: relative})
    return rows


# ---- panels


def _draw_against_compute(
    ax: Axes,
    s: Analysis,
    style: Style,
    y: str,
) -> None:
    """Draw training curves and a mark at their end, hollow where the trial is not finished."""
    by_name = {row["trial"]: row for row in s.trials}
    steps = tables.step_table(s.sweep)
    logged = [r for r in steps if r.get(s.compute, 0) > 0 and np.isfinite(r.get(y, np.nan))]
    ends: dict[str, list[Row]] = {}
    first: dict[str, Row] = {}
    for name, rows in points.group_by(logged, "trial").items():
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
            point = points.point_label(trial)
        first.setdefault(point, trial)
        ends.setdefault(point, []).append(rows[-1])
    for point, rows in ends.items():
        _draw_point(ax, style, first[point], column(rows, s.compute), column(rows, y))
    ax.set(
        xscale="log",
        xlabel=axis_title(s.compute),
        ylabel=axis_title(y),
    )
    ax.grid(alpha=0.3, which="major")


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


def _draw_law(
    ax: Axes,
    s: Analysis,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if s.is_comparable:
        ax.set_yscale("log")
    low, high = ax.get_ylim()
    before = column(s.trials, f"initial/{s.error}")
    if before and s.is_comparable:
        level = float(np.mean(before))
        ax.axhline(level, ls=":", color=GREY, label="randomly initialised encoder")
        high = max(high, level * 1.05)
    if isinstance(s.law, PowerLawFit) and s.law.unreliable_because:
        ax.plot([], [], " ", label=plain(f"no law: {s.law.unreliable_because}"))
    elif isinstance(s.law, PowerLawFit):
        c = np.geomspace(*s.law.span, 80)
        band = f"{power_law.LEVEL:.0%} band"
        ax.fill_between(c, *s.law.band(c), color=INK, alpha=0.15, lw=0, label=band)
        error = s.law.predict(c)
        ax.plot(c, error, "--", color=INK, lw=1.2, label="law of the frontier")
    ax.set_ylim(low, high)
    if s.is_comparable:
        ax.yaxis.set_major_locator(LogLocator(subs=range(1, 9)))
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
    for rows in points.group_by(known, *BLOCK, "setting").values():
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
    groups = points.group_by(relative_errors(s), "setting", "model")
    width = 0.4 / max(len(style.settings), 1)
    for index, setting in enumerate(style.settings):
        offset = (index + 0.5) * width - 0.2
        places: list[float] = []
        means: list[float] = []
        for position, model in enumerate(style.models):
            rows = groups.get(f"{setting} {model}", [])
            for point in points.group_by(rows, "steps").values():
                errors = column(point, RELATIVE)
                _draw_point(ax, style, point[0], [position + offset] * len(errors), errors)
            if rows:
                places.append(position + offset)
                means.append(points.mean_of(rows, RELATIVE))
        line = LINE_STYLES[index % len(LINE_STYLES)]
        ax.plot(places, means, color=GREY, lw=0.8, ls=line, zorder=1)
    ax.axhline(1, color=GREY, lw=0.8)
    ax.set_xticks(range(len(style.models)), list(map(plain, style.models)))
    ax.set_xlim(-0.5, len(style.models) - 0.5)
    ax.set(xlabel="model, small to large", ylabel=RELATIVE_TITLE)
    ax.grid(alpha=0.3, axis="y")
