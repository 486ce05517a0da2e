"""`jepa ui`: MLflow's server on loopback, with the collector and the Scaling page in one process.

Other users of the machine can reach the port, so every request needs the token that is printed.

In: a root and a store. Out: a server that is ready when its line is printed, and that stops cleanly
on Ctrl-C or SIGTERM. One process serves and collects, so mlflow is loaded once. Where the store is
a server already, nothing is served: its links are printed and the collector runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from jepa_cluster.errors import JepaError, TrackingError
from jepa_cluster.report import mlflow_app, payload
from jepa_cluster.tracking import chart_view, mlflow_client, sync
from jepa_cluster.tracking.mlflow_runs import find_experiment
from jepa_cluster.tracking.sync import Log
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.usage import modified

if TYPE_CHECKING:
    import uvicorn

MAX_LINKS = 5  # newest sweeps that a link is printed for
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # a request takes a second database connection while it has one; with the default of 15
    # connections, 40 threads would block one another
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "80",
}


def serve(
    root: Root,
    uri: str | None,
    host: str,
    port: int,
    every: float,
    log: Log,
    token: str = "",
) -> None:
    """Serve until a signal. Raises TrackingError for a port in use or a store that cannot open.

    token: what requests need; '' for none.
    """
    uri = uri or mlflow_client.default_uri(root)
    started = time.monotonic()
    stop = threading.Event()
    _stop_on_signals(stop)
    if mlflow_client.is_server(uri):
        links = Links(uri.rstrip("/"))
        log(links.ready())
        _start_thread(_print_links, root, uri, links, stop, log)
        sync.follow(root, uri, every, stop, log)
        return

    _check_port(host, port)
    store = mlflow_client.redacted(uri)
    log(f"starting MLflow on {store} (a fresh database takes a few seconds more) ...")
    links = Links(f"http://{host}:{port}", f"?token={quote(token)}" if token else "")
    server = create_server(root, uri, host, port, token)
    _start_thread(_print_ready, server, links, started, log)
    _start_thread(_print_links, root, uri, links, stop, log)
    collector = _start_thread(sync.follow, root, uri, every, stop, log)
    drawer = _start_thread(_redraw_figures, root, stop, log)
    try:
        server.run()  # handles SIGINT and SIGTERM itself and returns
    finally:
        stop.set()
        collector.join(timeout=20)
        drawer.join(timeout=20)
    log("stopped")


def _start_thread(target: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(
        target=target,
        args=args,
        daemon=True,
    )
    thread.start()
    return thread


def create_server(
    root: Root,
    uri: str,
    host: str,
    port: int,
    token: str = "",
) -> uvicorn.Server:
    """Create MLflow's server with our page over a database, in this process.

    MLflow reads its settings from the environment when its application is imported.

    token: what requests need; '' for none.
    """
    for key, value in SERVER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    mlflow_client.connect(root, uri)  # raises a clear error early
    import uvicorn

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # mlflow's own, at import
    warnings.filterwarnings("ignore", message="starlette.middleware.wsgi")
    # what `mlflow server` would set; the names cannot be imported before they are set
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": uri,
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(mlflow_client.artifact_folder(root, uri)),
    }
    with mlflow_client.translate_errors(uri):
        app = mlflow_app.create()
    if token:
        app = mlflow_app.RequireToken(app, token, port)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
    )
    return uvicorn.Server(config)


# ---- figures


def _redraw_figures(
    root: Root,
    stop: threading.Event,
    log: Log,
) -> None:
    """Fit and draw again when a trial of a sweep has finished; the collector ships the files."""
    drawn: dict[str, float] = {}  # sweep -> when the newest trial in its figure finished
    while not stop.wait(5):
        for name in root.sweeps():
            newest = _newest_end(root, name)
            page = root.sweep(name).path / "scaling.json"
            if name not in drawn and newest and not _is_current(page):
                drawn[name] = 0.0  # of another version
            if newest > drawn.get(name, modified(page)):
                drawn[name] = newest
                if not _redraw(root, name, stop):
                    log(f"jepa: the figure of {name} was not drawn")


def _is_current(document: Path) -> bool:
    """Whether scaling.json is of this version."""
    with contextlib.suppress(OSError), document.open("rb") as f:
        return f.read(40).startswith(f'{{"version":{payload.VERSION},'.encode())
    return False


def _newest_end(root: Root, sweep: str) -> float:
    """Return when the newest finished trial of a sweep finished, in Unix seconds; 0 for none."""
    try:
        planned = root.sweep(sweep).planned()
    except JepaError:
        return 0.0
    return max((modified(root.trial(entry["name"]).done) for entry in planned), default=0.0)


def _redraw(
    root: Root,
    sweep: str,
    stop: threading.Event,
) -> bool:
    """Draw a sweep's page and picture; return False after an error, which the process prints.

    It runs `jepa scaling` in a process of low priority: in this one, its arithmetic would delay
    every response of the server. Ends early when `stop` is set.
    """
    jepa = ["nice", "-n", "10", sys.executable, "-m", "jepa_cluster"]
    process = subprocess.Popen(
        [*jepa, "scaling", sweep, "--offline"],
        env={**os.environ, "JEPA_ROOT": str(root.path)},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if stop.wait(0.2):
            process.terminate()
            process.wait()
    return stop.is_set() or process.returncode == 0


# ---- what is printed


class Links(NamedTuple):
    """Addresses of a server. query: '?token=...', or '' for a server without our token."""

    base: str
    query: str = ""

    def ready(self) -> str:
        """Return the ready line and the address of the Scaling page."""
        scaling = f"{self.base}{mlflow_app.PREFIX}/{self.query}"
        return f"ready: {self.base}/{self.query}#/experiments\n  scaling:  {scaling}"

    def charts(self, experiment: str) -> str:
        """Return the address of an experiment in the chart view."""
        return f"{self.base}/{self.query}{chart_view.relative_link(experiment)}"


def _print_ready(
    server: uvicorn.Server,
    links: Links,
    started: float,
    log: Log,
) -> None:
    while not server.started:
        time.sleep(0.05)
    seconds = time.monotonic() - started
    log(f"{links.ready()}\n  after {seconds:.1f} s; Ctrl-C stops it")


def _print_links(
    root: Root,
    uri: str,
    links: Links,
    stop: threading.Event,
    log: Log,
) -> None:
    """Print one line per sweep, the newest first, as soon as MLflow has its experiment."""
    newest_first = sorted(root.sweeps(), key=lambda name: -modified(root.sweep(name).plan))
    waiting = newest_first[:MAX_LINKS]
    width = 1 + max(map(len, waiting), default=0)
    while waiting and not stop.wait(1):
        try:
            client, _ = mlflow_client.connect(root, uri)
            with mlflow_client.translate_errors(uri):
                found = [(name, find_experiment(client, root, name)) for name in waiting]
        except JepaError:  # the collector reports it
            continue
        lines: list[str] = []
        for name, experiment in found:
            if experiment and experiment.lifecycle_stage == "active":
                link = links.charts(experiment.experiment_id)
                lines.append(f"  {name + ':':{width}} {link}")
                waiting.remove(name)
        if lines:
            log("\n".join(lines))


# ---- the process


def _check_port(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            hint = f"jepa ui --port {port + 1}, or stop what uses it"
            raise TrackingError(f"port {port} on {host} is in use: {e.strerror}", hint=hint) from e


def _stop_on_signals(stop: threading.Event) -> None:
    """Set `stop` on SIGINT and SIGTERM. uvicorn handles them while it serves, then raises them."""

    def set_stop(number: int, frame: object) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, set_stop)
