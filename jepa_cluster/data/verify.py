"""Every byte of a split against its index: faults that name shard, sample and byte. Changes nothing.

A sample's CRC covers its headers, image, class and json, and spans leave no byte out, so nothing can change
unseen. Where one byte differs, the CRC itself says which one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import TarError, TarInfo

import numpy as np

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import COLUMNS, Shard


def verify(folder: Path, progress: Callable[[str], None] = lambda line: None) -> list[str]:
    """All faults of a split, one line each; none when every byte is as indexed. DataError when there is no index."""
    made, index = manifests.load(folder)
    first = index.first
    jobs = {s.name: {c: index.columns[c][first[k] : first[k + 1]] for c in COLUMNS} for k, s in enumerate(made.shards)}
    shards = {s.name: s for s in made.shards}  # a mix names a shard more than once
    faults: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading and CRC leave Python
        found = pool.map(lambda s: list(_shard(folder / s.name, s, jobs[s.name])), shards.values())
        for shard, lines in zip(shards.values(), found, strict=True):
            faults += lines
            progress(f"{shard.name}: {shard.images} images, {len(lines) or 'no'} faults")
    return faults + [
        f"{p.name}: not in the manifest; `jepa shards index` would add it"
        for p in sorted(folder.glob("*.tar"))
        if p.name not in shards
    ]


def _shard(path: Path, shard: Shard, columns: dict[str, np.ndarray]) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            yield f"{shard.name}: {size} bytes, the manifest says {shard.bytes}"
        wrong: list[str] = []
        end = 0
        with path.open("rb") as f:
            for n, row in enumerate(zip(*(columns[c].tolist() for c in COLUMNS), strict=True)):
                start, length, skip, image, crc = row
                f.seek(start)
                span = f.read(length)
                end = start + length
                if len(span) < length or zlib.crc32(span) != crc:
                    wrong.append(
                        f"{shard.name}: sample {n}{_key(span)}: {_damage(span, start, length, skip, image, crc)}"
                    )
            f.seek(end)
            tail = f.read()
    except OSError as e:
        yield f"{shard.name}: {'missing' if isinstance(e, FileNotFoundError) else e}"
        return
    yield from wrong
    if wrong and len(wrong) == shard.images:
        yield f"{shard.name}: not one sample is as indexed: another shard under this name, or a stale index"
    if size >= shard.bytes and (len(tail) < 1024 or tail.strip(b"\0")):
        yield f"{shard.name}: no end of archive after byte {end}"


def _key(span: bytes) -> str:
    """' (n01440764_10026)' from the first header of the span that is whole; '' when none is."""
    for at in range(0, len(span) - 511, 512):
        try:
            return f" ({TarInfo.frombuf(span[at : at + 512], 'utf-8', 'replace').name.split('.')[0]})"
        except TarError:
            continue
    return ""


def _damage(span: bytes, start: int, length: int, skip: int, image: int, crc: int) -> str:
    if len(span) < length:
        return f"cut short at byte {start + len(span)}, it should end at {start + length}"
    one = single_byte(span, crc)
    if one is not None:
        inside = "the image" if skip <= one < skip + image else "a header, label or padding"
        return f"byte {start + one} differs, in {inside}"
    whole = np.frombuffer(span[: length // 512 * 512], np.uint8).reshape(-1, 512)
    header = skip // 512 - 1
    if not whole[header].any():
        return f"zeros from byte {start + header * 512}, where the image's header was"
    empty = np.flatnonzero(~whole[skip // 512 : (skip + image) // 512].any(1))
    if len(empty):
        return f"zeros from byte {start + skip // 512 * 512 + int(empty[0]) * 512}, inside the image"
    return f"bytes {start}-{start + length} differ"


def _table() -> list[int]:
    values = list(range(256))
    for _ in range(8):
        values = [(v >> 1) ^ (0xEDB88320 if v & 1 else 0) for v in values]
    return values


_FORWARD = _table()
_BACK = {v >> 24: (v, n) for n, v in enumerate(_FORWARD)}  # the top byte of an entry names it
_ERRORS = {v: n for n, v in enumerate(_FORWARD) if n}  # effect on the CRC -> what was XORed into the last byte


def single_byte(data: bytes, crc: int) -> int | None:
    """Where one changed byte explains the wrong CRC-32; None when more than one byte differs.

    CRC is linear: the difference of the two CRCs is that of the error byte followed by zeros. It is run backwards,
    a zero at a time, until it is the effect of a single byte, which is then put right to make sure.
    """
    state = zlib.crc32(data) ^ crc
    for at in range(len(data) - 1, -1, -1):
        error = _ERRORS.get(state)
        if error is not None:
            mended = data[:at] + bytes([data[at] ^ error]) + data[at + 1 :]
            if zlib.crc32(mended) == crc:
                return at
        value, low = _BACK[state >> 24]
        state = ((state ^ value) << 8) & 0xFFFFFFFF | low
    return None
