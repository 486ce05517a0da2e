"""Where images come from, before they are shards: any of four layouts becomes one list of `Item`.

    a folder tree         <src>/<class>/<name>.JPEG, and perhaps labels.jsonl beside the classes
    a tar, or tar of tars ILSVRC2012_img_train.tar (one tar per class), ILSVRC2012_img_val.tar
    a list file           lines of "path class" or of JSON {"file": ..., "class": ...}
    WebDataset shards     a folder of *.tar with jpg/jpeg/png, cls and json members

In: a path. Out: items in a fixed order and the class names. An item names the place of its bytes;
nothing is decoded here.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from jepa_cluster.data.imagenet_devkit import KIT, Label, Labels, validation_labels
from jepa_cluster.errors import DataError

IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LABELS = "labels.jsonl"
CHUNK = 1 << 20  # bytes read at a time
_STEM_AND_EXTENSION = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: `size` bytes at `offset` of the file `path`."""

    path: str
    offset: int
    size: int
    file: str  # its name in the source, unique
    label: Label
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # as {"count": 3, ...}

    def read(self) -> bytes:
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def scan(source: Path, labels: Path | None = None) -> tuple[list[Item], tuple[str, ...]]:
    """Return all images of a source, sorted by file name, and its class names, sorted.

    labels: a file that gives or replaces classes, for sources without them. Raises DataError.
    """
    if not source.exists():
        hint = "give a folder, a tar or a list file"
        raise DataError(f"no source {source}", where=str(source.absolute()), hint=hint)
    items = list(_items_of(source))
    label_file = labels or _labels_beside(source)
    if label_file:
        items = _with_labels(items, label_file)
    items.sort(key=lambda item: item.file)
    _check(items, source, labels)
    names = {item.label for item in items if isinstance(item.label, str)}
    return items, tuple(sorted(names))


def _labels_beside(source: Path) -> Path | None:
    """Return the file with labels beside class folders or archives; None for a list file."""
    beside = source / LABELS
    if source.suffix == ".tar" and source.is_file():
        beside = source.with_name(LABELS)
    return beside if beside.is_file() else None


def _items_of(source: Path) -> Iterator[Item]:
    if not source.is_dir():
        is_tar = source.suffix == ".tar"
        yield from _tar_items(source) if is_tar else _list_items(source)
        return
    tars = sorted(source.glob("*.tar"))
    for path in tars:
        yield from _shard_items(path)
    if not tars:
        yield from _tree_items(source)


def _check(items: list[Item], source: Path, labels: Path | None) -> None:
    """Raise DataError unless files are unique and classes of one kind.

    Either every image has a class or none has.
    """
    if not items:
        hint = "a class folder holds .JPEG files; a list file has 'path class'"
        raise DataError("no images found", where=str(source), hint=hint)
    counts = Counter(item.file for item in items)
    twice = [file for file, count in counts.items() if count > 1]
    if twice:
        what = f"{len(twice)} file names occur twice, e.g. {twice[0]}"
        raise DataError(what, where=str(source))
    without = [item.file for item in items if item.label is None]
    if without and (labels or len(without) < len(items)):
        raise DataError(
            f"{len(without)} of {len(items)} images have no class, e.g. {without[0]}",
            where=str(labels or source),
            hint="give a class for each with --labels, or for none",
        )
    names = [item.label for item in items if isinstance(item.label, str)]
    if names and any(isinstance(item.label, int) for item in items):
        what = f"classes are given both as names ({min(names)}, ...) and as numbers"
        raise DataError(what, where=str(source))


def _tree_items(source: Path) -> Iterator[Item]:
    for path in source.rglob("*"):
        if path.suffix.lower() in IMAGES and not path.is_dir():
            inside = path.relative_to(source)
            *classes, _ = inside.parts
            label = classes[0] if classes else None
            yield _whole_file(path, inside.as_posix(), label, {})


def _whole_file(path: Path, name: str, label: Label, extra: Mapping[str, Any]) -> Item:
    size = path.stat().st_size
    return Item(path=str(path), offset=0, size=size, file=name, label=label, extra=extra)


def _tar_items(
    path: Path,
    start: int = 0,
    size: int | None = None,
    label: str | None = None,
) -> Iterator[Item]:
    """Yield the images of a tar; a tar inside it is a class, named by its file."""
    for member, offset, _ in members(path, start, size):
        inside = Path(member.name)
        if inside.suffix == ".tar":
            yield from _tar_items(path, offset, member.size, inside.stem)
        elif inside.suffix.lower() in IMAGES:
            file = f"{label}/{inside.name}" if label else member.name
            yield Item(
                path=str(path),
                offset=offset,
                size=member.size,
                file=file,
                label=label or inside.parent.name or None,
            )


def _list_items(path: Path) -> Iterator[Item]:
    for name, (label, extra) in _read_labels(path).items():
        file = path.parent / name
        if not file.is_file():
            raise DataError(f"{name} is listed and does not exist", where=str(path))
        yield _whole_file(file, name, label, extra)


def _shard_items(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for sample in samples(path):
            if not sample.image:
                continue
            label, extra = sample.labels(file)
            for name in ("file", "class", "label"):
                extra.pop(name, None)
            offset, size = sample.parts[sample.image]
            name = f"{sample.key}.{sample.image}"
            yield Item(
                path=str(path),
                offset=offset,
                size=size,
                file=name,
                label=label,
                extra=extra,
            )


def _read_labels(path: Path) -> Labels:
    """Read lines of "file class" or of JSON objects with "file". Raises DataError."""
    if path.name.endswith(KIT):
        return validation_labels(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = "a list has lines of 'file class', an archive is a .tar"
        what = f"no list of images or labels: {error}"
        raise DataError(what, where=str(path), hint=hint) from error
    found: Labels = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            file, labels = _parse_line(line.strip())
        except (ValueError, KeyError) as error:
            what = f"neither 'file class' nor JSON with \"file\": {line.strip()[:80]!r}"
            raise DataError(what, where=f"{path}:{number}") from error
        found[file] = labels
    found.pop("", None)
    return found


def _parse_line(line: str) -> tuple[str, tuple[Label, dict[str, Any]]]:
    if line.startswith("{"):
        values = json.loads(line)
        file = values.pop("file")
        return file, (values.pop("class", None), values)
    file, tab, label = line.partition("\t")
    if not tab:
        file, _, label = line.rpartition(" ")
    label = label.strip()
    return file.strip(), (int(label) if label.isdigit() else label, {})


def _with_labels(items: list[Item], path: Path) -> list[Item]:
    """Return the items with the labels that a file gives their names, or their base names."""
    known = _read_labels(path)
    found: list[Item] = []
    for item in items:
        label, extra = known.get(item.file) or known.get(Path(item.file).name) or (None, {})
        if label is None:
            label = item.label
        found.append(replace(item, label=label, extra={**item.extra, **extra}))
    return found


def members(
    path: Path,
    start: int = 0,
    size: int | None = None,
) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """Yield (member, first byte of its content, end of its padding) of a tar.

    start, size: where the tar lies, when it is inside another one. tarfile stops without an error
    at a damaged header. So what follows the last member must be the zeros that end an archive, or
    this raises DataError with the byte.
    """
    if size is None:
        size = path.stat().st_size - start
    stop = start + size
    end = start
    with path.open("rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # a tar of a million members must not stay in memory
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    end = member.offset_data
                    if member.isfile():
                        end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if end > stop:
                        what = f"{member.name} ends at byte {end}, the tar at {stop}"
                        raise _damaged(path, what)
                    yield member, member.offset_data, end
        except (tarfile.TarError, OSError, EOFError) as error:
            raise _damaged(path, f"not a readable tar after byte {end}: {error}") from error
        file.seek(end)
        complete = stop - end >= 2 * tarfile.BLOCKSIZE and _only_zeros(file, stop)
    if not complete:
        why = "no member begins there and the archive does not end there"
        raise _damaged(path, f"the tar is damaged at byte {end}: {why}")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), hint="fetch or build this file again")


def _only_zeros(file: BinaryIO, stop: int) -> bool:
    """Return whether the file holds zeros from its position to byte `stop`, or to its end."""
    while data := file.read(min(CHUNK, stop - file.tell())):
        if data.strip(b"\0"):
            return False
    return True


@dataclass(frozen=True)
class Sample:
    """Members of a shard that share a key. Bytes start..end hold them; spans leave no byte out."""

    key: str
    start: int
    end: int
    parts: Mapping[str, tuple[int, int]]  # extension -> (offset, length) in the shard

    @property
    def image(self) -> str | None:
        """The extension of the first member that is an image."""
        for extension in self.parts:
            if f".{extension}" in IMAGES:
                return extension
        return None

    def labels(self, file: BinaryIO) -> tuple[Label, dict[str, Any]]:
        """Read the class and further labels from the `cls` and `json` members. Raises DataError."""
        cls, text = self._read_part(file, "cls"), self._read_part(file, "json")
        try:
            extra = json.loads(text) if text is not None else {}
            if not isinstance(extra, dict):
                extra = {}
            label = extra.get("class", extra.get("label"))
            if cls:
                label = cls.decode().strip()
                if label.lstrip("-").isdigit():
                    label = int(label)
        except ValueError as error:
            what = f"sample {self.key}: labels that are neither a number nor JSON: {error}"
            raise DataError(what, where=file.name) from error
        if not isinstance(label, (str, int)):
            label = None
        return label, extra

    def _read_part(self, file: BinaryIO, extension: str) -> bytes | None:
        """Read a member; None when there is none."""
        if extension not in self.parts:
            return None
        offset, length = self.parts[extension]
        file.seek(offset)
        return file.read(length)


def split_name(path: str) -> tuple[str, str]:
    """Split a name at the first dot of the file, as webdataset does. Without one: ('', '')."""
    found = _STEM_AND_EXTENSION.fullmatch(path)
    return (found[1], found[2]) if found else ("", "")


def samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard, grouped as webdataset does.

    Neighbours whose names agree up to the first dot are one sample.
    """
    key = ""
    start = end = 0
    parts: dict[str, tuple[int, int]] = {}
    for member, offset, after in members(path):
        name, extension = split_name(member.name)
        if member.isfile() and extension:
            if name != key:
                if key:
                    yield Sample(key, start, end, parts)
                    start = end
                key, parts = name, {}
            extension = extension.lower()
            if extension in parts:
                what = f"sample {name} has two .{extension} members, the second at byte {offset}"
                raise DataError(what, where=str(path))
            parts[extension] = (offset, member.size)
        end = after
    if key:
        yield Sample(key, start, end, parts)
