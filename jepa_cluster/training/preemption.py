"""Turn signals into a flag; let all ranks stop between two steps, and in time.

In: TERM, USR2 or INT at any moment, also while Python starts or the main thread is inside C++. Out:
`PreemptionHandler`, a flag with the time by which this rank must end, and `exit_rank`.
What the scheduler does for a job comes in as `JobHooks`. Does not import torch, because the handler
must be installed before torch is imported.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
EXIT_MARGIN = 15.0  # seconds before the kill at which an attempt leaves with its last commit


@dataclass(frozen=True)
class JobHooks:
    """What a rank asks of the scheduler that runs its job. The default is a run without one.

    requeue: every rank calls it before it ends, so that the job runs again; returns when the
    process shall end. Its argument: whether the trial's files can be written. on_commit: rank 0
    calls it after each commit of a trial with milestones; returns at once. end_start: a rank of a
    start that opened no attempt calls it with cause and error of its end; returns why the start may
    not be repeated, or ''. may_retry: whether the attempt may be repeated that a bad node ended;
    every rank may call it. kill_wait: seconds from TERM to KILL when one rank has failed.
    """

    requeue: Callable[[bool], None] = lambda files_work: None
    on_commit: Callable[[], None] = lambda: None
    end_start: Callable[[str, str], str] = lambda cause, error: ""
    may_retry: Callable[[], bool] = lambda: True
    kill_wait: float = math.inf


class PreemptionHandler:
    """Turns signals into a flag. Install it in the main thread, first of all, once per process.

    signal, since: name of the first signal and its time.monotonic(); terminated: time of the first
    TERM. ranks_met: when all ranks were last known to be alive. raised: set with the flag.
    grace: seconds from the first signal to KILL. kill_wait: from TERM to KILL if a rank has failed.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.since: float | None = None
        self.terminated = math.inf
        self.ranks_met = -math.inf
        self.grace = self.kill_wait = math.inf
        self.raised = threading.Event()
        self.ending = False
        self._read, self._write = os.pipe()

    def install(self) -> PreemptionHandler:
        """Turn signals into the flag from here on. Signals blocked since the start arrive now."""
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # The C handler writes to the pipe; the thread below reads it.
            signal.signal(number, lambda *_: None)
        # Known now, not when the thread gets to it.
        for pending in sorted(signal.sigpending() & set(SIGNALS)):
            self.request_stop(signal.Signals(pending).name)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    @property
    def stop_requested(self) -> bool:
        return self.since is not None

    def request_stop(self, name: str) -> None:
        """Ask to stop as a signal would. The first reason stays."""
        if name == "SIGTERM":
            self.terminated = min(self.terminated, time.monotonic())
        if self.since is None:
            self.signal, self.since = name, time.monotonic()
            self.raised.set()

    def note_contact(self, when: float | None = None) -> None:
        """Note that every rank is alive and has answered this one. when: not now."""
        self.ranks_met = max(self.ranks_met, time.monotonic() if when is None else when)

    def deadline(self) -> float:
        """Return the time.monotonic() at which this rank must end, after a signal.

        After TERM the other ranks may be dead: until they have answered, half of `kill_wait` is
        left for the record and the requeue.
        """
        assert self.since is not None
        latest = self.since + self.grace - min(EXIT_MARGIN, self.grace / 4)
        if self.ranks_met < self.terminated:
            latest = min(latest, self.terminated + self.kill_wait / 2)
        return latest

    def ignore_signals(self) -> None:
        """Ignore signals at the end, so that a late one cannot turn success into failure."""
        self.ending = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        names = {int(s): s.name for s in SIGNALS}
        while data := os.read(self._read, 64):
            for number in data:
                if number in names:
                    self.request_stop(names[number])


def exit_rank(code: int) -> NoReturn:
    """End this process without joining the threads of torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
