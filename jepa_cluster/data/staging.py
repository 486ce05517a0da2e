"""Shards copied to a disk of the node, shared by its ranks, removed when the last of them is done.

    <stage>/jepa-<user>-<digest>/lock        shared by its users, exclusive to remove the folder
    <stage>/jepa-<user>-<digest>/filling     held by the process that copies
    <stage>/jepa-<user>-<digest>/000000.tar  one per shard, in the manifest's order

The kernel drops a lock when its holder dies, also by kill -9. So a folder whose lock is free has no
user. The next attempt on the node continues with it when it is the set that it needs, and removes
it otherwise. `lock` is a flock of our own, because filelock has no shared locks.

A disk of a node is often open to all its users, and the name of the folder can be guessed. So a
folder is used only if it is this user's, no other user can write to it, and it is no link.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from jepa_cluster.data.manifest import Manifest, Shard
from jepa_cluster.errors import DataError
from jepa_cluster.trial import file_lock

STREAMS = 4  # files copied at a time
CHUNK = 8 << 20  # bytes
GROWTH_SECONDS = 1.0  # between two looks at the size of the copies


@contextmanager
def staged(
    folder: Path,
    manifest: Manifest,
    stage: Path,
    on_progress: Callable[[], None] = lambda: None,
) -> Generator[list[Path]]:
    """Yield the paths of the set's shards on this node, in the manifest's order.

    The first rank copies, the others wait. on_progress: called on each of them while copies grow.
    Raises DataError when the disk has no room or cannot be written.
    """
    place = stage / f"jepa-{os.getuid()}-{manifest.digest}"
    copies: dict[str, tuple[Shard, Path]] = {}  # a mix names a shard more than once
    for shard in manifest.shards:
        copies.setdefault(shard.name, (shard, place / f"{len(copies):06d}.tar"))
    with ExitStack() as users:
        try:
            _remove_unused(stage, place)
            users.callback(_unlock, place, _lock_shared(place))
            with _growth_reported(place, on_progress):
                _fill(folder, list(copies.values()), place)
        except OSError as error:
            where = f"{stage} on {socket.gethostname()}"
            raise DataError(f"cannot stage the shards: {error}", where=where) from error
        yield [copies[shard.name][1] for shard in manifest.shards]


@contextmanager
def _growth_reported(place: Path, on_progress: Callable[[], None]) -> Generator[None]:
    """Call `on_progress`, in a thread, while files in the folder grow, also by another rank."""
    ended = threading.Event()

    def look() -> None:
        before = 0
        while not ended.wait(GROWTH_SECONDS):
            size = 0
            with suppress(OSError):
                for path in place.iterdir():
                    size += path.stat().st_size
            if size > before:
                on_progress()
            before = size

    threading.Thread(target=look, name="staging", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _remove_unused(stage: Path, place: Path) -> None:
    """Remove this user's folders of other sets whose users are all gone."""
    for other in stage.glob(f"jepa-{os.getuid()}-*"):
        if other == place or not _is_ours(other):
            continue
        lock = _open_lock(other)
        if lock is not None:
            _unlock(other, lock)


def _is_ours(place: Path) -> bool:
    """Whether this is a folder, no link, that only this user can write to."""
    try:
        facts = place.lstat()
    except FileNotFoundError:  # another rank has just removed it
        return False
    closed = facts.st_mode & 0o022 == 0
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and closed


def _open_lock(place: Path) -> int | None:
    """Open the lock file of a folder, not locked yet; None when the folder is gone."""
    try:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(place / "lock", flags, 0o600)
    except FileNotFoundError:
        return None


def _lock_shared(place: Path) -> int:
    """Lock the folder; tries again when it was removed while this process waited.

    Raises DataError for a folder that this user did not make.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            place.mkdir(0o700)
        except FileExistsError:
            _require_ours(place)
        lock = _open_lock(place)
        if lock is None:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(lock), (place / "lock").stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _require_ours(place: Path) -> None:
    with suppress(FileNotFoundError):  # removed meanwhile
        if not _is_ours(place):
            raise DataError(
                f"the staging folder {place.name} is a link, or other users can write to it",
                where=f"{place} on {socket.gethostname()}",
                hint="remove it, or set runtime.staging_dir to a folder of your own",
            )


def _unlock(place: Path, lock: int) -> None:
    """Unlock the folder. Its last user removes it, under a name that no other process opens."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = place.with_name(f"{place.name}.gone-{os.getpid()}")
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        os.close(lock)


def _fill(folder: Path, copies: list[tuple[Shard, Path]], place: Path) -> None:
    """Copy what is missing; one process of the node at a time, so the others find it done."""
    with file_lock.acquire(place / "filling"):
        for leftover in place.glob("*.partial"):
            leftover.unlink()
        missing: list[tuple[Shard, Path]] = []
        for shard, path in copies:
            if not path.exists() or path.stat().st_size != shard.bytes:
                missing.append((shard, path))
        need = sum(shard.bytes for shard, _ in missing)
        free = shutil.disk_usage(place).free
        if need > free:
            raise DataError(
                f"staging needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
                where=f"{place.parent} on {socket.gethostname()}",
                hint="set runtime.staging_dir=null, or give another folder",
            )
        with ThreadPoolExecutor(STREAMS) as pool:
            jobs = [pool.submit(_copy, folder / shard.name, path, shard) for shard, path in missing]
            for job in jobs:
                job.result()


def _copy(source: Path, target: Path, shard: Shard) -> None:
    partial = target.with_suffix(".partial")
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY
    with source.open("rb") as shared, os.fdopen(os.open(partial, flags, 0o600), "wb") as local:
        shutil.copyfileobj(shared, local, CHUNK)
    size = partial.stat().st_size
    if size != shard.bytes:
        raise DataError(
            f"{source.name} is {size} bytes, the manifest says {shard.bytes}",
            where=str(source),
            hint=f"jepa shards verify {source.parent}",
        )
    partial.replace(target)
