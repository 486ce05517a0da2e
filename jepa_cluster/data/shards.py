"""Images -> tar shards that can be verified.

A shard is a plain tar in the WebDataset layout (`<key>.jpg`, `<key>.cls`, `<key>.json`), written
with the webdataset library and readable by it. An index and a manifest lie beside the shards (see
data.manifest). Image bytes are stored as they came unless a resize is asked for. The same source,
options and seed give the same bytes. So a build that was killed continues where it stopped:
finished shards are kept, everything else lies in a hidden folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from webdataset.writer import TarWriter

from jepa_cluster.data import decode
from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.imagenet_devkit import Label
from jepa_cluster.data.indexing import (
    LeftOut,
    Part,
    Progress,
    class_names,
    command,
    index_shard,
    merge_parts,
    missing_labels,
)
from jepa_cluster.data.manifest import Manifest
from jepa_cluster.data.sources import Item, Scan
from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import CorruptSample, DataError, plural
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.files import fsync_folder, open_atomic, read_json, write_json

WORK = ".build"  # the plan and finished parts of an unfinished build


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards, beside the images. Recorded in the manifest."""

    shard_bytes: int = 256 << 20
    seed: int = 0
    resize: int | None = None  # shorter side in pixels; None stores the bytes as they came
    quality: int = 95  # of the JPEGs that a resize writes


Entry = tuple[str, Item]  # the key of a sample, and its image


def build(
    source: Scan,
    folder: Path,
    options: Options = Options(),
    workers: int | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Pack a source into `folder`, or continue a build that was killed.

    Does nothing when the folder already holds this very set. Raises DataError when the source has
    no usable image, the folder holds another set, or another process is building it.
    """
    items, names = source.items, class_names(source.classes, folder)
    highest = max((item.label for item in items if isinstance(item.label, int)), default=-1)
    if names and highest >= len(names):
        what = f"there is a class {highest}, and the split beside this one names {len(names)}"
        raise DataError(what, where=str(folder), hint="number the classes from 0, or name them")
    plan = _plan(items, names, options)
    work = folder / WORK
    if (folder / manifests.MANIFEST).exists():
        built = manifests.read(folder)
        if built.report.get("plan") != plan["plan"]:
            raise DataError(
                f"{folder} already holds another set (digest {built.digest})",
                where=str(folder),
                hint=f"rm -r {folder}, or give another DST",
            )
        shutil.rmtree(work, ignore_errors=True)
        progress(f"{folder}: already built")
        return built

    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = file_lock.acquire(work / "lock", timeout=0)
    except Timeout as error:
        what = f"another process is building {folder}"
        raise DataError(what, where=str(work), hint="wait for it") from error
    with lock:
        _remove_leftovers(folder, work, plan)
        assigned = _assign_to_shards(items, options)
        writer = ShardWriter(folder, names, options)
        parts: list[Part] = []
        packed = 0
        try:
            with processes(workers) as pool:
                for part in pool.map(writer.write_shard, range(len(assigned)), assigned):
                    parts.append(part)
                    packed += part.shard.images
                    shard = f"shard {len(parts)} of {len(assigned)}"
                    progress(f"{part.shard.name}: {packed}/{len(items)} images, {shard}")
            report = {"source": str(source.path), **plan, "skipped": source.skipped}
            return _move_into_place(parts, names, folder, report)
        except OSError as error:
            what = f"the build stopped: {error}"
            hint = "the same command continues from here"
            raise DataError(what, where=str(folder), hint=hint) from error


def without_validation(source: Scan, fraction: float, seed: int) -> tuple[Scan, Scan]:
    """Split a source into training and validation images -> (train, val).

    Of each class, `fraction` of the images are chosen at random, at least one, and not all.
    """
    by_class: dict[Label, list[Item]] = {}
    for item in source.items:
        by_class.setdefault(item.label, []).append(item)
    philox = np.random.Philox(key=np.array([seed, 1], np.uint64))
    held_out: set[str] = set()
    for label in sorted(by_class, key=str):
        items = by_class[label]
        count = min(max(1, round(fraction * len(items))), len(items) - 1)
        order = np.argsort(philox.random_raw(len(items)), kind="stable")
        held_out.update(items[number].file for number in order[:count].tolist())
    train = [item for item in source.items if item.file not in held_out]
    val = [item for item in source.items if item.file in held_out]
    if not val:
        what = f"{plural(len(source.items), 'image')}, each alone in its class"
        raise DataError(what, where=str(source.path), hint="a validation image needs a second one")
    return source._replace(items=train), source._replace(items=val, skipped={})


def _plan(items: list[Item], names: tuple[str, ...], options: Options) -> dict[str, Any]:
    """Return what identifies a build: a hash of the source and the options, and the command."""
    digest = hashlib.sha256(json.dumps([asdict(options), names]).encode())
    for item in items:
        row = [item.file, item.size, item.label, item.extra]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return {"plan": digest.hexdigest()[:16], "options": asdict(options), "command": command()}


def _remove_leftovers(folder: Path, work: Path, plan: dict[str, Any]) -> None:
    """Remove what another build left. Raises DataError when the folder holds shards of others."""
    earlier = read_json(work / "plan.json")
    if earlier is None and any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards without a manifest",
            where=str(folder),
            hint=f"jepa shards index {folder}, or another DST",
        )
    leftovers = list(work.glob(".*"))  # of `open_atomic`
    if earlier is not None and earlier.get("plan") != plan["plan"]:
        leftovers += [*work.glob("shard-*"), *folder.glob("shard-*.tar")]
    for path in leftovers:
        path.unlink()
    write_json(work / "plan.json", plan)


def _assign_to_shards(items: list[Item], options: Options) -> list[list[Entry]]:
    """Shuffle the images with the seed and fill one shard after another up to its size."""
    keys = _sample_keys(items)
    philox = np.random.Philox(key=np.array([options.seed, 0], np.uint64))
    order = np.argsort(philox.random_raw(len(items)), kind="stable")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for number in order.tolist():
        item = items[number]
        if filled and filled + item.size > options.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((keys[number], item))
        filled += item.size
    return shards


def _sample_keys(items: list[Item]) -> list[str]:
    """Name each sample after its file; a name that occurs twice gets the number of its file."""
    stems = (item.file.rsplit(".", 1)[0] for item in items)
    names = [stem.replace(".", "_").replace("/", "_") for stem in stems]
    counts = Counter(names)
    keys: list[str] = []
    for number, name in enumerate(names):
        keys.append(f"{name}_{number}" if counts[name] > 1 else name)
    return keys


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards into the work folder of `folder`."""

    folder: Path
    names: tuple[str, ...]  # of the classes, by number
    options: Options

    def write_shard(self, number: int, entries: list[Entry]) -> Part:
        """Write one shard; only index it when an earlier build finished it."""
        path = self.folder / WORK / f"shard-{number:06d}.tar"
        report_path = path.with_name(f"{path.name}.json")  # written after the shard
        report = read_json(report_path)
        if report is None:
            report = {"left_out": self.write_tar(path, entries)}
            write_json(report_path, report)
        if not path.exists():
            path = self.folder / path.name
        return replace(index_shard(path), left_out=report["left_out"])

    def write_tar(self, path: Path, entries: list[Entry]) -> LeftOut:
        """Write the images that can be decoded. Returns the files that are left out, and why."""
        class_numbers = {name: number for number, name in enumerate(self.names)}
        resize, quality = self.options.resize, self.options.quality
        left_out: LeftOut = []
        with open_atomic(path) as file, TarWriter(file, mtime=0) as tar:
            for key, item in entries:
                data = item.read()
                try:
                    image = decode.decode_rgb(data)
                except CorruptSample as error:
                    left_out.append({"file": item.file, "why": error.what})
                    continue
                if resize is not None:
                    data = decode.resize_jpeg(data, image, resize, quality)
                tar.write(_members(key, item, data, class_numbers))
        return left_out


def _members(
    key: str,
    item: Item,
    data: bytes,
    class_numbers: dict[str, int],
) -> dict[str, Any]:
    """Return the members of a sample, as webdataset's writer wants them."""
    sample: dict[str, Any] = {"__key__": key, "jpg": data}
    extra = {"file": item.file, **item.extra}
    if item.label is not None:
        sample["cls"] = str(class_numbers.get(str(item.label), item.label)).encode()
        extra["class"] = item.label
    sample["json"] = json.dumps(extra, sort_keys=True).encode()
    return sample


def _move_into_place(
    parts: list[Part],
    names: tuple[str, ...],
    folder: Path,
    report: dict[str, Any],
) -> Manifest:
    """Move the shards out of the work folder; the manifest comes last and completes the build."""
    kept = [part for part in parts if part.shard.images]
    if not kept:
        what = "not one image of the source can be decoded"
        raise DataError(what, where=str(report["source"]))
    left_out = [file for part in parts for file in part.left_out]
    skipped = {**report["skipped"], **missing_labels(kept)}
    report = {**report, "left_out": left_out, "skipped": skipped, "exif orientation": "ignored"}
    joined, names = merge_parts(kept, folder, names)
    work = folder / WORK
    manifest = manifests.write(work, joined, names, report)
    for name in [*(shard.name for shard in joined.shards), manifests.INDEX, manifests.MANIFEST]:
        if (work / name).exists():
            (work / name).replace(folder / name)
    fsync_folder(folder)
    shutil.rmtree(work)
    return manifest
