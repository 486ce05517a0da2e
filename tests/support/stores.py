"""Stores that fail for real: a server to kill and to fill up, a proxy that swallows answers, a private PostgreSQL.

Everything listens on loopback, and every process is ended by its id.
"""

import http.client
import os
import pwd
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from testcluster import claim_ports

SERVE = """import sys
from pathlib import Path
from jepa_cluster.report import ui_server
from jepa_cluster.trial.directory import Root
ui_server.create_server(Root(Path(sys.argv[1])), sys.argv[2], "127.0.0.1", int(sys.argv[3])).run()
"""


def until(done: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.HTTPError as e:
        return e.code in (401, 403)
    except OSError:
        return False


class Server:
    """The server of `jepa ui` in a process of its own, over any database; `command` runs another one instead."""

    def __init__(self, folder: Path, backend: str, command: list[str] | None = None, **env: str) -> None:
        self.folder, self.backend = folder, backend
        (self.claim,) = claim_ports(1)
        self.port = self.claim.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [c.format(port=self.port) for c in command] if command else [
            sys.executable, "-W", "ignore", "-c", SERVE, str(folder), backend, str(self.port)
        ]  # fmt: skip
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")} | env
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        return self

    def ready(self) -> "Server":
        """Raises RuntimeError with the server's words when it died."""

        def up() -> bool:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            return answers(f"{self.uri}/health")

        until(up, "the server does not answer")
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """It and what it started: the session is ours alone."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.process.wait(60)

    def disk(self, free: int | None) -> None:
        """Let no file of the server grow beyond the database's size + `free` bytes: the kernel refuses the write.
        None: room again."""
        assert self.process is not None
        database = Path(self.backend.removeprefix("sqlite:///"))
        soft = resource.RLIM_INFINITY if free is None else database.stat().st_size + free
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def __enter__(self) -> "Server":
        return self.start().ready()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.claim.close()


@contextmanager
def lossy(port: int, share: float, seed: int = 0) -> Iterator[tuple[str, dict[str, int]]]:
    """A proxy that lets every request through and swallows a share of the answers -> (its address, counts)."""
    rng, counts = random.Random(seed), {"passed": 0, "swallowed": 0}

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                upstream.close()
            if rng.random() < share:
                counts["swallowed"] += 1
                self.close_connection = True
                return
            counts["passed"] += 1
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}", counts
        proxy.shutdown()


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them off the PATH."""
    found = [Path(p).resolve().parent for p in (shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob(
        "*/bin/initdb"), reverse=True)) if p]  # fmt: skip
    return found[0] if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """A private PostgreSQL on loopback, as an unprivileged user and without fsync -> its URI."""
    programs = postgres_programs()
    assert programs is not None
    (claim,) = claim_ports(1)
    folder, port = Path(tempfile.mkdtemp(prefix="jepa-pg-")), claim.getsockname()[1]
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses root
        user = next(u.pw_name for name in ("postgres", "nobody") for u in pwd.getpwall() if u.pw_name == name)
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data, log = folder / "data", (folder / "log").open("w")
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "jepa", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        user=user, cwd="/", check=True, stdout=log, stderr=log,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"],
        user=user, cwd="/", stdout=log, stderr=log,
    )  # fmt: skip
    try:
        ask = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "jepa", "-d", "postgres"]
        until(lambda: subprocess.run(ask, check=False).returncode == 0, f"PostgreSQL: {folder / 'log'}")
        yield f"postgresql://jepa@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        claim.close()
        log.close()
        shutil.rmtree(folder)
