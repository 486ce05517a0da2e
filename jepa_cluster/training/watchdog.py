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
from jepa_cluster.training.dist_env import Place
from jepa_cluster.trial.layout import TrialDir

BEAT = 5.0  # seconds between heartbeats
LOOK = 0.5  # seconds between looks at STOP and the fence
FIRST = 6.0  # times `runtime.hang_seconds`, while nothing is known about a phase
SLACK = 10.0  # times the longest seen
USEFUL = ("train", "data", "probe")  # phases that a commit makes worth their time
GOOD = ("train", "probe")  # and those that move a trial forward
AFTER_DONE = 20.0  # seconds that a rank may wait for others once the trial says that it is done
STALLED_SAVE = 2.0  # times `runtime.hang_seconds` that a save may stand still
SAVES = 8  # newest saves whose beginning is remembered
OTHERS = 2.0  # seconds that a rank which found itself hung leaves the others to find the same


def say(text: str) -> None:
    """A line for the rank's log; a disk that does not take it stops nobody."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Clock:
    """Which phase this rank is in, and the seconds spent in each. Phases nest; the inner one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.longest: dict[str, float] = defaultdict(float)
        self.phase, self.since, self.step = "init", time.monotonic(), 0
        self.last = 0.0  # seconds that the phase before took
        self.alive = self.since  # when this phase last made progress
        self.kept: dict[str, float] = {}  # seconds by phase when the newest commit's save began
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
        self.last = now - self.since
        self.seconds[before] += self.last
        self.longest[before] = max(self.longest[before], now - self.alive)
        self.phase, self.since, self.alive = phase, now, now
        return before

    def touch(self) -> None:
        """This phase makes progress: however long it takes, it is no hang."""
        now = time.monotonic()
        self.longest[self.phase] = max(self.longest[self.phase], now - self.alive)
        self.alive = now

    def mark(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        return {**self.seconds, self.phase: self.seconds[self.phase] + time.monotonic() - self.since}

    def save_begins(self, step: int) -> None:
        self._saves[step] = self.mark()
        if len(self._saves) > SAVES:
            del self._saves[min(self._saves)]

    def committed(self, step: int) -> None:
        """A checkpoint of this step is committed: what was spent before its save began is not lost."""
        self.kept = self._saves.get(step, self.kept)
        self._saves = {other: mark for other, mark in self._saves.items() if other >= step}

    def report(self, ended: bool = False) -> dict[str, float]:
        """Seconds by phase, rounded; of an attempt that ended, what no commit covers is lost."""
        found = defaultdict(float, self.mark())
        for phase in USEFUL if ended else ():
            gone = max(0.0, found[phase] - self.kept.get(phase, 0.0))
            found[phase], found["lost"] = found[phase] - gone, found["lost"] + gone
        return {k: round(v, 3) for k, v in found.items() if v > 0}


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the time that moved a trial forward."""
    return round(sum(seconds.get(phase, 0.0) for phase in GOOD) / max(sum(seconds.values()), 1e-9), 4)


class Watch:
    """The background thread of a rank: heartbeat, STOP, fence, hang.

    on_hang: called with a description before the process ends with ExitCode.HANG. facts: further entries of rank 0's
    heartbeat file.
    """

    def __init__(
        self,
        trial: TrialDir,
        attempt: int,
        place: Place,
        clock: Clock,
        least: float,
        on_hang: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.trial, self.attempt, self.first, self.clock = trial, attempt, place.first, clock
        self.stop_asked = self.fenced = False
        self.least = least  # seconds that a phase may take at the least
        self.on_hang = on_hang
        self.facts: Callable[[], Mapping[str, Any]] = dict[str, Any]
        self.stalled_seconds: Callable[[], float] = lambda: 0.0  # since the running save made progress
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> Watch:
        self._thread.start()
        return self

    def close(self) -> None:
        self._end.set()
        self._thread.join(5)

    def limit(self, phase: str) -> float:
        """Seconds without progress after which a phase counts as hung: learnt from the longest seen so far."""
        longest = self.clock.longest.get(phase, 0.0)
        return max(self.least, SLACK * longest) if longest else FIRST * self.least

    def _run(self) -> None:
        beaten = 0.0
        while not self._end.wait(LOOK):
            now = time.monotonic()
            phase, alive = self.clock.phase, self.clock.alive
            if self.first:
                with contextlib.suppress(OSError):
                    self.stop_asked = self.trial.stop.exists()
                    self.fenced = self.trial.newest_attempt() > self.attempt
                    if now - beaten > BEAT:
                        self._beat(phase)
                        beaten = now
            if phase == "checkpoint" and now - alive > AFTER_DONE and self._is_done():
                say("watchdog: the trial is done; this rank was left behind")
                os._exit(ExitCode.DONE)
            if self.stalled_seconds() > STALLED_SAVE * self.least:
                self._hang(f"the save makes no progress for {self.stalled_seconds():.0f} s at step {self.clock.step}")
            if now - alive > self.limit(phase) and self.clock.alive == alive:
                self._hang(f"{now - alive:.0f} s without progress in phase '{phase}' at step {self.clock.step}")

    def _is_done(self) -> bool:
        with contextlib.suppress(OSError):
            return self.trial.done.exists()
        return False

    def _beat(self, phase: str) -> None:
        facts = {
            "step": self.clock.step,
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

    def _hang(self, what: str) -> None:
        say(f"watchdog: {what}; stacks of all threads follow")
        faulthandler.dump_traceback(sys.stderr)
        with contextlib.suppress(Exception):
            self.on_hang(what)
        os._exit(ExitCode.HANG)
