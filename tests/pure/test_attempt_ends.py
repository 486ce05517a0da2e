"""What an exception, a save that stands still or a finished trial makes of an attempt."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jepa_cluster.errors import CheckpointError, ConfigError, ExitCode, FilesystemFault, RankLost
from jepa_cluster.training import watchdog
from jepa_cluster.training.attempt_log import classify_exception
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.watchdog import PhaseTimer, Watchdog
from jepa_cluster.trial.directory import FRUITLESS, TrialDir
from jepa_cluster.trial.files import write_json

PLACE = DistEnv(0, 2, 0, 2, "launch")


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    for name in ("attempts", "checkpoints", "metrics"):
        (tmp_path / name).mkdir()
    trial = TrialDir(tmp_path)
    trial.claim({"launch": "launch"})
    return trial


@pytest.mark.parametrize(
    ("error", "code", "cause", "failed"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), ExitCode.HANG, "infrastructure", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ExitCode.HANG, "infrastructure", False),
        (FilesystemFault("unreadable: Stale file handle"), ExitCode.HANG, "infrastructure", False),
        (RankLost("no word of rank 1 for 300 s"), ExitCode.HANG, "lost", False),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), ExitCode.ERROR, "error", True),
        (CheckpointError("none of the 2 checkpoints verifies"), ExitCode.ERROR, "error", True),
        (ConfigError("optim.batch"), ExitCode.CONFIG, "config", True),
    ],
)
def test_only_an_error_that_another_attempt_cannot_cure_fails_the_trial(
    trial: TrialDir, error: Exception, code: ExitCode, cause: str, failed: bool
) -> None:
    """A filesystem that fails and a rank that was lost are tried again."""
    assert classify_exception(error, trial, 1, PLACE)[:2] == (code, cause)
    assert trial.failed.exists() == failed


def test_an_attempt_that_a_younger_one_has_fenced_off_does_not_fail_the_trial(trial: TrialDir) -> None:
    trial.claim({"launch": "younger"})
    assert classify_exception(ValueError("a bug"), trial, 1, PLACE)[:2] == (ExitCode.FENCED, "fenced")
    assert not trial.failed.exists()


class Ended(Exception):
    pass


def ended_by_watchdog(trial: TrialDir, monkeypatch: pytest.MonkeyPatch, watch: Watchdog) -> tuple[int, list[str]]:
    """The exit code that the watchdog's thread ends the process with, and what it reported."""
    reported: list[str] = []
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Ended

    watch.on_hang = reported.append
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda *_: None)
    with pytest.raises(Ended):
        watch._run()
    return codes[0], reported


def test_a_save_that_stands_still_is_a_hang_while_training_continues(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = PhaseTimer()
    watch = Watchdog(trial, 1, PLACE, clock, 30.0)
    watch.stalled_seconds = lambda: 61.0
    code, reported = ended_by_watchdog(trial, monkeypatch, watch)
    assert code == ExitCode.HANG and "the save makes no progress for 61 s" in reported[0]


def test_a_rank_that_waits_for_others_after_done_ends(trial: TrialDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the look at DONE.json fails at first: the watchdog's thread must not end with an error."""
    write_json(trial.done, {"step": 12})
    clock = PhaseTimer()
    looks = iter([OSError(errno.ESTALE, "stale"), True])

    def exists(path: Path) -> bool:
        if path.name != "DONE.json":
            return False
        found = next(looks)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(watchdog, "AFTER_DONE_SECONDS", 0.0)
    with clock("checkpoint"):
        code, reported = ended_by_watchdog(trial, monkeypatch, Watchdog(trial, 1, PLACE, clock, 30.0))
    assert code == ExitCode.DONE and not reported


def test_progress_keeps_a_long_phase_alive_and_does_not_raise_its_limit(trial: TrialDir) -> None:
    """The limit is ten times the longest time without progress, not ten times the longest phase."""
    clock = PhaseTimer()
    watch = Watchdog(trial, 1, PLACE, clock, 0.01)
    with clock("checkpoint"):
        clock.last_progress = clock.since = clock.since - 100.0
        clock.longest["checkpoint"] = 0.0
        clock.last_progress += 99.5
        clock.touch()
    assert clock.seconds["checkpoint"] > 99 and 4.0 < watch.limit("checkpoint") < 60.0


def test_attempts_that_never_get_further_are_not_repeated_for_ever(trial: TrialDir) -> None:
    """Attempts that hang before they have loaded anything have no start_step: they count as well."""
    assert not trial.is_stuck()
    while len(trial.attempts()) < FRUITLESS:
        trial.claim({"launch": "another"})
    assert trial.is_stuck()
    trial.amend(2, {"start_step": 8})
    assert not trial.is_stuck()


def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a trial would begin at step 0, and the fence would be open."""

    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for look in (trial.committed, trial.newest_attempt, trial.attempts):
        with pytest.raises(PermissionError):
            look()
