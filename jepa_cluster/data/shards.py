"""Images -> tar shards that can be verified: build, index, verify.

A shard is a plain tar in the WebDataset layout (`<key>.jpg`, `<key>.cls`, `<key>.json`), written with the webdataset
library and readable by it. Beside the shards stand an index and a manifest (data.manifest). Image bytes are stored
as they came unless a resize is asked for. The same source, options and seed give the same bytes, so a build that
was killed goes on where it stopped: finished shards are kept, everything else lies in a hidden folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import COLUMNS, LABEL, Index, Manifest, Shard
from jepa_cluster.data.sources import IMAGES, Item, labels_of, members, scan, split_key
from jepa_cluster.errors import CorruptSample, DataError
from jepa_cluster.trial.layout import fsync_folder, read_json, write_json

WORK = ".build"  # the plan and finished parts of an unfinished build


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards, beside the images. Recorded in the manifest."""

    shard_bytes: int = 256 << 20
    seed: int = 0
    resize: int | None = None  # shorter side in pixels; None stores the bytes as they came
    quality: int = 95  # of the JPEGs that a resize writes


@dataclass(frozen=True)
class Part:
    """What is known of one finished shard."""

    shard: Shard
    columns: dict[str, np.ndarray]
    report: dict[str, Any]


Progress = Callable[[str], None]


def build(
    source: Path,
    folder: Path,
    options: Options = Options(),
    labels: Path | None = None,
    workers: int | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Pack a source into `folder`. Does nothing when it already holds this very set; goes on after a kill.

    Raises DataError when the source has no usable image or the folder holds another set.
    """
    items, classes = scan(source, labels)
    plan = _plan(items, classes, options)
    if (folder / manifests.MANIFEST).exists():
        done = manifests.read(folder)
        if done.report.get("plan") == plan["plan"]:
            progress(f"{folder}: already built, {done.images} images, digest {done.digest}")
            return done
        raise DataError(
            f"{folder} already holds another set (digest {done.digest})",
            where=str(folder),
            now=f"rm -r {folder}, or give another DST",
        )
    work = folder / WORK
    if work.exists() and (read_json(work / "plan.json") or {}).get("plan") != plan["plan"]:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "plan.json", plan)
    for leftover in work.glob("*.partial"):
        leftover.unlink()
    parts = _write_parts(_cut(items, options), classes, work, options, workers, progress)
    return _publish(parts, classes, folder, work, {"source": str(source), **plan})


def _plan(items: list[Item], classes: tuple[str, ...], options: Options) -> dict[str, Any]:
    h = hashlib.sha256(json.dumps([asdict(options), classes]).encode())
    for i in items:
        h.update(json.dumps([i.file, i.size, i.label, i.extra], sort_keys=True).encode())
    return {"plan": h.hexdigest()[:16], "options": asdict(options), "command": ["jepa", *sys.argv[1:]]}


def _cut(items: list[Item], options: Options) -> list[list[tuple[str, Item]]]:
    """Shuffle with the seed, name the samples, cut into shards by the bytes of the source."""
    names = [i.file.rsplit(".", 1)[0].replace(".", "_").replace("/", "_") for i in items]
    twice = {n for n, c in Counter(names).items() if c > 1}
    keys = [f"{n}_{k}" if n in twice else n for k, n in enumerate(names)]
    raw = np.random.Philox(key=np.array([options.seed, 0], np.uint64)).random_raw(len(items))
    shards: list[list[tuple[str, Item]]] = [[]]
    filled = 0
    for k in np.argsort(raw, kind="stable").tolist():
        if filled and filled + items[k].size > options.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((keys[k], items[k]))
        filled += items[k].size
    return shards


def _write_parts(
    cut: list[list[tuple[str, Item]]],
    classes: tuple[str, ...],
    work: Path,
    options: Options,
    workers: int | None,
    progress: Progress,
) -> list[Part]:
    jobs = [(k, part, classes, work, options) for k, part in enumerate(cut)]
    total, began, images, size = sum(map(len, cut)), time.monotonic(), 0, 0
    parts: dict[int, Part] = {}
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {pool.submit(write_part, *job): job[0] for job in jobs}
        for future in as_completed(futures):
            part = parts[futures[future]] = future.result()
            images, size = images + part.shard.images, size + part.shard.bytes
            seconds = time.monotonic() - began
            progress(
                f"{part.shard.name}: {images}/{total} images, {size / 1e6:.0f} MB, "
                f"{images / seconds:.0f} images/s, {len(parts)}/{len(cut)} shards"
            )
    return [parts[k] for k in sorted(parts)]


def write_part(
    number: int, entries: list[tuple[str, Item]], classes: tuple[str, ...], work: Path, options: Options
) -> Part:
    """Write one shard into the work folder, or read it back when an earlier build finished it."""
    import webdataset

    name = f"shard-{number:06d}.tar"
    done, report_path, partial = work / name, work / f"{name}.json", work / f"{name}.partial"
    if done.exists() and report_path.exists():
        return Part(*_columns(done, classes), read_json(report_path) or {})
    place = {c: n for n, c in enumerate(classes)}
    left_out: list[dict[str, str]] = []
    oddities: Counter[str] = Counter()
    with partial.open("wb") as f, webdataset.TarWriter(f, mtime=0) as tar:
        for key, item in entries:
            try:
                data, odd = _image(item.read(), options)
            except CorruptSample as e:
                left_out.append({"file": item.file, "why": e.what})
                continue
            oddities.update(odd)
            sample: dict[str, Any] = {"__key__": key, "jpg": data}
            extra = {"file": item.file, **item.extra}
            if item.label is not None:
                sample["cls"] = str(place[item.label] if isinstance(item.label, str) else item.label).encode()
                extra["class"] = item.label
            tar.write({**sample, "json": json.dumps(extra, sort_keys=True).encode()})
        tar.close()
        f.flush()
        os.fsync(f.fileno())
    report = {"left_out": left_out, "oddities": dict(oddities)}
    write_json(report_path, report)
    partial.replace(done)
    fsync_folder(work)
    return Part(*_columns(done, classes), report)


def _image(data: bytes, options: Options) -> tuple[bytes, list[str]]:
    """The bytes to store and what is odd about them. Every image is decoded once: a broken one never gets in."""
    from jepa_cluster.data import decode

    odd = decode.oddities(data)
    decode.pixels(data)
    if options.resize is not None:
        data = decode.shrink(data, options.resize, options.quality)
    return data, odd


def _publish(parts: list[Part], classes: tuple[str, ...], folder: Path, work: Path, report: dict[str, Any]) -> Manifest:
    """Move the shards out of the work folder; the manifest comes last."""
    kept = [p for p in parts if p.shard.images]
    if not kept:
        raise DataError("not one image of the source can be decoded", where=str(folder))
    left_out = [x for p in parts for x in p.report.get("left_out", [])]
    odd: Counter[str] = Counter()
    for p in parts:
        odd.update(p.report.get("oddities", {}))
    for p in kept:
        if (work / p.shard.name).exists():
            (work / p.shard.name).replace(folder / p.shard.name)
    fsync_folder(folder)
    made = manifests.write(
        folder, _join(kept), classes, {**report, "left_out": left_out, "oddities": dict(odd), "exif": "ignored"}
    )
    shutil.rmtree(work)
    return made


def _join(parts: Iterable[Part]) -> Index:
    parts = list(parts)
    names = set.intersection(*(set(p.columns) for p in parts))
    return Index(
        tuple(p.shard for p in parts), {n: np.concatenate([p.columns[n] for p in parts]) for n in sorted(names)}
    )


def index(folder: Path, workers: int | None = None, progress: Progress = lambda line: None) -> Manifest:
    """Index and manifest for shards that others wrote. Raises DataError for a damaged or empty one."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError("no *.tar here", where=str(folder), now="give the folder of one split")
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        parts: list[Part] = []
        for shard, columns in pool.map(_columns, tars, [()] * len(tars)):
            parts.append(Part(shard, columns, {}))
            progress(f"{shard.name}: {shard.images} images")
    return manifests.write(folder, _join(parts), (), {"command": ["jepa", *sys.argv[1:]]})


def _columns(path: Path, classes: tuple[str, ...]) -> tuple[Shard, dict[str, np.ndarray]]:
    """Walk a shard once: its rows of the index. Raises DataError with the byte where the tar is damaged."""
    rows: dict[str, list[int]] = {c: [] for c in COLUMNS}
    labels: list[dict[str, Any]] = []
    with path.open("rb") as f:
        for start, end, key, group in samples(path):
            f.seek(start)
            span = f.read(end - start)
            image = next((e for e in group if f".{e}" in IMAGES), None)
            if image is None:
                raise DataError(f"sample {key} at byte {start} has no image", where=str(path))
            offset, length = group[image]
            for name, value in zip(COLUMNS, (start, len(span), offset - start, length, zlib.crc32(span)), strict=True):
                rows[name].append(value)
            texts = {e: span[o - start : o - start + n] for e, (o, n) in group.items() if e in ("cls", "json")}
            label, extra = labels_of(texts, f"{path}: sample {key}")
            if isinstance(label, str):
                label = classes.index(label) if label in classes else None
            labels.append({**_numbers(extra), **({} if label is None else {"class": label})})
    columns = {n: np.asarray(v, COLUMNS[n]) for n, v in rows.items()}
    for name in sorted(set.intersection(*map(set, labels)) if labels else ()):
        values = np.asarray([x[name] for x in labels])
        columns[LABEL + name] = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    return Shard(path.name, path.stat().st_size, len(labels)), columns


def _numbers(extra: dict[str, Any]) -> dict[str, int | float]:
    return {k: v for k, v in extra.items() if isinstance(v, (int, float)) and k not in ("class", "label")}


def samples(path: Path) -> Iterator[tuple[int, int, str, dict[str, tuple[int, int]]]]:
    """(start, end, key, {extension: (offset, length)}) of each sample of a shard. Spans leave no byte out."""
    start = end = 0
    current, group = None, dict[str, tuple[int, int]]()
    for member, offset in members(path):
        key, extension = split_key(member.name) if member.isfile() else ("", "")
        if key and key != current:
            if current is not None:
                yield start, end, current, group
                start = end
            current, group = key, {}
        if key:
            group[extension] = (offset, member.size)
        end = offset + (-(-member.size // 512) * 512 if member.isfile() else 0)
    if current is not None:
        yield start, end, current, group


def verify(folder: Path, progress: Progress = lambda line: None) -> list[str]:
    """Read every byte of a split against its index; what is wrong, one line a fault, naming shard, sample and byte."""
    made, rows = manifests.load(folder)
    faults: list[str] = []
    first = rows.first
    for k, shard in enumerate(made.shards):
        faults += verify_shard(
            folder / shard.name, shard, {n: c[first[k] : first[k + 1]] for n, c in rows.columns.items()}
        )
        progress(f"{shard.name}: {shard.images} images")
    known = {s.name for s in made.shards}
    faults += [f"{p.name}: not in the manifest" for p in sorted(folder.glob("*.tar")) if p.name not in known]
    return faults


def verify_shard(path: Path, shard: Shard, columns: dict[str, np.ndarray]) -> list[str]:
    if not path.exists():
        return [f"{shard.name}: missing"]
    faults: list[str] = []
    if path.stat().st_size != shard.bytes:
        faults.append(f"{shard.name}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    end = 0
    with path.open("rb") as f:
        for n, (start, size, crc) in enumerate(
            zip(columns["start"].tolist(), columns["size"].tolist(), columns["crc"].tolist(), strict=True)
        ):
            f.seek(start)
            span = f.read(size)
            if zlib.crc32(span) != crc:
                faults.append(f"{shard.name}: sample {n}, bytes {start}-{start + size}: CRC mismatch")
            end = start + size
        f.seek(end)
        tail = f.read()
    if tail.strip(b"\0"):
        faults.append(f"{shard.name}: bytes after the last sample, from {end}, are not zero")
    return faults
