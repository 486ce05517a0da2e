"""Sample number -> the bytes of its image, checked; or an error that names the cause.

Bad bytes belong to a sample: CorruptSample, and the pipeline replaces the sample and counts it. A
disk that does not answer belongs to no sample. The read is tried again with growing pauses, then
ends as a DataError that names shard and node. Reads are positional, not through memory maps: a file
that shrinks or a server that dies gives an errno, not a SIGBUS. At most `DESCRIPTORS` files are
open.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import COLUMNS, Index, Manifest, Shard
from jepa_cluster.errors import CorruptSample, DataError

try:
    from isal.isal_zlib import crc32  # three times as fast
except ImportError:
    from zlib import crc32

DESCRIPTORS = 64
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds between tries of a failing read
FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR}  # errors that no waiting removes
SHOWN = 5  # faulty shards that an error names


class Reader:
    """Images of one split by sample number. Forked copies share nothing but the index."""

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder, self.manifest, self.index = folder, manifest, index
        self.paths = [folder / shard.name for shard in manifest.shards]  # replaced when staged
        self._first = index.first
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor
        self._columns = [index.columns[name] for name in COLUMNS]

    def check(self) -> None:
        """Raise DataError, naming the shards, unless every shard is there at its size."""
        found = map(_fault, self.manifest.shards, self.paths)
        faults = list(filter(None, found))
        if not faults:
            return
        named = "; ".join(faults[:SHOWN])
        if len(faults) > SHOWN:
            named += f" and {len(faults) - SHOWN} more"
        shards = f"{len(faults)} of {len(self.paths)} shards"
        raise DataError(
            f"{shards} are not as the manifest says: {named}",
            where=f"{self.folder} on {socket.gethostname()}",
            hint=f"jepa shards verify {self.folder}",
        )

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (shard number, number inside the shard)."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])

    def name(self, sample: int) -> str:
        """Return shard, number and bytes of a sample, for messages."""
        number, inside = self.locate(sample)
        shard = self.manifest.shards[number]
        start = int(self.index.columns["start"][sample])
        end = start + int(self.index.columns["size"][sample])
        return f"{shard.name}, sample {inside} (bytes {start}-{end})"

    def image(self, sample: int) -> memoryview:
        """Return the encoded image.

        Raises CorruptSample when the bytes are not those that were indexed, and DataError when they
        cannot be read.
        """
        start, size, skip, length, crc = (column.item(sample) for column in self._columns)
        shard, _ = self.locate(sample)
        span = self._read(shard, start, size)
        if crc32(span) != crc:
            raise CorruptSample("CRC mismatch", where=self.name(sample))
        return memoryview(span)[skip : skip + length]

    def _read(self, shard: int, start: int, size: int) -> bytes:
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                span = os.pread(self._file(shard), size, start)
                if len(span) == size:
                    return span
                what = f"short read: {len(span)} of {size} bytes at {start}"
                error = OSError(errno.EIO, what)
            except OSError as e:
                error = e
            self._close(shard)
            if tries > len(PAUSES) or error.errno in FINAL:
                break
            time.sleep(PAUSES[tries - 1])
        seconds = time.monotonic() - began
        name = self.manifest.shards[shard].name
        raise DataError(
            f"cannot read {name}: {error.strerror} ({tries} tries in {seconds:.0f} s)",
            where=f"{self.paths[shard]} on {socket.gethostname()}",
            hint=f"look at the filesystem on that node, then: jepa shards verify {self.folder}",
        ) from error

    def _file(self, shard: int) -> int:
        """Return the descriptor of a shard; closes the one that was used least recently."""
        fd = self._files.get(shard)
        if fd is not None:
            self._files.move_to_end(shard)
            return fd
        fd = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = fd
        if os.fstat(fd).st_size != self.manifest.shards[shard].bytes:
            self.check()  # names every shard that changed since the start
        while len(self._files) > DESCRIPTORS:
            _, oldest = self._files.popitem(last=False)
            os.close(oldest)
        return fd

    def _close(self, shard: int) -> None:
        fd = self._files.pop(shard, None)
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        for shard in list(self._files):
            self._close(shard)


def _fault(shard: Shard, path: Path) -> str:
    """Name the shard and what is wrong with its file; '' when nothing is."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{shard.name}: missing"
    except OSError as error:
        return f"{shard.name}: {error.strerror}"
    if size != shard.bytes:
        return f"{shard.name}: {size} bytes instead of {shard.bytes}"
    return ""


def open_split(folder: Path, digest: str | None = None, check_shards: bool = True) -> Reader:
    """Open a reader whose shards are all there. Raises DataError.

    digest: the one that a frozen trial expects. A process reads the index of such a split once, and
    asks once for the sizes of its shards: a probe repeats neither.
    """
    if digest is not None:
        return Reader(folder, *_open_frozen(folder, digest, check_shards))
    reader = Reader(folder, *manifests.load(folder))
    reader.check()
    return reader


@functools.lru_cache(2)
def _open_frozen(folder: Path, digest: str, check_shards: bool) -> tuple[Manifest, Index]:
    made, index = manifests.load(folder)
    if made.digest != digest:
        raise DataError(
            f"the set has digest {made.digest}, the trial was frozen with {digest}",
            where=str(folder),
            hint="point runtime.data_root at the set of the plan, or submit the sweep again",
        )
    if check_shards:
        Reader(folder, made, index).check()
    return made, index
