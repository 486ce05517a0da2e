"""What a split is, from two small files beside its shards.

    <data_root>/<split>/manifest.json    counts, classes, shards with sizes, the digest, its origin
    <data_root>/<split>/index.npz        per sample: where its bytes are, their CRC, its labels
    <data_root>/<split>/shard-000000.tar ...

In: a folder. Out: `Manifest` (cheap: a plan reads only this) and `Index` (numpy columns, for
readers). The digest names the content: shard names, sizes and order, and every column of the index.
This module imports no torch and opens no shard.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.errors import DataError
from jepa_cluster.trial.files import open_atomic, write_json

VERSION = 1
SPLITS = ("train", "val")
MANIFEST, INDEX = "manifest.json", "index.npz"

# Columns of the index, one row per sample, in stream order. The span of a sample is every byte from
# the end of the sample before it to the end of the padding of its last member. So it holds headers,
# image, class and json.
COLUMNS = {
    "start": np.int64,  # first byte of the span in its shard
    "size": np.uint32,  # bytes of the span
    "skip": np.uint32,  # where the image begins inside the span
    "length": np.uint32,  # bytes of the image
    "crc": np.uint32,  # CRC-32 of the span
}
LABEL = "label/"  # columns of labels: label/class int64, label/<other> int64 or float64


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    images: int


@dataclass(frozen=True)
class Manifest:
    """One split, as it was when it was built or indexed."""

    digest: str
    images: int
    shards: tuple[Shard, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]  # class number -> name; empty when the source gave numbers only
    report: Mapping[str, Any]  # how it was made; what was left out

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Index:
    """Columns of all samples of a split, in the order of the shards; about 32 bytes per sample."""

    shards: tuple[Shard, ...]
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["start"])

    @property
    def first(self) -> np.ndarray:
        """int64[shards + 1]: the number of the first sample of each shard, and the total."""
        counts = [shard.images for shard in self.shards]
        return np.cumsum([0, *counts], dtype=np.int64)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        names = sorted(name for name in self.columns if name.startswith(LABEL))
        return {name.removeprefix(LABEL): self.columns[name] for name in names}

    @property
    def bytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def digest(self) -> str:
        """16 hex digits of SHA-256 over shard names, sizes and order, and over every column."""
        shards = [[shard.name, shard.bytes, shard.images] for shard in self.shards]
        digest = hashlib.sha256(json.dumps([VERSION, shards]).encode())
        for name, column in sorted(self.columns.items()):
            digest.update(f"{name} {column.dtype.str} {len(column)}\n".encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()[:16]


def read(folder: Path | str) -> Manifest:
    """Read the manifest of a split.

    Raises DataError, with the command that makes a manifest, when it is missing or unreadable.
    """
    path = Path(folder) / MANIFEST
    try:
        values = json.loads(path.read_text())
        version = values.pop("version")
        if version != VERSION:
            raise DataError(
                f"manifest version {version}, this program reads {VERSION}",
                where=str(path),
                hint=_index_command(folder),
            )
        for name in ("labels", "classes"):
            values[name] = tuple(values[name])
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return Manifest(shards=shards, **values)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"no {MANIFEST}, so no data set here"
        raise DataError(what, where=str(folder), hint=_making_command(path.parent)) from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"{MANIFEST} is damaged: {error!r}"
        raise DataError(what, where=str(path), hint=_index_command(folder)) from error


def _index_command(folder: Path | str) -> str:
    return f"jepa shards index {folder}"


def _making_command(folder: Path) -> str:
    """Return the command that makes a data set of what the folder holds."""
    if folder.is_dir() and any(folder.glob("*.tar")):
        return _index_command(folder)
    data_root = folder.parent if folder.name in SPLITS else folder
    return f"jepa shards build <images> {data_root}"


def write(
    folder: Path,
    index: Index,
    classes: tuple[str, ...],
    report: Mapping[str, Any],
) -> Manifest:
    """Write index.npz, then manifest.json: a split is complete when its manifest exists."""
    manifest = Manifest(
        digest=index.digest(),
        images=len(index),
        shards=index.shards,
        labels=tuple(index.labels),
        classes=classes,
        report=report,
    )
    with open_atomic(folder / INDEX) as file:
        np.savez(file, **dict(index.columns))  # type: ignore[arg-type]
    write_json(folder / MANIFEST, {"version": VERSION, **asdict(manifest)})
    return manifest


def load(folder: Path | str) -> tuple[Manifest, Index]:
    """Read manifest and index. Raises DataError when they do not belong together."""
    manifest = read(folder)
    path = Path(folder) / INDEX
    command = _index_command(folder)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = dict(arrays)
    except FileNotFoundError as error:
        raise DataError(f"no {INDEX} beside the manifest", where=str(path), hint=command) from error
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{INDEX} is damaged: {error}", where=str(path), hint=command) from error
    index = Index(manifest.shards, columns)
    if COLUMNS.keys() - columns.keys() or index.digest() != manifest.digest:
        raise DataError(
            f"{INDEX} is not the one the manifest speaks of (digest {manifest.digest})",
            where=str(path),
            hint=f"{command} to index the shards as they are now",
        )
    _require_agreement(manifest, index, str(path.with_name(MANIFEST)), command)
    return manifest, index


def _require_agreement(manifest: Manifest, index: Index, where: str, command: str) -> None:
    """Raise DataError when counts or labels of a manifest are not those of its index."""
    facts = {
        "images": (manifest.images, len(index)),
        "images of its shards": (sum(shard.images for shard in manifest.shards), len(index)),
        "labels": (manifest.labels, tuple(index.labels)),
    }
    for name, (stated, found) in facts.items():
        if stated != found:
            what = f"{MANIFEST} and {INDEX} disagree: {name} {stated} and {found}"
            raise DataError(what, where=where, hint=command)
