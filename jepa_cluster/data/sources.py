"""Where images come from, before they are shards: any of four layouts becomes one list of `Item`.

    a folder tree         <src>/<class>/<name>.JPEG, with an optional labels.jsonl beside the class folders
    a tar, or tar of tars ILSVRC2012_img_train.tar (one tar a class), ILSVRC2012_img_val.tar (with a labels file)
    a list file           lines of "path class" or of JSON {"file": ..., "class": ...}
    WebDataset shards     a folder of *.tar with jpg/jpeg/png, cls and json members

In: a path. Out: items in a fixed order and the class names. An item says where bytes are; nothing is decoded here.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jepa_cluster.data.devkit import KIT, validation_labels
from jepa_cluster.errors import DataError

IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LABELS = "labels.jsonl"

Labels = dict[str, tuple[str | int | None, dict[str, Any]]]  # file -> class, further labels


@dataclass(frozen=True, slots=True)
class Item:
    """One image at rest: `size` bytes at `offset` of the file `path`."""

    path: str
    offset: int
    size: int
    file: str  # its name in the source, unique
    label: str | int | None  # class name or number
    extra: Mapping[str, Any] = field(default_factory=dict)  # further labels: {"count": 3, ...}

    def read(self) -> bytes:
        with Path(self.path).open("rb") as f:
            f.seek(self.offset)
            return f.read(self.size)


def scan(source: Path, labels: Path | None = None) -> tuple[list[Item], tuple[str, ...]]:
    """All images of a source, sorted by file name, and its class names, sorted: a class's number is its place.

    labels: a file that gives or replaces classes, for sources that do not carry them. Raises DataError.
    """
    if not source.exists():
        raise DataError(f"no source {source}", where=str(source.absolute()), now="give a folder, a tar or a list file")
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        items = [i for t in tars for i in _shard(t)] if tars else list(_tree(source))
        beside = source / LABELS
    elif source.suffix == ".tar":
        items, beside = list(_tar(source)), source.with_name(LABELS)
    else:
        items, beside = list(_list(source)), Path()
    known = _read_labels(labels) if labels else _read_labels(beside) if beside.is_file() else {}
    items = sorted((_labelled(i, known) for i in items), key=lambda i: i.file)
    if not items:
        raise DataError(
            "no images found", where=str(source), now="a class folder holds .JPEG files; a list file has 'path class'"
        )
    twice = [f for f, n in Counter(i.file for i in items).items() if n > 1]
    if twice:
        raise DataError(f"{len(twice)} file names occur twice, e.g. {twice[0]}", where=str(source))
    without = [i.file for i in items if i.label is None]
    if without and (labels or len(without) < len(items)):
        raise DataError(
            f"{len(without)} of {len(items)} images have no class, e.g. {without[0]}",
            where=str(labels or source),
            now="give a class for each with --labels, or for none",
        )
    names = sorted({i.label for i in items if isinstance(i.label, str)})
    if names and any(isinstance(i.label, int) for i in items):
        raise DataError(f"classes are given both as names ({names[0]}, ...) and as numbers", where=str(source))
    return items, tuple(names)


def _tree(source: Path) -> Iterator[Item]:
    for folder, folders, files in os.walk(source):
        folders.sort()
        where = Path(folder)
        for name in sorted(files):
            if name.lower().endswith(IMAGES):
                path = where / name
                inside = path.relative_to(source)
                label = inside.parts[0] if len(inside.parts) > 1 else None
                yield Item(str(path), 0, path.stat().st_size, inside.as_posix(), label)


def _tar(path: Path, start: int = 0, size: int | None = None, label: str | None = None) -> Iterator[Item]:
    """Images of a tar; a tar inside it is a class, named by its file."""
    for member, offset, _ in members(path, start, size):
        inside = Path(member.name)
        if inside.suffix == ".tar":
            yield from _tar(path, offset, member.size, inside.stem)
        elif inside.suffix.lower() in IMAGES:
            mine = label or (inside.parts[-2] if len(inside.parts) > 1 else None)
            yield Item(str(path), offset, member.size, f"{label}/{inside.name}" if label else member.name, mine)


def _list(path: Path) -> Iterator[Item]:
    for name, values in _read_labels(path).items():
        file = path.parent / name
        if not file.is_file():
            raise DataError(f"{name} is listed and does not exist", where=str(path))
        label, extra = values
        yield Item(str(file), 0, file.stat().st_size, name, label, extra)


def _shard(path: Path) -> Iterator[Item]:
    with path.open("rb") as f:
        for sample in samples(path):
            if sample.image:
                label, extra = sample.labels(f)
                extra = {k: v for k, v in extra.items() if k not in ("file", "class", "label")}
                yield Item(str(path), *sample.parts[sample.image], f"{sample.key}.{sample.image}", label, extra)


def _read_labels(path: Path) -> Labels:
    """file name -> (class, further labels), from lines of "file class" or of JSON objects with "file"."""
    if path.name.endswith(KIT):
        return validation_labels(path)
    found: Labels = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"no list of images or labels: {e}",
            where=str(path),
            now="a list has lines of 'file class', an archive is a .tar",
        ) from e
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("{"):
                values = json.loads(line)
                name = values.pop("file")
                found[name] = (values.pop("class", None), values)
            else:
                name, _, label = line.partition("\t") if "\t" in line else line.rpartition(" ")
                found[name.strip()] = (int(label) if label.strip().isdigit() else label.strip(), {})
        except (ValueError, KeyError) as e:
            raise DataError(
                f"neither 'file class' nor JSON with \"file\": {line[:80]!r}", where=f"{path}:{number}"
            ) from e
    found.pop("", None)
    return found


def _labelled(item: Item, known: Labels) -> Item:
    label, extra = known.get(item.file) or known.get(Path(item.file).name) or (None, {})
    label = item.label if label is None else label
    return Item(item.path, item.offset, item.size, item.file, label, {**item.extra, **extra})


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """(member, first byte of its content, end of its padding) of a tar, or of a tar that lies inside a tar.

    tarfile stops without a word at a damaged header; here whatever follows the last member must be the zeros
    that end an archive, or this raises DataError with the byte.
    """
    stop = start + (path.stat().st_size - start if size is None else size)
    now = "fetch or build this file again"
    end = start
    with path.open("rb") as f:
        f.seek(start)
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # a tar of a million members must not stay in memory
                    end = member.offset_data + (-(-member.size // 512) * 512 if member.isfile() else 0)
                    if end > stop:
                        raise DataError(
                            f"{member.name} ends at byte {end}, the tar at {stop}", where=str(path), now=now
                        )
                    yield member, member.offset_data, end
        except (tarfile.TarError, OSError, EOFError) as e:
            raise DataError(f"not a readable tar after byte {end}: {e}", where=str(path), now=now) from e
        f.seek(end)
        whole = stop - end >= 1024
        while whole and (data := f.read(min(1 << 20, stop - f.tell()))):
            whole = not data.strip(b"\0")
    if not whole:
        raise DataError(
            f"the tar is damaged at byte {end}: no member begins there and the archive does not end there",
            where=str(path),
            now=now,
        )


@dataclass(frozen=True)
class Sample:
    """Members of a shard that share a key. Bytes start..end hold all of them; spans leave no byte out."""

    key: str
    start: int
    end: int
    parts: Mapping[str, tuple[int, int]]  # extension -> (offset, length) in the shard

    @property
    def image(self) -> str | None:
        """The extension of the first member that is an image."""
        return next((e for e in self.parts if f".{e}" in IMAGES), None)

    def labels(self, f: BinaryIO) -> tuple[str | int | None, dict[str, Any]]:
        """The class and further labels, from the `cls` and `json` members. Raises DataError."""
        texts: dict[str, bytes] = {}
        for extension in self.parts.keys() & {"cls", "json"}:
            offset, length = self.parts[extension]
            f.seek(offset)
            texts[extension] = f.read(length)
        try:
            values = json.loads(texts.get("json", b"{}"))
            extra: dict[str, Any] = values if isinstance(values, dict) else {}
            label = extra.get("class", extra.get("label"))
            if "cls" in texts:
                text = texts["cls"].decode().strip()
                label = int(text) if text.lstrip("-").isdigit() else text
        except ValueError as e:
            raise DataError(f"sample {self.key}: labels that are neither a number nor JSON: {e}", where=f.name) from e
        return (label if isinstance(label, (str, int)) else None), extra


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a shard, grouped as webdataset does: neighbours whose names agree up to the first dot."""
    key, start, end, parts = "", 0, 0, dict[str, tuple[int, int]]()
    for member, offset, after in members(path):
        mine, extension = _split(member.name) if member.isfile() else ("", "")
        if mine and mine != key:
            if key:
                yield Sample(key, start, end, parts)
                start = end
            key, parts = mine, {}
        if mine:
            if extension in parts:
                raise DataError(
                    f"sample {mine} has two .{extension} members, the second at byte {offset}", where=str(path)
                )
            parts[extension] = (offset, member.size)
        end = after
    if key:
        yield Sample(key, start, end, parts)


def _split(name: str) -> tuple[str, str]:
    """A member's name -> (key, extension); the key ends at the first dot of the base name. ('', '') without one."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")
