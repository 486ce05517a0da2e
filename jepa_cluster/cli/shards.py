"""`jepa shards ...`: images into tar shards that can be verified, and a look at what they hold."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.verb import ask_json, finish, print_json, tell
from jepa_cluster.errors import CorruptSample, DataError, plural

if TYPE_CHECKING:
    from jepa_cluster.data.manifest import Manifest

SPLITS = ("train", "val")


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number between `low` and `high`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number between {low} and {high}")
        return value

    return number


SEED = whole(0, 2**63 - 1)
WORKERS = whole(1, 1024)
IMAGES = whole(1, 10**8)
MAX_WEIGHT = 100  # times an epoch may show the images of a set


def add(verbs: Verbs) -> None:
    top = verbs.add_parser("shards", help="pack images into tar shards; index, verify, look at them")
    kinds = top.add_subparsers(metavar="VERB", required=True)

    p = kinds.add_parser("build", help="images -> shards, index and manifest; goes on where a killed build stopped")
    p.add_argument(
        "source",
        type=Path,
        help="folder with train/ and val/, or one split: a class tree, a tar of tars, a list, shards",
    )
    p.add_argument("root", type=Path, help="the data root to fill: ROOT/train, ROOT/val")
    p.add_argument(
        "--split", help="SOURCE is this one split (default: SOURCE/train and SOURCE/val, as far as they exist)"
    )
    p.add_argument(
        "--labels",
        type=Path,
        help="classes for sources without any: lines of 'file class' or JSON, or ImageNet's devkit .tar.gz",
    )
    p.add_argument(
        "--shard-mb", type=whole(1, 1 << 20), default=256, help="size of a shard in MiB of source images (default 256)"
    )
    p.add_argument("--seed", type=SEED, default=0, help="shuffles the images over the shards (default 0)")
    p.add_argument(
        "--resize",
        type=whole(1, 65_500),
        metavar="PX",
        help="shrink the shorter side to PX and re-encode (default: keep bytes)",
    )
    p.add_argument("--quality", type=whole(1, 100), default=95, help="JPEG quality of --resize (default 95)")
    p.add_argument("--workers", type=WORKERS, help="processes (default: one a core)")
    ask_json(p)
    p.set_defaults(run=build)

    p = kinds.add_parser("index", help="index and manifest for shards that others wrote")
    p.add_argument("folder", type=Path, help="folder with the *.tar of one split")
    p.add_argument("--workers", type=WORKERS, help="processes (default: one a core)")
    ask_json(p)
    p.set_defaults(run=index)

    p = kinds.add_parser("verify", help="read every byte; name the shard, sample and kind of each fault")
    p.add_argument("root", type=Path, help="a data root, or the folder of one split")
    ask_json(p)
    p.set_defaults(run=verify)

    p = kinds.add_parser("info", help="what a set holds, how it was made, how well an order mixes its classes")
    p.add_argument("root", type=Path, help="a data root, or the folder of one split")
    p.add_argument("--batch", type=IMAGES, default=2048, help="global batch for the count of classes (default 2048)")
    ask_json(p)
    p.set_defaults(run=info)

    p = kinds.add_parser("sample", help="a contact sheet of random images, with their labels, as a PNG")
    p.add_argument("folder", type=Path, help="the folder of one split, or a data root (its first split)")
    p.add_argument("png", type=Path, help="file to write")
    p.add_argument("--rows", type=whole(1, 64), default=6, help="rows and columns of the sheet (default 6)")
    p.add_argument("--seed", type=SEED, default=0, help="which images (default 0)")
    ask_json(p)
    p.set_defaults(run=sample)

    p = kinds.add_parser("synthetic", help="draw a tiny honest ImageNet: JPEG files with class, count and distance")
    p.add_argument("folder", type=Path, help="the folder to make, with train/ and val/")
    p.add_argument("--train", type=IMAGES, default=4000, help="training images (default 4000)")
    p.add_argument("--val", type=IMAGES, default=1000, help="validation images (default 1000)")
    p.add_argument("--seed", type=SEED, default=0, help="which images (default 0)")
    p.add_argument("--workers", type=WORKERS, help="processes (default: one a core)")
    ask_json(p)
    p.set_defaults(run=synthetic)

    p = kinds.add_parser("mix", help="one split out of several, with weights and without copying")
    p.add_argument("folder", type=Path, help="the split to write, e.g. DATA/mixed/train")
    p.add_argument(
        "sets",
        nargs="+",
        metavar="SPLIT=WEIGHT",
        help="a split's folder and how many times an epoch shows its images, e.g. imagenet/train=3",
    )
    ask_json(p)
    p.set_defaults(run=mix)


def splits(root: Path) -> list[Path]:
    """The folders of a data root that hold shards; the folder itself when it is one split."""
    found = [root / s for s in SPLITS if (root / s).is_dir()]
    return found or [root]


def summary(folder: Path, made: Manifest) -> dict[str, Any]:
    """A split as a document."""
    kept = {k: v for k, v in made.report.items() if k != "left_out"}
    return {
        "split": str(folder),
        "digest": made.digest,
        "images": made.images,
        "shards": len(made.shards),
        "bytes": made.bytes,
        "labels": list(made.labels),
        "classes": len(made.classes),
        "left_out": list(made.report.get("left_out", [])),
        "made": kept,
    }


def build(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import shards

    source: Path = arguments.source
    options = shards.Options(arguments.shard_mb << 20, arguments.seed, arguments.resize, arguments.quality)
    if arguments.split:
        jobs = [(source, arguments.split)]
    else:
        jobs = [(source / s, s) for s in SPLITS if (source / s).exists()]
        if not jobs:
            what = "the source has neither train/ nor val/" if source.exists() else f"no source {source}"
            hint = "say which split it is: --split train" if source.exists() else "give a folder, a tar or a list file"
            raise DataError(what, where=str(source.absolute()), hint=hint)

    def say(line: str) -> None:
        tell(arguments, line)

    found: list[dict[str, Any]] = []
    for where, split in jobs:
        if split in SPLITS[1:] and arguments.labels is None and where.name == "ILSVRC2012_img_val.tar":
            say(f"{where.name} names no classes: --labels ILSVRC2012_devkit_t12.tar.gz would")
        made = shards.build(where, arguments.root / split, options, arguments.labels, arguments.workers, say)
        found.append(summary(arguments.root / split, made))
        left_out = found[-1]["left_out"]
        say(
            f"{arguments.root / split}: {made.images} images, {_classes(made)}, {plural(len(made.shards), 'shard')}, "
            f"{made.bytes / 1e6:.0f} MB, digest {made.digest}"
        )
        for fault in left_out[:20]:
            say(f"  left out: {fault['file']}: {fault['why']}")
        if left_out:
            say(f"  {len(left_out)} left out in all; the manifest lists them")
    print_json(arguments, found)
    return 0


def _words(value: Any) -> str:
    """What a report says of one thing: a command line, counts by name, a number of files."""
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return shlex.join(items) if items and all(isinstance(v, str) for v in items) else str(len(items))
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in cast("dict[str, Any]", value).items()) or "none"
    return str(value)


def _classes(made: Manifest) -> str:
    return f"{len(made.classes) or 'numbered'} classes" if "class" in made.labels else "no classes"


def index(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import indexing

    made = indexing.index(arguments.folder, arguments.workers, lambda line: tell(arguments, line))
    labels = ", ".join(made.labels) or "none"
    text = f"{arguments.folder}: {made.images} images, labels {labels}, digest {made.digest}"
    return finish(arguments, summary(arguments.folder, made), text)


def verify(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data.verify import verify as faults_of

    found: list[dict[str, Any]] = []
    for folder in splits(arguments.root):
        faults = faults_of(folder)
        found.append({"split": str(folder), "faults": faults})
        for line in faults:
            tell(arguments, line)
        tell(arguments, f"{folder}: {plural(len(faults), 'fault') if faults else 'every byte as indexed'}")
    print_json(arguments, found)
    return int(any(f["faults"] for f in found))


def info(arguments: argparse.Namespace) -> int:
    import numpy as np

    from jepa_cluster.data import manifest
    from jepa_cluster.data.sample_order import Stream

    found: list[dict[str, Any]] = []
    for folder in splits(arguments.root):
        made, index = manifest.load(folder)
        found.append({**summary(folder, made), "index_bytes": index.bytes, "mixing": {}})
        tell(arguments, f"{folder}\n  digest    {made.digest}")
        tell(arguments, f"  images    {made.images} in {plural(len(made.shards), 'shard')}, {made.bytes / 1e9:.2f} GB")
        tell(arguments, f"  labels    {', '.join(made.labels) or 'none'}; {len(made.classes)} named classes")
        tell(arguments, f"  index     {index.bytes / 1e6:.1f} MB in memory")
        for key, value in made.report.items():
            tell(arguments, f"  {key:9} {_words(value)}")
        classes = index.labels.get("class")
        if classes is None:
            continue
        for name, block in (("global", 0), ("block", 64)):
            batch = min(arguments.batch, made.images)
            stream = Stream(len(index), 0, block, 1024)
            first = stream.lookup(np.arange(min(8, made.images // batch) * batch))[1]
            seen = [len(set(classes[part].tolist())) for part in first.reshape(-1, batch)]
            mean, total = sum(seen) / len(seen), len(set(classes.tolist()))
            found[-1]["mixing"][name] = {"batch": batch, "classes": mean, "of": total}
            tell(arguments, f"  {name:9} order: {mean:.0f} of {total} classes in {batch} images")
    print_json(arguments, found)
    return 0


def sample(arguments: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image, ImageDraw

    from jepa_cluster.data import decode, manifest
    from jepa_cluster.data.reader import Reader

    folder = splits(arguments.folder)[0]
    made, index = manifest.load(folder)
    reader, side, rows = Reader(folder, made, index), 160, arguments.rows
    chosen = np.random.default_rng(arguments.seed).permutation(len(index))[: rows * rows].tolist()
    sheet = Image.new("RGB", (rows * side, -(-len(chosen) // rows) * (side + 14)), "white")
    draw, unreadable = ImageDraw.Draw(sheet), list[str]()
    for k, number in enumerate(chosen):
        x, y = k % rows * side, k // rows * (side + 14)
        try:
            image = Image.fromarray(decode.decode_rgb(reader.image(number)))
        except CorruptSample as e:
            unreadable.append(f"{reader.name(number)}: {e.what}")
            tell(arguments, unreadable[-1])
            draw.rectangle((x + 2, y + 14, x + side - 3, y + side + 9), "gray")
            continue
        image.thumbnail((side - 4, side - 4))
        sheet.paste(image, (x + 2, y + 14))
        label = {name: column[number].item() for name, column in index.labels.items()}
        if made.classes and "class" in label:
            label["class"] = made.classes[int(label["class"])]
        draw.text((x + 2, y), " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in label.values()), "black")
    try:
        sheet.save(arguments.png, "PNG")
    except OSError as e:
        raise DataError(f"cannot write the sheet: {e}", where=str(arguments.png)) from e
    document = {"png": str(arguments.png), "images": len(chosen), "of": len(index), "unreadable": unreadable}
    text = f"{arguments.png}: {len(chosen)} of {len(index)} images; labels: {', '.join(made.labels) or 'none'}"
    return finish(arguments, document, text)


def synthetic(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data.synthetic import render

    a, told = arguments, 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * 5 // total > told:  # a line every fifth of the way
            told = done * 5 // total
            tell(a, f"{a.folder}: {done}/{total} images")

    drawn = render(a.folder, train=a.train, val=a.val, seed=a.seed, workers=a.workers, progress=progress)
    document = {"folder": str(a.folder), "train": a.train, "val": a.val, "drawn": drawn}
    return finish(a, document, f"{a.folder}: {a.train} + {a.val} images {'drawn' if drawn else 'already drawn'}")


def mix(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import indexing

    sets: dict[Path, int] = {}
    for word in arguments.sets:
        folder, _, weight = word.rpartition("=")
        if not folder or not weight.isdecimal() or not 1 <= int(weight) <= MAX_WEIGHT:
            raise DataError(
                f"{word!r} is not SPLIT=WEIGHT with a whole number between 1 and {MAX_WEIGHT}",
                where="jepa shards mix",
                hint="repeat sets a whole number of times: imagenet/train=2 other/train=1 for 1 and 0.5",
            )
        if Path(folder) in sets:
            raise DataError(f"{folder} is named twice", hint="give it the sum of the weights")
        sets[Path(folder)] = int(weight)
    made = indexing.mix(arguments.folder, sets)
    labels = ", ".join(made.labels) or "none"
    text = f"{arguments.folder}: {made.images} images an epoch, labels {labels}, digest {made.digest}"
    return finish(arguments, summary(arguments.folder, made), text)
