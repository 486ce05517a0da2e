"""Images -> tar shards that can be verified: build, index, mix.

A shard is a plain tar in the WebDataset layout (`<key>.jpg`, `<key>.cls`, `<key>.json`), written with the webdataset
library and readable by it. Beside the shards stand an index and a manifest (data.manifest). Image bytes are stored
as they came unless a resize is asked for. The same source, options and seed give the same bytes, so a build that
was killed goes on where it stopped: finished shards are kept, everything else lies in a hidden folder.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import COLUMNS, LABEL, Index, Manifest, Shard
from jepa_cluster.data.sources import Item, samples, scan
from jepa_cluster.errors import CorruptSample, DataError
from jepa_cluster.trial.layout import fsync_folder, open_atomic, read_json, write_json

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
    classes: list[str | int | None]
    report: dict[str, Any]


Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Progress that nobody reads."""


def build(
    source: Path,
    folder: Path,
    options: Options = Options(),
    labels: Path | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Pack a source into `folder`. Does nothing when it already holds this very set; goes on after a kill.

    Raises DataError when the source has no usable image, the folder holds another set, or another build fills it.
    """
    items, classes = scan(source, labels)
    classes = _numbered(classes, folder)
    plan = _plan(items, classes, options)
    work = folder / WORK
    if (folder / manifests.MANIFEST).exists():
        done = manifests.read(folder)
        if done.report.get("plan") != plan["plan"]:
            raise DataError(
                f"{folder} already holds another set (digest {done.digest})",
                where=str(folder),
                now=f"rm -r {folder}, or give another DST",
            )
        shutil.rmtree(work, ignore_errors=True)
        progress(f"{folder}: already built")
        return done
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / "lock", timeout=0).acquire()
    except Timeout as e:
        raise DataError(f"another process is building {folder}", where=str(work), now="wait for it") from e
    with lock:
        import webdataset  # noqa: F401  once, before the processes fork: it brings torch along

        _resume(folder, work, plan)
        cut = _cut(items, options)
        parts: dict[int, Part] = {}
        began, fresh = time.monotonic(), 0
        try:
            with processes(workers) as pool:
                jobs = {pool.submit(_write, k, part, classes, folder, options): k for k, part in enumerate(cut)}
                for job in as_completed(jobs):
                    part = parts[jobs[job]] = job.result()
                    fresh += 0 if part.report.get("kept") else part.shard.images
                    progress(
                        f"{part.shard.name}: {sum(p.shard.images for p in parts.values())}/{len(items)} images, "
                        f"shard {len(parts)} of {len(cut)}, {fresh / (time.monotonic() - began):.0f} images/s"
                    )
            return _publish([parts[k] for k in sorted(parts)], classes, folder, {"source": str(source), **plan})
        except OSError as e:
            raise DataError(
                f"the build stopped: {e}", where=str(folder), now="the same command goes on from here"
            ) from e


def _numbered(classes: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The class names in the numbering of the split beside this one, so that train and val agree."""
    for name in {"train": ("val",), "val": ("train",)}.get(folder.name, ()):
        if (folder.parent / name / manifests.MANIFEST).exists():
            theirs = manifests.read(folder.parent / name).classes
            new = sorted(set(classes) - set(theirs))
            if theirs and new:
                raise DataError(
                    f"class {new[0]} is not among the {len(theirs)} classes of {name}: numbers would disagree",
                    where=str(folder),
                    now="build the split with all classes first",
                )
            classes = theirs or classes
    return classes


def _resume(folder: Path, work: Path, plan: dict[str, Any]) -> None:
    """Forget what an earlier build left, unless it was this very build. Files of others stay, and stop us."""
    earlier = read_json(work / "plan.json")
    if earlier is None and any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards without a manifest",
            where=str(folder),
            now=f"jepa shards index {folder}, or another DST",
        )
    if earlier is not None and earlier.get("plan") != plan["plan"]:
        for path in [*work.glob("shard-*"), *folder.glob("shard-*.tar")]:
            path.unlink()
    for leftover in work.glob(".*"):  # of `open_atomic`
        leftover.unlink()
    write_json(work / "plan.json", plan)


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


def _write(
    number: int, entries: list[tuple[str, Item]], classes: tuple[str, ...], folder: Path, options: Options
) -> Part:
    """Write one shard into the work folder, or read it again when an earlier build finished it."""
    import webdataset

    name, work = f"shard-{number:06d}.tar", folder / WORK
    report_path = work / f"{name}.json"
    report = read_json(report_path)
    if report is not None:  # written after the shard was
        part = _walk(next(p for p in (work / name, folder / name) if p.exists()))
        return replace(part, report={**report, "kept": True})
    place = {c: n for n, c in enumerate(classes)}
    left_out: list[dict[str, str]] = []
    oddities: Counter[str] = Counter()
    with open_atomic(work / name) as f, webdataset.TarWriter(f, mtime=0) as tar:
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
                sample["cls"] = str(place.get(str(item.label), item.label)).encode()
                extra["class"] = item.label
            tar.write({**sample, "json": json.dumps(extra, sort_keys=True).encode()})
    report = {"left_out": left_out, "oddities": dict(oddities)}
    write_json(report_path, report)
    return replace(_walk(work / name), report=report)


def _image(data: bytes, options: Options) -> tuple[bytes, list[str]]:
    """The bytes to store and what is odd about them. Every image is decoded once: a broken one never gets in."""
    from jepa_cluster.data import decode

    odd = decode.oddities(data)
    decode.pixels(data)
    if options.resize is not None:
        data = decode.shrink(data, options.resize, options.quality)
    return data, odd


def _publish(parts: list[Part], classes: tuple[str, ...], folder: Path, report: dict[str, Any]) -> Manifest:
    """Move the shards out of the work folder, the manifest last: until it stands, the build is unfinished."""
    kept = [p for p in parts if p.shard.images]
    if not kept:
        raise DataError("not one image of the source can be decoded", where=str(report["source"]))
    odd: Counter[str] = Counter()
    for p in parts:
        odd.update(p.report["oddities"])
    left_out = [x for p in parts for x in p.report["left_out"]]
    index, names = _join(kept, classes)
    work = folder / WORK
    made = manifests.write(
        work, index, names, {**report, "left_out": left_out, "oddities": dict(odd), "exif orientation": "ignored"}
    )
    for name in [*(p.shard.name for p in kept), manifests.INDEX, manifests.MANIFEST]:
        if (work / name).exists():
            (work / name).replace(folder / name)
    fsync_folder(folder)
    shutil.rmtree(work)
    return made


def index(folder: Path, workers: int | None = None, progress: Progress = silent) -> Manifest:
    """Index and manifest for shards that others wrote. Raises DataError for a damaged or empty one."""
    tars = sorted(folder.glob("*.tar"))
    parts: list[Part] = []
    with processes(workers) as pool:
        for part in pool.map(_walk, tars):
            parts.append(part)
            progress(f"{part.shard.name}: {part.shard.images} images")
    if not any(p.shard.images for p in parts):
        raise DataError("no *.tar with images here", where=str(folder), now="give the folder of one split")
    without = sum(c is None for p in parts for c in p.classes)
    if 0 < without < sum(p.shard.images for p in parts):
        progress(f"{without} images have no class: the set gets none")
    joined, names = _join(parts)
    left_out = [x for p in parts for x in p.report["left_out"]]
    report: dict[str, Any] = {"command": ["jepa", *sys.argv[1:]], "left_out": left_out}
    with suppress(DataError):  # shards of our build, indexed again: numbers keep their names, the report its history
        before = manifests.read(folder)
        if not names and LABEL + "class" in joined.columns and joined.labels["class"].max() < len(before.classes):
            names, report = before.classes, {**before.report, **report}
    return manifests.write(folder, joined, names, report)


def _walk(path: Path) -> Part:
    """Read a shard once: its rows of the index. Raises DataError with the byte where the tar is damaged."""
    rows: list[tuple[int, ...]] = []
    classes: list[str | int | None] = []
    labels: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    start = 0  # spans leave no byte out: one without an image is a part of the next sample's
    with path.open("rb") as f:
        for sample in samples(path):
            if sample.image is None:
                skipped.append({"file": f"{path.name}: {sample.key}", "why": "no image"})
                continue
            offset, length = sample.parts[sample.image]
            label, extra = sample.labels(f)
            f.seek(start)
            rows.append((start, sample.end - start, offset - start, length, zlib.crc32(f.read(sample.end - start))))
            start = sample.end
            classes.append(label)
            labels.append(
                {k: v for k, v in extra.items() if isinstance(v, (int, float)) and k not in ("class", "label")}
            )
    values = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
    columns = {name: values[:, k].astype(kind) for k, (name, kind) in enumerate(COLUMNS.items())}
    for name in sorted(set.intersection(*map(set, labels)) if labels else ()):
        column = np.asarray([x[name] for x in labels])
        columns[LABEL + name] = column.astype(np.float64 if column.dtype.kind == "f" else np.int64)
    return Part(Shard(path.name, path.stat().st_size, len(rows)), columns, classes, {"left_out": skipped})


def _join(parts: Sequence[Part], names: tuple[str, ...] = ()) -> tuple[Index, tuple[str, ...]]:
    """Parts -> one index, and the class names: those given, or those found where shards name their classes."""
    shared = set.intersection(*(set(p.columns) for p in parts))
    columns = {n: np.concatenate([p.columns[n] for p in parts]) for n in sorted(shared)}
    classes = [c for p in parts for c in p.classes]
    if all(c is not None for c in classes):
        names = names or tuple(sorted({c for c in classes if isinstance(c, str)}))
        place: dict[Any, int] = {c: n for n, c in enumerate(names)}
        columns[LABEL + "class"] = np.asarray([place.get(c, c) for c in classes], np.int64)
    return Index(tuple(p.shard for p in parts), columns), names


def mix(folder: Path, sets: Mapping[Path, int]) -> Manifest:
    """Write one split that holds each image of set k `sets[k]` times, without a copy.

    Every occurrence is a sample with its own crops. Labels that all sets share are kept; the class is
    kept only when all sets have the same class names. Raises DataError.
    """
    parts = {path.resolve() for path in sets}
    if folder.resolve() in parts or any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards of its own",
            where=str(folder),
            now="write the mix into a folder that is not a set",
        )
    indices: list[Index] = []  # one per set and repeat
    classes: set[tuple[str, ...]] = set()
    shards: list[Shard] = []
    for path, weight in sets.items():
        made, index = manifests.load(path)
        classes.add(made.classes)
        moved = [replace(s, name=os.path.relpath(path / s.name, folder)) for s in made.shards]
        indices += [index] * weight
        shards += moved * weight
    names = set.intersection(*(set(index.columns) for index in indices))
    if len(classes) > 1:
        names.discard(LABEL + "class")
    columns = {name: np.concatenate([index.columns[name] for index in indices]) for name in names}
    class_names = classes.pop() if LABEL + "class" in names else ()
    weights = {str(path): weight for path, weight in sets.items()}
    report = {"command": ["jepa", *sys.argv[1:]], "mix": weights}
    folder.mkdir(parents=True, exist_ok=True)
    return manifests.write(folder, Index(tuple(shards), columns), class_names, report)


@contextmanager
def processes(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that die with their parent; one that dies alone ends the work with a DataError."""
    try:
        with ProcessPoolExecutor(workers or os.cpu_count(), initializer=follow_parent) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenExecutor as e:
        raise DataError(
            "a working process was killed, most often for memory", now="the same command again, with fewer --workers"
        ) from e


def follow_parent() -> None:
    """This process leaves SIGINT to its parent and dies with it, whatever it is waiting for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
