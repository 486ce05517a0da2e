"""Measure what a rank does, and end it when it hangs.

In: the phases that the loop enters. Out: seconds by phase for the attempt's record, rank 0's
heartbeat file, the STOP file and the fence polled in the background, and the end of a rank that
makes no progress. Imports no torch; knows nothing of what the phases do.
"""

# pyright: standard

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.directory import TrialDir

HEARTBEAT_SECONDS = 5.0  # between heartbeats
POLL_SECONDS = 0.5  # between two looks at progress, at STOP and at the fence
# Seconds between two looks at progress. In the rest of a longer time the process was paused.
LONGEST_LOOK = 2.0
COMMITTED_PHASES = ("train", "data", "probe")  # their time is lost unless a commit follows
PRODUCTIVE_PHASES = ("train", "probe")  # they move a trial forward
AFTER_DONE_SECONDS = 20.0  # that a rank may wait for others once the trial is done


def print_stderr(text: str) -> None:
    """Print a line to the rank's log. A full disk is no error."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class PhaseTimer:
    """The phase of this rank, and seconds by phase. Phases nest; only the inner one counts.

    last_seconds: of the phase before. last_progress: when this phase last made progress.
    committed: seconds by phase when the save of the newest commit began.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.phase = "init"
        self.since = time.monotonic()
        self.step = 0
        self.last_seconds = 0.0
        self.last_progress = self.since
        self.committed: Mapping[str, float] = {}
        self._saves: dict[int, Mapping[str, float]] = {}  # by step: seconds when its save began

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: str) -> str:
        self.touch()
        now, before = self.last_progress, self.phase
        self.last_seconds = now - self.since
        self.seconds[before] += self.last_seconds
        self.phase, self.since = phase, now
        return before

    def touch(self) -> None:
        """Note progress of this phase: it is no hang, however long it takes."""
        self.last_progress = time.monotonic()

    def snapshot(self) -> defaultdict[str, float]:
        """Return seconds by phase, up to now."""
        seconds = self.seconds.copy()
        seconds[self.phase] += time.monotonic() - self.since
        return seconds

    def mark_save(self, step: int) -> None:
        """Note that the save of this step begins."""
        self._saves[step] = self.snapshot()

    def mark_committed(self, step: int) -> None:
        """Note a commit: time before its save began is not lost."""
        self.committed = self._saves.get(step, self.committed)
        self._saves = {save: phases for save, phases in self._saves.items() if save >= step}

    def report(self, ended: bool = False) -> dict[str, float]:
        """Return seconds by phase, rounded. After the end, time that no commit covers is lost."""
        seconds = self.snapshot()
        if ended:
            for phase in COMMITTED_PHASES:
                lost = max(0.0, seconds[phase] - self.committed.get(phase, 0.0))
                seconds[phase] -= lost
                seconds["lost"] += lost
        return {phase: round(value, 3) for phase, value in seconds.items() if value > 0}


def goodput(seconds: Mapping[str, float]) -> float:
    """Return the share of the time that moved a trial forward."""
    productive = sum(seconds.get(phase, 0.0) for phase in PRODUCTIVE_PHASES)
    return round(productive / max(sum(seconds.values()), 1e-9), 4)


@dataclass
class Standstill:
    """Counts seconds in which a value does not change, without those of a paused process."""

    value: float | None = None
    seconds: float = 0.0

    def look(self, value: float | None, elapsed: float) -> float:
        """Return the seconds since the value changed. elapsed: seconds since the last look."""
        same = value == self.value and value is not None
        self.seconds = self.seconds + min(elapsed, LONGEST_LOOK) if same else 0.0
        self.value = value
        return self.seconds


@dataclass
class Watchdog:
    """The background thread of a rank: heartbeat, STOP, fence, hang.

    hang_seconds: without progress, of any phase or of a save. on_hang: called with a description
    before the process ends with ExitCode.HANG. facts: further entries of rank 0's heartbeat file.
    save_progress: time of the last progress of the running save; None while none runs.
    """

    trial: TrialDir
    attempt: int
    env: DistEnv
    timer: PhaseTimer
    hang_seconds: float
    on_hang: Callable[[str], None] = lambda what: None
    facts: Callable[[], Mapping[str, Any]] = dict[str, Any]
    save_progress: Callable[[], float | None] = lambda: None
    stop_requested: bool = False
    fenced: bool = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        if self.env.is_rank0:  # in another thread, because the filesystem may hang
            threading.Thread(target=self._poll_trial, name="poll", daemon=True).start()

    def _run(self) -> None:
        loop, save = Standstill(), Standstill()
        before = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            elapsed = time.monotonic() - before
            before += elapsed
            phase, step = self.timer.phase, self.timer.step
            idle = loop.look(self.timer.last_progress, elapsed)
            if phase == "checkpoint" and idle > AFTER_DONE_SECONDS and self._is_done():
                print_stderr("watchdog: the trial is done; this rank was left behind")
                os._exit(ExitCode.DONE)
            stalled = save.look(self.save_progress(), elapsed)
            if stalled > self.hang_seconds:
                self._end_process(f"the save makes no progress for {stalled:.0f} s at step {step}")
            if idle > self.hang_seconds and self.timer.last_progress == loop.value:
                what = f"{idle:.0f} s without progress in phase '{phase}' at step {step}"
                self._end_process(what)

    def _poll_trial(self) -> None:
        """Rank 0: look for STOP and newer attempts, write the heartbeat when it is due."""
        written = -math.inf
        while True:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            with contextlib.suppress(OSError):
                self.stop_requested = self.trial.stop.exists()
                self.fenced = self.trial.newest_attempt() > self.attempt
                if now - written > HEARTBEAT_SECONDS:
                    self._write_heartbeat()
                    written = now

    def _is_done(self) -> bool:
        with contextlib.suppress(OSError):
            return self.trial.done.exists()
        return False

    def _write_heartbeat(self) -> None:
        facts = {
            "step": self.timer.step,
            "phase": self.timer.phase,
            "attempt": self.attempt,
            "t": time.time_ns() // 1_000_000,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self.facts(),
        }
        fresh = self.trial.heartbeat.with_name(".heartbeat.new")
        fresh.write_text(json.dumps(facts))
        fresh.replace(self.trial.heartbeat)

    def _end_process(self, what: str) -> None:
        print_stderr(f"watchdog: {what}; stacks of all threads follow")
        faulthandler.dump_traceback(sys.stderr)
        with contextlib.suppress(Exception):
            self.on_hang(what)
        os._exit(ExitCode.HANG)
