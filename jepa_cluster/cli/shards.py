"""The verbs `jepa shards ...`: pack images into tar shards, verify and inspect them."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    between,
    command,
    finish,
    info,
    integer,
    print_json,
)
from jepa_cluster.errors import DataError, plural

if TYPE_CHECKING:
    from jepa_cluster.data.manifest import Manifest
    from jepa_cluster.data.sources import Scan
    from jepa_cluster.data.split_info import SplitInfo

MAX_LISTED = 20  # images left out that are listed
VALIDATION_TAR = "ILSVRC2012_img_val.tar"


IMAGES = integer(1, 10**8)


def add(verbs: Verbs) -> None:
    group = verbs.add_parser(
        "shards", help="pack images into tar shards, and index, verify or show such shards"
    )
    kinds = group.add_subparsers(metavar="VERB", required=True)
    _add_build(kinds)
    _add_index(kinds)
    _add_inspection(kinds)
    _add_synthetic(kinds)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=integer(1, 1024), help="number of processes (default: one per core)"
    )


def _add_seed(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument(
        "--seed", type=integer(0, 2**63 - 1), default=0, help=f"{help_text} (default: 0)"
    )


def _add_build(kinds: Verbs) -> None:
    parser = command(kinds, build, root=False)
    parser.add_argument(
        "source",
        type=Path,
        help="folder with train/ and val/, or a split: a class tree, a tar of tars, a list, shards",
    )
    parser.add_argument("root", type=Path, help="data root to fill: ROOT/train, ROOT/val")
    parser.add_argument(
        "--split",
        help="name of the split, if SOURCE is a single one (default: SOURCE/train and SOURCE/val)",
    )
    parser.add_argument(
        "--val",
        type=between(0, 1),
        metavar="FRACTION",
        help="hold out this part of each class of SOURCE as ROOT/val, chosen by --seed",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="classes of a source without: CSV, lines of 'file class', JSON, or ImageNet's devkit",
    )
    parser.add_argument(
        "--shard-mb",
        type=integer(1, 1 << 20),
        default=256,
        help="size of a shard in MiB of source images (default: 256)",
    )
    _add_seed(parser, "seed of the shuffle of images over shards, and of --val")
    parser.add_argument(
        "--resize",
        type=integer(1, 65_500),
        metavar="PX",
        help="resize the shorter side to PX and re-encode (default: keep the bytes)",
    )
    parser.add_argument(
        "--quality", type=integer(1, 100), default=95, help="JPEG quality of --resize (default: 95)"
    )
    _add_workers(parser)


def _add_index(kinds: Verbs) -> None:
    parser = command(kinds, index, root=False)
    parser.add_argument("folder", type=Path, help="folder with the *.tar of one split")
    _add_workers(parser)


def _add_inspection(kinds: Verbs) -> None:
    parser = command(kinds, verify, root=False)
    parser.add_argument("root", type=Path, help="data root, or the folder of one split")

    parser = command(kinds, show_info, "info", root=False)
    parser.add_argument("root", type=Path, help="data root, or the folder of one split")
    parser.add_argument(
        "--batch",
        type=IMAGES,
        default=2048,
        help="global batch in which classes are counted (default: 2048)",
    )

    parser = command(kinds, sample, root=False)
    parser.add_argument(
        "folder", type=Path, help="folder of one split, or a data root (its first split)"
    )
    parser.add_argument("png", type=Path, help="file to write")
    parser.add_argument(
        "--rows", type=integer(1, 64), default=6, help="rows and columns of the sheet (default: 6)"
    )
    _add_seed(parser, "seed of the choice of images")


def _add_synthetic(kinds: Verbs) -> None:
    parser = command(kinds, synthetic, root=False)
    parser.add_argument("folder", type=Path, help="folder to create, with train/ and val/")
    parser.add_argument(
        "--train", type=IMAGES, default=4000, help="number of training images (default: 4000)"
    )
    parser.add_argument(
        "--val", type=IMAGES, default=4000, help="number of validation images (default: 4000)"
    )
    _add_seed(parser, "seed of the images")
    parser.add_argument(
        "--layout",
        choices=("scattered", "arranged"),
        default="scattered",
        help="scattered: copies of one object, which is the class (default); "
        "arranged: four objects, whose places are the class",
    )
    _add_workers(parser)


# ---- build, index, synthetic


def build(args: Args) -> int:
    """Pack images into shards with an index and a manifest, or continue a build that was killed."""
    from jepa_cluster.data import shards, split_info

    log = partial(info, args)
    options = shards.Options(args.shard_mb << 20, args.seed, args.resize, args.quality)
    documents: list[SplitInfo] = []
    sources = _scans(args)
    for split, source in sources.items():
        if split == "val" and args.labels is None and source.path.name == VALIDATION_TAR:
            log(f"{source.path.name} names no classes: --labels ILSVRC2012_devkit_t12.tar.gz would")
        folder = args.root / split
        made = shards.build(source, folder, options, args.workers, log)
        documents.append(split_info.describe(folder, made))
        size = f"{plural(len(made.shards), 'shard')}, {made.bytes / 1e6:.0f} MB"
        log(f"{folder}: {made.images} images, {_classes(made)}, {size}, digest {made.digest}")
        for why, files in made.report.get("skipped", {}).items():
            log(f"  skipped: {files}: {why}")
        left_out = made.report["left_out"]
        for fault in left_out[:MAX_LISTED]:
            log(f"  left out: {fault['file']}: {fault['why']}")
        if left_out:
            log(f"  {len(left_out)} left out in all; the manifest lists them")
    if not (args.root / "val").exists():
        log("no validation split yet, and trials need one: --split val, or --val 0.1 next time")
    print_json(args, documents)
    return 0


def _scans(args: Args) -> dict[str, Scan]:
    """Return split -> what its source holds."""
    from jepa_cluster.data.shards import without_validation
    from jepa_cluster.data.sources import scan

    source: Path = args.source
    if args.val is None:
        return {split: scan(path, args.labels) for split, path in _sources(args).items()}
    if args.split not in (None, "train") or (source / "val").exists():
        what = "--val chooses validation images, but SOURCE/val or --split names them"
        raise DataError(what, where=str(source), hint="leave --val out")
    if (source / "train").is_dir():
        source = source / "train"
    train, val = without_validation(scan(source, args.labels), args.val, args.seed)
    return {"val": val, "train": train}  # val first: it is refused before hours of packing


def _sources(args: Args) -> dict[str, Path]:
    """Return split -> its source."""
    from jepa_cluster.data.manifest import SPLITS

    source: Path = args.source
    if args.split:
        return {args.split: source}
    found = {split: source / split for split in SPLITS if (source / split).exists()}
    if not found and source.exists():
        what = "the source has neither train/ nor val/"
        hint = "--val 0.1 holds out a tenth, or name the split: --split train"
        raise DataError(what, where=str(source.absolute()), hint=hint)
    return found or {"train": source}  # which does not exist: `scan` says so


def _classes(made: Manifest) -> str:
    if "class" not in made.labels:
        return "no classes"
    return plural(len(made.classes), "class") if made.classes else "numbered classes"


def index(args: Args) -> int:
    """Write the index and the manifest of shards that another program wrote."""
    from jepa_cluster.data import indexing, split_info

    made = indexing.index(args.folder, args.workers, partial(info, args))
    labels = ", ".join(made.labels) or "none"
    text = f"{args.folder}: {made.images} images, labels {labels}, digest {made.digest}"
    return finish(args, split_info.describe(args.folder, made), text)


def synthetic(args: Args) -> int:
    """Draw a small set of JPEG images with the labels class, count and distance.

    Arranged images have the class alone.
    """
    from jepa_cluster.data.synthetic import render

    fifth = 0

    def progress(done: int, total: int) -> None:
        nonlocal fifth
        if done * 5 // total > fifth:
            fifth = done * 5 // total
            info(args, f"{args.folder}: {done}/{total} images")

    drawn = render(
        args.folder,
        train=args.train,
        val=args.val,
        seed=args.seed,
        layout=args.layout,
        workers=args.workers,
        progress=progress,
    )
    text = (
        f"{args.folder}: {args.train} + {args.val} images {'drawn' if drawn else 'already drawn'}"
    )
    document = {"folder": str(args.folder), "train": args.train, "val": args.val, "drawn": drawn}
    return finish(args, document, text)


# ---- verify, info, sample


def verify(args: Args) -> int:
    """Read every byte and report the shard, sample and kind of each fault."""
    from jepa_cluster.data import split_info
    from jepa_cluster.data import verify as verification

    documents: list[dict[str, Any]] = []
    is_damaged = False
    for folder in split_info.splits(args.root):
        faults = verification.verify(folder)
        documents.append({"split": str(folder), "faults": faults})
        for line in faults:
            info(args, line)
        result = "every byte as indexed"
        if faults:
            is_damaged = True
            result = plural(len(faults), "fault")
        info(args, f"{folder}: {result}")
    print_json(args, documents)
    return int(is_damaged)


def show_info(args: Args) -> int:
    """Show what a data set holds, how it was made and how well an order mixes its classes."""
    from jepa_cluster.data import manifest, split_info

    documents: list[dict[str, Any]] = []
    for folder in split_info.splits(args.root):
        made, index = manifest.load(folder)
        mixing = split_info.mixing(index, args.batch)
        described = split_info.describe(folder, made)
        documents.append({**described, "index_bytes": index.bytes, "mixing": mixing})
        report = described["made"]
        skipped = report.get("skipped", {})
        shards = plural(len(made.shards), "shard")
        facts = {
            "digest": made.digest,
            "images": f"{made.images} in {shards}, {made.bytes / 1e9:.2f} GB",
            "labels": f"{', '.join(made.labels) or 'none'}; {len(made.classes)} named classes",
            "index": f"{index.bytes / 1e6:.1f} MB in memory",
            **report,
            "command": shlex.join(report.get("command", ())),
            "left_out": len(described["left_out"]),
            "skipped": "; ".join(f"{files}: {why}" for why, files in skipped.items()),
        }
        for name, m in mixing.items():
            facts[name] = f"order: {m['classes']:.0f} of {m['of']} classes in {m['batch']} images"
        info(args, str(folder))
        for key, text in facts.items():
            info(args, f"  {key:9} {text}")
    print_json(args, documents)
    return 0


def sample(args: Args) -> int:
    """Write a PNG with random images and their labels."""
    from jepa_cluster.data import split_info

    folder = split_info.splits(args.folder)[0]
    sheet = split_info.contact_sheet(folder, args.png, args.rows, args.seed)
    for line in sheet.unreadable:
        info(args, line)
    document = {"png": str(args.png), "images": sheet.images, "of": sheet.of}
    labels = ", ".join(sheet.labels) or "none"
    text = f"{args.png}: {sheet.images} of {sheet.of} images; labels: {labels}"
    return finish(args, {**document, "unreadable": sheet.unreadable}, text)
