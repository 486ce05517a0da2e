"""Turn signals into a flag; let all ranks stop between two steps, and in time.

In: TERM, USR2 or INT at any moment, also while Python starts or the main thread is inside C++. Out:
`PreemptionHandler`, a flag with the time it was raised, and `exit_rank`, which ends the process.
What the scheduler does for a job comes in as `JobHooks`. Does not import torch, because the handler
must be installed before torch is imported.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class JobHooks:
    """What a rank asks of the scheduler that runs its job. The default is a run without one.

    requeue: every rank calls it before it ends, so that the job runs again; returns when the
    process shall end. Its argument: whether the trial's files can be written. on_commit: rank 0
    calls it after each commit of a trial with milestones; returns at once.
    """

    requeue: Callable[[bool], None] = lambda files_work: None
    on_commit: Callable[[], None] = lambda: None


class PreemptionHandler:
    """Turns signals into a flag. Install it in the main thread, first of all, once per process."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first one that came
        self.since: float | None = None  # time.monotonic() when it came
        self._raised = threading.Event()
        self._ending = False
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
        if self.since is None:
            self.signal, self.since = name, time.monotonic()
            self._raised.set()

    def set_deadline(self, seconds: float, leave: Callable[[], None]) -> None:
        """Call `leave` in a thread if the process lives `seconds` after the flag was raised."""

        def expire() -> None:
            self._raised.wait()
            assert self.since is not None
            time.sleep(max(0.0, self.since + seconds - time.monotonic()))
            if not self._ending:
                leave()

        threading.Thread(target=expire, name="deadline", daemon=True).start()

    def ignore_signals(self) -> None:
        """Ignore signals at the end, so that a late one cannot turn success into failure."""
        self._ending = True
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
