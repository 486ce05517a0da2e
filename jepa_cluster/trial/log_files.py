"""Read the output of one rank of an attempt, at once or as it grows."""

from __future__ import annotations

from pathlib import Path

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_from


class LogFiles:
    """The files that one rank of an attempt prints to.

    The local launcher has one of its own, for what a rank prints before its attempt begins.
    """

    def __init__(self, trial: TrialDir, attempt: int, rank: int) -> None:
        folder = trial.logs(attempt)
        early = trial.root.local / "logs" / trial.name / f"rank{rank}.log"
        self._read = {folder / f"rank{rank}.out": 0, folder / f"rank{rank}.err": 0, early: 0}

    def read_new(self) -> dict[Path, str]:
        """Return what was appended to each file since the last call; no file that did not grow."""
        found: dict[Path, str] = {}
        for path, offset in self._read.items():
            data = read_from(path, offset)
            if data:
                found[path] = data.decode(errors="replace")
                self._read[path] = offset + len(data)
        return found
