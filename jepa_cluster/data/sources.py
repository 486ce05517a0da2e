"""Where images come from, before they are shards: any of four layouts becomes one list of `Item`.

    a folder tree         <src>/<class>/<name>.JPEG, and perhaps labels.jsonl beside the classes
    a tar, or tar of tars ILSVRC2012_img_train.tar (one tar per class), ILSVRC2012_img_val.tar
    a list file           lines of "path class" or of JSON {"file": ..., "class": ...}, or a CSV
    WebDataset shards     a folder of *.tar with jpg/jpeg/png, cls and json members

In: a path. Out: items in a fixed order, the class names, and what was skipped and why. An item
names the place of its bytes; nothing is decoded here.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cluster.data.imagenet_devkit import Label, Labels
from jepa_cluster.data.label_files import find_labels, read_labels
from jepa_cluster.data.manifest import INDEX, MANIFEST
from jepa_cluster.data.tar_samples import is_image, members, samples, why_unreadable
from jepa_cluster.errors import DataError

LABELS = "labels.jsonl"
OWN_FILES = {LABELS, INDEX, MANIFEST}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

Skipped = defaultdict[str, list[str]]  # why -> files


class Scan(NamedTuple):
    """What a source holds."""

    path: Path
    items: list[Item]  # sorted by file name
    classes: tuple[str, ...]  # names, sorted
    skipped: dict[str, str]  # why -> how many files, and the first of them


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


def scan(source: Path, labels: Path | None = None) -> Scan:
    """Find all images of a source.

    labels: a file that gives or replaces classes, for sources without them. Raises DataError.
    """
    if not source.exists():
        hint = "give a folder, a tar or a list file"
        raise DataError(f"no source {source}", where=str(source.absolute()), hint=hint)
    skipped: Skipped = defaultdict(list)
    items = list(_items_of(source, skipped))
    label_file = labels or _labels_beside(source)
    if label_file:
        known = read_labels(label_file)
        items, unused = _with_labels(items, known)
        if unused:
            skipped[f"in {label_file.name}, but no such image"] += unused
        if labels and items and 0 < len(known) == len(unused):
            raise DataError(
                f"none of its {len(unused)} entries names an image; the first is {unused[0]}",
                where=str(labels),
                hint=f"name files as the source does, e.g. {items[0].file}",
            )
    items.sort(key=lambda item: item.file)
    counts = count_skipped(skipped)
    _check(items, source, labels, counts)
    names = {item.label for item in items if isinstance(item.label, str)}
    return Scan(source, items, tuple(sorted(names)), counts)


def count_skipped(skipped: Mapping[str, list[str]]) -> dict[str, str]:
    """Return why -> how many files, and the first of them by name."""
    counts: dict[str, str] = {}
    for why, files in sorted(skipped.items()):
        what = f"{len(files)} files, the first is {min(files)}"
        counts[why] = what if len(files) > 1 else files[0]
    return counts


def _labels_beside(source: Path) -> Path | None:
    """Return the file with labels beside class folders or archives; None for a list file."""
    beside = source / LABELS
    if source.suffix == ".tar" and source.is_file():
        beside = source.with_name(LABELS)
    return beside if beside.is_file() else None


def _items_of(source: Path, skipped: Skipped) -> Iterator[Item]:
    if not source.is_dir():
        is_tar = source.suffix == ".tar"
        yield from _tar_items(source, skipped) if is_tar else _list_items(source)
        return
    tars = sorted(source.glob("*.tar"))
    for path in tars:
        yield from _shard_items(path, skipped)
    if tars:
        skip_beside_shards(source, skipped)
    else:
        yield from _tree_items(source, source, (), skipped)


def skip_beside_shards(folder: Path, skipped: Skipped) -> None:
    """Record what lies beside the shards of a folder and is not read."""
    for path in folder.iterdir():
        hidden = path.name.startswith(".")
        if path.suffix != ".tar" and path.name not in OWN_FILES and not hidden:
            skipped["beside the *.tar, and only they are read"].append(path.name)


def _check(
    items: list[Item],
    source: Path,
    labels: Path | None,
    skipped: Mapping[str, str],
) -> None:
    """Raise DataError unless files are unique and classes of one kind.

    Either every image has a class or none has.
    """
    if not items:
        hint = "a class folder holds images; a list file has 'path class'"
        what = "; ".join(
            ["no images found", *(f"{why}: {files}" for why, files in skipped.items())]
        )
        raise DataError(what, where=str(source), hint=hint)
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
            hint="give a class for each with --labels, or for none; a list as SOURCE packs only "
            "the images that it names",
        )
    names = [item.label for item in items if isinstance(item.label, str)]
    numbers = [item.file for item in items if isinstance(item.label, int)]
    if names and numbers:
        what = f"classes are given both as names ({min(names)}, ...) and as numbers ({numbers[0]})"
        raise DataError(what, where=str(source))


def _tree_items(
    source: Path,
    folder: Path,
    above: tuple[tuple[int, int], ...],
    skipped: Skipped,
) -> Iterator[Item]:
    """Yield the images below a folder, through links. above: device and inode of its parents."""

    def skip(why: str, name: str) -> None:
        skipped[why].append((folder / name).relative_to(source).as_posix())

    status = folder.stat()
    number = (status.st_dev, status.st_ino)
    if number in above:
        skip("a link to a folder that contains it", "")
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder: {error}", where=str(folder)) from error
    for entry in entries:
        is_link = entry.is_symlink()
        is_folder = Path(entry.path).is_dir() if is_link else entry.is_dir()
        if _is_hidden(entry.name):
            skip("hidden, or of the system", entry.name)
        elif is_folder and is_link and _is_walked(Path(entry.path).resolve(), source.resolve()):
            skip("a link to a folder of this source", entry.name)
        elif is_folder:
            yield from _tree_items(source, Path(entry.path), (*above, number), skipped)
        elif entry.name in OWN_FILES and folder == source:
            continue
        elif not is_image(entry.name):
            suffix = Path(entry.name).suffix.lower()
            skip(f"no image by its name ({suffix or 'without a suffix'})", entry.name)
        elif not (Path(entry.path).is_file() if is_link else entry.is_file()):
            skip("a link to nothing" if is_link else "not a regular file", entry.name)
        else:
            inside = Path(entry.path).relative_to(source)
            label = inside.parts[0] if len(inside.parts) > 1 else None
            yield _whole_file(Path(entry.path), inside.as_posix(), label, {})


def _is_walked(folder: Path, source: Path) -> bool:
    """Whether a folder is found below the source without this link."""
    if not folder.is_relative_to(source):
        return False
    return not any(map(_is_hidden, folder.relative_to(source).parts))


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_FOLDERS


def _whole_file(path: Path, name: str, label: Label, extra: Mapping[str, Any]) -> Item:
    size = path.stat().st_size
    return Item(path=str(path), offset=0, size=size, file=name, label=label, extra=extra)


def _tar_items(
    path: Path,
    skipped: Skipped,
    start: int = 0,
    size: int | None = None,
    label: str | None = None,
) -> Iterator[Item]:
    """Yield the images of a tar; a tar inside it is a class, named by its file."""
    for member, offset, _ in members(path, start, size):
        inside = Path(member.name)
        file = f"{label}/{inside.name}" if label else member.name
        why = why_unreadable(member)
        if member.isdir():
            continue
        if any(map(_is_hidden, inside.parts)):
            why = "hidden, or of the system"
        elif not is_image(inside.name) and inside.suffix != ".tar":
            why = f"no image by its name ({inside.suffix.lower() or 'without a suffix'})"
        if why:
            skipped[why].append(file)
        elif inside.suffix == ".tar":
            yield from _tar_items(path, skipped, offset, member.size, inside.stem)
        else:
            yield Item(
                path=str(path),
                offset=offset,
                size=member.size,
                file=file,
                label=label or inside.parent.name or None,
            )


def _list_items(path: Path) -> Iterator[Item]:
    for name, (label, extra) in read_labels(path).items():
        file = path.parent / name
        if not file.is_file():
            raise DataError(f"{name} is listed and does not exist", where=str(path))
        yield _whole_file(file, name, label, extra)


def _shard_items(path: Path, skipped: Skipped) -> Iterator[Item]:
    with path.open("rb") as file:
        for sample in samples(path):
            for name, why in sample.left_out().items():
                skipped[why].append(f"{path.name}: {name}")
            if not sample.images:
                continue
            label, extra = sample.labels(file)
            for name in ("file", "class", "label"):
                if not isinstance(extra.get(name), float):  # a quantity
                    extra.pop(name, None)
            extension = sample.images[0]
            offset, size = sample.parts[extension]
            name = f"{sample.key}.{extension}"
            yield Item(
                path=str(path),
                offset=offset,
                size=size,
                file=name,
                label=label,
                extra=extra,
            )


def _with_labels(items: list[Item], known: Labels) -> tuple[list[Item], list[str]]:
    """Return the items with the labels that a file gives them, and entries that name no image."""
    used: set[str] = set()
    labelled: list[Item] = []
    for item in items:
        found = find_labels(known, item.file)
        if found is None:
            labelled.append(item)
            continue
        entry, (label, extra) = found
        used.add(entry)
        if label is None:
            label = item.label
        labelled.append(replace(item, label=label, extra={**item.extra, **extra}))
    return labelled, [entry for entry in known if entry not in used]
