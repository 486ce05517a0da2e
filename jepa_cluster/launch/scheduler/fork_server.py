"""Ranks on this machine that start in a moment: forked from a server process that has imported torch once.

In: a Python, a code folder, and for each rank a trial and its environment. Out: `Rank`s, used like Popen objects.
Importing torch, timm and the sharding code costs about eight CPU seconds; here a queue of trials pays that once
instead of once a rank. The server never touches a GPU and starts no thread, so its forks are as good as new.

    python -P warm.py     # the server: a JSON line in, a JSON line out; leaves when its input ends
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOB, PRELOAD = "jepa_cluster.launch.worker.main", "jepa_cluster.training.train"
HELD = {signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}  # until the rank's guard stands


class RankProcess:
    """A process that the server forked. returncode: None while it runs; negative for a signal."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                self.server.listen(0)
            except EOFError:  # nobody will tell how it ends
                if not Path(f"/proc/{self.pid}").exists():
                    self.returncode = -signal.SIGKILL
            self.returncode = self.server.codes.get(self.pid, self.returncode)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """One server process for ranks of one Python and one code folder. When it dies, its ranks run on, unseen."""

    def __init__(self, python: str, code: Path, environment: Mapping[str, str]) -> None:
        self.codes: dict[int, int] = {}
        self._process = subprocess.Popen(
            [python, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=code,
            env={**environment, "PYTHONPATH": str(code)},
            start_new_session=True,
        )
        self._tail = b""
        self._forked: list[int] = []

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def spawn(self, trial: Path, environment: Mapping[str, str], log: Path) -> RankProcess:
        """A rank of a trial, in a session of its own; until its logs are open it writes to `log`."""
        order = {"trial": str(trial), "environment": dict(environment), "log": str(log)}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            while not self._forked:
                self.listen(600)
        except (BrokenPipeError, EOFError) as e:
            from jepa_cluster.errors import LaunchError  # the server may run beside another code's package

            raise LaunchError(
                "the process that starts ranks has ended", where=str(log), hint="look into its log"
            ) from e
        return RankProcess(self, self._forked.pop(0))

    def listen(self, seconds: float) -> None:
        """Take in what the server says; EOFError when it is gone, and then nobody knows how its ranks end."""
        assert self._process.stdout is not None
        waiting = select.poll()  # not select(): a long-lived process may hold more than 1024 descriptors
        waiting.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        if not waiting.poll(seconds * 1000):
            return
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise EOFError("the process that starts ranks has ended")
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            said: dict[str, Any] = json.loads(line)
            if "code" in said:
                self.codes[said["pid"]] = said["code"]
            else:
                self._forked.append(said["pid"])

    def close(self) -> None:
        """Let the server go; ranks that run are not touched."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main() -> None:
    """The server's process."""
    signal.signal(signal.SIGCHLD, _woken)
    answer = os.dup(1)
    os.dup2(2, 1)  # a chatty import must not speak in our place
    waker, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    with contextlib.suppress(ImportError):  # the rank itself will say what is missing
        importlib.import_module(PRELOAD)
    tail = b""
    while True:
        ready = select.select([0, waker], [], [])[0]
        if waker in ready:
            os.read(waker, 4096)
            _reap(answer)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                os._exit(0)
            *lines, tail = (tail + data).split(b"\n")
            for line in lines:
                _say(answer, {"pid": _fork(json.loads(line), (answer, waker, alarm))})


def _woken(number: int, frame: object) -> None:
    """A child ended: the C handler has written to the pipe that main selects on."""


def _fork(order: Mapping[str, Any], ours: tuple[int, ...]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        return pid
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in ours:
            os.close(fd)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = [JOB, order["trial"]]
        runpy.run_module(JOB, run_name="__main__")
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _reap(answer: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say(answer, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(answer: int, what: Mapping[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(answer, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
