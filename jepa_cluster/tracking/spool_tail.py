"""Read the spools of one trial incrementally.

In: a trial, and the step up to which its run is shipped. Out: the settled rows after that step.
Only new bytes are read, and shipped rows are forgotten. All state can be read again: a new
`SpoolTail` starts at byte 0 and returns the same rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jepa_cluster.records import AttemptRecord
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir

Signature = list[tuple[str, int, int]]  # name, size, mtime of each file


class SpoolTail:
    """The spools of one trial as far as they were read.

    forgotten_through: the last step whose row was dropped by `forget`; -1 for none. unshipped:
    settled rows may be waiting.
    """

    def __init__(self, trial: TrialDir) -> None:
        self.trial = trial
        self.damaged = 0
        self.forgotten_through = -1
        self.unshipped = True
        self._offsets: dict[int, int] = {}
        self._records: dict[int, list[dict[str, Any]]] = {}

    def read(self) -> None:
        """Read new complete lines."""
        for path in sorted((self.trial.path / "metrics").glob("[0-9]*.jsonl")):
            attempt = int(path.stem)
            offset = self._offsets.get(attempt, 0)
            if path.stat().st_size == offset:
                continue
            records, self._offsets[attempt], damaged = spool.read_lines(path, offset)
            self._records.setdefault(attempt, []).extend(records)
            self.damaged += damaged
            for record in records:
                self.unshipped |= "commit" in record or "settled" in record

    def awaits_first_line(self, attempts: Sequence[AttemptRecord]) -> bool:
        """Tell whether the newest attempt is open and has not written its first line.

        That line holds the step up to which history is settled. Until it is there, commits by the
        previous attempt may still be discarded.
        """
        if not attempts or attempts[-1].get("cause"):
            return False
        number = int(attempts[-1]["attempt"])
        records = self._records.get(number, ())
        return number > 1 and not any("settled" in record for record in records)

    def history(self) -> spool.History:
        """Merge what was read so far, without the forgotten rows."""
        return spool.merge(self._records, self.damaged)

    def forget(self, step: int) -> None:
        """Drop rows and events up to `step`: all settled ones are shipped. Commits stay."""
        self.unshipped = False
        self.forgotten_through = max(self.forgotten_through, step)
        for attempt, records in self._records.items():
            self._records[attempt] = [r for r in records if int(r.get("step", step + 1)) > step]


def signature(trial: TrialDir) -> Signature:
    """Return name, size and mtime of every file but the spools that can change what is shipped."""
    attempts = sorted(trial.path.glob("attempts/[0-9]*"))
    return file_facts([*attempts, trial.done, trial.failed, trial.stop])


def file_facts(paths: Iterable[Path]) -> Signature:
    """Return name, size and mtime of the files that exist."""
    found: Signature = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            found.append((path.name, facts.st_size, facts.st_mtime_ns))
    return found
