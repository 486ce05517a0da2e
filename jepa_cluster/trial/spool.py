"""A trial's metrics: append-only JSON lines, one file per attempt, and the rule of what is settled.

A spool file holds four kinds of line; the first key says which:

    {"settled": W, "attempt": k, "t": ms}          first line: steps <= W are settled (-1: none)
    {"step": n, "t": ms, "loss": ..., ...}         metrics of step n
    {"event": "checkpoint_failed", "step": n, ...} what a user wants to know beside the metrics
    {"commit": n, "t": ms}                         a checkpoint is committed: steps <= n are settled

**Settled** is history that no later attempt can undo: the steps up to the last commit. They never
change. An attempt that must begin below W (its newest checkpoint was damaged) trains those steps
again but does not write them again. Rows of an earlier attempt above a later attempt's W are void,
so a stale writer cannot change history. A torn last line (the machine died) is not read; a damaged
line is skipped and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import now_ms, read_from


@dataclass(frozen=True)
class Row:
    """Metrics of one step, as the attempt that owns the step wrote them. t: Unix milliseconds."""

    step: int
    t: int
    values: Mapping[str, float]
    attempt: int


@dataclass
class History:
    """What the spools of one trial say together.

    rows: by step, ascending. settled: the watermark, -1 for nothing.
    """

    rows: list[Row]
    settled: int
    events: list[dict[str, Any]] = field(default_factory=list["dict[str, Any]"])
    damaged: int = 0

    @property
    def settled_rows(self) -> list[Row]:
        return [row for row in self.rows if row.step <= self.settled]


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int, int]:
    """Whole lines from a byte offset on -> (records, next offset, damaged lines).

    A torn last line stays unread.
    """
    data = read_from(path, offset)
    end = data.rfind(b"\n") + 1
    lines = data[:end].splitlines()
    records = list(filter(None, map(parse_line, lines)))
    return records, offset + end, len(lines) - len(records)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None for a damaged one."""
    try:
        record: object = json.loads(line)
    except ValueError:
        return None
    return cast("dict[str, Any]", record) if isinstance(record, dict) else None


def merge(spools: Mapping[int, list[dict[str, Any]]], damaged: int = 0) -> History:
    """Records by attempt number -> one history, by the rule in this module's docstring."""
    settled, rows = -1, dict[int, Row]()
    events: list[dict[str, Any]] = []
    for attempt in sorted(spools):
        records = spools[attempt]
        head = next((record for record in records if "settled" in record), None)
        if head is None:  # killed before its first line was whole: it wrote nothing that counts
            continue
        settled = floor = int(head["settled"])
        # In identity version 1 rows up to its checkpoint stay, too.
        drop_rows_above(rows, max(floor, int(head.get("start", floor))))
        for record in records:
            if "commit" in record:
                settled = max(settled, int(record["commit"]))
            elif "event" in record:
                events.append({**record, "attempt": attempt})
                if record["event"] == "rollback":  # identity version 1
                    drop_rows_above(rows, max(settled, int(record["to"])))
            elif record.get("step", floor) > floor:
                values = {k: float(v) for k, v in record.items() if k not in ("step", "t")}
                rows[record["step"]] = Row(record["step"], record["t"], values, attempt)
    return History([rows[s] for s in sorted(rows)], settled, events, damaged)


def drop_rows_above(rows: dict[int, Row], last: int) -> None:
    for step in [step for step in rows if step > last]:
        del rows[step]


def read(trial: TrialDir) -> History:
    """All spools of a trial, merged."""
    spools: dict[int, list[dict[str, Any]]] = {}
    damaged = 0
    for path in trial.path.glob("metrics/[0-9]*.jsonl"):
        spools[int(path.stem)], _, bad = read_lines(path)
        damaged += bad
    return merge(spools, damaged)


class Spool:
    """The writer, held by rank 0 of one attempt. Settled rows are not written again.

    A full disk loses no line: what could not be written waits in memory for the next write. Safe to
    use from several threads.
    """

    def __init__(self, trial: TrialDir, attempt: int, settled: int = -1) -> None:
        """settled: last step that is settled by the checkpoint that the attempt begins from."""
        self.settled = max(read(trial).settled, settled)
        path = trial.metrics(attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._write({"settled": self.settled, "attempt": attempt, "t": now_ms()})
        with contextlib.suppress(
            OSError
        ):  # on a full disk it waits; nothing is committed before it is written
            self.sync()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one step. `sync` or `commit` makes them durable."""
        if step > self.settled:
            self._write({"step": step, "t": now_ms(), **{k: float(v) for k, v in values.items()}})

    def adopt(self, rows: Iterable[Row], settled: int) -> None:
        """Copy the trunk's rows up to the step that a branch begins from; settle them at once."""
        for row in rows:
            if row.step > self.settled:
                self._write({"step": row.step, "t": row.t, **row.values})
        self.commit(settled)

    def event(self, name: str, step: int, **facts: Any) -> None:
        self._write({"event": name, "step": step, "t": now_ms(), **facts})

    def sync(self) -> None:
        """Make all lines durable or raise OSError. Call it before a checkpoint is committed."""
        with self._lock:
            self._push()
        os.fsync(self._fd)

    def commit(self, step: int) -> None:
        """Checkpoint `step` is on disk: steps up to it are settled."""
        self.settled = max(self.settled, step)
        self._write({"commit": step, "t": now_ms()})
        with contextlib.suppress(
            OSError
        ):  # should the line be lost, the next attempt settles what it begins from
            self.sync()

    def close(self) -> None:
        """Write what waits, or raise OSError; nothing is written afterwards."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                self._push()
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._waiting += json.dumps(record, separators=(",", ":")).encode() + b"\n"
            with contextlib.suppress(OSError):
                self._push()

    def _push(self) -> None:
        """Write what waits. OSError: the rest waits for the next write."""
        while self._waiting:
            del self._waiting[: os.write(self._fd, self._waiting)]
