"""What a split holds, how it was made, how well an order mixes its classes; a sheet of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image, ImageDraw

from jepa_cluster.data import decode, manifest
from jepa_cluster.data.manifest import SPLITS, Index, Manifest
from jepa_cluster.data.reader import Reader
from jepa_cluster.data.sample_order import Stream
from jepa_cluster.errors import CorruptSample, DataError

SHUFFLE_BLOCKS = {"global": 0, "block": 64}  # name of an order -> its block; 0 shuffles all images
SHUFFLE_WINDOW = 1024
BATCHES = 8  # over which the classes of a batch are averaged
THUMBNAIL, CAPTION = 156, 14  # pixels


class SplitInfo(TypedDict):
    """A split as a document. made: report of its build; left_out: images that are not in it."""

    split: str
    digest: str
    images: int
    shards: int
    bytes: int
    labels: list[str]
    classes: int
    left_out: list[dict[str, Any]]
    made: dict[str, Any]


class Mixing(TypedDict):
    """Mean number of classes in a batch, of all classes."""

    batch: int
    classes: float
    of: int


def splits(root: Path) -> list[Path]:
    """Return the folders of a data root that hold shards; the folder itself if it is one split."""
    found = [root / name for name in SPLITS if (root / name).is_dir()]
    return found or [root]


def describe(folder: Path, made: Manifest) -> SplitInfo:
    report = dict(made.report)
    left_out = list(report.pop("left_out", []))
    return {
        "split": str(folder),
        "digest": made.digest,
        "images": made.images,
        "shards": len(made.shards),
        "bytes": made.bytes,
        "labels": list(made.labels),
        "classes": len(made.classes),
        "left_out": left_out,
        "made": report,
    }


def mixing(index: Index, batch: int) -> dict[str, Mixing]:
    """Return order -> classes per batch of its first batches; empty for a split without classes."""
    classes = index.labels.get("class")
    if classes is None:
        return {}
    batch = min(batch, len(index))
    positions = np.arange(min(BATCHES, len(index) // batch) * batch)
    found: dict[str, Mixing] = {}
    for name, block in SHUFFLE_BLOCKS.items():
        _, samples = Stream(len(index), 0, block, SHUFFLE_WINDOW).lookup(positions)
        counts = [len(np.unique(row)) for row in classes[samples].reshape(-1, batch)]
        found[name] = {
            "batch": batch,
            "classes": float(np.mean(counts)),
            "of": len(np.unique(classes)),
        }
    return found


class Sheet(NamedTuple):
    """What a contact sheet shows. unreadable: name and fault of images that are shown gray."""

    images: int
    of: int
    labels: tuple[str, ...]
    unreadable: list[str]


def contact_sheet(folder: Path, png: Path, rows: int, seed: int) -> Sheet:
    """Draw random images of a split with their labels. Raises DataError for a bad path."""
    made, index = manifest.load(folder)
    reader = Reader(folder, made, index)
    chosen = np.random.default_rng(seed).permutation(len(index))[: rows * rows].tolist()
    width, height = THUMBNAIL + 4, THUMBNAIL + 4 + CAPTION
    sheet = Image.new("RGB", (rows * width, -(-len(chosen) // rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    unreadable: list[str] = []
    for position, sample in enumerate(chosen):
        x, y = position % rows * width, position // rows * height
        try:
            image = Image.fromarray(decode.decode_rgb(reader.image(sample)))
        except CorruptSample as e:
            unreadable.append(f"{reader.name(sample)}: {e.what}")
            draw.rectangle((x + 2, y + CAPTION, x + width - 3, y + height - 5), "gray")
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        sheet.paste(image, (x + 2, y + CAPTION))
        draw.text((x + 2, y), _caption(made, index.labels, sample), "black")
    try:
        sheet.save(png, "PNG")
    except OSError as e:
        raise DataError(f"cannot write the sheet: {e}", where=str(png)) from e
    return Sheet(len(chosen), len(index), made.labels, unreadable)


def _caption(made: Manifest, labels: Mapping[str, np.ndarray], sample: int) -> str:
    """Return the labels of a sample, its class by name where the split has names."""
    words: list[str] = []
    for name, column in labels.items():
        value = column[sample].item()
        if name == "class" and made.classes:
            words.append(made.classes[int(value)])
        else:
            words.append(f"{value:.3g}" if isinstance(value, float) else str(value))
    return " ".join(words)
