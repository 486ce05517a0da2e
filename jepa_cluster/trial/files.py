"""Atomic writes, fresh listings and JSON on a filesystem that several nodes and users share.

A reader of a file that is written here sees the old content or the new one, never a part. A folder
appears complete. The umask of the user and the setgid bit of the folder decide who may write it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import pwd
import shutil
import tempfile
import time
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from jepa_cluster.errors import LaunchError, NodeFault, TrialError

SHARE_HINT = (
    "share it in a group (chgrp, chmod -R g+ws, umask 002 for all of you: "
    "docs/howto/share-a-root.md), or --root with one of your own"
)


@contextlib.contextmanager
def open_atomic(path: Path, durable: bool = True) -> Generator[BinaryIO]:
    """Open a hidden neighbour for writing, which replaces `path` unless the block raises.

    durable: sync the file and its folder, so that the new content survives a crash of the machine.
    """
    fresh = hidden_neighbour(path)
    try:
        with fresh.open("xb") as f:
            yield f
            if durable:
                f.flush()
                os.fsync(f.fileno())
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


def write_once(path: Path, text: str) -> bool:
    """Write a file unless it exists, and return whether it was this call that wrote it.

    Of several processes the first one decides, also on NFS. Nobody sees a part of the file.
    """
    fresh = hidden_neighbour(path)
    try:
        write_new(fresh, text)
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def new_folder(path: Path, durable: bool = True) -> Generator[Path]:
    """Yield a hidden neighbour that becomes the folder `path` when the block ends without an error.

    When another process creates `path` meanwhile, its folder stays and the new one is removed.
    durable: sync the parent folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = hidden_neighbour(path)
    fresh.mkdir()
    try:
        yield fresh
        fresh.rename(path)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not path.exists():
            raise
    if durable:
        fsync_folder(path.parent)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def hidden_neighbour(path: Path) -> Path:
    """Return an unused hidden name in the folder of `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def require_writable(folders: Iterable[Path]) -> None:
    """Raise LaunchError when this user may not create files in one of these folders.

    Raises NodeFault when the filesystem is read-only here: on another node it may be writable. A
    folder that does not exist yet is skipped.
    """
    refused = [path for path in folders if path.exists() and not os.access(path, os.W_OK | os.X_OK)]
    if refused and os.statvfs(refused[0]).f_flag & os.ST_RDONLY:
        raise NodeFault("the filesystem is read-only on this node", where=str(refused[0]))
    if refused:
        raise LaunchError(
            f"you may not write to {refused[0]}, which belongs to {owner(refused[0])}",
            where=str(refused[0]),
            hint=SHARE_HINT,
        )


def owner(path: Path) -> str:
    """Return the user name of the owner of a file, or the number if it has no name."""
    return user_name(path.stat().st_uid)


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the filesystem of a folder, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fsync_folder(path: Path) -> None:
    """Make a rename in this folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(folder: Path) -> None:
    """Make durable all that was written to the filesystem of a folder.

    After many small files, one call takes a fraction of the time of a sync of each.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(fd):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
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
        probe = folder / f".revalidate.{uuid.uuid4().hex}"
        probe.touch(exist_ok=False)
        probe.unlink()


def write_new(path: Path, text: str, durable: bool = True) -> None:
    """Write a file of a folder that nobody sees yet. The caller syncs the folder."""
    with path.open("x") as f:
        f.write(text)
        if durable:
            f.flush()
            os.fsync(f.fileno())


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


@functools.cache
def clock_offset(folder: Path) -> float:
    """Return the file server's clock minus ours, in seconds; 0 where no file can be made."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as f:
        return Path(f.name).stat().st_mtime - time.time()
    return 0.0


def read_from(path: Path, offset: int) -> bytes:
    """Return the bytes of a file from an offset on; none without the file."""
    try:
        with path.open("rb") as f:
            f.seek(offset)
            return f.read()
    except FileNotFoundError:
        return b""


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, to_json(value))


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
