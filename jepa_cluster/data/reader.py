"""Sample number -> the bytes of its image, checked; or an error that says whose fault it is.

Bad bytes are the sample's fault (CorruptSample: the pipeline replaces it and counts). A disk that
does not answer is nobody's sample: it is tried again with growing pauses, then ends as one
DataError that names shard and node. Positional reads, not memory maps: a file that shrinks or a
server that dies gives an errno, not a SIGBUS. At most `DESCRIPTORS` files are open; nothing else
grows.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
from isal import isal_zlib

from jepa_cluster.data.manifest import Index, Manifest, Shard
from jepa_cluster.errors import CorruptSample, DataError

DESCRIPTORS = 64
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds between tries of a failing read
FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR}  # waiting will not mend these


class Reader:
    """Images of one split by sample number. Cheap to make; forked copies share nothing but the index."""

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder, self.manifest, self.index = folder, manifest, index
        self.paths = [folder / s.name for s in manifest.shards]  # replaced when the shards are staged
        self._first = index.first
        self._files: OrderedDict[int, int] = OrderedDict()
        self._rows = [index.columns[c] for c in ("start", "size", "skip", "length", "crc")]

    def check(self) -> None:
        """Every shard is there, at its size. Raises DataError naming all that are not."""
        wrong = [
            f"{s.name}: {why}" for s, p in zip(self.manifest.shards, self.paths, strict=True) if (why := _wrong(s, p))
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise DataError(
                f"{len(wrong)} of {len(self.manifest.shards)} shards are not as the manifest says: "
                + "; ".join(wrong[:5])
                + more,
                where=f"{self.folder} on {socket.gethostname()}",
                now=f"jepa shards verify {self.folder}",
            )

    def place(self, sample: int) -> tuple[int, int]:
        """(shard number, number inside the shard)."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])

    def name(self, sample: int) -> str:
        shard, inside = self.place(sample)
        start, size = int(self._rows[0][sample]), int(self._rows[1][sample])
        return f"{self.manifest.shards[shard].name}, sample {inside} (bytes {start}-{start + size})"

    def image(self, sample: int) -> memoryview:
        """The encoded image. Raises CorruptSample when the bytes are not those that were indexed, else DataError."""
        start, size, skip, length, crc = (int(c[sample]) for c in self._rows)
        shard = self.place(sample)[0]
        span = self._read(shard, start, size)
        if isal_zlib.crc32(span) != crc:
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
                error: OSError = OSError(errno.EIO, f"short read: {len(span)} of {size} bytes at {start}")
            except OSError as e:
                error = e
            self._drop(shard)
            if tries > len(PAUSES) or error.errno in FINAL:
                break
            time.sleep(PAUSES[tries - 1])
        path = self.paths[shard]
        raise DataError(
            f"cannot read {self.manifest.shards[shard].name}: {error.strerror} "
            f"({tries} tries in {time.monotonic() - began:.0f} s)",
            where=f"{path} on {socket.gethostname()}",
            now=f"look at the filesystem on that node, then: jepa shards verify {self.folder}",
        ) from error

    def _file(self, shard: int) -> int:
        fd = self._files.get(shard)
        if fd is None:
            fd = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = fd
            if os.fstat(fd).st_size != self.manifest.shards[shard].bytes:
                self.check()  # names every shard that changed under us
            while len(self._files) > DESCRIPTORS:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return fd

    def _drop(self, shard: int) -> None:
        fd = self._files.pop(shard, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        for shard in list(self._files):
            self._drop(shard)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors do not travel to a spawned worker


def _wrong(shard: Shard, path: Path) -> str:
    try:
        size = path.stat().st_size
    except OSError as e:
        return "missing" if e.errno == errno.ENOENT else str(e.strerror)
    return "" if size == shard.bytes else f"{size} bytes instead of {shard.bytes}"
