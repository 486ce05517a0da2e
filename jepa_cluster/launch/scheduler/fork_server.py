"""Start ranks on this machine quickly, by forking a server process that has imported torch once.

In: a Python, a code folder, and per rank a trial and its environment. Out: a `RankProcess`, used
like a Popen object. To import torch, timm and the sharding code takes about eight CPU seconds; a
queue of trials pays that once instead of once per rank. The server never touches a GPU and starts
no thread, so its forks are clean.

    python -P fork_server.py    # a JSON line in, a JSON line out; exits when its input ends
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RANK_MODULE = "jepa_cluster.launch.worker.main"
PRELOAD_MODULE = "jepa_cluster.training.train"
BLOCKED_SIGNALS = {signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}  # until the rank handles them
POLL_SECONDS = 0.05
KILL_DELAY = 15.0  # s from the first failed rank of a trial to the kill of its others


class RankProcess:
    """A process that the server forked."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        """Return the exit code: None while the process runs, negative for a signal."""
        cannot_report = not self.server.alive
        code = self.server.exit_codes.get(self.pid)
        if code is None and cannot_report and not Path(f"/proc/{self.pid}").exists():
            return -signal.SIGKILL
        return code

    def wait(self) -> int:
        """Return the exit code once the process has ended."""
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its data workers, which may have outlived it."""
        kill_group(self.pid)


def kill_group(pid: int) -> None:
    """Kill a rank by its process id, and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class ForkServer:
    """A server for the ranks of one Python and one code folder. Its ranks run on when it dies."""

    def __init__(self, python: str, code: Path, environment: Mapping[str, str]) -> None:
        self.exit_codes: dict[int, int] = {}  # by process id
        self._process = subprocess.Popen(
            [python, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=code,
            env={**environment, "PYTHONPATH": str(code)},
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._forked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_replies, name="replies", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether it can still start a rank and report the end of one."""
        return self._reader.is_alive()

    def spawn(self, trial: Path, environment: Mapping[str, str], log: Path) -> RankProcess:
        """Start a rank in a session of its own. It writes to `log` until its own logs are open.

        Raises LaunchError when the server has ended.
        """
        request = {"trial": str(trial), "environment": dict(environment), "log": str(log)}
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            pid = self._forked.get()
        except BrokenPipeError:
            pid = None
        if pid is None:
            # imported here because the server runs with the package of another code folder
            from jepa_cluster.errors import LaunchError

            what = "the process that starts ranks has ended"
            raise LaunchError(what, where=str(log), hint="look into its log")
        return RankProcess(self, pid)

    def _read_replies(self) -> None:
        """Read the replies of the server until it ends, in a thread."""
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of a line that is no reply
            for line in self._replies:
                reply = json.loads(line)
                pid = reply["pid"]
                if "code" in reply:
                    self.exit_codes[pid] = reply["code"]
                else:
                    self.exit_codes.pop(pid, None)  # of an earlier process with this id
                    self._forked.put(pid)
        self._forked.put(None)

    def close(self) -> None:
        """End the server. Ranks that run are not touched."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._reader.join()
        self._replies.close()


# ---- the server's process


def main() -> None:
    """Fork a rank per request, and report the pid and later the exit code of each."""
    replies = os.dup(1)
    os.dup2(2, 1)  # keep stdout for replies; what imports print goes to stderr
    with contextlib.suppress(ImportError):  # the rank itself reports what is missing
        importlib.import_module(PRELOAD_MODULE)
    gc.collect()
    gc.freeze()  # else each collection of a rank visits, and so copies, what was imported here
    unread = b""
    while True:
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        _report_ended(replies)
        if not ready:
            continue
        data = os.read(0, 65536)
        if not data:
            os._exit(0)
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            _reply(replies, {"pid": _fork(json.loads(line), replies)})


def _fork(request: Mapping[str, Any], replies: int) -> int:
    """Fork a rank and return its pid. Signals wait until the rank can handle them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        return pid
    try:
        os.setsid()
        os.close(replies)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [RANK_MODULE, request["trial"]]
        runpy.run_module(RANK_MODULE, run_name="__main__")
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _report_ended(replies: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _reply(replies, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _reply(replies: int, message: Mapping[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(replies, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
