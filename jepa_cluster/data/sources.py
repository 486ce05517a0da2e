"""Where images come from, before they are shards: any of four layouts becomes one list of `Item`.

    a folder tree         <src>/<class>/<name>.JPEG, with an optional labels.jsonl beside the class folders
    a tar, or tar of tars ILSVRC2012_img_train.tar (one tar a class), ILSVRC2012_img_val.tar (with a labels file)
    a list file           lines of "path class" or of JSON {"file": ..., "class": ...}
    WebDataset shards     a folder of *.tar with jpg/jpeg/png, cls and json members

In: a path. Out: items in a fixed order and the class names. An item says where bytes are; nothing is decoded here.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jepa_cluster.errors import DataError

IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LABELS = "labels.jsonl"


@dataclass(frozen=True)
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
        items = [i for t in tars for i in _samples(t)] if tars else list(_tree(source))
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


def _tar(path: Path) -> Iterator[Item]:
    """Images of a tar; tars inside it are classes named by their file."""
    for member, offset in members(path):
        if member.name.endswith(".tar"):
            label = Path(member.name).stem
            for inner, inner_offset in members(path, offset, member.size):
                if inner.name.lower().endswith(IMAGES):
                    yield Item(str(path), inner_offset, inner.size, f"{label}/{Path(inner.name).name}", label)
        elif member.name.lower().endswith(IMAGES):
            parts = Path(member.name).parts
            yield Item(str(path), offset, member.size, "/".join(parts), parts[-2] if len(parts) > 1 else None)


def _list(path: Path) -> Iterator[Item]:
    for name, values in _read_labels(path).items():
        file = path.parent / name
        if not file.is_file():
            raise DataError(f"{name} is listed and does not exist", where=str(path))
        label, extra = values
        yield Item(str(file), 0, file.stat().st_size, name, label, extra)


def _samples(path: Path) -> Iterator[Item]:
    """Samples of a WebDataset shard as items: the class from `cls`, further labels from `json`."""
    group: dict[str, tuple[int, int]] = {}
    current = None
    with path.open("rb") as f:
        for member, offset in [*members(path), (None, 0)]:
            key, extension = split_key(member.name) if member and member.isfile() else ("", "")
            if member and not key:
                continue
            if current is not None and key != current:
                yield from _sample(path, f, current, group)
                group = {}
            current = key
            if member:
                group[extension] = (offset, member.size)


def _sample(path: Path, f: BinaryIO, key: str, group: Mapping[str, tuple[int, int]]) -> Iterator[Item]:
    image = next((e for e in group if f".{e}" in IMAGES), None)
    if image is None:
        return

    def content(extension: str) -> bytes:
        f.seek(group[extension][0])
        return f.read(group[extension][1])

    label, extra = labels_of({e: content(e) for e in ("cls", "json") if e in group}, f"{path}: sample {key}")
    yield Item(str(path), *group[image], f"{key}.{image}", label, extra)


def labels_of(texts: Mapping[str, bytes], where: str) -> tuple[str | int | None, dict[str, Any]]:
    """The `cls` and `json` members of a sample -> (class, further labels). Raises DataError."""
    try:
        values = json.loads(texts["json"]) if "json" in texts else {}
        extra = dict(values) if isinstance(values, dict) else {}
        label: Any = extra.get("class", extra.get("label"))
        if "cls" in texts:
            text = texts["cls"].decode().strip()
            number = text.lstrip("-").isdigit()
            label = int(text) if number else text
        return (label if isinstance(label, (str, int)) else None), extra
    except (ValueError, UnicodeDecodeError) as e:
        raise DataError(f"labels that are neither a number nor JSON: {e}", where=where) from e


def _read_labels(path: Path) -> dict[str, tuple[str | int | None, dict[str, Any]]]:
    """file name -> (class, further labels), from lines of "file class" or of JSON objects with "file"."""
    found: dict[str, tuple[str | int | None, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
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


def _labelled(item: Item, known: Mapping[str, tuple[str | int | None, dict[str, Any]]]) -> Item:
    label, extra = known.get(item.file) or known.get(Path(item.file).name) or (None, {})
    label = item.label if label is None else label
    return Item(item.path, item.offset, item.size, item.file, label, {**item.extra, **extra})


def split_key(name: str) -> tuple[str, str]:
    """A member's name -> (key, extension) as webdataset does: the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else ("", "")


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, f: BinaryIO, start: int, size: int) -> None:
        self._f, self._start, self._size, self._at = f, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._f.seek(self._start + self._at)
        data = self._f.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(member, offset of its bytes in the file) of a tar, or of a tar inside a tar.

    tarfile stops without a word at a damaged header; here whatever follows the last member must be the zeros
    that end an archive, or this raises DataError with the byte.
    """
    size = path.stat().st_size - start if size is None else size
    now = "fetch or build this file again"
    end = 0
    with path.open("rb") as f:
        window = _Window(f, start, size)
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:  # pyright: ignore[reportArgumentType]
                for member in tar:
                    tar.members.clear()  # a tar of a million members must not stay in memory
                    end = member.offset_data + (-(-member.size // 512) * 512 if member.isfile() else 0)
                    if end > size:
                        raise DataError(
                            f"{member.name} ends at byte {end}, the file at {size}", where=str(path), now=now
                        )
                    yield member, start + member.offset_data
        except (tarfile.TarError, OSError, EOFError) as e:
            raise DataError(f"not a readable tar at byte {start + end}: {e}", where=str(path), now=now) from e
        tail = _tail(window.read, window.seek, end, size)
    if tail is not None:
        raise DataError(
            f"the tar is damaged at byte {start + tail}: no member begins there and the archive does not end there",
            where=str(path),
            now=now,
        )


def _tail(read: Callable[[int], bytes], seek: Callable[[int], int], at: int, size: int) -> int | None:
    """Where an archive's end is not what it must be (two or more blocks of zeros); None when it is."""
    seek(at)
    if size - at < 1024:
        return at
    while data := read(1 << 20):
        if data.strip(b"\0"):
            return at
        at += len(data)
    return None
