"""Compare every byte of a split with its index; a fault names the shard and the sample.

In: the folder of a split. Out: one line per fault; nothing on disk changes. The CRC of a sample
covers its headers, image, class and json, and the spans of a shard leave no byte out. So no byte
can change without a fault.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import BLOCKSIZE, TarError, TarInfo

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import Shard
from jepa_cluster.trial.provenance import available_cores


def verify(folder: Path) -> list[str]:
    """Return every fault of a split as one line; none when every byte is as indexed.

    Raises DataError when there is no index.
    """
    manifest, index = manifests.load(folder)
    columns = [index.columns[name] for name in ("start", "size", "crc")]
    first = index.first

    def check(number: int, shard: Shard) -> list[str]:
        rows = slice(first[number], first[number + 1])
        spans = zip(*(column[rows].tolist() for column in columns), strict=True)
        return list(_shard_faults(folder / shard.name, shard, spans))

    with ThreadPoolExecutor(available_cores()) as pool:  # reading and CRC release the GIL
        found = pool.map(check, itertools.count(), manifest.shards)
        faults = list(itertools.chain.from_iterable(found))
    classes = index.labels.get("class")
    if manifest.classes and classes is not None and classes.max() >= len(manifest.classes):
        what = f"{len(manifest.classes)} names of classes, and a class {classes.max()}"
        faults.append(f"{manifests.MANIFEST}: {what}")
    known = {shard.name for shard in manifest.shards}
    unknown = sorted({path.name for path in folder.glob("*.tar")} - known)
    return faults + [f"{name}: not in the manifest; jepa shards index adds it" for name in unknown]


def _shard_faults(
    path: Path,
    shard: Shard,
    spans: Iterable[tuple[int, int, int]],
) -> Iterator[str]:
    """Yield the faults of one shard. spans: first byte, bytes and CRC-32 of each sample."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            yield f"{shard.name}: {size} bytes, the manifest says {shard.bytes}"
        damaged: list[str] = []
        end = 0
        with path.open("rb") as file:
            for number, (start, length, crc) in enumerate(spans):
                file.seek(start)
                span = file.read(length)
                end = start + length
                if zlib.crc32(span) != crc:
                    damage = f"bytes {start}-{end} differ"
                    if len(span) < length:
                        damage = f"cut short at byte {start + len(span)}, it should end at {end}"
                    damaged.append(f"{shard.name}: sample {number}{_key_of(span)}: {damage}")
            file.seek(end)
            tail = file.read()
    except FileNotFoundError:
        yield f"{shard.name}: missing"
        return
    except OSError as error:
        yield f"{shard.name}: {error}"
        return
    yield from damaged
    if damaged and len(damaged) == shard.images:
        why = "another shard under this name, or a stale index"
        yield f"{shard.name}: not one sample is as indexed: {why}"
    # a shard without images has no span
    if shard.images and size >= shard.bytes and (len(tail) < 2 * BLOCKSIZE or tail.strip(b"\0")):
        yield f"{shard.name}: no end of archive after byte {end}"


def _key_of(span: bytes) -> str:
    """Return ' (n01440764_10026)' from the first readable header of the span; '' when none is."""
    for at in range(0, len(span) - BLOCKSIZE + 1, BLOCKSIZE):
        try:
            member = TarInfo.frombuf(span[at : at + BLOCKSIZE], "utf-8", "replace")
        except TarError:
            continue
        return f" ({member.name.split('.')[0]})"
    return ""
