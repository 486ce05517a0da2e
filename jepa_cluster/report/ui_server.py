"""`jepa ui`: MLflow's server, light and on loopback, with the collector and the Scaling page in the same process.

In: a root and a store. Out: a server that is ready when its line is printed, and that stops cleanly on Ctrl-C or
TERM. One process serves and collects, so mlflow is loaded once. Where the store is a server already, nothing is
served: its links are printed and the collector runs beside it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jepa_cluster.errors import JepaError, TrackingError
from jepa_cluster.report import mlflow_app
from jepa_cluster.results import tables
from jepa_cluster.tracking import chart_view, mlflow_client, sync
from jepa_cluster.trial.layout import Root

if TYPE_CHECKING:
    import uvicorn

Say = Callable[[str], None]
NEWEST = 5  # sweeps that a link is printed for
SERVING = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # MLflow holds a connection while it takes a second one: 40 threads over its default of 15 wait for one another
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "80",
}


def ui(root: Root, uri: str | None, host: str, port: int, every: float, say: Say) -> None:
    """Serve until a signal. Raises TrackingError when the port is taken or the store cannot be opened."""
    uri = uri or mlflow_client.default_uri(root)
    begun = time.monotonic()
    stop = threading.Event()
    _on_signal(stop)
    if mlflow_client.is_server(uri):
        say(links(uri))
        threading.Thread(target=_lead, args=(root, uri, uri, stop, say), daemon=True).start()
        sync.follow(root, uri, every, stop, say)
        return
    _check_port(host, port)
    say(f"starting MLflow on {mlflow_client.public(uri)} (a fresh database takes a few seconds more) ...")
    served = server(root, uri, host, port)
    collector = threading.Thread(target=sync.follow, args=(root, uri, every, stop, say), daemon=True)
    threading.Thread(target=_announce, args=(served, f"http://{host}:{port}", begun, say), daemon=True).start()
    threading.Thread(target=_lead, args=(root, uri, f"http://{host}:{port}", stop, say), daemon=True).start()
    collector.start()
    drawer = threading.Thread(target=_figures, args=(root, stop, say), daemon=True)
    drawer.start()
    try:
        served.run()  # handles INT and TERM itself and returns
    finally:
        stop.set()
        collector.join(timeout=20)
        drawer.join(timeout=20)
    say("stopped")


def _figures(root: Root, stop: threading.Event, say: Say) -> None:
    """Fit and draw again whenever a trial of a sweep has finished; the collector ships the files. It is `jepa scaling`
    in a process of its own that gives way to the server: in this one, its arithmetic would hold up every answer."""
    drawn: dict[str, int] = {}
    while not stop.wait(5):
        for name in root.sweeps():
            done = _finished(root, name)
            if not done or drawn.get(name) == len(done):
                continue
            page = root.sweep(name) / "scaling.html"
            if name in drawn or not page.exists() or page.stat().st_mtime < max(done):
                why = _draw(root, name, stop)
                if why and not stop.is_set():
                    say(f"jepa: the figure of {name} was not drawn: {why}")
            drawn[name] = len(done)


def _finished(root: Root, sweep: str) -> list[float]:
    """When each finished trial of a sweep finished, Unix s."""
    try:
        trials = tables.plan_of(root, sweep).get("trials") or ()
    except JepaError:
        return []
    ends = [root.trial(str(t["name"])).done for t in trials]
    return [path.stat().st_mtime for path in ends if path.exists()]


def _draw(root: Root, sweep: str, stop: threading.Event) -> str:
    """Draw a sweep's page and picture -> why it failed, else ''. Ends early when told to stop."""
    words = ["nice", "-n", "10", sys.executable, "-m", "jepa_cluster", "scaling", sweep, "--offline"]
    env = {**os.environ, "JEPA_ROOT": str(root.path)}
    work = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while True:
        try:
            _, told = work.communicate(timeout=0.5)
            return told.strip() if work.returncode else ""
        except subprocess.TimeoutExpired:
            if stop.is_set():
                work.terminate()


def links(base: str) -> str:
    """The ready line and where to go from it."""
    base = base.rstrip("/")
    lines = [f"ready: {base}/#/experiments", f"  scaling:  {base}{mlflow_app.PREFIX}/"]
    return "\n".join(lines)


def server(root: Root, uri: str, host: str, port: int) -> uvicorn.Server:
    """MLflow and our page over a database, in this process; MLflow reads its settings from the environment when its
    application is imported."""
    for key, value in {**mlflow_client.DEFAULTS, **SERVING}.items():
        os.environ.setdefault(key, value)
    mlflow_client.connect(root, uri)  # fails early and clearly
    import uvicorn

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # mlflow's own, at import
    warnings.filterwarnings("ignore", message="starlette.middleware.wsgi")
    os.environ |= {  # what `mlflow server` would set; mlflow.server.constants cannot be imported before it is set
        "_MLFLOW_SERVER_FILE_STORE": uri,
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(mlflow_client.artifact_folder(root, uri)),
    }
    with mlflow_client.reaching(uri):
        application: Any = mlflow_app.create()
    return uvicorn.Server(uvicorn.Config(application, host=host, port=port, log_level="warning", access_log=False))


def _lead(root: Root, uri: str, base: str, stop: threading.Event, say: Say) -> None:
    """One line a sweep, the newest first: where its charts are, said as soon as MLflow knows it."""
    waiting = sorted(root.sweeps(), key=lambda name: _submitted(root, name), reverse=True)[:NEWEST]
    wide = max(map(len, waiting), default=0)
    while waiting and not stop.wait(1):
        try:
            client, _ = mlflow_client.connect(root, uri)
            with mlflow_client.reaching(uri):
                found = {name: client.get_experiment_by_name(name) for name in waiting}
        except JepaError:  # the collector tells of it
            continue
        there = {name: e.experiment_id for name, e in found.items() if e and e.lifecycle_stage == "active"}
        waiting = [name for name in waiting if name not in there]
        if there:
            say(
                "\n".join(
                    f"  {name + ':':{wide + 1}} {chart_view.link(base, number)}" for name, number in there.items()
                )
            )


def _submitted(root: Root, sweep: str) -> int:
    """Unix ms of its newest submit."""
    try:
        return int(tables.plan_of(root, sweep).get("submitted") or 0)
    except JepaError:
        return 0


def _announce(server: uvicorn.Server, base: str, begun: float, say: Say) -> None:
    while not server.started:
        time.sleep(0.05)
    say(f"{links(base)}\n  after {time.monotonic() - begun:.1f} s; Ctrl-C stops it")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise TrackingError(
                f"port {port} on {host} is taken: {e.strerror}", hint=f"jepa ui --port {port + 1}, or stop what uses it"
            ) from e


def _on_signal(stop: threading.Event) -> None:
    """INT and TERM end `stop`'s wait; uvicorn takes them first while it serves and passes them on when it is done."""

    def told(number: int, frame: object) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)
