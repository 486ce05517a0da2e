"""Is it alive: where each rank is, since when, and what the outside world asks of it.

In: the phases that the loop enters. Out: seconds by phase for the attempt's record, rank 0's heartbeat file, the
STOP file and the fence looked at in the background, and a watchdog that ends a rank which has stopped moving.
Torch-free; knows nothing of what the phases do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.layout import TrialDir

HEARTBEAT_SECONDS = 5.0  # seconds between heartbeats
POLL_SECONDS = 0.5  # seconds between looks at STOP and the fence
FIRST_PHASE_FACTOR = 6.0  # times `runtime.hang_seconds`, while nothing is known about a phase
LONGEST_PHASE_FACTOR = 10.0  # times the longest seen
COMMITTED_PHASES = ("train", "data", "probe")  # phases that a commit makes worth their time
PRODUCTIVE_PHASES = ("train", "probe")  # and those that move a trial forward
AFTER_DONE_SECONDS = 20.0  # seconds that a rank may wait for others once the trial says that it is done
STALLED_SAVE_FACTOR = 2.0  # times `runtime.hang_seconds` that a save may stand still
REMEMBERED_SAVES = 8  # newest saves whose beginning is remembered
OTHER_RANKS_SECONDS = 2.0  # seconds that a rank which found itself hung leaves the others to find the same


def print_stderr(text: str) -> None:
    """A line for the rank's log; a disk that does not take it stops nobody."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class PhaseTimer:
    """Which phase this rank is in, and the seconds spent in each. Phases nest; the inner one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.longest: dict[str, float] = defaultdict(float)
        self.phase, self.since, self.step = "init", time.monotonic(), 0
        self.last_seconds = 0.0  # seconds that the phase before took
        self.last_progress = self.since  # when this phase last made progress
        self.committed: dict[str, float] = {}  # seconds by phase when the newest commit's save began
        self._saves: dict[int, dict[str, float]] = {}  # step of a save -> seconds by phase when it began

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: str) -> str:
        now, before = time.monotonic(), self.phase
        self.last_seconds = now - self.since
        self.seconds[before] += self.last_seconds
        self.longest[before] = max(self.longest[before], now - self.last_progress)
        self.phase, self.since, self.last_progress = phase, now, now
        return before

    def touch(self) -> None:
        """This phase makes progress: however long it takes, it is no hang."""
        now = time.monotonic()
        self.longest[self.phase] = max(self.longest[self.phase], now - self.last_progress)
        self.last_progress = now

    def snapshot(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        return {
            **self.seconds,
            self.phase: self.seconds[self.phase] + time.monotonic() - self.since,
        }

    def mark_save(self, step: int) -> None:
        self._saves[step] = self.snapshot()
        if len(self._saves) > REMEMBERED_SAVES:
            del self._saves[min(self._saves)]

    def mark_committed(self, step: int) -> None:
        """A checkpoint of this step is committed: what was spent before its save began is not lost."""
        self.committed = self._saves.get(step, self.committed)
        self._saves = {other: mark for other, mark in self._saves.items() if other >= step}

    def report(self, ended: bool = False) -> dict[str, float]:
        """Seconds by phase, rounded; of an attempt that ended, what no commit covers is lost."""
        found = defaultdict(float, self.snapshot())
        for phase in COMMITTED_PHASES if ended else ():
            gone = max(0.0, found[phase] - self.committed.get(phase, 0.0))
            found[phase], found["lost"] = found[phase] - gone, found["lost"] + gone
        return {k: round(v, 3) for k, v in found.items() if v > 0}


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the time that moved a trial forward."""
    return round(
        sum(seconds.get(phase, 0.0) for phase in PRODUCTIVE_PHASES) / max(sum(seconds.values()), 1e-9),
        4,
    )


class Watchdog:
    """The background thread of a rank: heartbeat, STOP, fence, hang.

    on_hang: called with a description before the process ends with ExitCode.HANG. facts: further entries of rank 0's
    heartbeat file.
    """

    def __init__(
        self,
        trial: TrialDir,
        attempt: int,
        env: DistEnv,
        timer: PhaseTimer,
        least: float,
        on_hang: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.trial, self.attempt, self.is_rank0, self.timer = trial, attempt, env.is_rank0, timer
        self.stop_requested = self.fenced = False
        self.hang_seconds = least  # seconds that a phase may take at the least
        self.on_hang = on_hang
        self.facts: Callable[[], Mapping[str, Any]] = dict[str, Any]
        self.stalled_seconds: Callable[[], float] = lambda: 0.0  # since the running save made progress
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> Watchdog:
        self._thread.start()
        return self

    def close(self) -> None:
        self._end.set()
        self._thread.join(5)

    def limit(self, phase: str) -> float:
        """Seconds without progress after which a phase counts as hung: learnt from the longest seen so far."""
        longest = self.timer.longest.get(phase, 0.0)
        return (
            max(self.hang_seconds, LONGEST_PHASE_FACTOR * longest)
            if longest
            else FIRST_PHASE_FACTOR * self.hang_seconds
        )

    def _run(self) -> None:
        beaten = 0.0
        while not self._end.wait(POLL_SECONDS):
            now = time.monotonic()
            phase, alive = self.timer.phase, self.timer.last_progress
            if self.is_rank0:
                with contextlib.suppress(OSError):
                    self.stop_requested = self.trial.stop.exists()
                    self.fenced = self.trial.newest_attempt() > self.attempt
                    if now - beaten > HEARTBEAT_SECONDS:
                        self._write_heartbeat(phase)
                        beaten = now
            if phase == "checkpoint" and now - alive > AFTER_DONE_SECONDS and self._is_done():
                print_stderr("watchdog: the trial is done; this rank was left behind")
                os._exit(ExitCode.DONE)
            if self.stalled_seconds() > STALLED_SAVE_FACTOR * self.hang_seconds:
                self._end_process(
                    f"the save makes no progress for {self.stalled_seconds():.0f} s at step {self.timer.step}"
                )
            if now - alive > self.limit(phase) and self.timer.last_progress == alive:
                self._end_process(f"{now - alive:.0f} s without progress in phase '{phase}' at step {self.timer.step}")

    def _is_done(self) -> bool:
        with contextlib.suppress(OSError):
            return self.trial.done.exists()
        return False

    def _write_heartbeat(self, phase: str) -> None:
        facts = {
            "step": self.timer.step,
            "phase": phase,
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
