"""The attempts of a trial: their numbers, their records and their ends.

In: the folder of a trial. Out: attempts/NNNN.json, by whose exclusive create a rank 0 opens an
attempt, and attempts/NNNN.end.json. Rank 0 alone changes the first while the attempt runs; any rank
may create the second, once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jepa_cluster.errors import TrialError
from jepa_cluster.records import AttemptRecord
from jepa_cluster.trial.files import (
    fsync_folder,
    names_in,
    read_json,
    require_writable,
    revalidate_folder,
    to_json,
    write_json,
    write_new,
    write_once,
)

_ATTEMPT = re.compile(r"(\d+)\.json")
_END = re.compile(r"(\d+)\.end\.json")
FOLDERS = ("attempts", "metrics", "checkpoints", "logs")  # of a trial that has an attempt
# Attempts in a row without a step forward, after which a lost or hung trial is left to the user.
FRUITLESS = 3


def numbers_in(names: Iterable[str], pattern: re.Pattern[str]) -> list[int]:
    """Numbers in the names that match a pattern, ascending."""
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


@dataclass(frozen=True)
class Attempts:
    """What a trial's folder holds about its attempts.

    path: of the trial.
    """

    path: Path

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:04d}.json"

    def attempt_end(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:04d}.end.json"

    def attempts(self) -> list[AttemptRecord]:
        """All attempt records, oldest first."""
        return list(map(self.read_attempt, self.attempt_numbers()))

    def read_attempt(self, number: int) -> AttemptRecord:
        """Return a record with its end. A file that a crash has torn counts as missing."""
        record: dict[str, Any] = {"attempt": number}
        for path in (self.attempt(number), self.attempt_end(number)):
            with contextlib.suppress(TrialError):
                record |= read_json(path) or {}
        return cast("AttemptRecord", record)

    def is_stuck(self) -> bool:
        """Whether the newest attempts all began at one step, or never began.

        Running the trial again would change nothing.
        """
        starts = [record.get("start_step") for record in self.attempts()[-FRUITLESS:]]
        return len(starts) == FRUITLESS and len(set(starts)) == 1

    def attempt_numbers(self) -> list[int]:
        """Numbers of all attempts, ascending, from one directory listing."""
        return numbers_in(names_in(self.path / "attempts"), _ATTEMPT)

    def open_attempts(self) -> list[int]:
        """Numbers of the attempts without a file of their end, ascending."""
        names = names_in(self.path / "attempts")
        return sorted({*numbers_in(names, _ATTEMPT)} - {*numbers_in(names, _END)})

    def newest_attempt(self) -> int:
        """The highest attempt number, 0 without one. On NFS the listing may be up to 60 s old."""
        return max(self.attempt_numbers(), default=0)

    def superseded(self, attempt: int) -> bool:
        """Whether a newer attempt exists, also on NFS; for decisions that need a fresh listing.

        An NFS client answers a directory listing, and a lookup that found nothing, from its cache
        for up to 60 s. So a plain look can miss an attempt that another node has opened.
        """
        self.revalidate_attempts()
        return self.newest_attempt() > attempt

    def attempt_of(self, launch: str) -> AttemptRecord | None:
        """Return the newest attempt if this launch has opened it. Raises OSError."""
        newest = self.attempts()[-1:]
        return newest[0] if newest and newest[0].get("launch") == launch else None

    def revalidate_attempts(self) -> None:
        """Make the next listing of attempts/ a fresh one, also when the first attempt makes it.

        A killed process leaves an empty file that no pattern matches.
        """
        folder = self.path / "attempts"
        revalidate_folder(folder if folder.exists() else self.path)

    def claim(self, record: Mapping[str, Any]) -> int:
        """Open the next attempt and become the trial's only writer. The number is the fence.

        The first attempt makes the folders. Raises LaunchError, before anything is written, if this
        user may not write all of the trial, NodeFault if this node may not. Exclusive create is
        decided by the NFS server, but the listing may come from the client's cache. So after
        FileExistsError the next number is tried, and the listing is not read again.
        """
        self.require_writable()
        for folder in FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        number = self.newest_attempt() + 1
        while True:
            path = self.attempt(number)
            try:
                write_new(path, to_json({**record, "attempt": number}))
            except FileExistsError:
                number += 1
                continue
            fsync_folder(path.parent)
            fsync_folder(self.path)
            return number

    def require_writable(self) -> None:
        """Raise LaunchError if this user may not write all of the trial, NodeFault if this node."""
        require_writable([self.path, *(self.path / folder for folder in FOLDERS)])

    def add_to_attempt(self, number: int, facts: Mapping[str, Any]) -> None:
        """Rank 0 of the attempt: add facts to its record while it runs."""
        _add_to(self.attempt(number), facts)

    def end_attempt(self, number: int, end: Mapping[str, Any]) -> bool:
        """Write the end of an attempt. Return False if another rank has written one.

        The end has a file of its own: rank 0 may be adding facts to the record.
        """
        path = self.attempt_end(number)
        is_first = write_once(path, to_json(end))
        fsync_folder(path.parent)
        return is_first

    def amend(self, number: int, changes: Mapping[str, Any]) -> None:
        """Change an attempt that has ended: its end, or its record where no rank wrote an end."""
        self.revalidate_attempts()
        end = self.attempt_end(number)
        _add_to(end if end.exists() else self.attempt(number), changes)


def _add_to(path: Path, facts: Mapping[str, Any]) -> None:
    write_json(path, {**(read_json(path) or {}), **facts})
