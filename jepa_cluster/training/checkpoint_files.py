"""The files of a checkpoint: its manifest, and the filesystem operations of a save.

In: a folder. Out: a `Manifest`, or what is wrong with it or with a file that it names. Imports no
torch.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jepa_cluster.errors import CheckpointError, FilesystemFault, JepaError
from jepa_cluster.trial.directory import STEP_WIDTH
from jepa_cluster.trial.files import fsync_folder, names_in, revalidate_folder

MANIFEST = "manifest.json"
FORMAT = 3
CHUNK = 8 << 20  # bytes between two reports of progress
SYNC_EVERY = 256 << 20  # bytes between two fsyncs of one file, so that the last one is short
READS = 3  # of a file that the filesystem cannot read, before that is an error


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, stored as manifest.json.

    shards: number of files, one per writing rank. File k holds rows `row_range(rows, k, shards)` of
    every sharded tensor; file 0 holds the tensors that are not sharded. tensors: name -> [dtype,
    global shape, whether it is sharded]. files: name -> [bytes, CRC-32]. counters: running totals
    at `step`. row: metrics of `step` whose probe has not run yet, else null. detector: state of the
    divergence detector, {} when it is off.
    """

    step: int
    recipe: str
    world: int
    attempt: int
    counters: Mapping[str, float]
    row: Mapping[str, float] | None
    files: Mapping[str, Sequence[int]]
    versions: Mapping[str, str]
    t: int
    format: int = FORMAT
    shards: int = 1
    tensors: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, "Sequence[Any]"])
    detector: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def settled_through(self) -> int:
        """Last step whose metric row is complete, and final once this checkpoint is committed."""
        return self.step if self.row is None else self.step - 1

    def to_bytes(self) -> bytes:
        """JSON with its own CRC-32 as `seal`."""
        values = asdict(self)
        return (
            json.dumps({**values, "seal": _seal(values)}, indent=1, sort_keys=True).encode() + b"\n"
        )


def _seal(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """Raises ValueError when the text is damaged, CheckpointError when it is of another format."""
    values = json.loads(data)
    seal = values.pop("seal", None)
    if seal != _seal(values):
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"this checkpoint has format {values.get('format')},"
            f" this version reads format {FORMAT}",
            where=str(folder),
            hint="finish the trial with the code snapshot that wrote it,"
            " or move checkpoints/ away to start over",
        )
    manifest = Manifest(**values)
    for name in manifest.files:
        if Path(name).name != name:
            raise ValueError(f"{MANIFEST} names a file outside its folder: {name}")
    return manifest


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:0{STEP_WIDTH}d}"


def quarantine_path(folder: Path) -> Path:
    """Return the name under which a damaged checkpoint is set aside."""
    return folder.with_name(f"bad-{folder.name}-{time.time_ns()}")


def row_range(rows: int, part: int, parts: int) -> tuple[int, int]:
    """Return [start, stop) of the rows in part `part` of `parts`, as torch.chunk and FSDP2 do."""
    size = -(-rows // parts)
    start = min(part * size, rows)
    return start, min(start + size, rows)


class Disk:
    """The filesystem operations that a save needs. Tests replace it by one that fails."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write_file(
        self, path: Path, chunks: Iterable[Any], on_progress: Callable[[], None]
    ) -> tuple[int, int]:
        """Create a file, write the chunks, sync -> (bytes, CRC-32) of what was handed over."""
        size = crc = unsynced = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                left = memoryview(chunk).cast("B")
                while left:
                    piece = left[:CHUNK]
                    written = os.write(fd, piece)
                    crc = zlib.crc32(piece[:written], crc)
                    size += written
                    unsynced += written
                    left = left[written:]
                    on_progress()
                    if unsynced >= SYNC_EVERY:
                        os.fsync(fd)
                        unsynced = 0
            os.fsync(fd)
        finally:
            os.close(fd)
        return size, crc

    def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    def fingerprint(self, path: Path, on_progress: Callable[[], None]) -> tuple[int, int]:
        """(bytes, CRC-32) of a file."""
        size = crc = 0
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
                on_progress()
        return size, crc

    def names(self, folder: Path) -> list[str]:
        """Names in a folder; none when there is no such folder."""
        return sorted(names_in(folder))

    def revalidate(self, folder: Path) -> None:
        """Make the next listing of a folder a fresh one, also on NFS."""
        revalidate_folder(folder)

    def sizes(self, folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    def exists(self, path: Path) -> bool:
        return path.exists()

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def sync_folder(self, path: Path) -> None:
        """Make creations, renames and removals in this folder durable."""
        fsync_folder(path)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def remove(self, folder: Path) -> None:
        """Remove a folder; what cannot be removed now is removed before a later save."""
        shutil.rmtree(folder, ignore_errors=True)


LOCAL_DISK = Disk()


def read_manifest(folder: Path, disk: Disk = LOCAL_DISK) -> Manifest | str:
    """Return the manifest, or what is wrong with it.

    Raises CheckpointError for another format, FilesystemFault.
    """
    try:
        return parse_manifest(_retried(disk, lambda: disk.read_file(folder / MANIFEST)), folder)
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except OSError as e:
        raise _unreadable(e) from e
    except (ValueError, TypeError, AttributeError) as e:
        return str(e) if MANIFEST in str(e) else f"{MANIFEST}: {e}"


def check_file(
    path: Path,
    size: int,
    crc: int,
    disk: Disk = LOCAL_DISK,
    on_progress: Callable[[], None] = lambda: None,
) -> list[str]:
    """What is wrong with one file. Raises FilesystemFault when it cannot be read."""
    try:
        found = _retried(disk, lambda: disk.fingerprint(path, on_progress))
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except OSError as e:
        raise _unreadable(e) from e
    if found[0] != size:
        return [f"{path.name} has {found[0]} bytes instead of {size}"]
    return (
        [] if found[1] == crc else [f"{path.name} has CRC-32 {found[1]:08x} instead of {crc:08x}"]
    )


def _retried(disk: Disk, read: Callable[[], Any]) -> Any:
    for left in reversed(range(READS)):
        try:
            return read()
        except OSError as e:
            if not left or e.errno in (errno.ENOENT, errno.ENOTDIR):
                raise
            disk.pause(0.2)
    raise AssertionError("unreachable")


def _unreadable(error: OSError) -> FilesystemFault:
    return FilesystemFault(
        f"unreadable: {describe(error)}",
        hint="the filesystem fails, not the file; try again when it works",
    )


def describe(error: BaseException) -> str:
    """One line: what the system says and which file, or the exception's type and first line."""
    if isinstance(error, JepaError):
        return error.what
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def read_verified(
    folder: Path, disk: Disk = LOCAL_DISK, on_progress: Callable[[], None] = lambda: None
) -> Manifest | str:
    """Read every byte of a checkpoint; return the manifest, or what is wrong."""
    manifest = read_manifest(folder, disk)
    if isinstance(manifest, str):
        return manifest
    faults: list[str] = []
    for name, (size, crc) in manifest.files.items():
        faults += check_file(folder / name, size, crc, disk, on_progress)
    return "; ".join(faults[:3]) or manifest
