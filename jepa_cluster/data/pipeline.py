"""Bytes -> batches: resumable from one integer, the same stream at any number of ranks and workers.

In: a trial's config, this rank, the world size and the samples consumed so far by all ranks. Out: micro-batches of
uint8 crops with their masks. What a sample looks like is a function of (seed, epoch, sample) alone: which ranks,
workers and batches there are changes nothing. Uses torch's own DataLoader over our reader (data.reader).

Memory: `PREFETCH` micro-batches of b·3·S² bytes a worker and `SPARE` for whoever reads them, in buffers that are
used again and again (data.buffers). A worker adds one decoded image, at most 64 descriptors and its share of the
index (32 B a sample, forked, not copied).
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from jepa_cluster.config import Data, TrialConfig
from jepa_cluster.data import decode, manifest
from jepa_cluster.data.buffers import Buffer, Buffers
from jepa_cluster.data.order import Stream, positions
from jepa_cluster.data.reader import Reader
from jepa_cluster.data.shards import follow_parent
from jepa_cluster.data.stage import staged
from jepa_cluster.errors import CorruptSample, DataError, JepaError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.keyed import keys, uniform

PREFETCH = 2  # micro-batches a worker prepares ahead
SPARE = 3  # micro-batches that their reader may hold: the one at work, the one before, the one just handed over
CROPS, SUBSTITUTES = 1 << 30, 1 << 31  # where in a sample's random stream its crop and its substitutes begin
CHANCES = 16  # substitutes tried before the set is given up


class Batch(NamedTuple):
    """A micro-batch of one rank. images: uint8 [b, 3, S, S]; masks: tensors, see ijepa.masks; corrupt: replaced."""

    images: torch.Tensor
    masks: masks.Masks
    epoch: torch.Tensor  # int64 [b]
    index: torch.Tensor  # int64 [b], the sample's number in the set
    corrupt: int


class Wanted(NamedTuple):
    """What a worker is asked for: places in the stream and what stands there. int64 [b] each."""

    position: np.ndarray
    epoch: np.ndarray
    index: np.ndarray
    buffer: Buffer | None  # where its images go; None when the reader keeps them all


class Parcel:
    """A batch on its way from a worker: images in a buffer, everything else small."""

    def __init__(self, images: Buffer | torch.Tensor, drawn: masks.Masks, wanted: Wanted, faults: list[str]) -> None:
        self.images, self.drawn, self.faults = images, drawn, faults
        self.epoch, self.index = wanted.epoch, wanted.index

    def open(self) -> tuple[Batch, list[str]]:
        """The batch, and what was corrupt in it. The buffer is free again when the batch's images are gone."""
        images = self.images.lend(len(self.index)) if isinstance(self.images, Buffer) else self.images
        drawn = masks.Masks(*(None if v is None else torch.from_numpy(v) for v in self.drawn))
        epoch, index = torch.from_numpy(self.epoch), torch.from_numpy(self.index)
        return Batch(images, drawn, epoch, index, len(self.faults)), self.faults

    def pin_memory(self) -> tuple[Batch, list[str]]:
        """The same in pinned memory. torch's own pinning thread calls this."""
        batch, faults = self.open()
        drawn = masks.Masks(*(None if v is None else v.pin_memory() for v in batch.masks))
        return batch._replace(images=batch.images.pin_memory(), masks=drawn), faults


def stream(config: TrialConfig, rank: int, world: int, consumed: int) -> Iterator[Batch]:
    """This rank's micro-batches, endlessly, from the sample after `consumed` (of all ranks) on.

    A step's global batch is `optim.batch` consecutive samples of the stream; rank r takes every world-th of them
    from the r-th on, in micro-batches of `runtime.micro_batch`. Close the iterator (or let it go) to end its
    workers and remove staged shards. Raises DataError: no such set, another digest than the trial was planned
    with, missing or changed shards, a disk that fails, too many corrupt samples.
    """
    recipe, runtime = config.recipe, config.runtime
    reader = open_split(Path(runtime.data_root) / "train", recipe.data.digest)
    allowed, seen, corrupt = recipe.data.max_corrupt, 0, 0
    with staged(reader.folder, reader.manifest, Path(runtime.stage)) if runtime.stage else nullcontext() as paths:
        reader.paths = paths or reader.paths
        for batch, faults in batches(config, reader, rank, world, consumed):
            for fault in faults:
                print(f"data: {fault}", file=sys.stderr, flush=True)
            seen, corrupt = seen + len(batch.index), corrupt + batch.corrupt
            if corrupt > allowed * max(seen, len(reader.index) / world):
                raise DataError(
                    f"{corrupt} of {seen} samples read by rank {rank} are corrupt, more than "
                    f"data.max_corrupt={allowed} of an epoch; the last: {faults[-1]}",
                    where=str(reader.folder),
                    now=f"jepa shards verify {reader.folder}",
                )
            yield batch


def batches(
    config: TrialConfig, reader: Reader, rank: int, world: int, consumed: int
) -> Iterator[tuple[Batch, list[str]]]:
    """The endless batches of a rank and what was corrupt in each, before anything is counted or said."""
    runtime = config.runtime
    micro = runtime.micro_batch or config.recipe.optim.batch // world
    buffers = Buffers(runtime.workers * PREFETCH + SPARE, micro, config.recipe.model.image)
    wanted = _wanted(config, reader.index, rank, world, consumed, micro, buffers)
    for item in _guarded(_loader(_Training(config, reader), wanted, config)):
        yield item.open() if isinstance(item, Parcel) else item


def labelled(
    config: TrialConfig, split: str, limit: int | None, rank: int, world: int, batch: int
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]:
    """(images uint8 [b, 3, S, S], labels {name: [b]}, index int64 [b]) of a split, once, for probes.

    The largest centred square of each image. `limit` images, the same ones at any world size and spread over the
    whole split; rank r takes every world-th. Corrupt images are left out and named on stderr.
    """
    reader = open_split(Path(config.runtime.data_root) / split, config.recipe.data.digest if split == "train" else None)
    images = len(reader.index)
    chosen = np.sort(Stream(images, seed=0).lookup(np.arange(min(limit or images, images)))[1])[rank::world]
    wanted = (chosen[k : k + batch] for k in range(0, len(chosen), batch))
    labels = {k: torch.from_numpy(v) for k, v in reader.index.labels.items()}
    for (pixels, index), faults in _guarded(_loader(_Centred(config, reader), wanted, config)):
        for fault in faults:
            print(f"data: {split}: {fault}; left out", file=sys.stderr, flush=True)
        yield pixels, {k: v[index] for k, v in labels.items()}, index


def normalise(images: torch.Tensor, data: Data) -> torch.Tensor:
    """uint8 [b, 3, S, S] -> float32 of zero mean and unit deviation by the set's constants, where the images lie."""
    mean, std = _constants(data.mean, data.std, images.device)
    return (images.to(torch.float32, memory_format=torch.contiguous_format) - mean) / std


@functools.lru_cache(8)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """In grey levels, [3, 1, 1]. Kept, because every copy to a GPU waits for it."""
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (mean, std))


def open_split(folder: Path, digest: str | None = None) -> Reader:
    """A reader whose shards are all there. digest: what a frozen trial expects. Raises DataError."""
    made, index = manifest.load(folder)
    if digest is not None and made.digest != digest:
        raise DataError(
            f"the set has digest {made.digest}, the trial was frozen with {digest}",
            where=str(folder),
            now="point runtime.data_root at the set it was planned with, or submit the sweep again",
        )
    reader = Reader(folder, made, index)
    reader.check()
    return reader


def _wanted(
    config: TrialConfig, index: manifest.Index, rank: int, world: int, consumed: int, micro: int, buffers: Buffers
) -> Iterator[Wanted]:
    """The endless list of what this rank's micro-batches hold."""
    data, batch = config.recipe.data, config.recipe.optim.batch
    block = data.block if data.order == "block" else 0
    order = Stream(len(index), config.recipe.seed, block, data.window)
    while True:
        mine = positions(consumed, batch, rank, world)
        for k in range(0, len(mine), micro):
            part = mine[k : k + micro]
            yield Wanted(part, *order.lookup(part), buffers.take())
        consumed += batch


class _Training(Dataset[Any]):
    """Wanted -> (Batch, what was corrupt). Errors travel as values: a worker's traceback helps nobody."""

    def __init__(self, config: TrialConfig, reader: Reader) -> None:
        self.recipe, self.reader = config.recipe, reader

    def __getitem__(self, wanted: Wanted) -> Parcel | JepaError:
        recipe, data, size = self.recipe, self.recipe.data, self.recipe.model.image
        key = keys(recipe.seed, wanted.epoch, wanted.index)
        draws = uniform(key, CROPS, decode.DRAWS)
        count = len(key)
        images = wanted.buffer.room(count) if wanted.buffer else decode.empty(count, size)
        faults: list[str] = []
        try:
            for k, sample in enumerate(wanted.index.tolist()):
                choose = functools.partial(
                    decode.random_box, draws=draws[k], scale=data.crop_scale, aspect=data.crop_aspect
                )
                picture, box = self._picture(sample, choose, key[k : k + 1], faults)
                decode.crop(picture, box, size, data.flip and draws[k, -1] < 0.5, images[k])
            place, batch = wanted.position, recipe.optim.batch
            drawn = masks.sample(
                recipe.mask, recipe.model.grid, recipe.seed, wanted.epoch, wanted.index, place // batch, place % batch
            )
        except JepaError as e:
            return e
        return Parcel(wanted.buffer or images, drawn, wanted, faults)

    def _picture(
        self, sample: int, choose: Callable[[int, int], decode.Box], key: np.ndarray, faults: list[str]
    ) -> tuple[np.ndarray, decode.Box]:
        """The decoded sample and its box, or of its substitutes (a function of its key) the first that is whole."""
        try:
            return decode.boxed(self.reader.image(sample), choose)
        except CorruptSample as e:
            fault = f"{self.reader.name(sample)}: {e.what}"
        others = (uniform(key, SUBSTITUTES, CHANCES)[0] * len(self.reader.index)).astype(np.int64).tolist()
        for other in others:
            try:
                picture = decode.boxed(self.reader.image(other), choose)
            except CorruptSample:
                continue
            faults.append(f"{fault}; replaced by sample {other} of the set")
            return picture
        raise DataError(
            f"{fault}, and {CHANCES} substitutes are corrupt too",
            where=str(self.reader.folder),
            now=f"jepa shards verify {self.reader.folder}",
        )


class _Centred(Dataset[Any]):
    """Sample numbers -> ((images, index), what was corrupt)."""

    def __init__(self, config: TrialConfig, reader: Reader) -> None:
        self.size, self.reader = config.recipe.model.image, reader

    def __getitem__(self, wanted: np.ndarray) -> tuple[tuple[torch.Tensor, torch.Tensor], list[str]] | JepaError:
        images, index, faults = [], [], []
        try:
            for sample in wanted.tolist():
                try:
                    picture, box = decode.boxed(self.reader.image(sample), decode.centre_box)
                except CorruptSample as e:
                    faults.append(f"{self.reader.name(sample)}: {e.what}")
                    continue
                images.append(decode.crop(picture, box, self.size))
                index.append(sample)
        except JepaError as e:
            return e
        stacked = torch.stack(images) if images else torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        return (stacked, torch.tensor(index, dtype=torch.int64)), faults


def _loader(dataset: Dataset[Any], wanted: Iterator[Any], config: TrialConfig) -> DataLoader[Any]:
    workers = config.runtime.workers
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes whole batches
        sampler=wanted,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # index and buffers are shared, not sent
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available() and config.runtime.device != "cpu",
        worker_init_fn=_quiet,
        in_order=True,
    )


def _quiet(worker: int) -> None:
    """A worker leaves signals to its parent, which decides when to stop, dies with it, and uses one thread."""
    follow_parent()  # torch's own watch would wait for ever in a worker whose batches nobody takes from the pipe
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _guarded(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's items; errors that came as values are raised, a dead worker becomes a DataError."""
    items = iter(loader)
    _hear_of_the_dead()
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise _died(e) from e
        if isinstance(item, JepaError):
            raise item
        yield item


def _died(e: RuntimeError) -> DataError:
    return DataError(f"a decoding worker died: {e}", now="most often memory: lower runtime.workers or ask for more")


def _hear_of_the_dead() -> None:
    """torch's SIGCHLD handler raises a RuntimeError wherever the process is; here it becomes a DataError.

    threading.Condition.notify, which hands workers their next batch, swallows a RuntimeError: the news was lost, and
    half a message of the dead worker was waited for.
    """
    theirs = signal.getsignal(signal.SIGCHLD)
    if getattr(theirs, "__module__", "") != "torch.utils.data._utils.signal_handling" or not callable(theirs):
        return  # no workers, ours already, or not the main thread, where torch sets none either

    def handler(number: int, frame: Any) -> None:
        try:
            theirs(number, frame)
        except RuntimeError as e:
            raise _died(e) from e

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
