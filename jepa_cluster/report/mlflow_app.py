"""The Scaling page inside MLflow's own server (`mlflow server --app-name jepa`).

In: MLflow's Flask application. Out: the ASGI application with our static files at /scaling/. The
page reads all data from MLflow's REST API with the user's own rights. The routes are added to the
Flask application, so that host, origin and, with `--app-name jepa-auth`, password checks apply to
them as to MLflow's own pages. MLflow's pages get one more script, which selects model training at
the first visit. `create_fastapi_app` is internal to MLflow, so mlflow is pinned, and
tests/cpu/test_tracking_faults.py and tests/browser fail when it changes.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

PREFIX = "/scaling"
STATIC = Path(__file__).parent / "static"
# MLflow opens every experiment as a GenAI one, whatever its tag says, with an assistant's panel
# over a third of the window. What the user chooses later is kept.
BROWSER_DEFAULTS = """<script>try {
  localStorage["mlflow.workflowType_v1"] ??= '"machine_learning"';
  localStorage["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] ??= "true";
} catch {}</script>"""


def constants_js() -> str:
    """Return constants.js: what the page shares with Python, defined in Python alone."""
    from jepa_cluster import labels
    from jepa_cluster.ijepa import mask_preview
    from jepa_cluster.report import figure_style, power_law
    from jepa_cluster.tracking import chart_view

    values = {
        "COLORS": chart_view.COLORS,
        "SHAPES": list(figure_style.SHAPES),
        "MASK_COLORS": {"c": mask_preview.CONTEXT, "t": mask_preview.TARGETS[1]},
        "AXIS_TITLES": figure_style.AXIS_TITLES,
        "SIZE_AXES": labels.SIZE_AXES,
        "STUDENT_QUANTILES": list(map(power_law.student_quantile, range(1, 100))),
    }
    lines = [f"export const {name} = {json.dumps(value)};\n" for name, value in values.items()]
    return "".join(lines)


def create() -> Any:
    """Return the server's application with the Scaling page."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import create_fastapi_app

    return create_fastapi_app(add_routes(app))


def create_with_auth() -> Any:
    """Return the same application behind MLflow's basic-auth.

    Needs mlflow[auth], MLFLOW_FLASK_SERVER_SECRET_KEY and an admin password.
    """
    from mlflow.server import app
    from mlflow.server.auth import create_app

    return create_app(add_routes(app))


def add_routes(app: Any) -> Any:
    """Add /scaling/ and its files to MLflow's Flask application, and our script to its pages."""
    from flask import Response, redirect, send_from_directory
    from mlflow.server.handlers import STATIC_PREFIX_ENV_VAR

    prefix = os.environ.get(STATIC_PREFIX_ENV_VAR, "") + PREFIX
    plotly = Path(str(importlib.resources.files("plotly"))) / "package_data" / "plotly.min.js"
    constants = constants_js()

    def redirect_to_page() -> Any:
        return redirect(f"{prefix}/", 308)

    def serve_file(name: str = "index.html") -> Any:
        if name == plotly.name:  # in one piece: flask's small chunks would take seconds
            cached = {"Cache-Control": "max-age=86400"}
            return Response(plotly.read_bytes(), mimetype="text/javascript", headers=cached)
        if name == "constants.js":
            return Response(constants, mimetype="text/javascript")
        return send_from_directory(STATIC, name, max_age=0)

    def mlflow_page() -> Any:
        page = (Path(app.static_folder) / "index.html").read_text()
        return page.replace("<head>", f"<head>{BROWSER_DEFAULTS}", 1)

    app.view_functions["serve"] = mlflow_page
    app.add_url_rule(prefix, "jepa_enter", redirect_to_page)
    app.add_url_rule(f"{prefix}/", "jepa_index", serve_file)
    app.add_url_rule(f"{prefix}/<path:name>", "jepa_files", serve_file)
    return app
