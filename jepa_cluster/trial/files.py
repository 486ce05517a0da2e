"""Atomic writes, fresh listings and JSON on a filesystem that several nodes share.

A reader of a file that is written here sees the old content or the new one, never a part. A folder
appears complete.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO, cast

from jepa_cluster.errors import TrialError


@contextlib.contextmanager
def open_atomic(path: Path, durable: bool = True) -> Generator[BinaryIO]:
    """Open a hidden neighbour for writing, which replaces `path` unless the block raises.

    durable: sync the file and its folder, so that the new content survives a crash of the machine.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            if durable:
                f.flush()
                os.fsync(handle)
        fresh.chmod(0o644)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def write_atomic(path: Path, text: str | bytes) -> None:
    """Replace the content of a file, all of it or nothing."""
    with open_atomic(path) as f:
        f.write(text.encode() if isinstance(text, str) else text)


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yield a hidden neighbour that becomes the folder `path` when the block ends without an error.

    When another process creates `path` meanwhile, its folder stays and the new one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield fresh
        fresh.chmod(0o755)
        fresh.rename(path)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not path.exists():
            raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make a rename in this folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, none when it does not exist. Any other error is raised."""
    try:
        return os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []


def revalidate_folder(folder: Path) -> None:
    """Make an NFS client drop what it has cached about a folder: create and remove a file in it.

    The server's replies carry the attributes of the folder. When they differ from the cached ones,
    the client discards its cached listing and its cached "no such file" answers. An OSError
    (read-only or full disk) is ignored.
    """
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=folder, prefix=".revalidate.")
        os.close(handle)
        Path(name).unlink()


@functools.cache
def clock_offset(folder: Path) -> float:
    """Return the file server's clock minus ours, in seconds; 0 where no file can be made."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as f:
        return Path(f.name).stat().st_mtime - time.time()
    return 0.0


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None without the file. Raises TrialError when it is not JSON."""
    try:
        value: object = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise TrialError(f"{path.name} is not valid JSON: {e}", where=str(path)) from e
    if not isinstance(value, dict):
        raise TrialError(f"{path.name} holds no object", where=str(path))
    return cast("dict[str, Any]", value)
