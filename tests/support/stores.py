"""Stores with real failures: a server to kill, a proxy that drops answers, a private PostgreSQL.

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
    """The server of `jepa ui` in a process of its own, over any database.

    command: another server to run instead; '{port}' in it becomes the port. prefix: of its paths.
    env: further variables of its environment.
    """

    def __init__(
        self,
        folder: Path,
        backend: str,
        command: list[str] | None = None,
        prefix: str = "",
        **env: str,
    ) -> None:
        self.folder = folder
        self.backend = backend
        (self.claim,) = claim_ports(1)
        self.port = self.claim.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}{prefix}"
        if command:
            self.command = [word.format(port=self.port) for word in command]
        else:
            arguments = [str(folder), backend, str(self.port)]
            self.command = [sys.executable, "-W", "ignore", "-c", SERVE, *arguments]
        self.env = dict(os.environ)
        for name in os.environ:
            if name.startswith("MLFLOW_TRACKING"):
                del self.env[name]
        self.env |= env
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        return self

    def ready(self) -> "Server":
        """Wait for the server. Raises RuntimeError with the end of its log when it has ended."""

        def up() -> bool:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            return answers(f"{self.uri}/health")

        until(up, "the server does not answer")
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill the server and the processes that it started."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.process.wait(60)

    def disk(self, free: int | None) -> None:
        """Let the kernel refuse writes beyond the size of the database + `free` bytes.

        None removes the limit.
        """
        assert self.process is not None
        database = Path(self.backend.removeprefix("sqlite:///"))
        limit = resource.RLIM_INFINITY
        if free is not None:
            limit = database.stat().st_size + free
        limits = (limit, resource.RLIM_INFINITY)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    def __enter__(self) -> "Server":
        try:
            return self.start().ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.claim.close()


@contextmanager
def lossy(port: int, share: float, seed: int = 0) -> Iterator[tuple[str, dict[str, int]]]:
    """Run a proxy that passes every request and drops a share of the answers.

    Yields its address and the numbers of answers that it passed and dropped.
    """
    rng = random.Random(seed)
    counts = {"passed": 0, "swallowed": 0}

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                headers = dict(self.headers.items())
                for name in self.headers:
                    if name.lower() in ("host", "connection"):
                        headers.pop(name, None)
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
    """Return the folder of initdb and postgres. Debian's is not on PATH."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    of_debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return of_debian[-1].resolve().parent if of_debian else None


def unprivileged_user() -> str | None:
    """Return the user to run PostgreSQL as, which refuses root; None is the current user."""
    if os.geteuid() != 0:
        return None
    users = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in users else "nobody"


@contextmanager
def postgres() -> Iterator[str]:
    """Run a private PostgreSQL on loopback without fsync. Yields its URI."""
    programs = postgres_programs()
    assert programs is not None
    (claim,) = claim_ports(1)
    port = str(claim.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="jepa-pg-"))
    user = unprivileged_user()
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data = folder / "data"
    log = (folder / "log").open("w")

    options = ["-U", "jepa", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    command = [programs / "initdb", "-D", data, *options]
    subprocess.run(command, user=user, cwd="/", check=True, stdout=log, stderr=log)
    options = ["-p", port, "-k", folder, "-h", "127.0.0.1", "-F"]
    command = [programs / "postgres", "-D", data, *options]
    server = subprocess.Popen(command, user=user, cwd="/", stdout=log, stderr=log)

    options = ["-h", "127.0.0.1", "-p", port, "-U", "jepa", "-d", "postgres"]
    is_ready = [programs / "pg_isready", "-q", *options]
    try:
        until(
            lambda: subprocess.run(is_ready, check=False).returncode == 0,
            f"PostgreSQL: {folder / 'log'}",
        )
        yield f"postgresql://jepa@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        claim.close()
        log.close()
        shutil.rmtree(folder)
