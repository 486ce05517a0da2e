"""Index and manifest of shards: of a build, of shards that others wrote, of a mix of sets.

In: the folder of a split, or several. Out: index.npz and manifest.json (see data.manifest). Shards
are only read.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.data import manifest as manifests
from jepa_cluster.data.manifest import COLUMNS, LABEL, Index, Manifest, Shard
from jepa_cluster.data.sources import Label, samples
from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import DataError

Progress = Callable[[str], None]
LeftOut = list[dict[str, str]]  # files, and why


@dataclass(frozen=True)
class Part:
    """One finished shard: its rows of the index, its classes, and the files that were left out."""

    shard: Shard
    columns: dict[str, np.ndarray]
    classes: list[Label]
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
    classes = [label for part in parts for label in part.classes]
    left_out = [file for part in parts for file in part.left_out]
    if not classes:
        hint = "give the folder of one split"
        raise DataError("no *.tar with images here", where=str(folder), hint=hint)
    without_class = classes.count(None)
    if 0 < without_class < len(classes):
        progress(f"{without_class} images have no class: the set gets none")

    joined, names = merge_parts(parts)
    report: dict[str, Any] = {"command": command(), "left_out": left_out}
    with suppress(DataError):  # no readable manifest
        before = manifests.read(folder)
        numbers = joined.labels.get("class")
        if not names and numbers is not None and numbers.max() < len(before.classes):
            # shards of a build of ours: numbers keep their names, the report keeps its history
            names, report = before.classes, {**before.report, **report}
    return manifests.write(folder, joined, names, report)


def index_shard(path: Path) -> Part:
    """Read a shard once. Raises DataError with the byte where the tar is damaged."""
    rows: list[tuple[int, ...]] = []  # as COLUMNS
    classes: list[Label] = []
    numbers: list[dict[str, float]] = []  # numeric labels, other than the class
    skipped: LeftOut = []
    start = 0  # a sample without an image becomes part of the next span: spans leave no byte out
    with path.open("rb") as file:
        for sample in samples(path):
            if sample.image is None:
                skipped.append({"file": f"{path.name}: {sample.key}", "why": "no image"})
                continue
            label, extra = sample.labels(file)
            classes.append(label)
            numbers.append({k: v for k, v in extra.items() if isinstance(v, (int, float))})
            file.seek(start)
            span = file.read(sample.end - start)
            offset, length = sample.parts[sample.image]
            rows.append((start, len(span), offset - start, length, zlib.crc32(span)))
            start = sample.end
    table = np.array(rows, list(COLUMNS.items()))
    columns: dict[str, np.ndarray] = {name: table[name] for name in COLUMNS}
    for name in _shared_keys(numbers) - {"class", "label"}:
        column = np.asarray([labels[name] for labels in numbers])
        dtype = np.float64 if column.dtype.kind == "f" else np.int64
        columns[LABEL + name] = column.astype(dtype)
    shard = Shard(path.name, path.stat().st_size, len(rows))
    return Part(shard, columns, classes, skipped)


def _shared_keys(mappings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that all mappings have; none when there is no mapping."""
    return set(mappings[0]).intersection(*mappings) if mappings else set()


def _concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the columns that all parts have."""
    names = sorted(_shared_keys(parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def merge_parts(
    parts: Sequence[Part],
    names: tuple[str, ...] = (),
) -> tuple[Index, tuple[str, ...]]:
    """Return one index of all parts, and the class names: those given, else those of the shards."""
    shards = tuple(part.shard for part in parts)
    columns = _concatenate([part.columns for part in parts])
    classes = [label for part in parts for label in part.classes]
    if None not in classes:
        if not names:
            names = tuple(sorted({label for label in classes if isinstance(label, str)}))
        numbers: dict[Any, int] = dict(zip(names, range(len(names)), strict=True))
        column = [numbers.get(label, label) for label in classes]
        columns[LABEL + "class"] = np.asarray(column, np.int64)
    return Index(shards, columns), names


def mix(folder: Path, sets: Mapping[Path, int]) -> Manifest:
    """Write one split that holds each image of set k `sets[k]` times, without a copy.

    Every occurrence is a sample with its own crops. Labels that all sets share are kept; the class
    is kept only when all sets have the same class names. Raises DataError.
    """
    is_a_part = folder.resolve() in [path.resolve() for path in sets]
    if is_a_part or any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards of its own",
            where=str(folder),
            hint="write the mix into a folder that is not a set",
        )
    parts: list[Mapping[str, np.ndarray]] = []  # columns, once per repeat of a set
    shards: list[Shard] = []
    class_names: set[tuple[str, ...]] = set()
    for path, weight in sets.items():
        manifest, index = manifests.load(path)
        class_names.add(manifest.classes)
        for _ in range(weight):
            parts.append(index.columns)
            for shard in manifest.shards:
                name = os.path.relpath(path / shard.name, folder)
                shards.append(replace(shard, name=name))
    columns = _concatenate(parts)
    names: tuple[str, ...] = ()
    if len(class_names) > 1:
        columns.pop(LABEL + "class", None)
    elif LABEL + "class" in columns:
        names = class_names.pop()
    weights = {str(path): weight for path, weight in sets.items()}
    folder.mkdir(parents=True, exist_ok=True)
    report = {"command": command(), "mix": weights}
    return manifests.write(folder, Index(tuple(shards), columns), names, report)


def command() -> list[str]:
    return ["jepa", *sys.argv[1:]]
