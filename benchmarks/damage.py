"""Claim: damage is named and counted, never a silent loss.

The webdataset library reads the same files beside us.

    python benchmarks/damage.py

Prints one row a kind of damage: what each reader makes of 2 shards of 50 images; then every byte of
every header and every cut between members of a small shard.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from jepa_cluster.data import shards, verify
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.sources import scan
from jepa_cluster.data.tar_samples import Sample, samples
from jepa_cluster.errors import CorruptSample, DataError


def prepare(root: Path, images: int = 100) -> None:
    rng = np.random.default_rng(0)
    for n in range(images):
        path = root / "images" / f"c{n % 4}" / f"{n:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(path, quality=75)
    size = sum(p.stat().st_size for p in root.glob("images/*/*"))
    shards.build(
        scan(root / "images"),
        root / "whole",
        shards.Options(shard_bytes=size // 2 + 300),
        workers=1,
    )


def by_webdataset(folder: Path) -> str:
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    seen = 0
    try:
        for sample in webdataset.WebDataset(
            urls, shardshuffle=False, handler=webdataset.reraise_exception
        ):
            seen += "jpg" in sample and "cls" in sample
    except Exception as e:
        return f"{seen} of 100, then {type(e).__name__}"
    return f"{seen} of 100{'' if seen == 100 else ', no error'}"


def by_training(folder: Path, images: int = 100) -> str:
    try:
        reader = open_split(folder)
        corrupt = 0
        for n in range(images):
            try:
                reader.image(n)
            except CorruptSample:
                corrupt += 1
        if corrupt > images // 2:
            return f"{corrupt} of {images} corrupt: stops after data.max_corrupt of an epoch"
        return f"{images - corrupt} read, {corrupt} replaced and named"
    except DataError as e:
        return f"refused: {e.what.split(': ', 1)[-1]}"


def by_verify(folder: Path) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            faults = verify.verify(folder)
        return f"{len(faults)}: {faults[0]}" if faults else "no fault"
    except DataError as e:
        return e.what


def every(root: Path) -> None:
    """The same for all damage of a kind, one by one, to the first of two shards of 4 images."""
    prepare(root, 8)
    folder = root / "whole"
    path = min(folder.glob("*.tar"))
    data = path.read_bytes()
    starts = sorted(offset - 512 for s in samples(path) for offset, _ in s.parts.values())
    whole = [tuple(sorted(s.items())) for s in _rows(folder)]
    flips = (
        (at, bytes([data[at] ^ 1 << at % 8]))
        for start in starts
        for at in range(start, start + 512)
    )
    kinds: dict[str, Iterable[bytes]] = {
        "each byte of every header": (data[:at] + byte + data[at + 1 :] for at, byte in flips),
        "cut at every member boundary": (
            data[:at] for at in [*starts, len(data) - len(data.rstrip(b"\0")) // 512 * 512]
        ),
    }
    print(
        "\n| damage, one at a time | times | webdataset, raising handler "
        "| training | `jepa shards verify` |"
    )
    print("|---|---:|---|---|---|")
    for name, changes in kinds.items():
        web, ours, named = Counter[str](), Counter[str](), Counter[str]()
        for changed in changes:
            path.write_bytes(changed)
            web[_webdataset_makes_of(folder, whole)] += 1
            ours[by_training(folder, 8).split(":")[0]] += 1
            named["names the shard" if path.name in by_verify(folder) else "says nothing"] += 1
        cells = (
            ", ".join(f"{n} x {what}" for what, n in c.most_common()) for c in (web, ours, named)
        )
        print(f"| {name} | {web.total()} | {' | '.join(cells)} |", flush=True)
        path.write_bytes(data)


def _rows(folder: Path) -> list[dict[str, object]]:
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.reraise_exception)
    return [{k: s.get(k) for k in ("__key__", "jpg", "cls")} for s in data]


def _webdataset_makes_of(folder: Path, whole: list[tuple[object, ...]]) -> str:
    try:
        found = [tuple(sorted(s.items())) for s in _rows(folder)]
    except Exception:
        return "an error"
    lost = len(set(whole) - set(found))
    return "nothing lost" if not lost else "samples lost or changed, no error"


def main() -> None:
    root = Path(tempfile.mkdtemp())
    prepare(root)
    first = min((root / "whole").glob("*.tar"))
    middle: Sample = list(samples(first))[20]
    header = middle.parts["jpg"][0] - 512

    def patch(at: int, data: bytes) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            with (folder / first.name).open("r+b") as f:
                f.seek(at)
                f.write(data)

        return change

    def cut(at: int) -> Callable[[Path], None]:
        return lambda folder: (folder / first.name).write_bytes(first.read_bytes()[:at]) and None

    image = middle.parts["jpg"][0] + 300
    kinds: dict[str, Callable[[Path], None]] = {
        "nothing": lambda folder: None,
        "one flipped byte in a header": patch(
            header + 5, bytes([first.read_bytes()[header + 5] ^ 1])
        ),
        "one flipped byte in an image": patch(image, bytes([first.read_bytes()[image] ^ 4])),
        "a zeroed header": patch(header, bytes(512)),
        "a zeroed 4 KiB page": patch(header // 4096 * 4096, bytes(4096)),
        "cut at a member boundary": cut(header),
        "cut inside an image": cut(image),
        "a shard missing": lambda folder: (folder / first.name).unlink(),
        "two shards exchanged": lambda folder: (
            [
                shutil.copy(a, folder / b.name)
                for a, b in zip(
                    *(lambda x: (x, x[::-1]))(sorted(first.parent.glob("*.tar"))), strict=True
                )
            ]
            and None
        ),
        "a stale index": lambda folder: (
            (folder / "index.npz").write_bytes((root / "other" / "index.npz").read_bytes()) and None
        ),
    }
    shards.build(scan(root / "images"), root / "other", shards.Options(seed=1), workers=1)
    print(
        "| damage | webdataset, raising handler | our training reads | `jepa shards verify` |\n"
        "|---|---|---|---|"
    )
    for name, change in kinds.items():
        folder = root / "damaged"
        shutil.copytree(root / "whole", folder)
        change(folder)
        print(f"| {name} | {by_webdataset(folder)} | {by_training(folder)} | {by_verify(folder)} |")
        shutil.rmtree(folder)
    every(root / "small")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
