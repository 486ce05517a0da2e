"""The members of a tar, and the samples that they form, as webdataset groups them.

In: the path of a tar. Out: members with the place of their bytes, and samples. A damaged tar is a
DataError with the byte.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jepa_cluster.data.imagenet_devkit import Label
from jepa_cluster.errors import DataError

IMAGES = (
    ".jpeg",
    ".jpg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
)
# of a sample that has one of each kind, these are not the image, but perhaps its mask
SECONDARY = (
    ".jpe",
    ".jfif",
    ".pgm",
    ".pbm",
    ".pnm",
    ".avif",
    ".jp2",
    ".tga",
)
NAMELESS = "hidden, or without a dot: webdataset sees no key"
CHUNK = 1 << 20  # bytes read at a time
MAX_CLASS = 999_999  # a probe needs memory for every class up to the highest number
_STEM_AND_EXTENSION = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")


def is_image(name: str) -> bool:
    """Return whether a file name ends as those of images do."""
    return name.lower().endswith((*IMAGES, *SECONDARY))


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
                    end = tar.offset  # of the next header: a sparse member is larger than its bytes
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


def why_unreadable(member: tarfile.TarInfo) -> str:
    """Return why the bytes of a member are not in one piece in its tar; '' when they are."""
    if member.issparse():
        return "a sparse member of the tar"
    if member.issym() or member.islnk():
        return "a link inside the tar"
    return "" if member.isreg() else "not a regular file"


@dataclass(frozen=True)
class Sample:
    """Members of a shard that share a key. Bytes start..end hold them; spans leave no byte out."""

    key: str
    start: int
    end: int
    parts: Mapping[str, tuple[int, int]]  # extension -> (offset, length) in the shard
    unreadable: Mapping[str, str]  # extension -> why its bytes are not there
    nameless: Sequence[str]  # members without a key, up to the end of this sample

    @property
    def images(self) -> list[str]:
        """The extensions of the members that are images; the first one is used."""
        names = [name for name in self.parts if f".{name}" in (*IMAGES, *SECONDARY)]
        return sorted(names, key=lambda name: f".{name}" in SECONDARY)

    def left_out(self) -> dict[str, str]:
        """Return what of this sample no image is made of -> why: members, or the sample itself."""
        found = dict.fromkeys(self.nameless, NAMELESS)
        if not self.images:
            return {**found, self.key: self.why_no_image()} if self.key else found
        for extension in self.images[1:]:
            found[f"{self.key}.{extension}"] = "a second image of its sample"
        for extension, why in self.unreadable.items():
            found[f"{self.key}.{extension}"] = why
        return found

    def why_no_image(self) -> str:
        for extension, why in self.unreadable.items():
            if is_image(f".{extension}"):
                return f"its .{extension} is {why}"
        for extension in self.parts:
            if is_image(extension):
                return f"a key ends at the first dot, so the extension is .{extension}"
        return "no image"

    def labels(self, file: BinaryIO) -> tuple[Label, dict[str, Any]]:
        """Read the class and further labels from the `cls` and `json` members. Raises DataError."""
        where = f"{file.name}, sample {self.key}"
        cls, text = self._read_part(file, "cls"), self._read_part(file, "json")
        try:
            extra = json.loads(text) if text is not None else {}
            if not isinstance(extra, dict):
                extra = {}
            label = extra.get("class", extra.get("label"))
            if cls and cls.strip():
                label = class_number(cls.decode())
        except ValueError as error:
            raise DataError(f"labels that cannot be read: {error}", where=where) from error
        return class_label(label, where), extra

    def _read_part(self, file: BinaryIO, extension: str) -> bytes | None:
        """Read a member; None when there is none."""
        if extension not in self.parts:
            return None
        offset, length = self.parts[extension]
        file.seek(offset)
        return file.read(length)


def class_number(text: str) -> str | int:
    """Return the number that a text is, else the text."""
    text = text.strip()
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 4000 else text


def class_label(value: object, where: str) -> Label:
    """Return a class as its name or its number; None for '', for quantities and for other values.

    Raises DataError for a whole number that no class can have, and for NaN and infinity.
    """
    if isinstance(value, str):
        return value.strip() or None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if value in range(MAX_CLASS + 1):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return None  # a quantity
    raise DataError(
        f"the class is {str(value)[:40]}, but classes are numbered from 0 to {MAX_CLASS:_}",
        where=where,
        hint="number the classes from 0, or name them; leave it out where there is none",
    )


def split_name(path: str) -> tuple[str, str]:
    """Split a name at the first dot of the file, as webdataset does. Without one: ('', '')."""
    found = _STEM_AND_EXTENSION.fullmatch(path)
    return (found[1], found[2]) if found else ("", "")


def samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard, grouped as webdataset does.

    Neighbours whose names agree up to the first dot are one sample. Raises DataError when the
    labels of an image lie elsewhere in the shard.
    """
    has_image: dict[str, bool] = {}  # of each key so far
    for sample in _groups(path):
        image = bool(sample.images)
        if has_image.get(sample.key, image) != image:
            raise DataError(
                f"the members of sample {sample.key} lie apart, so its labels would be lost",
                where=str(path),
                hint="webdataset reads neighbours: write the tar sorted by name (tar --sort=name)",
            )
        has_image[sample.key] = image
        yield sample


def _groups(path: Path) -> Iterator[Sample]:
    key = ""
    start = end = 0
    parts: dict[str, tuple[int, int]] = {}
    unreadable: dict[str, str] = {}
    nameless: list[str] = []
    for member, offset, after in members(path):
        name, extension = split_name(member.name)
        if extension and not member.isdir():
            if name != key:
                if key:
                    yield Sample(key, start, end, parts, unreadable, nameless)
                    start, nameless = end, []
                key, parts, unreadable = name, {}, {}
            extension = extension.lower()
            if extension in parts:
                what = f"sample {name} has two .{extension} members, the second at byte {offset}"
                raise DataError(what, where=str(path))
            why = why_unreadable(member)
            if why:
                unreadable[extension] = why
            else:
                parts[extension] = (offset, member.size)
        elif not member.isdir():
            nameless.append(member.name)
        end = after
    if key or nameless:
        yield Sample(key, start, end, parts, unreadable, nameless)
