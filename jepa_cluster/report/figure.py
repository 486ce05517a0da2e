"""The figure of an analysis as a PNG: error over compute with its law, and the effect of settings.

In: an `Analysis`. Out: a file by matplotlib, for pages that are read without a browser. Only means
for drawing are computed here. Training loss is drawn only where all trials share one mask setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_cluster.report import effect_figure, figure_numbers, figure_style, points, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.figure_style import GREY, INK, Style, axis_title, plain
from jepa_cluster.report.power_law import PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.tables import Row, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MAX_EFFECTS = 2  # axes whose effects are drawn
SIZE = (12.0, 5.4)  # inches of the upper row
LEGEND_COLUMNS = 10
LOWER = 4.0  # inches of the lower row


def draw(
    s: Analysis,
    path: Path,
) -> None:
    """Write the panels of this analysis: points and effects, heat maps and importance below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    has_effects = isinstance(s.effects, Effects) and bool(s.effects.axes)
    heights = [SIZE[1], LOWER] if has_effects else [SIZE[1]]
    fig = plt.figure(figsize=(SIZE[0], sum(heights)), layout="constrained")
    rows = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0].tolist()
    style = Style(s)
    _draw_points_and_effects(rows[0], s, style)
    if has_effects:
        effect_figure.draw_lower_row(rows[1], s, style)
    fig.suptitle(plain(s.sweep.question or s.sweep.name))
    fig.savefig(path, dpi=110, bbox_inches="tight")  # whatever the legend needs
    plt.close(fig)


def _draw_points_and_effects(
    part: SubFigure,
    s: Analysis,
    style: Style,
) -> None:
    effects = s.effects
    axes: list[Levels] = []
    if isinstance(effects, Effects):
        axes = figure_numbers.ordered_axes(effects)[:MAX_EFFECTS]
    has_loss = s.is_comparable and not axes and len({row["setting"] for row in s.trials}) == 1
    panels = part.subplots(1, 1 + max(len(axes), int(has_loss)), squeeze=False)[0].tolist()
    reach = float("nan")
    if isinstance(effects, Effects):
        reach = figure_numbers.seed_reach(effects)
    _draw_against_compute(panels[0], s, style, s.error, reach)
    _draw_law(panels[0], s)
    if has_loss:
        _draw_against_compute(panels[1], s, style, "loss", float("nan"))
    for panel, axis in zip(panels[1:], axes, strict=False):
        effect_figure.draw_effect(panel, s, style, axis)
    handles = figure_style.legend_handles(style, bool(np.isfinite(reach)))
    if handles:
        part.legend(
            handles=handles,
            title=plain(style.title),
            title_fontsize=9,
            loc="outside lower center",
            ncols=-(-len(handles) // -(-len(handles) // LEGEND_COLUMNS)),
            fontsize=9,
            frameon=False,
        )


# ---- panels


def _draw_against_compute(
    ax: Axes,
    s: Analysis,
    style: Style,
    y: str,
    reach: float,
) -> None:
    """Draw training curves and a mark at their end, by the state of the trial."""
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
        _draw_point(ax, style, first[point], column(rows, s.compute), column(rows, y), reach)
    ax.set(
        xscale="log",
        xlabel=axis_title(s.compute),
        ylabel=axis_title(y),
    )
    figure_style.set_ticks(ax.xaxis)
    ax.grid(alpha=0.3, which="major")


def _draw_point(
    ax: Axes,
    style: Style,
    first: Row,
    x: Sequence[float],
    y: Sequence[float],
    reach: float,
) -> None:
    """Draw a mark at the mean of a point's trials, and each of several seeds as a small one.

    reach: half the interval of a trial's log error; nan where it is not known.
    """
    at = float(np.mean(x))
    mean = float(np.mean(y))
    color = style.color(first)
    mark = style.mark(first)
    if len(y) > 1:
        ax.plot(
            x,
            y,
            "o",
            color=color,
            ms=4,
            mec="white",
            mew=0.6,
            zorder=3,
        )
    if np.isfinite(reach) and first["state"] == "done":
        factor = np.exp(reach / len(y) ** 0.5)
        ax.vlines(at, mean / factor, mean * factor, color=color, lw=1.2)
    ax.plot(at, mean, ms=7, **mark)


def _draw_law(
    ax: Axes,
    s: Analysis,
) -> None:
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
        figure_style.set_ticks(ax.yaxis, 12)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize=9, frameon=False)
