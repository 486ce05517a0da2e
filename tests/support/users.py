"""Functions that run as other users of a group, in child processes of a test that runs as root."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.errors import JepaError

GROUP = 43210
ALICE, BOB = 43211, 43212
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")


@contextmanager
def group_folder() -> Iterator[Path]:
    """Yield a folder as a group shares it: owned by Alice and the group, with the setgid bit."""
    folder = Path(tempfile.mkdtemp(prefix="jepa-group-"))
    os.chown(folder, ALICE, GROUP)
    folder.chmod(0o2775)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_as(user: int, umask: int, function: Callable[..., Any], *args: Any) -> Any:
    """Return what the function returns, or the error it raises: JepaError or OSError."""
    fork = multiprocessing.get_context("fork")
    answers, child = fork.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([GROUP])
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        try:
            child.send(function(*args))
        except (JepaError, OSError) as e:
            child.send(e)

    process = fork.Process(target=run)
    process.start()
    child.close()
    try:
        return answers.recv()
    finally:
        process.join()


def modes(folder: Path) -> dict[str, str]:
    """Return mode and group of everything below a folder: {'a.json': '664 43210'}."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        found[str(path.relative_to(folder))] = f"{facts.st_mode & 0o7777:o} {facts.st_gid}"
    return found
