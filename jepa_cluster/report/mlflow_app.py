"""Our Scaling page inside MLflow's own server, by MLflow's app entry point (`mlflow server --app-name jepa`).

In: MLflow's Flask application. Out: the ASGI application with static files of ours at /scaling/. The page has no
data but what it reads from MLflow's REST API with the visitor's own rights. The rules are added to the Flask
application, so that host, origin and, with `--app-name jepa-auth`, password checks apply to them like to MLflow's
own pages. MLflow's pages get one script more: they start as for model training. It leans on `create_fastapi_app`, an
internal name: mlflow is pinned, tests/cpu/test_tracking_faults.py and tests/browser hold it.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

PREFIX = "/scaling"
STATIC = Path(__file__).parent / "static"
# MLflow opens every experiment as a GenAI one, whatever its tag says, and an assistant's panel over a third of the
# window, until the visitor chooses; a choice stays
TRAINING = """<script>try {
  localStorage["mlflow.workflowType_v1"] ??= '"machine_learning"';
  localStorage["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] ??= "true";
} catch {}</script>"""


def constants() -> str:
    """constants.js: what the page shares with Python, defined in Python alone."""
    from jepa_cluster.report import analysis, figure, power_law
    from jepa_cluster.tracking import chart_view

    values = {
        "COLORS": chart_view.COLORS,
        "SHAPES": list(figure.SHAPES),
        "UNITS": figure.UNITS,
        "SIZES": analysis.SIZE_AXES,
        "STUDENT": [power_law.student_quantile(degrees) for degrees in range(1, 100)],
    }
    return "".join(f"export const {name} = {json.dumps(v)};\n" for name, v in values.items())


def create() -> Any:
    """The server's application with the Scaling page."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import create_fastapi_app

    return create_fastapi_app(mount(app))


def create_with_auth() -> Any:
    """The same behind MLflow's basic-auth (needs mlflow[auth], MLFLOW_FLASK_SERVER_SECRET_KEY, an admin password)."""
    from mlflow.server import app
    from mlflow.server.auth import create_app

    return create_app(mount(app))


def mount(app: Any) -> Any:
    """Add /scaling -> /scaling/ and the files below it to MLflow's Flask application, and TRAINING to its pages."""
    from flask import Response, redirect, send_from_directory
    from mlflow.server.handlers import STATIC_PREFIX_ENV_VAR

    prefix = os.environ.get(STATIC_PREFIX_ENV_VAR, "") + PREFIX
    plotly = Path(str(importlib.resources.files("plotly"))) / "package_data"
    shared = constants()

    def enter() -> Any:
        return redirect(f"{prefix}/", 308)

    def files(name: str = "index.html") -> Any:
        if name == "plotly.min.js":
            whole = (plotly / name).read_bytes()  # in one piece: a file's many small ones take seconds on the way
            return Response(whole, mimetype="text/javascript", headers={"Cache-Control": "max-age=86400"})
        if name == "constants.js":
            return Response(shared, mimetype="text/javascript")
        return send_from_directory(STATIC, name, max_age=0)

    def home() -> Any:
        return (Path(app.static_folder) / "index.html").read_text().replace("<head>", f"<head>{TRAINING}", 1)

    app.view_functions["serve"] = home
    app.add_url_rule(prefix, "jepa_enter", enter)
    app.add_url_rule(f"{prefix}/", "jepa_index", files)
    app.add_url_rule(f"{prefix}/<path:name>", "jepa_files", files)
    return app
