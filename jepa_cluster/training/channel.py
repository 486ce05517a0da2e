"""Messages between the ranks of an attempt, through the process group's key-value store.

In: a store that every rank reaches. Out: values, and exceptions that every rank raises alike. Each
message has a topic that is used once, so it can never be taken for another. Every wait ends after
`patience` seconds without progress, as long as the store answers at all; torch's client waits for
its answer without a limit, which is the watchdog's business. Imports no torch.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jepa_cluster.errors import (
    CheckpointError,
    ConfigError,
    Fenced,
    FilesystemFault,
    JepaError,
    RankLost,
    is_filesystem_fault,
)
from jepa_cluster.training.checkpoint_files import describe
from jepa_cluster.training.watchdog import LONGEST_LOOK

PROGRESS_SECONDS = 1.0  # between two looks at the progress of the other ranks
LONGEST_PAUSE = 0.25  # seconds between two looks at the store


class CheckpointGone(CheckpointError):
    """An older attempt removed the checkpoint while it was read; a newer one is committed."""


_ERRORS = {
    error.__name__: error
    for error in (CheckpointError, CheckpointGone, ConfigError, Fenced, FilesystemFault, RankLost)
}


class Store(Protocol):
    """The part of torch.distributed.TCPStore that is used. No call blocks until a key is there."""

    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def delete_key(self, key: str, /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(eq=False)
class Channel:
    """Messages between the ranks of one attempt, each under a topic that is used once.

    patience: seconds that a wait lasts while nobody makes progress. on_progress: called when this
    rank, or a rank that it waits for, makes progress.
    """

    store: Store
    rank: int
    world: int
    attempt: int
    patience: float
    clock: SystemClock = field(default_factory=SystemClock)
    on_progress: Callable[[], None] = lambda: None
    # When this rank last reported progress
    reported: float = field(default=-PROGRESS_SECONDS, init=False)

    def post(self, topic: str, name: str, value: Any) -> None:
        self.store.set(self._key(topic, name), json.dumps(value))

    def read(self, topic: str, names: Sequence[str], patience: float | None = None) -> list[Any]:
        """Return the messages of these names, in their order.

        Raises RankLost after `patience` seconds without progress. Seconds in which this process was
        paused do not count.
        """
        patience = patience or self.patience
        keys = [self._key(topic, name) for name in names]
        if not keys:
            return []
        progress, look, pause = None, 0.0, 0.001
        waited, woke = 0.0, self.clock.now()
        while not self.store.check(keys):
            now = self.clock.now()
            waited += now - woke
            if now >= look:
                seen = self.store.add(self._key(topic, "progress"), 0)
                if progress is not None and seen != progress:
                    waited = 0.0
                    self.on_progress()
                progress, look = seen, now + PROGRESS_SECONDS
            if waited >= patience:
                missing = [name for name in names if not self.store.check([self._key(topic, name)])]
                if not missing:
                    break
                raise RankLost(
                    f"no word of {', '.join(missing[:8])} for {patience:.0f} s", where=topic
                )
            before = self.clock.now()
            self.clock.sleep(pause)
            woke = self.clock.now()
            waited += min(woke - before, LONGEST_LOOK) + before - now
            pause = min(2 * pause, LONGEST_PAUSE)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def advance(self, topic: str) -> None:
        """This rank has made progress; ranks that wait for it wait on."""
        self.on_progress()
        now = self.clock.now()
        if now - self.reported >= PROGRESS_SECONDS:
            self.reported = now
            self.store.add(self._key(topic, "progress"), 1)

    def forget(self, topic: str, names: Iterable[str]) -> None:
        for name in (*names, "progress"):
            self.store.delete_key(self._key(topic, name))

    def from_rank0(self, topic: str, fn: Callable[[], Any]) -> Any:
        """Call `fn` on rank 0; return its result, or raise its exception, on every rank."""
        if self.rank == 0:
            self.post(topic, "answer", _outcome(fn))
        return _result(self.read(topic, ["answer"])[0])

    def gather(self, topic: str, fn: Callable[[], Any]) -> list[Any]:
        """Call `fn` on every rank; return all results by rank, on every rank.

        The first exception is raised on every rank.
        """
        self.post(topic, f"rank {self.rank}", _outcome(fn))
        if self.rank == 0:
            names = [f"rank {rank}" for rank in range(self.world)]
            self.post(topic, "answer", _outcome(lambda: self.read(topic, names)))
        return [_result(each) for each in _result(self.read(topic, ["answer"])[0])]

    def close(self, seconds: float) -> None:
        """Before the process ends: rank 0, which holds the store, waits for all other ranks.

        Else a rank that has not yet read the last answer could not read it any more. seconds: the
        longest wait.
        """
        with contextlib.suppress(Exception):
            self.post("end", f"rank {self.rank}", True)
            if self.rank == 0:
                self.read("end", [f"rank {rank}" for rank in range(self.world)], seconds)

    def _key(self, topic: str, name: str) -> str:
        return f"attempt-{self.attempt}/{topic}/{name}"


def _result(outcome: Mapping[str, Any]) -> Any:
    """The value of an outcome, or its exception."""
    if "error" not in outcome:
        return outcome["value"]
    kind = _ERRORS.get(outcome["error"], CheckpointError)
    raise kind(outcome["what"], where=outcome["where"], hint=outcome["hint"])


def _outcome(fn: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": fn()}
    except JepaError as e:
        return {"error": type(e).__name__, "what": e.what, "where": e.where, "hint": e.hint}
    except Exception as e:
        kind = FilesystemFault if is_filesystem_fault(e) else CheckpointError
        return {"error": kind.__name__, "what": describe(e), "where": "", "hint": ""}
