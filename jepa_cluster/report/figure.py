"""The still picture of a study: error over compute with its law, what the masks realised, and a heat map.

In: a Study. Out: a PNG file (matplotlib), for pages that are read without a browser. It computes no statistic but
means for drawing. Training loss is drawn only where all trials share one mask setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.report import analysis, power_law
from jepa_cluster.results import tables
from jepa_cluster.tracking.chart_view import COLORS

UNITS = {
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
# shapes of settings, Plotly's name -> matplotlib's
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
FEW = 4  # distinct context fractions below which the error is drawn by size instead
Row = Mapping[str, Any]


def unit(metric: str) -> str:
    """An axis title with its unit."""
    if metric in UNITS:
        return UNITS[metric]
    if metric.endswith("_error"):
        label = metric.removeprefix("probe/").removesuffix("_error")
        return f"{label} probe error (1 − top-1)"
    return metric


class Palette:
    """Colour by model size (small to large), of one size by setting; symbol by setting."""

    def __init__(self, s: analysis.Study) -> None:
        sizes = {r["model"]: r["parameters"] for r in s.finals}
        self.models = sorted(sizes, key=lambda m: (sizes[m], m))
        groups = analysis.group(s.finals, s.settings)
        self.settings = sorted(groups, key=lambda g: [order(str(groups[g][0].get(a, ""))) for a in s.settings])
        self.study = s

    def color(self, row: Row) -> str:
        by_size = len(self.models) > 1 or not self.told
        return self.shade(self.models.index(row["model"]) if by_size else self.setting(row))

    def shade(self, place: int) -> str:
        return COLORS[place % len(COLORS)]

    def setting(self, row: Row) -> int:
        return self.settings.index(analysis.setting(row, self.study.settings))

    def mark(self, row: Row) -> str:
        """A symbol each while there are enough of them, else one for all: the settings then stand in the table."""
        return MARKERS[self.setting(row) if self.told else 0]

    @property
    def told(self) -> bool:
        return len(self.settings) <= len(MARKERS)


def lines(s: analysis.Study, y: str, x: str) -> dict[str, list[Row]]:
    """Settled rows that have both values, by trial, for drawing along training."""
    out: dict[str, list[Row]] = {}
    for row in tables.rows(s.sweep):
        if row.get(x, 0) > 0 and row.get(y) is not None and np.isfinite(row[y]):
            out.setdefault(row["trial"], []).append(row)
    return out


def law_curve(s: analysis.Study, points: int = 80) -> tuple[Any, Any, Any, Any] | None:
    """(C, E, low, high) over the data; None without a law that they know."""
    if not isinstance(s.law, power_law.PowerLawFit) or s.law.unreliable_because:
        return None
    c = np.geomspace(*s.law.span, points)
    return c, s.law.predict(c), *s.law.band(c)


def relative(s: analysis.Study) -> dict[str, float]:
    """Trial -> its error over the mean of all finished trials of its size and horizon."""
    blocks: dict[tuple[Any, ...], list[Row]] = {}
    for row in s.finished:
        blocks.setdefault((row["model"], row.get("steps")), []).append(row)
    return {r["trial"]: r[s.error] / float(np.mean([m[s.error] for m in b])) for b in blocks.values() for r in b}


def heat_axes(s: analysis.Study) -> tuple[str, str] | None:
    """Mask scale and aspect where they are swept, else the first two settings; None with fewer than two."""
    if len(s.settings) < 2:
        return None
    first = next((a for a in s.settings if "scale" in a), s.settings[0])
    rest = [a for a in s.settings if a != first]
    return first, next((a for a in rest if "aspect" in a), rest[0])


def draw(s: analysis.Study, path: Path) -> None:
    """The panels that this study has, side by side, as a PNG; one legend below them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    one, axes = len(analysis.group(s.finals, s.settings)) == 1, heat_axes(s)
    panels = 3 if axes and s.finished else 2
    fig, ax = plt.subplots(1, panels, figsize=(6 * panels, 5.4), layout="constrained")
    palette = Palette(s)
    _against_compute(ax[0], s, palette, s.error)
    _law(ax[0], s)
    if one:
        _against_compute(ax[1], s, palette, "loss")
    elif len({round(float(r["context_fraction"]), 2) for r in s.finished if "context_fraction" in r}) < FEW:
        _by_size(ax[1], s, palette)
    else:
        _against_context(ax[1], s, palette)
    if panels == 3 and axes:
        _heat(ax[2], s, *axes)
    _legend(fig, palette)
    fig.suptitle(s.sweep.question or s.sweep.name)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _against_compute(ax: Any, s: analysis.Study, palette: Palette, y: str) -> None:
    """Curves along training and a mark at their end, hollow where the trial is not finished."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    finals, ends = {r["trial"]: r for r in s.finals}, dict[str, list[tuple[Row, Row]]]()
    for trial, rows in lines(s, y, s.compute).items():
        final = finals[trial]
        ax.plot([r[s.compute] for r in rows], [r[y] for r in rows], color=palette.color(final), alpha=0.3, lw=1)
        done = final["state"] == "done"
        ends.setdefault(analysis.point(final) if done else trial, []).append((final, rows[-1]))
    for members in ends.values():
        last = [row for _, row in members]
        _point(ax, palette, members[0][0], [r[s.compute] for r in last], [r[y] for r in last])
    ax.set(xscale="log", xlabel=unit(s.compute), ylabel=unit(y))
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 12 * low else (1, 3) if high < 1e3 * low else (1,)))
    ax.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, which="major")


def _point(ax: Any, palette: Palette, first: Row, x: Sequence[float], y: Sequence[float]) -> None:
    """A mark at the mean of a point's trials, hollow where they are not finished; of several seeds, each as a small
    mark, and a whisker over the 90 % interval of their mean. Axes reach no further than to half and twice the seeds."""
    from matplotlib.collections import LineCollection

    mark, color, told, at = palette.mark(first), palette.color(first), power_law.mean(y), float(np.mean(x))
    if len(y) > 1:
        ax.plot(x, y, mark, color=color, ms=4, mec="white", mew=0.6, zorder=3)
        whisker = LineCollection([[(at, told.low), (at, told.high)]], colors=color, linewidths=1.2)
        ax.add_collection(whisker, autolim=False)
        ax.update_datalim([(at, max(told.low, min(y) / 2)), (at, min(told.high, max(y) * 2))])
    ax.plot(at, told.value, mark, color=color, ms=7, mfc=color if first["state"] == "done" else "none")


def _against_context(ax: Any, s: analysis.Study, palette: Palette) -> None:
    """One mark a point: the error, relative to its size's mean, over the context fraction that the masks realised."""
    told = relative(s)
    for members in analysis.group(s.finished, ["model", *s.settings, "steps"]).values():
        known = [r for r in members if "context_fraction" in r]
        if known:
            y = [told[r["trial"]] for r in known]
            _point(ax, palette, known[0], [r["context_fraction"] for r in known], y)
    ax.axhline(1, color="#888", lw=0.8)
    ax.set(xlabel=UNITS["context_fraction"], ylabel="error / mean error of its size")
    ax.grid(alpha=0.3)


def _by_size(ax: Any, s: analysis.Study, palette: Palette) -> None:
    """Does a setting's standing change with size? Relative errors, sizes side by side, a setting's points joined and
    set a little apart from those of the others."""
    told, apart = relative(s), 0.4 / max(len(palette.settings), 1)
    for members in analysis.group(s.finished, s.settings).values():
        ends, place = list[tuple[float, float]](), palette.setting(members[0])
        for group in analysis.group(members, ["model", "steps"]).values():
            at = palette.models.index(group[0]["model"]) + (place + 0.5) * apart - 0.2
            y = [told[r["trial"]] for r in group]
            _point(ax, palette, group[0], [at] * len(y), y)
            ends.append((at, float(np.mean(y))))
        means = {at: float(np.mean([e for x, e in ends if x == at])) for at, _ in sorted(ends)}
        ax.plot(list(means), list(means.values()), color="#888", lw=0.8, ls=("-", "--", ":", "-.")[place % 4], zorder=1)
    ax.axhline(1, color="#888", lw=0.8)
    ax.set_xticks(range(len(palette.models)), palette.models)
    ax.set_xlim(-0.5, len(palette.models) - 0.5)
    ax.set(xlabel="model, small to large", ylabel="error / mean error of its size")
    ax.grid(alpha=0.3, axis="y")


def _heat(ax: Any, s: analysis.Study, first: str, second: str) -> None:
    """Relative error by two nominal axes, everything else averaged, with the count in each cell."""
    told, finished = relative(s), s.finished
    xs, ys = (sorted({str(r[a]) for r in finished}, key=order) for a in (first, second))
    cells = analysis.group(finished, [first, second])
    z = np.full((len(ys), len(xs)), np.nan)
    for members in cells.values():
        i, j = ys.index(str(members[0][second])), xs.index(str(members[0][first]))
        z[i, j] = np.mean([told[r["trial"]] for r in members])
        ax.text(j, i, f"{z[i, j]:.3f}\nn = {len(members)}", ha="center", va="center",
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5})  # fmt: skip
    image = ax.imshow(z, cmap="viridis_r", aspect="auto", origin="lower")
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    ax.set(xlabel=first.rsplit(".", 1)[-1].replace("_", " "), ylabel=second.rsplit(".", 1)[-1].replace("_", " "))
    ax.figure.colorbar(image, ax=ax, label="error / mean error of its size")


def order(value: str) -> tuple[float, str]:
    """Sort key of a setting: its number, or the middle of an interval written '0.15–0.2'; 0 for a name."""
    try:
        middle = float(np.mean([float(end) for end in value.split("–")]))
    except ValueError:
        middle = 0.0
    return middle, value


def _law(ax: Any, s: analysis.Study) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    start: Sequence[float] = [float(r[f"initial/{s.error}"]) for r in s.finals if f"initial/{s.error}" in r]
    if start:
        ax.axhline(float(np.mean(start)), ls=":", color="#888", label="randomly initialised encoder")
        high = max(high, float(np.mean(start)) * 1.05)
    drawn = law_curve(s)
    if isinstance(s.law, power_law.PowerLawFit) and s.law.unreliable_because:
        ax.plot([], [], " ", label=f"no law: {s.law.unreliable_because}")
    if drawn is not None:
        c, e, below, above = drawn
        ax.fill_between(c, below, above, color="#555", alpha=0.15, lw=0, label=f"{power_law.LEVEL:.0%} band")
        ax.plot(c, e, "--", color="#222", lw=1.2, label="law of the frontier")
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize=8)


def _legend(fig: Any, palette: Palette) -> None:
    from matplotlib.lines import Line2D

    several = len(palette.models) > 1
    handles = [Line2D([], [], color=palette.shade(i), label=m) for i, m in enumerate(palette.models) if several]
    handles += [
        Line2D([], [], color="#555" if several else palette.shade(i), ls="", marker=MARKERS[i], label=name)
        for i, name in enumerate(palette.settings if palette.told else ())
    ]
    if len(palette.study.finals) > len({analysis.point(r) for r in palette.study.finals}):
        handles += [
            Line2D([], [], color="#555", ls="", marker="o", ms=4, mec="white", mew=0.6, label="a seed"),
            Line2D(
                [], [], color="#555", ls="", marker="|", ms=14, label=f"{power_law.LEVEL:.0%} interval of their mean"
            ),
        ]
    if handles:
        fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
