"""Atomic writes: a reader finds the old file or the new one."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

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
