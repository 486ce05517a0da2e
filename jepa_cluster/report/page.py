"""The scaling page, one self-contained file, and its still picture.

In: a sweep's document for the page, a Study for the picture. Out: HTML text (the Scaling app of `static/` with its
data and plotly inside; no address is ever asked) and a PNG file (matplotlib). It computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.report import laws, scaling
from jepa_cluster.report.app import STATIC
from jepa_cluster.report.document import document, dumps, with_curves
from jepa_cluster.tracking import curves
from jepa_cluster.tracking.views import SIZES
from jepa_cluster.trial.layout import Root, write_atomic

UNITS = {
    "flops_total": "compute, total [FLOP]",
    "flops_encoder": "compute, encoder [FLOP]",
    "images_seen": "images seen",
    "gpu_hours": "GPU-hours",
    "parameters": "encoder parameters",
    "context_fraction": "context, share of patches",
    "target_fraction": "targets, share of patches",
    "loss": "training loss",
    "val/loss": "validation loss",
    "probe/rankme": "RankMe, effective rank",
}
MARKERS = "osD^vPX*"
Row = Mapping[str, Any]


def unit(metric: str) -> str:
    """An axis title with its unit."""
    if metric in UNITS:
        return UNITS[metric]
    name = metric.removeprefix("probe/").replace("_", " ")
    return f"{name} of the probe (1 − top-1)" if metric.endswith("_error") else name


class Palette:
    """Colour by model size (small to large), symbol by setting."""

    def __init__(self, s: scaling.Study) -> None:
        sizes = {r["model"]: r["parameters"] for r in s.finals}
        self.models = sorted(sizes, key=lambda m: (sizes[m], m))
        self.settings = list(scaling.group(s.finals, s.settings))
        self.study = s

    def color(self, row: Row) -> str:
        return SIZES[self.models.index(row["model"]) % len(SIZES)]

    def mark(self, row: Row) -> int:
        return self.settings.index(scaling.setting(row, self.study.settings)) % len(MARKERS)


def lines(s: scaling.Study, y: str, x: str) -> dict[str, list[Row]]:
    """Settled rows that have both values, by trial, for drawing along training."""
    out: dict[str, list[Row]] = {}
    for row in curves.rows(s.sweep):
        if row.get(x, 0) > 0 and row.get(y) is not None and np.isfinite(row[y]):
            out.setdefault(row["trial"], []).append(row)
    return out


def law_curve(s: scaling.Study, points: int = 80) -> tuple[Any, Any, Any, Any] | None:
    """(C, E, low, high) a little beyond the data; None without a law."""
    if not isinstance(s.law, laws.Law):
        return None
    low, high = s.law.span
    c = np.geomspace(low / 1.5, high * 3, points)
    return c, s.law.predict(c), *s.law.band(c)


def columns(s: scaling.Study) -> list[str]:
    """Heads of the table of trials, for page, terminal and Markdown."""
    return ["trial", "state", "parameters", "FLOP", "loss", "random", "trained", "GPU-h"]


def cells(s: scaling.Study, row: Row) -> list[str]:
    """One trial's cells: `random` and `trained` are the probe error before and after."""
    before, after = scaling.gain(row, s.error)

    def tell(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        str(row["label"]), str(row["state"]), f"{row['parameters'] / 1e6:.2f} M", tell(row.get(s.compute), ".3g"),
        tell(row.get("loss"), ".4f"), tell(before, ".4f"), tell(after, ".4f"), f"{row['gpu_hours']:.3g}",
    ]  # fmt: skip


def write(root: Root, sweep: curves.Sweep, s: scaling.Study) -> Path:
    """scaling.json, scaling.html and scaling.png into the sweep's folder -> the folder. `sync` ships them."""
    folder = root.sweep(sweep.name)
    doc = document(sweep, s.error)
    write_atomic(folder / "scaling.json", dumps(doc))
    write_atomic(folder / "scaling.html", page(with_curves(sweep, doc)))
    picture(s, folder / "scaling.png")
    return folder


def page(doc: Mapping[str, Any]) -> str:
    """The Scaling app with one sweep's document (with curves) inside."""
    from plotly.offline import get_plotlyjs

    text = (STATIC / "index.html").read_text()
    data = dumps(doc).replace("</", "<\\/")
    inside = f'<script type="application/json" id="jepa-data">{data}</script>'
    for mark, content in (
        ('<link rel="stylesheet" href="app.css">', f"<style>{(STATIC / 'app.css').read_text()}</style>"),
        ('<script src="plotly.min.js"></script>', f"<script>{get_plotlyjs()}</script>"),
        ('<script src="app.js"></script>', f"{inside}<script>{(STATIC / 'app.js').read_text()}</script>"),
    ):
        if mark not in text:
            raise AssertionError(f"index.html no longer holds {mark}")
        text = text.replace(mark, content)
    return text


def picture(s: scaling.Study, path: Path) -> None:
    """Two panels as a PNG: the probe with its law, the training loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    palette = Palette(s)
    finals = {r["trial"]: r for r in s.finals}
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax, y in ((axes[0], s.error), (axes[1], "loss")):
        for trial, rows in lines(s, y, s.compute).items():
            final = finals[trial]
            color, done = palette.color(final), final["state"] == "done"
            ax.plot([r[s.compute] for r in rows], [r[y] for r in rows], color=color, alpha=0.4, lw=1)
            ax.plot(rows[-1][s.compute], rows[-1][y], MARKERS[palette.mark(final)], color=color, ms=8,
                    mfc=color if done else "none")  # fmt: skip
        ax.set(xscale="log", xlabel=unit(s.compute), ylabel=unit(y))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3, which="major")
    _picture_law(axes[0], s)
    _picture_legend(axes[1], palette)
    fig.suptitle(s.sweep.question or s.sweep.name)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _picture_law(ax: Any, s: scaling.Study) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    start: Sequence[float] = [float(r[f"initial/{s.error}"]) for r in s.finals if f"initial/{s.error}" in r]
    if start:
        ax.axhline(float(np.mean(start)), ls=":", color="#888", label="randomly initialised encoder")
        high = max(high, float(np.mean(start)) * 1.05)
    drawn = law_curve(s)
    if drawn is not None:
        c, e, below, above = drawn
        ax.fill_between(c, below, above, color="#555", alpha=0.15, lw=0, label=f"{laws.LEVEL:.0%} band")
        ax.plot(c, e, "--", color="#222", lw=1.2, label="law of the frontier")
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize=8)


def _picture_legend(ax: Any, palette: Palette) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=SIZES[i % len(SIZES)], label=m) for i, m in enumerate(palette.models)]
    handles += [
        Line2D([], [], color="#555", ls="", marker=MARKERS[i % len(MARKERS)], label=name)
        for i, name in enumerate(palette.settings)
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
