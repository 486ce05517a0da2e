"""`jepa shards ...`: images into tar shards that can be verified, and a look at what they hold."""

from __future__ import annotations

import argparse
from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import DataError

SPLITS = ("train", "val")


def add(verbs: Verbs) -> None:
    top = verbs.add_parser("shards", help="pack images into tar shards; index, verify, look at them")
    kinds = top.add_subparsers(metavar="WHAT", required=True)

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
    p.add_argument("--labels", type=Path, help="classes, lines of 'file class' or JSON, for sources without any")
    p.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MiB of source images (default 256)")
    p.add_argument("--seed", type=int, default=0, help="shuffles the images over the shards (default 0)")
    p.add_argument(
        "--resize", type=int, metavar="PX", help="shrink the shorter side to PX and re-encode (default: keep bytes)"
    )
    p.add_argument("--quality", type=int, default=95, help="JPEG quality of --resize (default 95)")
    p.add_argument("--workers", type=int, help="processes (default: one a core)")
    p.set_defaults(run=build)

    p = kinds.add_parser("index", help="index and manifest for shards that others wrote")
    p.add_argument("folder", type=Path, help="folder with the *.tar of one split")
    p.add_argument("--workers", type=int, help="processes (default: one a core)")
    p.set_defaults(run=index)

    p = kinds.add_parser("verify", help="read every byte; name the shard, sample and byte of each fault")
    p.add_argument("root", type=Path, help="a data root, or the folder of one split")
    p.set_defaults(run=verify)


def splits(root: Path) -> list[Path]:
    """The folders of a data root that hold shards; the folder itself when it is one split."""
    found = [root / s for s in SPLITS if (root / s).is_dir()]
    return found or [root]


def say(line: str) -> None:
    print(line, flush=True)


def build(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import shards

    source: Path = arguments.source
    options = shards.Options(arguments.shard_mb << 20, arguments.seed, arguments.resize, arguments.quality)
    if arguments.split:
        jobs = [(source, arguments.split)]
    else:
        jobs = [(source / s, s) for s in SPLITS if (source / s).exists()]
        if not jobs:
            raise DataError(
                "the source has neither train/ nor val/", where=str(source), now="say which split it is: --split train"
            )
    for where, split in jobs:
        made = shards.build(where, arguments.root / split, options, arguments.labels, arguments.workers, say)
        left_out = made.report.get("left_out", [])
        say(
            f"{arguments.root / split}: {made.images} images, {len(made.classes)} classes, {len(made.shards)} shards, "
            f"{made.bytes / 1e6:.0f} MB, digest {made.digest}"
        )
        for fault in left_out[:20]:
            say(f"  left out: {fault['file']}: {fault['why']}")
        if left_out:
            say(f"  {len(left_out)} left out in all; the manifest lists them")
    return 0


def index(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import shards

    made = shards.index(arguments.folder, arguments.workers, say)
    say(f"{arguments.folder}: {made.images} images, labels {', '.join(made.labels) or 'none'}, digest {made.digest}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from jepa_cluster.data import shards

    faults = 0
    for folder in splits(arguments.root):
        found = shards.verify(folder)
        for line in found:
            say(line)
        say(f"{folder}: {f'{len(found)} faults' if found else 'every byte as indexed'}")
        faults += len(found)
    return 1 if faults else 0
