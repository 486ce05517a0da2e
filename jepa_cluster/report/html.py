"""The scaling page as one self-contained file, and the table of trials that pages and terminal share.

In: a sweep's document. Out: HTML text: the Scaling app of `static/` with its data, its modules and plotly inside; no
address is ever asked. It computes nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_cluster.report import analysis, figure
from jepa_cluster.report.mlflow_app import STATIC, constants
from jepa_cluster.report.payload import document, dumps, with_curves
from jepa_cluster.results import tables
from jepa_cluster.trial.layout import Root, write_atomic

Row = Mapping[str, Any]


def columns(s: analysis.Study) -> list[str]:
    """Heads of the table of trials, for page, terminal and Markdown."""
    return ["trial", "state", "parameters", "FLOP", "loss", "random", "trained", s.sweep.unit]


def cells(s: analysis.Study, row: Row) -> list[str]:
    """One trial's cells: `random` and `trained` are the probe error before and after."""
    before, after = row.get(f"initial/{s.error}"), row.get(s.error)

    def tell(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        str(row["label"]), str(row["state"]), f"{row['parameters'] / 1e6:.2f} M", tell(row.get(s.compute), ".3g"),
        tell(row.get("loss"), ".4f"), tell(before, ".4f"), tell(after, ".4f"), f"{row['gpu_hours']:.3g}",
    ]  # fmt: skip


def write(root: Root, sweep: tables.Sweep, s: analysis.Study) -> Path:
    """scaling.json, scaling.html and scaling.png into the sweep's folder -> the folder. `sync` ships them."""
    folder = root.sweep(sweep.name)
    doc = document(sweep, s.error)
    write_atomic(folder / "scaling.json", dumps(doc))
    write_atomic(folder / "scaling.html", page(with_curves(sweep, doc)))
    figure.draw(s, folder / "scaling.png")
    return folder


def page(doc: Mapping[str, Any]) -> str:
    """The Scaling app with one sweep's document (with curves) inside."""
    from plotly.offline import get_plotlyjs

    text = (STATIC / "index.html").read_text()
    data = dumps(doc).replace("</", "<\\/")
    inside = f'<script type="application/json" id="jepa-data">{data}</script>'
    modules = {p.name: p.read_text() for p in sorted(STATIC.glob("*.js"))}
    modules["constants.js"] = constants()
    imports: dict[str, str] = {}
    for name, code in modules.items():
        body = base64.b64encode(code.encode()).decode()
        imports[f"scaling/{name}"] = f"data:text/javascript;base64,{body}"
    addresses = json.dumps({"imports": imports})
    for mark, content in (
        ('<link rel="stylesheet" href="app.css">', f"<style>{(STATIC / 'app.css').read_text()}</style>"),
        ('<link rel="preload" as="script" href="plotly.min.js">', f"<script>{get_plotlyjs()}</script>"),
        *((line, "") for line in text.splitlines(keepends=True) if line.startswith('<link rel="modulepreload"')),
        (
            '<script type="importmap">{"imports": {"scaling/": "./"}}</script>',
            f'{inside}<script type="importmap">{addresses}</script>',
        ),
    ):
        if mark not in text:
            raise AssertionError(f"index.html no longer holds {mark}")
        text = text.replace(mark, content)
    return text
