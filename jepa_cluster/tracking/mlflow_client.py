"""Open MLflow's store: a URI in, a client out, and every failure as one TrackingError.

mlflow is imported here, when a store is opened. MLflow's own retries are off: the collector reads
again what the store holds and continues from there, which also covers a response that was lost.
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
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import fsync_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
LOGIN = (
    "wants a user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD) "
    "or a token (MLFLOW_TRACKING_TOKEN)"
)
REASONS = {  # text of a library's error -> what to print
    "Connection refused": "connection refused",
    "Name or service not known": "unknown host",
    "Read timed out": "no answer in time",
    "database or disk is full": "the disk of the store is full",
    "disk I/O error": "the disk of the store is full or broken",
    "too many 503": "the server answers, its database does not (503): down, or its disk is full",
    "database is locked": "the database is locked by another program",
}
REFUSALS = {  # status code of HTTP -> what to print
    401: f"the store {LOGIN}",
    403: "the store refuses this user or this host name",
}
FAULTY = (400, 404, 409)  # status codes: the request is at fault, not a lack of rights or of time


class RefusedError(TrackingError):
    """The store answered that it does not take a request, for example of a deleted run."""


def default_uri(root: Root) -> str:
    """Return $MLFLOW_TRACKING_URI, else one SQLite file below the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.path / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def artifact_folder(root: Root, uri: str) -> str | None:
    """Return where artifacts of a database below the root are kept; None lets a server decide."""
    if is_server(uri):
        return None
    return (root.path / "mlflow-artifacts").as_uri()


def redacted(uri: str) -> str:
    """Return the URI without its password."""
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    address = f"{parts.username}:***@{parts.hostname}:{parts.port or ''}"
    return urlunsplit(parts._replace(netloc=address))


def connect(root: Root, uri: str | None = None) -> tuple[MlflowClient, str]:
    """Return a client and the URI of its store. A new database gets its tables first (about 3 s).

    Raises TrackingError when mlflow is not installed or the store cannot be opened.
    """
    uri = uri or default_uri(root)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if uri.startswith("file:") or "://" not in uri:
        raise TrackingError(
            f"'{redacted(uri)}' is no store MLflow can write",
            where="MLFLOW_TRACKING_URI",
            hint="use http(s)://host:port, sqlite:////absolute/path.db or postgresql://...",
        )
    try:
        from mlflow import MlflowClient
    except ImportError as e:
        what = f"mlflow cannot be imported: {e}"
        raise TrackingError(what, hint="pip install 'jepa-cluster[track]'") from e
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with translate_errors(uri):
        if uri.startswith("sqlite:///"):
            create_database(Path(uri.removeprefix("sqlite:///")))
        return MlflowClient(uri), uri


def create_database(path: Path) -> None:
    """Create a SQLite store with MLflow's tables, atomically.

    The database is made in a temporary folder and linked into place. A process that dies or races
    here leaves a complete database or none. Its hundred migrations share one fsync at the end.
    """
    if path.exists():
        return
    from mlflow import MlflowClient
    from sqlalchemy import engine, event

    def disable_fsync(connection: Any, record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        made.touch()  # SQLite would make it with mode 0644, whatever the umask
        event.listen(engine.Engine, "connect", disable_fsync)
        try:
            MlflowClient(f"sqlite:///{made}").search_experiments()
        finally:
            event.remove(engine.Engine, "connect", disable_fsync)
        with made.open("rb") as f:
            os.fsync(f.fileno())
        with suppress(FileExistsError):
            path.hardlink_to(made)
    fsync_folder(path.parent)


@contextmanager
def translate_errors(uri: str) -> Generator[None]:
    """Turn errors of the store, the network and the disk into a TrackingError."""
    try:
        yield
    except TrackingError:
        raise
    except ModuleNotFoundError as e:
        raise TrackingError(
            f"the database's driver is not installed: no module '{e.name}'",
            where=redacted(uri),
            hint="for PostgreSQL: pip install 'psycopg[binary]'",
        ) from e
    except Exception as e:
        library = type(e).__module__.split(".")[0]
        known = library in {"mlflow", "requests", "urllib3", "sqlalchemy", "sqlite3"}
        if not known and not isinstance(e, OSError):
            raise
        raise (RefusedError if status_code(e) in FAULTY else TrackingError)(
            f"MLflow did not take the data: {short_reason(e)}",
            where=redacted(uri),
            hint="nothing is lost, the spools stay; make the store reachable, then run 'jepa sync'",
        ) from e


def short_reason(e: BaseException) -> str:
    """Return the last cause in a chain of library errors, in one line of at most 200 characters."""
    text = " ".join(str(e).split())
    refusal = REFUSALS.get(status_code(e))
    if refusal:
        return refusal
    for mark, reason in REASONS.items():
        if mark in text:
            return reason
    cause = text.partition("(Caused by ")[2] or text
    return cause[:200] or type(e).__name__


def status_code(e: BaseException) -> int:
    """Return the status code of HTTP that an error of MLflow or requests has; 0 without one."""
    of_mlflow = getattr(e, "get_http_status_code", None)
    if of_mlflow:
        return int(of_mlflow())
    return int(getattr(getattr(e, "response", None), "status_code", None) or 0)
