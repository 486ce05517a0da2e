"""The scaling page as one self-contained file, and the table of trials.

In: the document of a sweep. Out: HTML with the Scaling app of `static/`, its data, its modules and
plotly inside. The page requests no address. This module computes nothing.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.report import figure, payload
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.mlflow_app import STATIC, constants_js
from jepa_cluster.report.payload import Payload
from jepa_cluster.results.tables import Row
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_atomic

STYLE = '<link rel="stylesheet" href="app.css">'
PLOTLY = '<link rel="preload" as="script" href="plotly.min.js">'
IMPORT_MAP = '<script type="importmap">{"imports": {"scaling/": "./"}}</script>'
PRELOAD = '<link rel="modulepreload"'


def trial_cells(
    s: Analysis,
    row: Row,
) -> dict[str, str]:
    """Return a line of the table of trials, for terminal and Markdown: column -> cell.

    random, trained: the probe error before and after training.
    """
    return {
        "trial": str(row["label"]),
        "state": str(row["state"]),
        "parameters": f"{format_number(row['parameters'] / 1e6, FITTED)} M",
        "FLOP": format_number(row.get(s.compute)),
        "loss": format_number(row.get("loss")),
        "random": format_number(row.get(f"initial/{s.error}")),
        "trained": format_number(row.get(s.error)),
        s.sweep.unit: format_number(row["gpu_hours"], FITTED),
    }


def write(
    root: Root,
    s: Analysis,
) -> Path:
    """Write scaling.json, scaling.html and scaling.png into the sweep's folder; return it."""
    folder = root.sweep(s.sweep.name).path
    document = payload.build(s.sweep, s.error)
    write_atomic(folder / "scaling.json", payload.to_json(document))
    write_atomic(folder / "scaling.html", render(payload.add_curves(s.sweep, document)))
    figure.draw(s, folder / "scaling.png")
    return folder


def render(document: Payload) -> str:
    """Return the Scaling app with one sweep's document inside, curves included."""
    from plotly.offline import get_plotlyjs

    page = (STATIC / "index.html").read_text()
    assert all(mark in page for mark in (STYLE, PLOTLY, IMPORT_MAP))
    data = payload.to_json(document).replace("<", "\\u003c")  # no tag or comment begins in it
    embedded = f'<script type="application/json" id="jepa-data">{data}</script>'
    import_map = f'<script type="importmap">{json.dumps({"imports": _module_urls()})}</script>'
    page = page.replace(STYLE, f"<style>{(STATIC / 'app.css').read_text()}</style>")
    page = page.replace(PLOTLY, f"<script>{get_plotlyjs()}</script>")
    lines = page.splitlines(keepends=True)
    page = "".join(line for line in lines if not line.startswith(PRELOAD))
    return page.replace(IMPORT_MAP, embedded + import_map)


def _module_urls() -> dict[str, str]:
    """Return the app's modules as data URLs, by the names that they import."""
    modules = {path.name: path.read_text() for path in sorted(STATIC.glob("*.js"))}
    modules["constants.js"] = constants_js()
    urls: dict[str, str] = {}
    for name, code in modules.items():
        body = base64.b64encode(code.encode()).decode()
        urls[f"scaling/{name}"] = f"data:text/javascript;base64,{body}"
    return urls
