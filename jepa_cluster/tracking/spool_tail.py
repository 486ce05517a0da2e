"""Following one trial's spools: only new bytes are read, and shipped rows are forgotten.

In: a trial and the step up to which its run is shipped. Out: the settled rows after it. It keeps no state that
could not be read again: a fresh `Tail` starts at byte 0 and says the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir

Signature = tuple[tuple[str, int, int], ...]  # name, size, mtime


class Tail:
    def __init__(self, trial: TrialDir) -> None:
        self.trial = trial
        self.damaged = 0
        self.forgotten = -1
        self._offsets: dict[int, int] = {}
        self._records: dict[int, list[dict[str, Any]]] = {}

    def read(self) -> bool:
        """Take in new whole lines; True when one of them may have moved the settled watermark."""
        moved = False
        for path in sorted((self.trial.path / "metrics").glob("[0-9]*.jsonl")):
            attempt, offset = int(path.stem), self._offsets.get(int(path.stem), 0)
            if path.stat().st_size == offset:
                continue
            records, self._offsets[attempt], bad = spool.read_lines(path, offset)
            self._records.setdefault(attempt, []).extend(records)
            self.damaged += bad
            moved = moved or any("commit" in r or "settled" in r for r in records)
        return moved

    def awaits(self, attempts: Sequence[Mapping[str, Any]]) -> bool:
        """The newest attempt is open and has not yet said to where it takes history as settled. Until it does, a
        commit of its predecessor may still turn out to be a zombie's."""
        if not attempts or attempts[-1].get("cause"):
            return False
        number = int(attempts[-1]["attempt"])
        return number > 1 and not any("settled" in r for r in self._records.get(number, ()))

    def history(self) -> spool.History:
        """What was read so far, merged; rows forgotten by `forget` are missing."""
        return spool.merge(self._records, self.damaged)

    def forget(self, step: int) -> None:
        """Drop rows and events up to `step`: they are shipped, and settled ones cannot change. Commits stay."""
        self.forgotten = max(self.forgotten, step)
        for attempt, records in self._records.items():
            self._records[attempt] = [r for r in records if int(r.get("step", step + 1)) > step]


def signature(trial: TrialDir) -> Signature:
    """Name, size and mtime of every file that can change what is shipped; cheap to compare between rounds."""
    found: list[tuple[str, int, int]] = []
    for folder in ("metrics", "attempts"):
        try:
            with os.scandir(trial.path / folder) as entries:
                found += [(e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.name[0] != "."]
        except FileNotFoundError:
            continue
    for path in (trial.done, trial.failed, trial.stop):
        found += _mark(path)
    return tuple(sorted(found))


def papers(mark: Signature) -> Signature:
    """A signature without the spools."""
    return tuple(part for part in mark if not part[0].endswith(".jsonl"))


def _mark(path: Path) -> list[tuple[str, int, int]]:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return []
    return [(path.name, facts.st_size, facts.st_mtime_ns)]
