"""The exceptions of this project and the exit codes of an attempt.

    JepaError                     what, which value, where, hint; printed without a traceback
    ├── ConfigError               a setting that cannot be used: key, type, range, combination
    │   └── SweepFileError        the same, found in a sweep file (file and line are known)
    ├── DataError                 shards, index or manifest: missing, damaged, stale
    │   └── CorruptSample         one image that cannot be read; the pipeline replaces and counts it
    ├── CheckpointError           no usable checkpoint, or one that cannot be written
    ├── TrialError                a trial directory that is not as docs/trial-directory.md says
    │   └── Fenced                a newer attempt owns this trial; stop writing
    ├── RankLost                  another rank does not answer; the trial may be tried again
    ├── NodeFault                 the node is broken: no GPU, wrong results; tried again elsewhere
    ├── FilesystemFault           I/O error, no space: not the data; the trial may be tried again
    ├── Diverged                  the training diverged or collapsed; another try ends the same way
    ├── LaunchError               the scheduler, its profile, or a submission
    │   └── SchedulerDown         the scheduler did not answer; nothing was changed
    │       └── NotInstalled      its program is missing on this machine
    └── TrackingError             MLflow: unreachable, refused, or not the store we left

Exceptions are for the world (files, clusters, people); our own bugs are asserts. `ExitCode` is the
other half: how a process of an attempt reports its end to its launcher.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from enum import IntEnum

SELF_TEST_FAILED = "self-test failed: "  # begins the line of a self-test that blames the node


class ExitCode(IntEnum):
    """The exit code of an attempt's process. 75 and 78 are those of sysexits.h."""

    DONE = 0  # finished, or reached runtime.stop_after
    ERROR = 1  # an exception; never retried automatically
    PREEMPTED = 75  # left after a checkpoint; may run again
    HANG = 76  # ended by the watchdog
    FENCED = 77  # a newer attempt owns the trial
    CONFIG = 78  # the trial cannot run as configured; retrying is useless
    STOPPED = 79  # the user asked for it (STOP file); stopped until `jepa resume`

    @property
    def cause(self) -> str:
        """The cause as it is written into an attempt's record."""
        return self.name.lower()


class JepaError(Exception):
    """An error that is printed for the user.

    what: the fact, with the offending value. where: file, line, key, host. hint: what to type next.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint:  {self.hint}")
        return printable("\n".join(lines))


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


class NodeFault(JepaError):
    pass


class FilesystemFault(JepaError):
    pass


FILESYSTEM_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ETIMEDOUT,
    errno.EREMOTEIO, errno.ENXIO,
    errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN,
}  # fmt: skip


def is_filesystem_fault(error: BaseException) -> bool:
    """Return whether the filesystem failed, so that another attempt may succeed."""
    if isinstance(error, FilesystemFault):
        return True
    return isinstance(error, OSError) and error.errno in FILESYSTEM_ERRNOS


class Diverged(JepaError):
    pass


class LaunchError(JepaError):
    pass


class SchedulerDown(LaunchError):
    pass


class NotInstalled(SchedulerDown):
    pass


class SubmitLimit(LaunchError):
    pass


class QueueFull(SubmitLimit, SchedulerDown):
    pass


class TrackingError(JepaError):
    pass


# What sets colours or moves the cursor, and every control character but line feed and tab
_CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text without what a terminal would obey instead of show."""
    return _CONTROL.sub("", text)


def plural(count: int, noun: str) -> str:
    """Return '1 trial' or '2 trials'."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}es" if noun.endswith("s") else f"{count} {noun}s"


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'X'?" for the closest known name, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if names:
        return "known: " + ", ".join(names)
    return "nothing is known here"
