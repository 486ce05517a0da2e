"""Shards copied to a disk of the node, shared by its ranks, gone when the last of them is.

    <stage>/jepa-<digest>/lock        whoever reads holds it shared, whoever copies or removes holds it alone
    <stage>/jepa-<digest>/000000.tar  one a shard, in the manifest's order

The kernel drops a lock when its holder dies, also by kill -9. So a folder whose lock is free belongs to nobody:
the next attempt on the node goes on with it when it is the set it wants, and removes it when it is not.
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

from jepa_cluster.data.manifest import Manifest
from jepa_cluster.errors import DataError

STREAMS = 4  # files copied side by side


@contextmanager
def staged(folder: Path, manifest: Manifest, stage: Path) -> Iterator[list[Path]]:
    """The set's shards on this node, in the manifest's order, as long as the context is open.

    The first rank copies, the others wait. Raises DataError when the disk has no room or cannot be written.
    """
    names = list(dict.fromkeys(s.name for s in manifest.shards))  # a mix names a shard more than once
    size = {s.name: s.bytes for s in manifest.shards}
    place = stage / f"jepa-{os.getuid()}-{manifest.digest}"
    local = {name: place / f"{k:06d}.tar" for k, name in enumerate(names)}
    try:
        for other in stage.glob(f"jepa-{os.getuid()}-*"):
            if other != place and (lock := _open(other)) is not None:
                _leave(other, lock)
        lock = None
        while lock is None:
            place.mkdir(parents=True, exist_ok=True)
            lock = _open(place)
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
                _fill(folder, {n: p for n, p in local.items() if not _is(p, size[n])}, size, place)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if not os.fstat(lock).st_nlink:  # removed by another while we had no lock: once more
                    os.close(lock)
                    lock = None
    except OSError as e:
        raise DataError(f"cannot stage the shards: {e}", where=f"{stage} on {socket.gethostname()}") from e
    try:
        yield [local[s.name] for s in manifest.shards]
    finally:
        _leave(place, lock)


def _open(place: Path) -> int | None:
    """The folder's lock file, not locked yet; None when the folder is gone."""
    try:
        return os.open(place / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _leave(place: Path, lock: int) -> None:
    """Let go; the last one out removes the folder."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _is(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _fill(folder: Path, missing: dict[str, Path], size: dict[str, int], place: Path) -> None:
    """Copy what is missing. The lock is held alone."""
    place.mkdir(exist_ok=True)
    for leftover in place.glob("*.partial"):
        leftover.unlink()
    need, free = sum(size[n] for n in missing), shutil.disk_usage(place).free
    if need > free:
        shutil.rmtree(place)
        raise DataError(
            f"staging needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            where=f"{place.parent} on {socket.gethostname()}",
            now="set runtime.stage=null, or give another folder",
        )
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda n: _copy(folder / n, missing[n], size[n]), missing))


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
