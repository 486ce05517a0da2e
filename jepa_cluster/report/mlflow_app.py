"""The Scaling page inside MLflow's own server (`mlflow server --app-name jepa`).

In: MLflow's Flask application. Out: the ASGI application with our static files at /scaling/. The
page reads all data from MLflow's REST API with the user's own rights. The routes are added to the
Flask application, so that host, origin and, with `--app-name jepa-auth`, password checks apply to
them as to MLflow's own pages. `jepa ui` puts `RequireToken` before all of them. MLflow's pages get
one more script, which selects model training at the first visit. `create_fastapi_app` is internal
to MLflow, so mlflow is pinned, and tests/cpu/test_tracking_faults.py and tests/browser fail when it
changes.
"""

from __future__ import annotations

import hmac
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

PREFIX = "/scaling"
STATIC = Path(__file__).parent / "static"
MAX_COLORS = 12  # of a palette
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
    from jepa_cluster.report import figure_style, payload
    from jepa_cluster.tracking import chart_view
    from jepa_cluster.trial import calibration, status

    counts = range(MAX_COLORS)
    values = {
        "SIZE_COLORS": [chart_view.ramp(chart_view.COLORS, n + 1) for n in counts],
        "OTHER_COLORS": [chart_view.ramp(figure_style.OTHER_COLORS, n + 1) for n in counts],
        "HEAT_COLORS": figure_style.HEAT_COLORS,
        "SHAPES": list(figure_style.SHAPES),
        "STATE_MARKS": {state: mark._asdict() for state, mark in figure_style.STATE_MARKS.items()},
        "MASK_COLORS": {"c": mask_preview.CONTEXT, "t": mask_preview.TARGETS[1]},
        "AXIS_TITLES": figure_style.AXIS_TITLES,
        "SIZE_AXES": labels.SIZE_AXES,
        "DOCUMENT_VERSION": payload.VERSION,
        "ABBREVIATIONS": labels.ABBREVIATIONS,
        "STATES": status.STATES,
        "NEAR": calibration.NEAR,
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


class RequireToken:
    """An ASGI application that passes on the requests of the user who knows the token.

    The token comes in the address, which is answered with a cookie, or as a bearer token, as
    MLflow's clients send $MLFLOW_TRACKING_TOKEN. port: cookies are shared by all ports of a host.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.cookie = f"jepa-ui-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = None
        if scope["type"] != "lifespan":
            answer = self._refusal_or_cookie(scope)
        await (answer or self.app)(scope, receive, send)

    def _refusal_or_cookie(self, scope: Any) -> Any:
        """Return the response to a request without the token, or with it in the address."""
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse

        request = HTTPConnection(scope)
        if self._is_token(request.query_params.get("token")):
            rest = request.url.remove_query_params("token")
            response = RedirectResponse(f"{rest.path}?{rest.query}".rstrip("?"), 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return response
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(request.cookies.get(self.cookie)) or self._is_token(bearer):
            return None
        text = (
            "Open the address that `jepa ui` printed: it ends in ?token=... (clients: send it in "
        )
        return PlainTextResponse(f"{text}MLFLOW_TRACKING_TOKEN)\n", 401)

    def _is_token(self, given: str | None) -> bool:
        return hmac.compare_digest((given or "").encode(), self.token.encode())
