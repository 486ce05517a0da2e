"""What a split is, from two small files beside its shards: manifest.json for people and plans, index.npz for readers.

    <data_root>/<split>/manifest.json    counts, classes, shards with sizes, the digest, the command that made it
    <data_root>/<split>/index.npz        one row a sample: where its bytes are, their CRC, its labels
    <data_root>/<split>/shard-000000.tar ...

In: a folder. Out: `Manifest` (cheap: a plan reads only this) and `Index` (numpy columns). The digest names the
content: shard names, sizes and order, every column of the index, and the shares of a mix. Torch-free; opens no shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.data.order import Share, epoch_images
from jepa_cluster.errors import DataError
from jepa_cluster.trial.layout import write_atomic, write_json

VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.npz"

# Columns of the index, one row a sample, in stream order. A sample's *span* is every byte from the end of the
# sample before it to the end of its last member's padding: headers, image, class, json. One CRC-32 covers it all.
COLUMNS = {
    "start": np.int64,  # first byte of the span in its shard
    "size": np.uint32,  # bytes of the span
    "skip": np.uint32,  # where the image begins inside the span
    "length": np.uint32,  # bytes of the image
    "crc": np.uint32,  # CRC-32 of the span
}
LABEL = "label/"  # columns of labels: label/class int32, label/<other> int64 or float64


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    images: int


@dataclass(frozen=True)
class Manifest:
    """One split. digest: 16 hex digits; labels: names that samples can be asked for ("class" and others)."""

    digest: str
    images: int  # samples an epoch
    shards: tuple[Shard, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]  # names by class number; () when only numbers are known
    report: Mapping[str, Any] = field(default_factory=dict)  # how it was made, and what was odd or left out
    shares: tuple[Share, ...] = ()  # samples of which an epoch shows some; only a mix has any

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.shards)


@dataclass(frozen=True)
class Index:
    """Columns of all samples of a split, in the order of the shards. About 32 bytes a sample in memory."""

    shards: tuple[Shard, ...]
    columns: Mapping[str, np.ndarray]
    shares: tuple[Share, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["start"])

    @property
    def first(self) -> np.ndarray:
        """int64[shards + 1]: the number of the first sample of each shard, and the total."""
        return np.concatenate([[0], np.cumsum([s.images for s in self.shards], dtype=np.int64)]).astype(np.int64)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        return {k.removeprefix(LABEL): v for k, v in sorted(self.columns.items()) if k.startswith(LABEL)}

    @property
    def images(self) -> int:
        """Samples an epoch."""
        return epoch_images(len(self), self.shares)

    @property
    def bytes(self) -> int:
        return sum(c.nbytes for c in self.columns.values())

    def digest(self) -> str:
        """16 hex digits of SHA-256 over shard names, sizes and order, over every column, and over shares if any."""
        h = hashlib.sha256(json.dumps([VERSION, [[s.name, s.bytes, s.images] for s in self.shards]]).encode())
        for name, column in sorted(self.columns.items()):
            h.update(f"{name} {column.dtype.str} {len(column)}\n".encode())
            h.update(np.ascontiguousarray(column).data)
        if self.shares:  # a set without any keeps the digest it always had
            h.update(f"shares {[list(s) for s in self.shares]}".encode())
        return h.hexdigest()[:16]


def read(folder: Path | str) -> Manifest:
    """The manifest of a split. Raises DataError, with the command that makes one, when it is missing or unreadable."""
    path = Path(folder) / MANIFEST
    try:
        values = json.loads(path.read_text())
        if values["version"] != VERSION:
            raise DataError(
                f"manifest version {values['version']}, this program reads {VERSION}",
                where=str(path),
                now=f"jepa shards index {folder}",
            )
        return Manifest(
            digest=values["digest"],
            images=values["images"],
            shards=tuple(Shard(**s) for s in values["shards"]),
            labels=tuple(values["labels"]),
            classes=tuple(values["classes"]),
            report=values["report"],
            shares=tuple(Share(*s) for s in values.get("shares", ())),
        )
    except (FileNotFoundError, NotADirectoryError) as e:
        tars = path.parent.is_dir() and any(path.parent.glob("*.tar"))
        root = path.parent.parent if path.parent.name in ("train", "val") else path.parent
        now = f"jepa shards index {folder}" if tars else f"jepa shards build <images> {root}"
        raise DataError(f"no {MANIFEST}, so no data set here", where=str(folder), now=now) from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{MANIFEST} is damaged: {e!r}", where=str(path), now=f"jepa shards index {folder}") from e


def write(folder: Path, index: Index, classes: tuple[str, ...], report: Mapping[str, Any]) -> Manifest:
    """Write index.npz, then manifest.json: the manifest is the last file of a split, and says that it is whole."""
    manifest = Manifest(index.digest(), index.images, index.shards, tuple(index.labels), classes, report, index.shares)
    buffer = io.BytesIO()
    np.savez(buffer, **{k: np.asarray(v) for k, v in index.columns.items()})  # type: ignore[arg-type]
    write_atomic(folder / INDEX, buffer.getvalue())
    write_json(folder / MANIFEST, {"version": VERSION, **asdict(manifest)})
    return manifest


def load(folder: Path | str) -> tuple[Manifest, Index]:
    """Manifest and index, checked against each other. Raises DataError when they do not belong together."""
    manifest, path = read(folder), Path(folder) / INDEX
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = {k: arrays[k] for k in arrays.files}
    except FileNotFoundError as e:
        raise DataError(f"no {INDEX} beside the manifest", where=str(path), now=f"jepa shards index {folder}") from e
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise DataError(f"{INDEX} is damaged: {e}", where=str(path), now=f"jepa shards index {folder}") from e
    index = Index(manifest.shards, columns, manifest.shares)
    if set(COLUMNS) - set(columns) or index.digest() != manifest.digest:
        raise DataError(
            f"{INDEX} is not the one the manifest speaks of (digest {manifest.digest})",
            where=str(path),
            now=f"jepa shards index {folder} to index the shards as they are now",
        )
    return manifest, index
