"""Atomic writes: a reader finds the old file or the new one."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from jepa_cluster.errors import FilesystemFault
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.ops import doctor
from jepa_cluster.launch.submit import submit
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_atomic


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=write_until_killed, args=(path,))
    process.start()
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert set(path.read_text()) in ({"o", "l", "d"}, {"a"}, {"b"})


def write_until_killed(path: Path) -> None:
    while True:
        write_atomic(path, "a" * 200_000)
        write_atomic(path, "b" * 200_000)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_named_by_submit_and_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """Lustre without its mount option, NFS without its lock service: nobody holds the lock."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    root = Root(tmp_path)
    with pytest.raises(FilesystemFault, match="has no file locks"):
        file_lock.acquire(tmp_path / "lock")
    with pytest.raises(FilesystemFault, match="has no file locks"), submit.locked(root):
        pass
    checks = {check.what: check for check in doctor.run_checks(Profile("local"), root)}
    assert not checks["file locks"].ok
    assert "flock" in checks["file locks"].hint
    assert not list(tmp_path.glob(".doctor*"))
