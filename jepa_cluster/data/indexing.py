"""Index and manifest of shards: of a build, or of shards that others wrote.

In: the folder of a split. Out: index.npz and manifest.json (see data.manifest). Shards are
only read.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.imagenet_devkit import Label
from jepa_cluster.data.manifest import COLUMNS, LABEL, Index, Manifest, Shard
from jepa_cluster.data.sources import Skipped, count_skipped, skip_beside_shards
from jepa_cluster.data.tar_samples import MAX_CLASS, samples
from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import DataError

Progress = Callable[[str], None]
LeftOut = list[dict[str, str]]  # files, and why
OTHER_SPLIT = {"train": "val", "val": "train"}


@dataclass(frozen=True)
class Part:
    """One finished shard: its rows of the index and its classes.

    columns: of the spans, and of the numbers that every sample has. some: labels of a part of the
    samples -> how many have it. kinds: "name", "number" or "none" -> the first sample with such a
    class. left_out: files, and why.
    """

    shard: Shard
    columns: dict[str, np.ndarray]
    some: dict[str, int]
    classes: list[Label]
    kinds: dict[str, str]
    left_out: LeftOut


def index(
    folder: Path,
    workers: int | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Write index and manifest for shards that others wrote.

    Raises DataError for a damaged shard, and when there is no image.
    """
    parts: list[Part] = []
    with processes(workers) as pool:
        for part in pool.map(index_shard, sorted(folder.glob("*.tar"))):
            progress(f"{part.shard.name}: {part.shard.images} images")
            parts.append(part)
    left_out = [file for part in parts for file in part.left_out]
    if not any(part.shard.images for part in parts):
        what = "no *.tar with images here"
        if left_out:
            what = f"no image in these shards; {left_out[0]['file']}: {left_out[0]['why']}"
        raise DataError(what, where=str(folder), hint="give the folder of one split")

    named = {label for part in parts for label in part.classes if isinstance(label, str)}
    names = class_names(tuple(sorted(named)), folder) if named else ()
    joined, names = merge_parts(parts, folder, names)
    skipped: Skipped = defaultdict(list)
    skip_beside_shards(folder, skipped)
    counts = {**count_skipped(skipped), **missing_labels(parts)}
    for why, files in counts.items():
        progress(f"skipped: {why}: {files}")
    report: dict[str, Any] = {"command": command(), "left_out": left_out, "skipped": counts}
    with suppress(DataError):  # no readable manifest
        before = manifests.read(folder)
        numbers = joined.labels.get("class")
        if not names and numbers is not None and numbers.max() < len(before.classes):
            # shards of a build of ours: numbers keep their names, the report keeps its history
            names = before.classes
            skipped_before = before.report.get("skipped", {})
            earlier = before.report.get("left_out", [])
            report["left_out"] = earlier + [file for file in left_out if file not in earlier]
            report["skipped"] = {**skipped_before, **counts}
            report = {**before.report, **report}
    return manifests.write(folder, joined, names, report)


def class_names(names: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the class names of the split beside this one, so that train and val agree."""
    other = OTHER_SPLIT.get(folder.name, "")
    beside = folder.parent / other
    if not other or not (beside / manifests.MANIFEST).exists():
        return names
    known = manifests.read(beside).classes
    new = sorted(set(names) - set(known))
    if known and new:
        what = f"class {new[0]} is not among the {len(known)} classes of {other}"
        raise DataError(
            f"{what}: numbers would disagree",
            where=str(folder),
            hint="build the split with all classes first",
        )
    return known or names


def missing_labels(parts: Sequence[Part]) -> dict[str, str]:
    """Return why labels are not in the index -> which ones."""
    images = without_class = 0
    first = ""  # image without a class
    counts: Counter[str] = Counter()
    for part in parts:
        images += part.shard.images
        without_class += part.classes.count(None)
        first = first or part.kinds.get("none", "")
        counts.update(part.some)
        for name in part.columns:
            counts[name] += part.shard.images
    missing: dict[str, str] = {}
    if 0 < without_class < images:
        why = "no class, so the set gets none"
        missing[why] = f"{without_class} of {images} images, the first is {first}"
    for name, count in sorted(counts.items()):
        if count < images:
            label = name.removeprefix(LABEL)
            missing[f"label {label} is no number of every image"] = f"{count} of {images} have it"
    return missing


def index_shard(path: Path) -> Part:
    """Read a shard once. Raises DataError with the byte where the tar is damaged."""
    rows: list[tuple[int, ...]] = []  # as COLUMNS
    classes: list[Label] = []
    kinds: dict[str, str] = {}
    numbers: list[dict[str, float]] = []  # numeric labels, other than the class
    left_out: LeftOut = []
    start = end = 0  # spans leave no byte out: a sample without an image is part of the next one

    def add(offset: int, length: int, end: int) -> None:
        """Add the row of an image at `offset`, whose span goes from `start` to `end`."""
        file.seek(start)
        crc = zlib.crc32(file.read(end - start))
        rows.append((start, end - start, offset - start, length, crc))

    with path.open("rb") as file:
        for sample in samples(path):
            end = sample.end
            for name, why in sample.left_out().items():
                left_out.append({"file": f"{path.name}: {name}", "why": why})
            if not sample.images:
                continue
            label, extra = sample.labels(file)
            classes.append(label)
            kinds.setdefault(_kind(label), f"{path.name}: {sample.key}")
            numbers.append(_finite_numbers(extra))
            add(*sample.parts[sample.images[0]], end)
            start = end
        if rows and end > start:  # samples without an image at the end: to the last span
            start, _, skip, length, _ = rows.pop()
            add(start + skip, length, end)
    table = np.array(rows, list(COLUMNS.items()))
    columns: dict[str, np.ndarray] = {name: table[name] for name in COLUMNS}
    counts = Counter(name for labels in numbers for name in labels)
    for name, count in counts.items():
        if count == len(numbers):
            columns[LABEL + name] = _label_column([labels[name] for labels in numbers])
    some = {LABEL + name: count for name, count in counts.items() if count < len(numbers)}
    shard = Shard(path.name, path.stat().st_size, len(rows))
    return Part(shard, columns, some, classes, kinds, left_out)


def _kind(label: Label) -> str:
    if label is None:
        return "none"
    return "name" if isinstance(label, str) else "number"


def _finite_numbers(extra: Mapping[str, Any]) -> dict[str, float]:
    """Return the labels that are numbers, other than the class. NaN and infinity are none."""
    found: dict[str, float] = {}
    for name, value in extra.items():
        is_class = name in ("class", "label") and isinstance(value, int)
        if is_class or not isinstance(value, (int, float)):
            continue
        with suppress(OverflowError):
            if math.isfinite(float(value)):
                found[name] = value
    return found


def _label_column(values: list[float]) -> np.ndarray:
    """Return int64 when every value can be a class, float64 otherwise."""
    is_class = all(isinstance(value, int) and 0 <= value <= MAX_CLASS for value in values)
    return np.asarray(values, np.int64 if is_class else np.float64)


def merge_parts(
    parts: Sequence[Part],
    folder: Path,
    names: tuple[str, ...] = (),
) -> tuple[Index, tuple[str, ...]]:
    """Return one index of all parts, and the class names: those given, else those of the shards.

    Raises DataError when some classes are names and others numbers.
    """
    shards = tuple(part.shard for part in parts)
    tables = [part.columns for part in parts if part.shard.images]
    shared = set(tables[0]).intersection(*tables) if tables else set[str]()
    columns: dict[str, np.ndarray] = {}
    for name in sorted(shared):
        columns[name] = np.concatenate([table[name] for table in tables])
    classes = [label for part in parts for label in part.classes]
    kinds = {kind: sample for part in reversed(parts) for kind, sample in part.kinds.items()}
    if "name" in kinds and "number" in kinds:
        raise DataError(
            f"some classes are names ({kinds['name']}) and others numbers ({kinds['number']})",
            where=str(folder),
            hint="write the shards again with classes of one kind",
        )
    if "none" not in kinds:
        if not names:
            names = tuple(sorted({label for label in classes if isinstance(label, str)}))
        numbers: dict[Any, int] = dict(zip(names, range(len(names)), strict=True))
        column = [numbers.get(label, label) for label in classes]
        columns[LABEL + "class"] = np.asarray(column, np.int64)
    return Index(shards, columns), names


def command() -> list[str]:
    return ["jepa", *sys.argv[1:]]
