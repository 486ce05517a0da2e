"""Our page inside MLflow's server is behind MLflow's own door."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
from jepa_cluster.report import app
app.create_with_auth()
from mlflow.server import app as flask
visitor = flask.test_client()
for path in ("/scaling", "/scaling/", "/scaling/app.js", "/scaling/plotly.min.js", "/scaling/../app.py"):
    known = visitor.get(path, auth=("admin", "a-long-password-1"))
    print(path, visitor.get(path).status_code, known.status_code)
"""
INI = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/auth.db
admin_username = admin
admin_password = a-long-password-1
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def test_with_a_password_set_a_stranger_sees_no_page_of_ours(tmp_path: Path):
    """`mlflow server --app-name jepa-auth`: 401 for anybody, the page for those who may; nothing outside the folder."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]: uv pip install flask-wtf")
    (tmp_path / "auth.ini").write_text(INI.format(folder=tmp_path))
    env = os.environ | {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{tmp_path}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.split("\n")[:5] == [
        "/scaling 401 308",
        "/scaling/ 401 200",
        "/scaling/app.js 401 200",
        "/scaling/plotly.min.js 401 200",
        "/scaling/../app.py 401 404",
    ], done.stderr[-2000:]
