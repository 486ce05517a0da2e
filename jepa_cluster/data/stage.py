"""Shards copied to a disk of the node, shared by its ranks, gone when the last of them is.

    <stage>/jepa-<user>-<digest>/lock        whoever uses the folder holds it shared, whoever
    removes it holds it alone <stage>/jepa-<user>-<digest>/filling     whoever copies holds it
    <stage>/jepa-<user>-<digest>/000000.tar  one a shard, in the manifest's order

The kernel drops a lock when its holder dies, also by kill -9. So a folder whose lock is free
belongs to nobody: the next attempt on the node goes on with it when it is the set it wants, and
removes it when it is not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from jepa_cluster.data.manifest import Manifest
from jepa_cluster.errors import DataError

STREAMS = 4  # files copied side by side


@contextmanager
def staged(folder: Path, manifest: Manifest, stage: Path) -> Iterator[list[Path]]:
    """The set's shards on this node, in the manifest's order, as long as the context is open.

    The first rank copies, the others wait. Raises DataError when the disk has no room or cannot be
    written.
    """
    names = list(dict.fromkeys(s.name for s in manifest.shards))  # a mix names a shard more than once
    size = {s.name: s.bytes for s in manifest.shards}
    place = stage / f"jepa-{os.getuid()}-{manifest.digest}"
    local = {name: place / f"{k:06d}.tar" for k, name in enumerate(names)}
    try:
        for other in stage.glob(f"jepa-{os.getuid()}-*"):
            if other != place and (lock := _open(other / "lock")) is not None:
                _leave(other, lock)
        lock = _enter(place)
    except OSError as e:
        raise _cannot(stage, e) from e
    try:
        try:
            _fill(folder, local, size, place)
        except OSError as e:
            raise _cannot(stage, e) from e
        yield [local[s.name] for s in manifest.shards]
    finally:
        _leave(place, lock)


def _cannot(stage: Path, e: OSError) -> DataError:
    return DataError(f"cannot stage the shards: {e}", where=f"{stage} on {socket.gethostname()}")


def _open(path: Path) -> int | None:
    """A lock file, not locked yet; None when its folder is gone."""
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _enter(place: Path) -> int:
    """The folder's lock, shared. Once more when the folder was removed while we waited for it."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        lock = _open(place / "lock")
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                if os.path.samestat(os.fstat(lock), (place / "lock").stat()):
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)


def _leave(place: Path, lock: int) -> None:
    """Let go; the last one out removes the folder, under a name that nobody enters."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = place.with_name(f"{place.name}.gone-{os.getpid()}")
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        os.close(lock)


def _fill(folder: Path, local: dict[str, Path], size: dict[str, int], place: Path) -> None:
    """Copy what is missing; one process of the node at a time, so the others find it done."""
    with FileLock(place / "filling"):
        for leftover in place.glob("*.partial"):
            leftover.unlink()
        missing = [n for n, p in local.items() if not p.exists() or p.stat().st_size != size[n]]
        need, free = sum(size[n] for n in missing), shutil.disk_usage(place).free
        if need > free:
            raise DataError(
                f"staging needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
                where=f"{place.parent} on {socket.gethostname()}",
                now="set runtime.stage=null, or give another folder",
            )
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(lambda n: _copy(folder / n, local[n], size[n]), missing))


def _copy(source: Path, target: Path, size: int) -> None:
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    if partial.stat().st_size != size:
        raise DataError(
            f"{source.name} is {partial.stat().st_size} bytes, the manifest says {size}",
            where=str(source),
            now=f"jepa shards verify {source.parent}",
        )
    partial.replace(target)
