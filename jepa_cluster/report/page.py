"""The scaling figure: one self-contained interactive page and one PNG, drawn from the same `Study`.

In: a Study. Out: HTML text (plotly inside, no address is ever asked) and a PNG file (matplotlib). It computes
nothing: every number it shows stands in the Study or its tables.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.report import laws, scaling
from jepa_cluster.tracking import curves

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
SIZES = ("#440154", "#31688e", "#35b779", "#d8a200", "#d1495b", "#8d5a97", "#444444")  # dark is small
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
MARKERS = "osD^vPX*"
Row = Mapping[str, Any]


def unit(metric: str) -> str:
    """An axis title with its unit."""
    if metric in UNITS:
        return UNITS[metric]
    name = metric.removeprefix("probe/").replace("_", " ")
    return f"{name} of the probe (1 − top-1)" if metric.endswith("_error") else name


class Palette:
    """Colour by model size (small to large), symbol by setting: the same in both pictures."""

    def __init__(self, s: scaling.Study) -> None:
        sizes = {r["model"]: r["parameters"] for r in s.finals}
        self.models = sorted(sizes, key=lambda m: (sizes[m], m))
        self.settings = list(scaling.group(s.finals, s.settings))
        self.study = s

    def color(self, row: Row) -> str:
        return SIZES[self.models.index(row["model"]) % len(SIZES)]

    def mark(self, row: Row) -> int:
        return self.settings.index(scaling.setting(row, self.study.settings)) % len(SYMBOLS)


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


# ---- the page ----------------------------------------------------------------------------------------------------


def figure(s: scaling.Study, y: str, x: str, by: str, fitted: bool) -> Any:
    """A plotly figure: curves along training, final points, and the law when `fitted`. by: 'size' or 'setting'."""
    import plotly.graph_objects as go

    palette = Palette(s)
    fig = go.Figure()
    shown: set[str] = set()
    finals = {r["trial"]: r for r in s.finals}
    for trial, rows in lines(s, y, x).items():
        final = finals[trial]
        where = scaling.setting(final, s.settings)
        name = str(final["model"]) if by == "size" else where
        color = palette.color(final) if by == "size" else SIZES[palette.mark(final) % len(SIZES)]
        common: dict[str, Any] = {"legendgroup": name, "name": name, "line": {"color": color}}
        fig.add_scatter(
            x=[r[x] for r in rows], y=[r[y] for r in rows], mode="lines", opacity=0.45,
            showlegend=False, hoverinfo="skip", **common,
        )  # fmt: skip
        last = rows[-1]
        about = f"<b>{final['label']}</b><br>{where}<br>{final['parameters'] / 1e6:.2f} M parameters, {final['state']}"
        fig.add_scatter(
            x=[last[x]], y=[last[y]], mode="markers", showlegend=name not in shown,
            marker={"color": color, "size": 11, "symbol": SYMBOLS[palette.mark(final)]
                    + ("" if final["state"] == "done" else "-open"), "line": {"width": 1.5, "color": color}},
            hovertemplate=f"{about}<br>%{{x:.3g}}<br>{y} %{{y:.4g}}<extra></extra>", **common,
        )  # fmt: skip
        shown.add(name)
    if fitted:
        _law(fig, s)
        _initial(fig, s)
    fig.update_layout(
        template="plotly_white", height=480, margin={"l": 70, "r": 20, "t": 20, "b": 60},
        legend={"title": {"text": by}}, xaxis={"title": unit(x), "type": "log", "exponentformat": "power"},
        yaxis={"title": unit(y), "type": "log" if fitted else "linear", "nticks": 8},
    )  # fmt: skip
    return fig


def _law(fig: Any, s: scaling.Study) -> None:
    drawn = law_curve(s)
    if drawn is None:
        return
    c, e, low, high = drawn
    top = max(float(r[s.error]) for r in s.finished) * 2
    fig.add_scatter(
        x=[*c, *c[::-1]], y=[*np.minimum(high, top), *low[::-1]], fill="toself", fillcolor="rgba(90,90,90,.15)",
        line={"width": 0}, name=f"{laws.LEVEL:.0%} band", hoverinfo="skip",
    )  # fmt: skip
    fig.add_scatter(x=c, y=e, mode="lines", name="law of the frontier", line={"color": "#222", "dash": "dash"})


def _initial(fig: Any, s: scaling.Study) -> None:
    start = [float(r[f"initial/{s.error}"]) for r in s.finals if f"initial/{s.error}" in r]
    if start:
        fig.add_hline(
            y=float(np.mean(start)), line={"dash": "dot", "color": "#888"},
            annotation={"text": "randomly initialised encoder", "font": {"color": "#666"}},
            annotation_position="top right",
        )  # fmt: skip


def page(s: scaling.Study) -> str:
    """The whole page as text: question, findings, three figures, the table of trials."""
    from plotly.offline import get_plotlyjs

    figures = [
        ("Probe error against compute, by size", figure(s, s.error, s.compute, "size", True)),
        ("The same, by setting", figure(s, s.error, s.compute, "setting", True)),
        (
            "Training loss against compute. Health of each trial only: the target moves and its scale depends on the "
            "masks, so losses of different settings must not be compared",
            figure(s, "loss", s.compute, "setting", False),
        ),
    ]
    body = "".join(
        f"<h2>{html.escape(title)}</h2>{fig.to_html(full_html=False, include_plotlyjs=False)}" for title, fig in figures
    )
    told = "".join(f"<li>{html.escape(line)}</li>" for line in scaling.summary(s))
    expect = f"<p>Expected: {html.escape(str(s.sweep.plan.get('expect')))}</p>" if s.sweep.plan.get("expect") else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(s.sweep.name)}: scaling</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script><main><h1>{html.escape(s.sweep.question or s.sweep.name)}</h1>"
        f"{expect}<ul>{told}</ul>{body}{_table(s)}</main></html>"
    )


STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#222}main{max-width:1000px;margin:auto;padding:1rem}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}td,th{padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f5f5f5}h2{font-size:1.05rem}"""


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


def _table(s: scaling.Study) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns(s))
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(s, r)) + "</tr>" for r in s.finals)
    return f"<h2>Trials ({html.escape(s.error)} before and after training)</h2><table><tr>{head}</tr>{rows}</table>"


# ---- the picture -------------------------------------------------------------------------------------------------


def picture(s: scaling.Study, path: Path) -> None:
    """Two panels as a PNG: the probe with its law, the training loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

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
