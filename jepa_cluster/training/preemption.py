"""A signal becomes a flag; all ranks agree to stop between steps; a thread sees to it that they do in time.

In: TERM, USR2 or INT at any moment, also while Python starts or the main thread is inside C++. Out: `Guard`, a flag
with the time it was raised, and `go_back_to_queue`, which asks Slurm to run the job again when that is still ours
to ask. Torch-free at import, because the guard must stand before torch is imported.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
OURS_TO_REQUEUE = ("RUNNING", "SIGNALING")  # in any other state Slurm has already decided
NEVER = ("disabled", "Access/permission denied")  # words with which Slurm refuses a requeue for good

successor: Callable[[], bool] | None = None  # set by the job: what to do where a requeue is not possible
requeued: Callable[[str], None] | None = None  # set by the job: what is left to do once Slurm has put it back


class Guard:
    """Turns the signals into a flag. Install it in the main thread, first of all, once a process."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first one that came
        self.since: float | None = None  # time.monotonic() when it came
        self._deadline: tuple[float, Callable[[], None]] | None = None
        self._read, self._write = os.pipe()

    def install(self) -> Guard:
        """From here on the signals do nothing but raise the flag; those held back since the start arrive now."""
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the C handler writes to the pipe; the thread below reads it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._watch, name="guard", daemon=True).start()
        return self

    @property
    def raised(self) -> bool:
        return self.since is not None

    def raise_flag(self, name: str) -> None:
        """Ask to stop as a signal would. The first reason stays."""
        if self.since is None:
            self.signal, self.since = name, time.monotonic()
            if self._deadline:
                self._arm()

    def at_deadline(self, seconds: float, leave: Callable[[], None]) -> None:
        """Call `leave`, in a thread of its own, when the process still lives `seconds` after the flag was raised."""
        self._deadline = (seconds, leave)
        if self.raised:
            self._arm()

    def stand_down(self) -> None:
        """The end of the process: signals are ignored, so that a late one cannot turn success into failure."""
        self._deadline = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        names = {int(s): s.name for s in SIGNALS}
        while data := os.read(self._read, 64):
            for number in data:
                if number in names:
                    self.raise_flag(names[number])

    def _arm(self) -> None:
        threading.Thread(target=self._expire, name="deadline", daemon=True).start()

    def _expire(self) -> None:
        if self._deadline is None or self.since is None:
            return
        seconds, leave = self._deadline
        while (left := self.since + seconds - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        if self._deadline is not None:
            leave()


def own_job(env: Mapping[str, str]) -> str:
    """Our own job as Slurm's programs name it. Not SLURM_JOB_ID: one task of each array has the array's own number
    there, and a requeue of that number sends every task of the array back."""
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def go_back_to_queue(env: Mapping[str, str], patience: float = 120.0) -> bool:
    """Requeue our own Slurm job if it still runs as ours; False when Slurm has already decided about it.

    Ours: with our restart count. A node that thaws finds its job running again elsewhere, and must leave it alone.
    Retries while the controller is down: the tasks run on meanwhile. Where scontrol is missing, or requeues are
    disabled, `successor` sees to it that another job follows, and this one shall end by itself: False.
    """
    job, restarts = own_job(env), env.get("SLURM_RESTART_COUNT", "0")
    end = time.monotonic() + patience
    while time.monotonic() < end:
        told = _ask("squeue", "--noheader", "--Format=State:20,RestartCnt:20", f"--jobs={job}")
        if told is not None and told.split() not in [[state, restarts] for state in OURS_TO_REQUEUE]:
            return False
        if told is not None or not shutil.which("squeue"):
            done = _requeue(job)
            if done and requeued is not None:
                requeued(job)
            if done is not None:
                return done or (successor is not None and successor())
        time.sleep(2)
    print(f"preemption: Slurm did not answer for {patience:.0f} s; job {job} is not requeued", file=sys.stderr)
    return False


def _requeue(job: str) -> bool | None:
    """True: Slurm took it. False: it never will, from here. None: not now."""
    if not shutil.which("scontrol"):
        return False
    refusals: list[str] = []
    if _ask("scontrol", "requeue", job, refusals=refusals) is not None:
        return True
    return False if any(word in text for text in refusals for word in NEVER) else None


def _ask(*command: str, refusals: list[str] | None = None) -> str | None:
    """One answer of a Slurm program; None when it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        print(f"preemption: {command[0]}: {e}", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(f"preemption: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
        if refusals is not None:
            refusals.append(done.stderr)
        return None
    return done.stdout


def depart(code: int, requeue: bool, first: bool) -> NoReturn:
    """End this process now. On Slurm, when the job shall run again, first ask for that and then wait to be killed:
    a task that ends by itself would be taken for a result. Threads of torch are left where they are."""
    sys.stdout.flush()
    sys.stderr.flush()
    if requeue:
        for number in SIGNALS:
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        if not first or go_back_to_queue(os.environ):
            sleep_until_killed()
    os._exit(code)


def sleep_until_killed(seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
