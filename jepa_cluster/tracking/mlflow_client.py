"""The door to MLflow: a URI in, a client out whose failures are one clear TrackingError each.

mlflow is imported here, when a store is opened, and nowhere else on this floor. Retries are off: the collector
re-reads what the store really holds and goes on from there, which also survives an answer that was lost.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from jepa_cluster.errors import TrackingError
from jepa_cluster.trial.layout import Root, fsync_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(root: Root) -> str:
    """$MLFLOW_TRACKING_URI, else one SQLite file below the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.path / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def artifact_folder(root: Root, uri: str) -> str | None:
    """Where a database of our own keeps artifacts; None lets a server decide."""
    return None if is_server(uri) else (root.path / "mlflow-artifacts").as_uri()


def public(uri: str) -> str:
    """The URI as it may be printed: without a password."""
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.hostname}:{parts.port or ''}"))


def connect(root: Root, uri: str | None = None) -> tuple[MlflowClient, str]:
    """A client of the store and its URI. The first use of a fresh database makes its tables (about 3 s).

    Raises TrackingError when mlflow is not installed or the store cannot be opened.
    """
    uri = uri or default_uri(root)
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    if uri.startswith("file:") or "://" not in uri:
        raise TrackingError(
            f"'{public(uri)}' is no store MLflow can write",
            where="MLFLOW_TRACKING_URI",
            hint="use http(s)://host:port, sqlite:////absolute/path.db or postgresql://...",
        )
    try:
        from mlflow import MlflowClient
    except ImportError as e:
        raise TrackingError(f"mlflow cannot be imported: {e}", hint="pip install 'jepa-cluster[track]'") from e
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with reaching(uri):
        if uri.startswith("sqlite:///"):
            make_database(Path(uri.removeprefix("sqlite:///")))
        return MlflowClient(uri), uri


def make_database(path: Path) -> None:
    """A fresh SQLite store with MLflow's tables, made beside and linked into place: whoever dies or races here leaves
    a whole database or none. Its hundred migrations wait for the disk once, at the end."""
    if path.exists():
        return
    from mlflow import MlflowClient
    from sqlalchemy import engine, event

    def hurry(connection: Any, record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        event.listen(engine.Engine, "connect", hurry)
        try:
            MlflowClient(f"sqlite:///{made}").search_experiments()
        finally:
            event.remove(engine.Engine, "connect", hurry)
        with made.open("rb") as f:
            os.fsync(f.fileno())
        with suppress(FileExistsError):
            path.hardlink_to(made)
    fsync_folder(path.parent)


@contextmanager
def reaching(uri: str) -> Generator[None]:
    """Whatever the store, the network or the disk throws becomes a TrackingError; our own errors pass."""
    try:
        yield
    except TrackingError:
        raise
    except ModuleNotFoundError as e:
        raise TrackingError(
            f"the database's driver is not installed: no module '{e.name}'",
            where=public(uri),
            hint="for PostgreSQL: pip install 'psycopg[binary]'",
        ) from e
    except Exception as e:
        kind = type(e).__module__.split(".")[0]
        if not (isinstance(e, OSError) or kind in {"mlflow", "requests", "urllib3", "sqlalchemy", "sqlite3"}):
            raise
        raise TrackingError(
            f"MLflow did not take the data: {reason(e)}",
            where=public(uri),
            hint="nothing is lost, the spools stay; make the store reachable and run 'jepa sync' again",
        ) from e


def reason(e: BaseException) -> str:
    """The last cause in a chain of library errors, in one line of at most 200 characters."""
    words = " ".join(str(e).split())
    for mark, plain in (
        ("Connection refused", "connection refused"),
        ("Name or service not known", "unknown host"),
        ("Read timed out", "no answer in time"),
        ("database or disk is full", "the disk of the store is full"),
        ("disk I/O error", "the disk of the store is full or broken"),
        ("too many 503", "the server answers, its database does not (503): away, or its disk is full"),
        ("database is locked", "the database is locked by another program"),
        ("401", "the store wants a user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"),
        ("403", "the store refuses this user or this host name"),
    ):
        if mark in words:
            return plain
    return (words.partition("(Caused by ")[2] or words)[:200] or type(e).__name__
