"""Claim: the input pipeline is near the speed of decoding alone, and seeks anywhere at once.

    python benchmarks/pipeline.py
        variants of one epoch, interleaved; CPU and wall time per image
    python benchmarks/pipeline.py --seek
        the middle of epoch 7 of a 1.28 M-sample index, from a cold process

Every variant reads the same JPEGs (500x375, about 100 KB, spectrum of photographs) with 2 workers,
crops 224 px (scale .3 to 1) and makes batches of 64. CPU is that of the loader's process and its
workers, from /proc, in the middle of an epoch; each measurement is a process of its own, rounds are
interleaved, times are medians and ratios are medians of the rounds' ratios, which a change of load
between rounds leaves alone. About six minutes on two cores.
Peers, where they are installed:
    uv pip install --python .venv/bin/python mosaicml-streaming litdata torchvision
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from jepa_cluster.config import TrialConfig, config_from_dict
from jepa_cluster.data import decode, manifest, pipeline, shards
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.sample_order import Stream
from jepa_cluster.data.sources import scan

WORKERS, BATCH, SIZE = 2, 64, 224
SCALE, ASPECT = (0.3, 1.0), (0.75, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = """
model: {name: vit_s, width: 384, depth: 12, heads: 6, mlp_ratio: 4.0, patch: 16, image: 224}
predictor: {width: 384, depth: 6, heads: 6}
mask: {mode: multiblock, targets: 4, target_scale: [0.15, 0.2], target_aspect: [0.75, 1.5],
       context_scale: [0.85, 1.0], context_keep: 50}
data: {name: bench}
optim: {batch: 64, steps: 10, epochs: null, warmup_steps: 2, warmup_epochs: null,
        start_lr: 0.0001, lr: 0.001, final_lr: 1.0e-6, weight_decay: 0.04, final_weight_decay: 0.4,
        decay_shape: cosine, momentum: 0.99, final_momentum: 1.0}
probe: {}
runtime: {data_root: "", workers: 2, device: cpu}
"""


# ---------------------------------------------------------------- the images, in everybody's format


def photo(path: Path, height: int = 375, width: int = 500) -> None:
    """A JPEG with the spectrum of a photograph, a function of the file's name."""
    rng = np.random.default_rng(int(path.stem))
    f = np.fft.rfftfreq(width)[None] ** 2 + np.fft.fftfreq(height)[:, None] ** 2
    f[0, 0] = 1
    layers = [
        np.fft.irfft2((rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)) / f**0.55)
        for _ in range(3)
    ]
    grey, *colour = (
        x[:height, :width] / x.std() for x in (np.resize(x, (height, width)) for x in layers)
    )
    pixels = np.stack([grey + 0.3 * c for c in (colour[0], -colour[0], colour[1])], -1)
    Image.fromarray(np.clip(128 + 50 * pixels, 0, 255).astype(np.uint8)).save(
        path, "JPEG", quality=90
    )


def prepare(root: Path, images: int) -> None:
    wanted = [root / "images" / "train" / f"c{n % 10}" / f"{n:06d}.JPEG" for n in range(images)]
    for folder in {p.parent for p in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool() as pool:
        pool.map(photo, [p for p in wanted if not p.exists()])
    files = sorted((root / "images" / "train").glob("*/*.JPEG"))
    shards.build(
        scan(root / "images" / "train"),
        root / "shards" / "train",
        shards.Options(shard_bytes=8 << 20),
    )
    if importlib.util.find_spec("streaming") and not (root / "mds").exists():
        from streaming import MDSWriter

        with MDSWriter(
            out=str(root / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=8 << 20
        ) as out:
            for n, path in enumerate(files):
                out.write({"image": path.read_bytes(), "label": n % 10})
    if importlib.util.find_spec("litdata") and not (root / "lit").exists():
        import litdata

        litdata.optimize(
            _lit, [str(f) for f in files], str(root / "lit"), chunk_bytes="8MB", num_workers=1
        )


def _lit(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": 0}


# ---------------------------------------------------------------- the variants


def pil_float() -> Callable[[bytes], torch.Tensor]:
    """The usual pipeline: Pillow, torchvision's crop, a normalised float tensor from the worker."""
    from torchvision import transforms

    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, ASPECT),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda data: change(Image.open(io.BytesIO(data)).convert("RGB"))


def our_decode() -> Callable[[bytes], torch.Tensor]:
    rng = np.random.default_rng(0)

    def change(data: bytes) -> torch.Tensor:
        draws = rng.random(decode.DRAWS)
        return decode.crop_resize(
            *decode.decode_for_crop(
                data, lambda h, w: decode.random_box(h, w, draws, SCALE, ASPECT)
            ),
            SIZE,
        )

    return change


def config(root: Path) -> TrialConfig:
    values = yaml.safe_load(CONFIG)
    values["runtime"]["data_root"] = str(root / "shards")
    return config_from_dict(values)


def ours(root: Path, images: int) -> Iterable[torch.Tensor]:
    for batch in itertools.islice(pipeline.stream(config(root), 0, 1, 0), images // BATCH):
        yield batch.images


def web(root: Path, change: Callable[[bytes], torch.Tensor]) -> Iterable[torch.Tensor]:
    import webdataset

    urls = [str(p) for p in sorted((root / "shards" / "train").glob("*.tar"))]
    data = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(change, int)
    )
    for images, _ in webdataset.WebLoader(data, batch_size=BATCH, num_workers=WORKERS):
        yield images


def streaming(root: Path) -> Iterable[torch.Tensor]:
    from streaming import StreamingDataset

    change = pil_float()

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> torch.Tensor:
            return change(super().__getitem__(at)["image"])

    data = Images(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
    yield from torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=WORKERS)


def lit(root: Path) -> Iterable[torch.Tensor]:
    import litdata

    change = pil_float()

    class Images(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> torch.Tensor:
            return change(super().__getitem__(at)["image"])

    yield from litdata.StreamingDataLoader(
        Images(str(root / "lit"), shuffle=True), batch_size=BATCH, num_workers=WORKERS
    )


def folder(root: Path) -> Iterable[torch.Tensor]:
    from torchvision.datasets import DatasetFolder

    change = pil_float()
    data = DatasetFolder(
        str(root / "images" / "train"), lambda p: change(Path(p).read_bytes()), (".jpeg",)
    )
    for images, _ in torch.utils.data.DataLoader(
        data, batch_size=BATCH, num_workers=WORKERS, shuffle=True
    ):
        yield images


def decode_only(root: Path, images: int) -> Iterable[torch.Tensor]:
    """The limit: the same decode and crop of bytes that are in memory already; no reading, no
    batches to hand over.
    """
    data = [p.read_bytes() for p in sorted((root / "images" / "train").glob("*/*.JPEG"))[:images]]

    def work(part: list[bytes]) -> None:
        torch.set_num_threads(1)
        draws, out = (
            np.random.default_rng(0).random((BATCH, decode.DRAWS)),
            decode.empty(BATCH, SIZE),
        )
        for k, one in enumerate(part):
            choose = functools.partial(
                decode.random_box, draws=draws[k % BATCH], scale=SCALE, aspect=ASPECT
            )
            picture, box = decode.decode_for_crop(one, choose)
            decode.crop_resize(picture, box, SIZE, out=out[k % BATCH])

    yield torch.empty(0)  # the clock starts here
    tasks = [
        multiprocessing.get_context("fork").Process(target=work, args=(data[w::WORKERS],))
        for w in range(WORKERS)
    ]
    for t in tasks:
        t.start()
    for t in tasks:
        t.join()
    yield torch.empty((len(data), 0))


def variants(root: Path, images: int) -> dict[str, Callable[[], Iterable[torch.Tensor]]]:
    return {
        "decode only (the limit)": lambda: decode_only(root, images),
        "ours": lambda: ours(root, images),
        "webdataset + our decode": lambda: web(root, our_decode()),
        "webdataset + PIL": lambda: web(root, pil_float()),
        "ImageFolder + PIL": lambda: folder(root),
        "litdata + PIL": lambda: lit(root),
        "mosaicml-streaming + PIL": lambda: streaming(root),
    }


NEEDS = {"litdata + PIL": "litdata", "mosaicml-streaming + PIL": "streaming"}


def cpu_seconds(pid: int) -> float:
    """CPU of a process and all its living descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = [
        c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()
    ]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(
        cpu_seconds(int(c)) for c in children
    )


def measure(root: Path, name: str, images: int) -> dict[str, float]:
    """CPU and wall per image in the middle of an epoch: starting, imports and the drained end are
    left out.
    """
    batches = iter(variants(root, images)[name]())
    if name.startswith("decode only"):
        next(batches)
        began, used = time.perf_counter(), sum(os.times()[:4])
        seen = len(next(batches))
        wall, cpu = time.perf_counter() - began, sum(os.times()[:4]) - used
    else:
        for _ in range(3):
            next(batches)
        began, used = time.perf_counter(), cpu_seconds(os.getpid())
        seen = sum(len(next(batches)) for _ in range(images // BATCH - 2 * WORKERS - 4))
        wall, cpu = time.perf_counter() - began, cpu_seconds(os.getpid()) - used
    return {"cpu": cpu / seen * 1e3, "wall": wall / seen * 1e3, "images": seen}


def compare(root: Path, images: int, rounds: int) -> None:
    names = [
        n for n in variants(root, images) if n not in NEEDS or importlib.util.find_spec(NEEDS[n])
    ]
    figures: dict[str, list[dict[str, float]]] = {n: [] for n in names}
    for _ in range(rounds):
        for name in names:
            words = [
                sys.executable,
                __file__,
                "--root",
                str(root),
                "--images",
                str(images),
                "--one",
                name,
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            figures[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {figures[name][-1]}", file=sys.stderr, flush=True)
    middle = {
        n: {k: statistics.median(f[k] for f in figures[n]) for k in ("cpu", "wall")} for n in names
    }

    def ratio(base: str, name: str, what: str) -> float:
        return statistics.median(
            b[what] / f[what] for b, f in zip(figures[base], figures[name], strict=True)
        )

    print(
        f"{images} images, {rounds} rounds, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print(
        "| pipeline, 2 workers | CPU ms/img | wall ms/img "
        "| speed, webdataset + PIL = 1 | (wall) | of the limit |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for n in sorted(names, key=lambda n: middle[n]["cpu"]):
        m = middle[n]
        faster = [ratio("webdataset + PIL", n, k) for k in ("cpu", "wall")]
        limit = ratio("decode only (the limit)", n, "cpu")
        print(
            f"| {n} | {m['cpu']:.2f} | {m['wall']:.2f} "
            f"| {faster[0]:.2f} | {faster[1]:.2f} | {limit:.0%} |"
        )
    print(
        f"\nours against webdataset + our decode: "
        f"{ratio('webdataset + our decode', 'ours', 'cpu'):.2f} (CPU)"
    )


# ---------------------------------------------------------------- seeking


def seek(root: Path, images: int = 1_281_167, each: int = 2400) -> None:
    """A real index and real (sparse) shard files of ImageNet's size; open, check, and find the
    middle of epoch 7.
    """
    split = root / "big" / "train"
    if not split.exists():
        split.mkdir(parents=True)
        rng = np.random.default_rng(0)
        size = (rng.integers(20_000, 200_000, images) // 512 + 4).astype(np.int64) * 512
        number = np.arange(images) // each
        first = np.searchsorted(number, np.arange(number[-1] + 1))
        start = np.cumsum(size) - size
        start -= start[first][number]
        columns = {
            "start": start,
            "size": size.astype(np.uint32),
            "skip": np.full(images, 1536, np.uint32),
            "length": (size - 2048).astype(np.uint32),
            "crc": rng.integers(0, 2**32, images, dtype=np.uint32),
            "label/class": rng.integers(0, 1000, images),
        }
        made: list[manifest.Shard] = []
        for k, at in enumerate(first):
            stop = first[k + 1] if k + 1 < len(first) else images
            shard = manifest.Shard(
                f"shard-{k:06d}.tar", int(size[at:stop].sum()) + 10240, int(stop - at)
            )
            made.append(shard)
            with (split / shard.name).open("wb") as f:
                f.truncate(shard.bytes)
        manifest.write(split, manifest.Index(tuple(made), columns), (), {})
    for order in ("global", "block"):
        trial = config(root)
        data = dataclasses.replace(trial.recipe.data, order=order)
        began, used = time.perf_counter(), time.process_time()
        reader = open_split(split)
        opened = time.perf_counter()
        block = data.shuffle_block if order == "block" else 0
        place = 7 * images + images // 2
        epoch, index = Stream(images, 0, block, data.shuffle_window).lookup(
            np.arange(place, place + 2048)
        )
        found, cpu = time.perf_counter(), time.process_time()
        assert epoch[0] == 7 and len(set(index.tolist())) == 2048
        print(
            f"{order} order: {len(reader.manifest.shards)} shards, {images} samples; "
            f"open and check {opened - began:.2f} s, "
            f"find the middle of epoch 7 {found - opened:.2f} s, together {found - began:.2f} s "
            f"({cpu - used:.2f} s of CPU); "
            f"index {reader.index.bytes / 1e6:.1f} MB, an epoch's order {4 * images / 1e6:.1f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data/bench"))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help="measure this variant alone, print JSON")
    parser.add_argument("--seek", action="store_true")
    arguments = parser.parse_args()
    if arguments.seek:
        seek(arguments.root)
    elif arguments.one:
        print(json.dumps(measure(arguments.root, arguments.one, arguments.images)))
    else:
        prepare(arguments.root, arguments.images)
        compare(arguments.root, arguments.images, arguments.rounds)
        shutil.rmtree("/dev/shm/streaming", ignore_errors=True)


if __name__ == "__main__":
    main()
