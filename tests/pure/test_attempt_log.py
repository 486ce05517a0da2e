"""How an exception ends an attempt: exit code, cause, and whether the trial fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jepa_cluster.errors import CheckpointError, ConfigError, ExitCode, FilesystemFault, RankLost
from jepa_cluster.training.attempt_log import classify_exception
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.directory import TrialDir

RANK_0 = DistEnv(0, 2, 0, 2, "launch")


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
def test_only_an_error_that_a_retry_cannot_cure_fails_the_trial(
    trial: TrialDir, error: Exception, code: ExitCode, cause: str, failed: bool
) -> None:
    """A filesystem that fails and a rank that was lost are tried again."""
    found_code, found_cause, *_ = classify_exception(error, trial, 1, RANK_0)
    assert found_code == code
    assert found_cause == cause
    assert trial.failed.exists() == failed


def test_a_fenced_attempt_does_not_fail_the_trial(
    trial: TrialDir,
) -> None:
    trial.claim({"launch": "newer"})
    code, cause, *_ = classify_exception(ValueError("a bug"), trial, 1, RANK_0)
    assert code == ExitCode.FENCED
    assert cause == "fenced"
    assert not trial.failed.exists()
