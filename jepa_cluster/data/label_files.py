"""Files that give images their classes: lines, JSON lines, CSV, and ImageNet's devkit.

In: a path. Out: file name -> (class, further labels). A line that cannot be read is a DataError
with its number.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jepa_cluster.data.imagenet_devkit import KIT, Label, Labels, validation_labels
from jepa_cluster.data.tar_samples import class_label, class_number, is_image
from jepa_cluster.errors import DataError

# names of CSV columns, as public sets use them; the first that occurs is taken
FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "path",
    "image",
    "image_id",
    "id",
)
CLASS_COLUMNS = ("class", "label", "class_name", "category", "target")

Row = tuple[int, str, object, dict[str, Any]]  # line, file, class, further labels


def read_labels(path: Path) -> Labels:
    """Read the labels of a file by its name. Raises DataError."""
    if path.name.endswith(KIT):
        return validation_labels(path)
    hint = "a list has lines of 'file class', an archive is a .tar"
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if path.suffix.lower() == ".csv":
            hint = "save the table as CSV in UTF-8" if path.exists() else ""
        what = f"no list of images or labels: {error}"
        raise DataError(what, where=str(path), hint=hint) from error
    rows = _csv_rows if path.suffix.lower() == ".csv" else _line_rows
    found: Labels = {}
    for line, file, label, extra in rows(path, text):
        labels = (class_label(label, f"{path}:{line}"), extra)
        if labels[0] is None and label not in (None, ""):
            what = f"the class {label!r} is neither a name nor a whole number"
            raise DataError(what, where=f"{path}:{line}")
        if found.setdefault(file, labels) != labels:
            what = f"{file} is listed before with other labels"
            raise DataError(what, where=f"{path}:{line}")
    return found


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            file, label, extra = _parse_line(line.strip())
        except (ValueError, KeyError, AttributeError) as error:
            what = f"neither 'file class' nor JSON with \"file\": {line.strip()[:80]!r}"
            raise DataError(what, where=f"{path}:{number}") from error
        if file:
            yield number, file, label, extra


def _parse_line(line: str) -> tuple[str, object, dict[str, Any]]:
    if line.startswith("{"):
        values = json.loads(line)
        return values.pop("file"), values.pop("class", None), values
    file, tab, label = line.partition("\t")
    if not tab:
        file, space, label = line.rpartition(" ")
        if not space:  # no class
            file, label = line, ""
        for end in re.finditer(" ", line):  # names of classes may have spaces
            if is_image(line[: end.start()]):
                file, label = line[: end.start()], line[end.end() :]
                break
    return file.strip(), class_number(label), {}


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a CSV with a header. Columns of numbers are further labels.

    One of two columns may have any name.
    """
    head = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=head.count))
    columns = [name or "" for name in reader.fieldnames or []]
    known = {name.strip().lower(): name for name in columns}
    file = next((known[name] for name in FILE_COLUMNS if name in known), "")
    label = next((known[name] for name in CLASS_COLUMNS if name in known), "")
    if len(columns) == 2 and (file or label):
        file = file or next((name for name in columns if name != label), "")
        label = label or next((name for name in columns if name != file), "")
    if not file or not label:
        names = f"{', '.join(FILE_COLUMNS)} and {', '.join(CLASS_COLUMNS)}"
        raise DataError(
            f"no columns for file and class among {', '.join(columns) or 'none'}",
            where=f"{path}:1",
            hint=f"the first line names the columns; known are {names}",
        )
    for row in reader:
        extra: dict[str, Any] = {}
        for name in columns:
            number = _number(row[name])
            if name not in (file, label, "") and number is not None:
                extra[name] = number
        if (row[file] or "").strip():
            yield reader.line_num, row[file].strip(), class_number(row[label] or ""), extra


def _number(text: str | None) -> int | float | None:
    for parse in (int, float):
        try:
            return parse(text or "")
        except ValueError:
            pass
    return None


def find_labels(known: Labels, file: str) -> tuple[str, tuple[Label, dict[str, Any]]] | None:
    """Return the entry for a file of a source: by its path, its name, or its name without suffix.

    None when there is none.
    """
    name = file.rsplit("/", 1)[-1]
    for entry in (file, name, name.rsplit(".", 1)[0]):
        if entry in known:
            return entry, known[entry]
    return None
