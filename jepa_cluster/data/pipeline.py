"""Bytes -> batches: resumable from one integer, the same stream at any number of ranks and workers.

In: a trial's config, this rank, the world size and the samples consumed so far by all ranks. Out:
micro-batches of uint8 crops with their masks. What a sample looks like is a function of (seed,
epoch, sample) alone: the number of ranks, workers and batches changes nothing. Uses torch's own
DataLoader over data.reader.

Memory: per worker `PREFETCH` micro-batches of b*3*S*S bytes, and `SPARE` for the reader of the
batches, in buffers that are reused (data.shared_buffers). A worker adds one decoded image, at most
64 descriptors and its share of the index (32 bytes per sample, forked, not copied).
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from jepa_cluster.config import Data, Recipe, TrialConfig
from jepa_cluster.data import decode
from jepa_cluster.data.reader import Reader, open_split
from jepa_cluster.data.sample_order import Stream, positions
from jepa_cluster.data.shared_buffers import Buffer, Buffers
from jepa_cluster.data.staging import staged
from jepa_cluster.data.worker_processes import die_with_parent, ignore_sigterm_of_others
from jepa_cluster.errors import CorruptSample, DataError, JepaError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.pixels import grey_levels
from jepa_cluster.ijepa.stateless_rng import rng_keys, uniform

PREFETCH = 2  # micro-batches a worker prepares ahead
SPARE = 3  # micro-batches in their reader's hands: the current, the one before, the one just read
CROPS, SUBSTITUTES = 1 << 30, 1 << 31  # where a sample's draws of its crop and substitutes begin
MAX_SUBSTITUTES = 16  # substitutes tried before the set counts as damaged


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    images: torch.Tensor  # uint8 [b, 3, S, S]
    masks: masks.Masks  # tensors, see ijepa.masks
    epoch: torch.Tensor  # int64 [b]
    index: torch.Tensor  # int64 [b], the sample's number in the set
    corrupt: int  # samples that were replaced


@dataclass(frozen=True)
class BatchRequest:
    """What a worker is asked for: positions of the stream and their samples, int64 [b] each."""

    position: np.ndarray
    epoch: np.ndarray
    index: np.ndarray
    buffer: Buffer | None  # where its images go; None when no buffer is free


@dataclass(frozen=True)
class WorkerBatch:
    """A batch on its way from a worker: images in a buffer, everything else small."""

    request: BatchRequest
    images: Buffer | torch.Tensor
    drawn: masks.Masks
    faults: list[str]

    def open(self) -> tuple[Batch, list[str]]:
        """Return the batch and its faults. Its buffer is free when the batch's images are gone."""
        images = self.images
        if isinstance(images, Buffer):
            images = images.for_reading(len(self.request.index))
        drawn = self.drawn.apply(torch.from_numpy)
        epoch, index = torch.from_numpy(self.request.epoch), torch.from_numpy(self.request.index)
        return Batch(images, drawn, epoch, index, len(self.faults)), self.faults

    def pin_memory(self) -> tuple[Batch, list[str]]:
        """Return the same in pinned memory. torch's own pinning thread calls this."""
        batch, faults = self.open()
        pinned = batch.masks.apply(torch.Tensor.pin_memory)
        return replace(batch, images=batch.images.pin_memory(), masks=pinned), faults


def stream(
    config: TrialConfig,
    rank: int,
    world: int,
    consumed: int,
    check_shards: bool = True,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches, endlessly, beginning after `consumed` samples of all ranks.

    The global batch of a step is `optim.batch` consecutive samples of the stream. Rank r takes
    every world-th of them from the r-th on, in micro-batches of `runtime.micro_batch`.
    check_shards: whether to look that all shards are there, which one rank per node does.
    on_progress: called while shards are copied to a disk of this node. Closing the iterator ends
    its workers and removes staged shards. Raises DataError: no such set, another digest than the
    trial was planned with, missing or changed shards, a disk that fails, too many corrupt samples.
    """
    recipe, runtime = config.recipe, config.runtime
    reader = open_split(Path(runtime.data_root) / "train", recipe.data.digest, check_shards)
    staging = nullcontext(reader.paths)
    if runtime.staging_dir:
        stage = Path(runtime.staging_dir)
        staging = staged(reader.folder, reader.manifest, stage, on_progress)
    micro = runtime.micro_batch or recipe.optim.batch // world
    buffers = Buffers(runtime.workers * PREFETCH + SPARE, micro, recipe.model.image)
    requests = _requests(recipe, len(reader.index), rank, world, consumed, micro, buffers)
    allowed = recipe.data.max_corrupt
    seen = corrupt = 0
    with staging as paths:
        reader.paths = paths
        for item in _raise_worker_errors(_loader(_Training(recipe, reader), requests, config)):
            # a batch that torch's thread has pinned is open already
            batch, faults = item.open() if isinstance(item, WorkerBatch) else item
            _print_faults("data", faults)
            seen += len(batch.index)
            corrupt += batch.corrupt
            if corrupt > allowed * max(seen, len(reader.index) / world):
                raise DataError(
                    f"{corrupt} of {seen} samples read by rank {rank} are corrupt, more than "
                    f"data.max_corrupt={allowed} of an epoch; the last: {faults[-1]}",
                    where=str(reader.folder),
                    hint=f"jepa shards verify {reader.folder}",
                )
            yield batch


def _print_faults(where: str, faults: list[str]) -> None:
    for fault in faults:
        print(f"{where}: {fault}", file=sys.stderr, flush=True)


def labelled(
    config: TrialConfig,
    split: str,
    limit: int | None,
    rank: int,
    world: int,
    batch: int,
    check_shards: bool = True,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]:
    """Yield a split once, for probes: (images uint8 [b, 3, S, S], labels {name: [b]}, index [b]).

    A rank without images gets an empty batch. An image is its largest centred square. limit: number
    of images, the same ones at any world size and spread over the split; rank r takes every
    world-th. Corrupt images are left out and named on stderr.
    """
    data = config.recipe.data
    digest = data.digest if split == "train" else data.val_digest
    reader = open_split(Path(config.runtime.data_root) / split, digest, check_shards)
    images = len(reader.index)
    count = min(limit or images, images)
    _, samples = Stream(images, seed=0).lookup(np.arange(count))
    mine = np.sort(samples)[rank::world]
    starts = range(0, max(len(mine), 1), batch)
    requests = (mine[k : k + batch] for k in starts)
    labels = {k: torch.from_numpy(v) for k, v in reader.index.labels.items()}
    loader = _loader(_Centred(config, reader), requests, config)
    for (pixels, index), faults in _raise_worker_errors(loader):
        _print_faults(f"data: {split}: left out", faults)
        yield pixels, {name: column[index] for name, column in labels.items()}, index


def normalise(images: torch.Tensor, data: Data) -> torch.Tensor:
    """Map uint8 [b, 3, S, S] to float32 of zero mean and unit deviation, on the images' device."""
    mean, std = grey_levels(data.mean, data.std, images.device)
    return (images.to(torch.float32, memory_format=torch.contiguous_format) - mean) / std


def _requests(
    recipe: Recipe,
    images: int,
    rank: int,
    world: int,
    consumed: int,
    micro: int,
    buffers: Buffers,
) -> Iterator[BatchRequest]:
    """Yield what this rank's micro-batches hold, endlessly."""
    data, batch = recipe.data, recipe.optim.batch
    block = data.shuffle_block if data.order == "block" else 0
    order = Stream(images, recipe.seed, block, data.shuffle_window)
    while True:
        mine = positions(consumed, batch, rank, world)
        for k in range(0, len(mine), micro):
            part = mine[k : k + micro]
            yield BatchRequest(part, *order.lookup(part), buffers.acquire())
        consumed += batch


class _Training(Dataset[Any]):
    """BatchRequest -> WorkerBatch. Errors are returned: a worker's traceback helps nobody."""

    def __init__(self, recipe: Recipe, reader: Reader) -> None:
        self.recipe, self.reader = recipe, reader

    def __getitem__(self, request: BatchRequest) -> WorkerBatch | JepaError:
        recipe, buffer, count = self.recipe, request.buffer, len(request.index)
        if buffer is not None:
            images = buffer.for_writing(count)
        else:
            images = decode.empty(count, recipe.model.image)
        faults: list[str] = []
        step, slot = np.divmod(request.position, recipe.optim.batch)
        mask, grid, seed = recipe.mask, recipe.model.grid, recipe.seed
        try:
            self._crop_all(request, images, faults)
            drawn = masks.sample(mask, grid, seed, request.epoch, request.index, step, slot)
        except JepaError as error:
            return error
        return WorkerBatch(request, buffer or images, drawn, faults)

    def _crop_all(
        self,
        request: BatchRequest,
        images: torch.Tensor,
        faults: list[str],
    ) -> None:
        """Decode and crop the requested samples into `images`."""
        data, size = self.recipe.data, self.recipe.model.image
        key = rng_keys(self.recipe.seed, request.epoch, request.index)
        draws = uniform(key, CROPS, decode.DRAWS)
        for k, sample in enumerate(request.index.tolist()):
            choose = functools.partial(
                decode.random_box,
                draws=draws[k],
                scale=data.crop_scale,
                aspect=data.crop_aspect,
            )
            picture, box = self._picture(sample, choose, key[k : k + 1], faults)
            flip = data.flip and draws[k, -1] < 0.5
            decode.crop_resize(picture, box, size, flip, images[k])

    def _picture(
        self,
        sample: int,
        choose: Callable[[int, int], decode.Box],
        key: np.ndarray,
        faults: list[str],
    ) -> tuple[np.ndarray, decode.Box]:
        """Decode a sample, or the first intact one of its substitutes, a function of its key."""
        try:
            return decode.decode_for_crop(self.reader.image(sample), choose)
        except CorruptSample as error:
            fault = f"{self.reader.name(sample)}: {error.what}"
        draws = uniform(key, SUBSTITUTES, MAX_SUBSTITUTES)[0]
        others = (draws * len(self.reader.index)).astype(np.int64)
        for other in others.tolist():
            try:
                picture = decode.decode_for_crop(self.reader.image(other), choose)
            except CorruptSample:
                continue
            faults.append(f"{fault}; replaced by sample {other} of the set")
            return picture
        raise DataError(
            f"{fault}, and {MAX_SUBSTITUTES} substitutes are corrupt too",
            where=str(self.reader.folder),
            hint=f"jepa shards verify {self.reader.folder}",
        )


class _Centred(Dataset[Any]):
    """Sample numbers -> ((images, index), faults)."""

    def __init__(self, config: TrialConfig, reader: Reader) -> None:
        self.size, self.reader = config.recipe.model.image, reader

    def __getitem__(
        self,
        wanted: np.ndarray,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[str]] | JepaError:
        images = [torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)]
        index: list[int] = []
        faults: list[str] = []
        for sample in wanted.tolist():
            try:
                data = self.reader.image(sample)
                picture, box = decode.decode_for_crop(data, decode.centred_box)
            except CorruptSample as error:
                faults.append(f"{self.reader.name(sample)}: {error.what}")
                continue
            except JepaError as error:
                return error
            images.append(decode.crop_resize(picture, box, self.size)[None])
            index.append(sample)
        return (torch.cat(images), torch.tensor(index, dtype=torch.int64)), faults


def _loader(dataset: Dataset[Any], requests: Iterable[Any], config: TrialConfig) -> DataLoader[Any]:
    workers = config.runtime.workers
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes whole batches
        sampler=requests,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # index and buffers are shared
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available() and config.runtime.device != "cpu",
        worker_init_fn=_init_worker,
        in_order=True,
    )


def _init_worker(worker: int) -> None:
    """Leave signals to the parent, which decides when to stop; use one thread."""
    ignore_sigterm_of_others()
    # torch's own check never runs in a worker that is blocked on a full pipe
    die_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    torch.set_num_threads(1)


def _raise_worker_errors(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the loader's items. Raises the errors among them; DataError when a worker died."""
    items = iter(loader)
    _install_sigchld_handler()
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise _worker_died(error) from error
        if isinstance(item, JepaError):
            raise item
        yield item


def _worker_died(error: RuntimeError) -> DataError:
    return DataError(
        f"a decoding worker died: {error}",
        hint="most often memory: lower runtime.workers or ask for more",
    )


def _install_sigchld_handler() -> None:
    """Turn the RuntimeError of torch's SIGCHLD handler into a DataError.

    torch raises it wherever the process is. threading.Condition.notify, which sends workers their
    next request, swallows a RuntimeError. Then the loader would wait for the rest of a dead
    worker's message.
    """
    torch_handler = signal.getsignal(signal.SIGCHLD)
    module = getattr(torch_handler, "__module__", "")
    if module != "torch.utils.data._utils.signal_handling" or not callable(torch_handler):
        return  # no workers, installed already, or not the main thread, where torch sets none

    def handler(number: int, frame: Any) -> None:
        try:
            torch_handler(number, frame)
        except RuntimeError as error:
            raise _worker_died(error) from error

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
