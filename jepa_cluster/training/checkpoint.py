"""Lay out a checkpoint in files, write it, and read it back on any number of ranks.

In: model and optimizer of every rank, a step, a trial directory. Out: `checkpoints/step-N/` with
manifest.json and one safetensors file per writing rank. FSDP2 shards dimension 0, so a rank's part
of a tensor is a range of rows; the ranks of replica 0 write their rows, and a reader at another
world size reads the rows that it needs. The protocol that makes a save safe is in save_protocol.py.

The files are read and written here instead of by the safetensors package: a save needs the checksum
of the bytes as they are written, and a read error must be an exception (the package maps the file
into memory, where it is SIGBUS).
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa.objective import IJepa, local_part
from jepa_cluster.training.channel import CheckpointGone
from jepa_cluster.training.checkpoint_files import (
    Disk,
    Manifest,
    read_manifest,
    read_verified,
    row_range,
)
from jepa_cluster.training.distributed import World, named_tensors
from jepa_cluster.training.save_protocol import SaveProtocol, SaveResult
from jepa_cluster.training.sharded_adamw import ShardedAdamW, trainable_parameters
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.provenance import versions

DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def state(model: IJepa, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """Return all that must survive, by name: weights, the target's too, and optimizer moments."""
    out = {f"model.{name}": tensor.detach() for name, tensor in named_tensors(model).items()}
    for name, parameter in trainable_parameters(model):
        for key in ("exp_avg", "exp_avg_sq"):
            out[f"optim.{name}.{key}"] = optimizer.state[parameter][key]
        out["optim.updates"] = optimizer.state[parameter]["step"]  # the same for all
    return out


def new_manifest(
    step: int,
    recipe: str,
    attempt: int,
    world: World,
    counters: Mapping[str, float],
) -> Manifest:
    """The manifest of a save that is about to start; `files` is filled in when they are written."""
    now = time.time_ns() // 1_000_000
    return Manifest(
        step,
        recipe,
        world.size,
        attempt,
        dict(counters),
        row=None,
        files={},
        versions=versions(),
        t=now,
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold rows of this tensor (FSDP2); else every rank holds all of it."""
    if not isinstance(tensor, DTensor):
        return False
    replicate, shard = tensor.placements
    assert isinstance(replicate, Replicate) and shard == Shard(0), (
        f"cannot save placements {tensor.placements}"
    )
    return True


# ---- saving


class AsyncSaver:
    """Saves in a background thread, one at a time.

    Only ranks of replica 0 copy and write anything.

    `take_result` tells the end of a save: on rank 0 whether it is committed, on other ranks whether
    their part failed.
    """

    def __init__(self, trial: TrialDir, attempt: int, world: World) -> None:
        self.world, self.writes = world, world.replica_index == 0
        channel = world.new_channel(self._progress) if self.writes else world.channel
        self.protocol = SaveProtocol(
            trial.checkpoints,
            attempt,
            world.shard_count,
            channel,
            Disk(),
            lambda: trial.superseded(attempt),
        )
        # Rank 0, in the thread of the save.
        self.on_failure: Callable[[SaveResult], None] = lambda result: None
        self._moved = 0.0  # when the running save last made progress
        self._number = 0
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        """Copy the state to host memory and save the copy in the background.

        Every rank calls this while none is saving.
        """
        self._number += 1
        if not self.writes:
            return
        assert not self.busy
        described = {
            name: (DTYPES[tensor.dtype], tuple(tensor.shape), is_sharded(tensor))
            for name, tensor in tensors.items()
        }
        manifest = replace(manifest, tensors=described)
        self._result, self._moved = None, time.monotonic()
        arguments = (self._number, manifest, self._stage(tensors))
        self._thread = threading.Thread(
            target=self._save, args=arguments, name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def last_progress(self) -> float | None:
        """Time of the last progress of the running save; None when none runs."""
        return self._moved if self.busy else None

    def take_result(self) -> SaveResult | None:
        """How the last save ended, once; None while it runs or when the result was taken."""
        if self.busy:
            return None
        result, self._result = self._result, None
        return result

    def _save(
        self,
        number: int,
        manifest: Manifest,
        staged: Mapping[str, Tensor],
    ) -> None:
        result = self.protocol.save(number, manifest, shard_bytes(staged))
        if result.error and self.world.rank == 0:
            self.on_failure(result)
        self._result = result

    def _progress(self) -> None:
        self._moved = time.monotonic()

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's rows to host memory, pinned for a GPU. All saves share the buffers."""
        rank0 = self.world.rank == 0
        parts = {name: local_part(t) for name, t in tensors.items() if rank0 or is_sharded(t)}
        cuda = self.world.device.type == "cuda"
        for name, part in parts.items():
            if is_sharded(tensors[name]):
                start, stop = row_range(
                    tensors[name].shape[0], self.world.shard_index, self.world.shard_count
                )
                assert part.shape[0] == stop - start, (
                    f"{name} is not sharded as torch.chunk does it"
                )
            if name not in self._buffers:
                self._buffers[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=cuda)
            self._buffers[name].copy_(part, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()
        return self._buffers


def shard_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file that holds these CPU tensors."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        if tensor.numel():
            yield _memory(tensor)


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


# ---- loading


class ShardFile:
    """One safetensors file, read by position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        (length,) = struct.unpack("<Q", self._read(8))
        if length > path.stat().st_size:
            raise self._too_short()
        self.header: dict[str, Any] = json.loads(self._read(length))
        self._data = 8 + length

    def rows_into(
        self,
        target: Tensor,
        name: str,
        start: int,
    ) -> None:
        """Fill a contiguous CPU tensor with rows of this file's part, from row `start` on."""
        if not target.numel():
            return
        row = target.nbytes // len(target)
        buffer = _memory(target)
        self._file.seek(self._data + self.header[name]["data_offsets"][0] + start * row)
        if self._file.readinto(buffer) < len(buffer):
            raise self._too_short()

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise self._too_short()
        return data

    def _too_short(self) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is too short", where=str(self.path))

    def close(self) -> None:
        self._file.close()


class CheckpointReader:
    """Rows of the tensors of a checkpoint, whichever ranks wrote them. To be closed."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if isinstance(manifest, str):
            raise CheckpointError(manifest, where=str(folder))
        self.folder, self.manifest = folder, manifest
        self._names = sorted(manifest.files)
        self._opened: dict[int, ShardFile] = {}

    def close(self) -> None:
        for shard in self._opened.values():
            shard.close()

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Rows [start, stop) of a tensor, by default all of it, on the CPU."""
        kind, shape, sharded = self.manifest.tensors[name]
        rows, *columns = shape or (1,)
        if stop is None:
            stop = int(rows)
        parts = self.manifest.shards if sharded else 1
        out = torch.empty((stop - start, *columns), dtype=TORCH_DTYPES[kind])
        for part in range(parts):
            first, last = row_range(rows, part, parts)
            low, high = max(start, first), min(stop, last)
            if low < high:
                self._shard(part).rows_into(out[low - start : high - start], name, low - first)
        return out if shape else out[0]

    def _shard(self, part: int) -> ShardFile:
        if part not in self._opened:
            self._opened[part] = ShardFile(self.folder / self._names[part])
        return self._opened[part]


def load(
    folder: Path,
    model: IJepa,
    optimizer: ShardedAdamW,
    world: World,
    topic: str,
) -> None:
    """Fill model and optimizer in place from a verified checkpoint of any world size.

    The ranks of replica 0 read the rows that they hold and broadcast them to the other replicas. An
    error of one rank is raised on every rank, before any of them enters a collective:
    CheckpointGone when an older attempt has removed this checkpoint meanwhile, FilesystemFault when
    it cannot be read.
    """
    targets = state(model, optimizer)
    updates = targets["optim.updates"] = torch.zeros((), device=world.device)
    parts = {name: local_part(tensor) for name, tensor in targets.items()}

    def read() -> None:
        if world.replica_index > 0:
            return
        try:
            with contextlib.closing(CheckpointReader(folder)) as reader:
                for name, tensor in targets.items():
                    start, stop = 0, None
                    if is_sharded(tensor):
                        rows = tensor.shape[0]
                        start, stop = row_range(rows, world.shard_index, world.shard_count)
                    parts[name].copy_(reader.rows(name, start, stop))
                    world.channel.advance(topic)
        except (CheckpointError, OSError) as e:
            if folder.exists():
                raise
            raise CheckpointGone(
                f"{folder.name} was removed while it was read", where=str(folder)
            ) from e

    with torch.no_grad():
        world.channel.gather(topic, read)
        if world.replica_count > 1:
            for part in parts.values():
                # Broadcasts rows from their rank of replica 0 to the same rank of each replica.
                dist.broadcast(part, src=world.shard_index, group=world.mesh.get_group("replicate"))
                world.channel.on_progress()
        for _, parameter in trainable_parameters(model):
            optimizer.state[parameter]["step"].copy_(updates)


def load_unsharded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, unsharded, on the CPU, in one process.

    Raises CheckpointError, also for files that match their checksums and hold something else.
    """
    try:
        with contextlib.closing(CheckpointReader(folder)) as reader:
            return {name: reader.rows(name) for name in reader.manifest.tensors}
    except (LookupError, TypeError, ValueError, RuntimeError, MemoryError, struct.error) as e:
        what = f"this is no checkpoint of ours: {type(e).__name__}: {e}"
        raise CheckpointError(what, where=str(folder)) from e


def load_latest(trial: TrialDir) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of the newest checkpoint of a trial, every byte verified.

    Raises CheckpointError.
    """
    steps = trial.committed()
    if not steps:
        raise CheckpointError(
            "no checkpoint yet",
            where=str(trial.checkpoints),
            hint="jepa status tells how far it is",
        )
    folder = trial.checkpoint(steps[-1])
    verified = read_verified(folder)
    if isinstance(verified, str):
        raise CheckpointError(
            f"the newest checkpoint is damaged: {verified}",
            where=str(folder),
            hint="move it away to use the one before",
        )
    return steps[-1], load_unsharded(folder)
