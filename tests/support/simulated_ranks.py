"""Ranks as threads of which exactly one runs at a time, in virtual time, with faults at calls.

In: functions to run as tasks and a seed. Out: one run, the same for the same seed. A task gives up
its turn only in `Scheduler.sleep`, which every simulated call goes through. A seeded generator
chooses the next task. When all tasks sleep, the time jumps to the earliest wake-up. No real time
passes in a sleep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf

from jepa_cluster.training.channel import LONGEST_PAUSE, PROGRESS_SECONDS, Channel, SystemClock

ERRORS = ("EIO", "ESTALE", "ENOSPC", "EDQUOT", "EACCES", "EEXIST")
SLOW = ("slow", "delay")
DEATHS = ("thread dies", "process dies", "crash")
FAULTS = (*ERRORS, "error after the call", *SLOW, *DEATHS, "claim")

STORE_TIMEOUT = 1800.0  # seconds that TCPStore.multi_get waits for a key that is not there
MOST_SWITCHES = 2_000_000  # changes of the running task; a schedule with more does not end
REAL_SECONDS = 120.0  # of a run; a thread that takes longer is stuck outside of the simulation


class Died(BaseException):
    """End the thread. Not an Exception, so that the code under test cannot continue after it."""


class Process:
    """A process of the simulation. When it dies, its tasks have no further effect."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True


class Task:
    """A thread of the simulation. delayed: virtual seconds that its calls have taken."""

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.wake = 0.0
        self.delayed = 0.0
        self.ended = False
        self.turn = threading.Semaphore(0)
        self.thread: threading.Thread


class Scheduler:
    """Runs tasks one at a time and records violations of promises."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.current = Task(Process("none"), "none")
        self.violations: list[str] = []
        self._tasks: list[Task] = []
        self._threads: list[threading.Thread] = []
        self._switches = 0
        self._stopping = False
        self._trace = trace
        self._all_ended = threading.Semaphore(0)

    def spawn(self, process: Process, name: str, function: Callable[[], None]) -> Task:
        task = Task(process, name)
        task.wake = self.now
        task.thread = threading.Thread(
            target=self._run,
            args=(task, function),
            name=name,
            daemon=True,
        )
        self._tasks.append(task)
        self._threads.append(task.thread)
        task.thread.start()
        return task

    def run(self) -> None:
        """Run until every task has ended."""
        self._hand_over(self._choose())
        if not self._all_ended.acquire(timeout=REAL_SECONDS):
            self.violations.append(f"{self.current.name} did not give up its turn")
            return
        for thread in self._threads:
            thread.join(REAL_SECONDS)
            if thread.is_alive():
                self.violations.append(f"{thread.name} is still alive after the end")

    def sleep(self, seconds: float) -> None:
        """Let others run for `seconds` of virtual time. Raises Died in a process that is dead."""
        task = self.current
        self._raise_if_dead(task)
        task.wake = self.now + seconds
        self._switches += 1
        if self._switches == MOST_SWITCHES:
            self.violation("the schedule does not end")
        chosen = self._choose()
        if chosen is not task:
            self._hand_over(chosen)
            task.turn.acquire()
        self._raise_if_dead(task)

    def park(self) -> None:
        """Sleep until `wake`."""
        self.sleep(inf)

    def wake(self, task: Task) -> None:
        task.wake = min(task.wake, self.now)

    def kill(self, process: Process) -> None:
        process.alive = False
        for task in self._tasks:
            if task.process is process:
                self.wake(task)

    def violation(self, what: str) -> None:
        """Record that a promise is broken, and end the run."""
        self.violations.append(f"at {self.now:.3f} s, in {self.current.name}: {what}")
        self._stopping = True
        for task in self._tasks:
            self.wake(task)

    def trace(self, what: str) -> None:
        if self._trace:
            print(f"{self.now:9.3f}  {self.current.name:28}  {what}")

    def _run(self, task: Task, function: Callable[[], None]) -> None:
        task.turn.acquire()
        try:
            function()
        except Died:
            pass
        except BaseException:
            self.violation(traceback.format_exc())
        task.ended = True
        self._tasks.remove(task)
        if self._tasks:
            self._hand_over(self._choose())
        else:
            self._all_ended.release()

    def _choose(self) -> Task:
        ready = [task for task in self._tasks if task.wake <= self.now]
        if ready:
            return self.random.choice(ready)
        self.now = min(task.wake for task in self._tasks)
        if self.now == inf:
            self.now = 0.0
            names = ", ".join(task.name for task in self._tasks)
            self.violation(f"every task waits for another: {names}")
        return self._choose()

    def _hand_over(self, task: Task) -> None:
        self.current = task
        task.turn.release()

    def _raise_if_dead(self, task: Task) -> None:
        if self._stopping or not task.process.alive:
            raise Died


class Clock(SystemClock):
    """The clock of a Channel."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def now(self) -> float:
        return self.scheduler.now

    def sleep(self, seconds: float) -> None:
        self.scheduler.sleep(seconds)


class Faults:
    """Decides at every call whether a fault strikes, and which.

    rate: probability per call.
    kinds: which of FAULTS.
    patience: that of the channels; a delay is longer.
    aims: (call, rank) -> (which occurrence of it, fault), for faults at one exact place.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        patience: float,
        rate: float = 0.0,
        kinds: tuple[str, ...] = (),
    ) -> None:
        self.scheduler = scheduler
        self.patience = patience
        self.rate = rate
        self.kinds = kinds
        self.aims: dict[tuple[str, int], tuple[int, str]] = {}
        self.active = True
        self.struck: Counter[str] = Counter()
        self.crash: Callable[[], None] = lambda: None
        self.claim: Callable[[], bool] = lambda: False
        self._seen: Counter[tuple[str, int]] = Counter()

    @contextlib.contextmanager
    def call(
        self,
        process: Process,
        rank: int,
        name: str,
        error: type[Exception] = OSError,
    ) -> Iterator[None]:
        """Wrap the effect of one call. A fault strikes before it, or as an error after it."""
        self.scheduler.trace(name)
        seconds = self.scheduler.random.choice((0.0, 0.0, 0.001, 0.01))
        self._take(seconds)
        kind = self._chosen(name, rank)
        if kind == "error after the call":
            yield
            self._take(0.0)
            raise _error(error, "EIO")
        self._strike(kind, process, error)
        yield

    def loses_byte(self) -> bool:
        """Return whether the filesystem loses the last byte of a file that it reported synced."""
        if not self.active or self.scheduler.random.random() >= self.rate:
            return False
        self.struck["lost byte"] += 1
        return True

    def _chosen(self, name: str, rank: int) -> str:
        if not self.active:
            return ""
        self._seen[name, rank] += 1
        occurrence, kind = self.aims.get((name, rank), (0, ""))
        if self._seen[name, rank] != occurrence:
            kind = ""
            if self.rate and self.scheduler.random.random() < self.rate:
                kind = self.scheduler.random.choice(self.kinds)
        if kind == "claim" and not self.claim():
            kind = ""
        if kind:
            self.struck[kind] += 1
            self.scheduler.trace(f"{name}: {kind}")
        return kind

    def _strike(self, kind: str, process: Process, error: type[Exception]) -> None:
        if kind in ERRORS:
            raise _error(error, kind)
        choose = self.scheduler.random
        if kind == "slow":
            self._take(choose.uniform(0.1, 0.4) * self.patience)
        if kind == "claim":
            self._take(choose.choice((0.0, 0.01, 0.03, 0.1, self.patience)))
        if kind == "delay":
            self._take(choose.uniform(1.2, 4.0) * self.patience)
        if kind == "crash":
            self.crash()
        if kind == "process dies":
            self.scheduler.kill(process)
        if kind in DEATHS:
            raise Died

    def _take(self, seconds: float) -> None:
        self.scheduler.current.delayed += seconds
        self.scheduler.sleep(seconds)


def os_error(name: str, path: object = None) -> OSError:
    """Return the OSError of an error name, such as EIO."""
    number = getattr(errno, name)
    if path is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), str(path))


def _error(error: type[Exception], name: str) -> Exception:
    cause = os_error(name)
    if error is OSError:
        return cause
    return error(f"the connection to the store failed: {cause.strerror}")


class SimulatedStore:
    """The keys that all ranks share. `of` gives the store as one rank reaches it."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.values = dict[str, bytes]()

    def of(self, process: Process, rank: int) -> StoreClient:
        return StoreClient(self, process, rank)


class StoreClient:
    """The part of TCPStore that Channel uses: one connection, for one thread at a time."""

    def __init__(self, store: SimulatedStore, process: Process, rank: int) -> None:
        self.values = store.values
        self.faults = store.faults
        self.process = process
        self.rank = rank
        self._user: Task | None = None

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        if self._user is not None:
            self.faults.scheduler.violation(f"uses a connection that {self._user.name} is using")
        self._user = self.faults.scheduler.current
        try:
            with self.faults.call(self.process, self.rank, f"store.{name}", RuntimeError):
                yield
        finally:
            self._user = None

    def set(self, key: str, value: str) -> None:
        with self._call("set"):
            self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        with self._call("check"):
            return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys that are not there, longer than any patience, as TCPStore does."""
        with self._call("multi_get"):
            scheduler = self.faults.scheduler
            end = scheduler.now + STORE_TIMEOUT
            while not all(key in self.values for key in keys):
                if scheduler.now >= end:
                    raise RuntimeError(f"timeout of the store while it waited for {keys}")
                scheduler.sleep(1.0)
            return [self.values[key] for key in keys]

    def add(self, key: str, amount: int) -> int:
        with self._call("add"):
            value = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(value).encode()
            return value

    def delete_key(self, key: str) -> bool:
        with self._call("delete_key"):
            return self.values.pop(key, None) is not None


class WatchedChannel(Channel):
    """A Channel that records each wait that outlasted its patience since the last progress.

    progress_at: topic -> time of a rank's last progress; shared by all ranks of an attempt.
    """

    progress_at: dict[str, float]

    def advance(self, topic: str) -> None:
        super().advance(topic)
        self.progress_at[topic] = self.clock.now()

    def read(self, topic: str, names: list[str], patience: float | None = None) -> list[object]:
        scheduler = self.clock.scheduler
        task = scheduler.current
        begin = scheduler.now
        delayed = task.delayed
        try:
            return super().read(topic, names, patience)
        finally:
            since = max(begin, self.progress_at.get(topic, begin))
            waited = scheduler.now - since
            in_calls = task.delayed - delayed
            allowed = (patience or self.patience) + PROGRESS_SECONDS + LONGEST_PAUSE + in_calls
            if waited > allowed + 1e-6:
                what = f"waited {waited:.2f} s for {names[0]} of {topic}"
                scheduler.violation(f"{what}, {allowed:.2f} s are allowed")
