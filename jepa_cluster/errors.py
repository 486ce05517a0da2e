"""Everything that can go wrong, drawn as a tree.

    JepaError                     what, which value, where, what now; printed without a traceback
    ├── ConfigError               a setting that cannot be used: key, type, range, combination
    │   └── SweepFileError        the same, found in a sweep file (file and line are known)
    ├── DataError                 shards, index or manifest: missing, damaged, stale
    │   └── CorruptSample         one image that cannot be read; the pipeline replaces and counts it
    ├── CheckpointError           no usable checkpoint, or one that cannot be written
    ├── TrialError                a trial directory that is not as docs/trial-directory.md says
    │   └── Fenced                a newer attempt owns this trial; stop writing
    ├── RankLost                  another rank does not answer; the trial may be tried again
    ├── FilesystemFault           the filesystem fails (I/O error, no space), not the data; the trial may be tried again
    ├── Diverged                  the training diverged or collapsed; another try ends the same way
    ├── LaunchError               the scheduler, its profile, or a submission
    │   └── SchedulerDown         the scheduler did not answer; nothing is known, nothing was changed
    └── TrackingError             MLflow: unreachable, refused, or not the store we left

Exceptions are for the world (files, clusters, people); our own bugs are asserts. `ExitCode` is the
other half: what a process of an attempt tells its launcher when it ends.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """How an attempt's process ended, as the launcher reads it. Source of 75 and 78: sysexits.h."""

    DONE = 0
    ERROR = 1  # an exception: never retried by itself
    PREEMPTED = 75  # checkpointed and gone; free to run again
    HANG = 76  # the watchdog ended it
    FENCED = 77  # a newer attempt owns the trial
    CONFIG = 78  # the trial cannot run as configured; retrying is useless
    STOPPED = 79  # a person asked (STOP file); stays stopped until resumed

    @property
    def cause(self) -> str:
        """The word for it in an attempt's record."""
        return self.name.lower()


class JepaError(Exception):
    """An error meant for a person.

    what: the fact, with the offending value in it. where: file, line, key, host. now: what to type next.
    """

    def __init__(self, what: str, *, where: str = "", now: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.now = what, where, now

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.now:
            lines.append(f"  now:   {self.now}")
        return "\n".join(lines)


class ConfigError(JepaError):
    pass


class SweepFileError(ConfigError):
    pass


class DataError(JepaError):
    pass


class CorruptSample(DataError):
    pass


class CheckpointError(JepaError):
    pass


class TrialError(JepaError):
    pass


class Fenced(TrialError):
    pass


class RankLost(JepaError):
    pass


class FilesystemFault(JepaError):
    pass


FILESYSTEM_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENXIO,
    errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN,
}  # fmt: skip


def is_filesystem_fault(error: BaseException) -> bool:
    """Whether the filesystem failed, so that another attempt, perhaps on another node, may succeed."""
    return isinstance(error, FilesystemFault) or (isinstance(error, OSError) and error.errno in FILESYSTEM_ERRNOS)


class Diverged(JepaError):
    pass


class LaunchError(JepaError):
    pass


class SchedulerDown(LaunchError):
    pass


class TrackingError(JepaError):
    pass


def many(count: int, what: str) -> str:
    """'1 trial', '2 trials'."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known name, or the list of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(names) if names else "nothing is known here"
