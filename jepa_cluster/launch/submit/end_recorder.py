"""Write what only Slurm knows of the end of trials and attempts: markers, and ends of attempts.

In: sweeps. Out: STOP, FAILED.json and attempts/NNNN.end.json. MLflow, tables and pages read these
files, so that they show the state that `status` shows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import facts
from jepa_cluster.launch.submit import lost_attempts
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_atomic
from jepa_cluster.trial.status import RESUME, TrialStatus
from jepa_cluster.trial.usage import modified


@dataclass
class EndRecorder:
    """Records ends again and again, at little cost for trials that are over.

    closed: trial -> the time of its marker, if each of its attempts has an end.
    """

    root: Root
    closed: dict[str, float] = field(default_factory=dict[str, float])

    def record(self, sweeps: Iterable[str]) -> None:
        """Write the ends of trials and attempts, unless a submit holds the lock.

        Those in folders that this user cannot write are left out, and take no lock.
        """
        names: list[str] = []
        for sweep in sweeps:
            with contextlib.suppress(JepaError, OSError):  # a torn plan
                planned = map(itemgetter("name"), self.root.sweep(sweep).planned())
                names += [name for name in planned if not self._is_closed(name)]
        with contextlib.suppress(JepaError, OSError):
            trials = facts.query_status(self.root, names).trials if names else {}
            ended: set[str] = set()
            for name, status in trials.items():
                if status.marker and os.access(self.root.trial(name).path, os.W_OK):
                    ended.add(name)
            for attempt, _ in lost_attempts.find_ended(self.root, trials):
                if os.access(attempt.trial.path / "attempts", os.W_OK):
                    ended.add(attempt.trial.name)
            if not ended:
                return
            with file_lock.acquire(self.root.submit_lock, 0):  # what a submit started has no end
                trials = facts.query_status(self.root, ended).trials
                for name, status in trials.items():
                    with contextlib.suppress(OSError):  # of a user whose folders are closed
                        write_marker(self.root.trial(name), status)
                lost_attempts.write_ends(self.root, trials)

    def _is_closed(self, name: str) -> bool:
        """Whether the trial has a marker, and each attempt its end."""
        trial = self.root.trial(name)
        markers = map(modified, (trial.done, trial.failed, trial.stop))
        marked = next(filter(None, markers), 0.0)
        if marked and self.closed.get(name) != marked and not trial.open_attempts():
            self.closed[name] = marked
        return bool(marked) and self.closed.get(name) == marked


def write_marker(trial: TrialDir, status: TrialStatus) -> None:
    """Make a state last that Slurm forgets: STOP for what was cancelled, FAILED.json for the rest.

    The caller holds the lock of the root, so no submit starts the trial meanwhile.
    """
    if status.marker == "STOP" and trial.path.exists():
        write_atomic(trial.stop, f"{status.note.removesuffix(RESUME)}\n")
    elif status.marker == "FAILED":
        trial.write_failed(status.cause, status.note, status.attempts)
