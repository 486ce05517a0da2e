"""Sharded checkpoints: saved beside the training, committed by rename, verified before they are believed.

In: the model and optimiser of all ranks, a step, and a trial directory. Out: `checkpoints/step-N/`, whole or not at
all: torch's distributed files, and a manifest with the size and CRC-32 of each. Any number of ranks loads what any
other saved. A checkpoint that does not verify is set aside under another name and the one before it is taken;
when none is left that is an error, never a silent start from zero.

All communication goes through a gloo group of its own, from one background thread a rank.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jepa_cluster.errors import CheckpointError, TrialError
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training.health import say
from jepa_cluster.training.parallel import Ranks, trained, values
from jepa_cluster.trial.layout import TrialDir, fsync_folder, read_json, write_json
from jepa_cluster.trial.provenance import versions

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What stands in a checkpoint. files: name -> [bytes, CRC-32]. counters: running totals that the state goes with.

    row: metrics of `step` that still await a probe, null when the row is in the spool. whole: the step up to which
    the spool is whole with this checkpoint. anchor, watch: where a rollback would go (null in a trial that is not
    watched) and what the watch knew; see training.stability. settles: the step up to which history stands.
    """

    step: int
    recipe: str
    world: int
    attempt: int
    counters: Mapping[str, float]
    row: Mapping[str, float] | None
    files: Mapping[str, tuple[int, int]]
    versions: Mapping[str, str]
    t: int
    format: int = FORMAT
    anchor: int | None = None
    watch: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def whole(self) -> int:
        return self.step if self.row is None else self.step - 1

    @property
    def settles(self) -> int:
        return self.whole if self.anchor is None else min(self.whole, self.anchor)


def state(model: IJepa, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that must survive, flat, by name: weights, the target's too, and the optimiser's moments."""
    out = {f"model.{name}": tensor.detach() for name, tensor in values(model).items()}
    for name, parameter in trained(model):
        for key in ("exp_avg", "exp_avg_sq"):
            out[f"optim.{name}.{key}"] = optimizer.state[parameter][key]
        out["optim.updates"] = optimizer.state[parameter]["step"]  # the same for all
    return out


# ---- saving


@dataclass(frozen=True)
class Outcome:
    """How a save ended. error: None when committed. fenced: a newer attempt owns the trial."""

    step: int
    seconds: float
    error: str | None = None
    fenced: bool = False


class Saver:
    """One save at a time, in a thread; `committed` runs on rank 0 when the checkpoint is in its place."""

    def __init__(
        self,
        trial: TrialDir,
        attempt: int,
        ranks: Ranks,
        keep: int,
        for_ever: Callable[[int], bool],
        anchor_every: int,
    ) -> None:
        self.trial, self.attempt, self.ranks = trial, attempt, ranks
        self.keep, self.for_ever, self.anchor_every = keep, for_ever, anchor_every
        self.before_commit: Callable[[], None] = lambda: None  # rank 0: make the spool durable
        self.committed: Callable[[Manifest], None] = lambda manifest: None  # rank 0: tell the spool
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> float:
        """Copy the state and save the copy in the background -> seconds the training stood still for it."""
        begun = time.monotonic()
        self.wait()
        staged: Any = self._stager.stage(dict(tensors))
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._outcome = None
        self._thread = threading.Thread(target=self._save, args=(manifest, staged), name="checkpoint", daemon=True)
        self._thread.start()
        return time.monotonic() - begun

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def outcome(self) -> Outcome | None:
        """How the last save ended, once; None while it runs or when it was already told."""
        if self.busy:
            return None
        told, self._outcome = self._outcome, None
        return told

    def _save(self, manifest: Manifest, staged: dict[str, Tensor]) -> None:
        begun = time.monotonic()
        result: dict[str, Any] = {"error": None, "fenced": False}
        work = self.trial.checkpoints / f".step-{manifest.step}.{self.attempt}"
        try:
            write(work, staged, self.ranks)
            files = survey(work, self.ranks)
            if self.ranks.place.first:
                result = self._commit(work, manifest, files)
            answer = [result]
            dist.broadcast_object_list(answer, 0, group=self.ranks.disk)
            result = answer[0]
        except BaseException as e:  # torch's CheckpointException is no Exception; the training goes on and says so
            result["error"] = explain(e)
        if result["error"] and self.ranks.place.first:
            shutil.rmtree(work, ignore_errors=True)
        self._outcome = Outcome(manifest.step, time.monotonic() - begun, result["error"], result["fenced"])

    def _commit(self, work: Path, manifest: Manifest, files: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """Rank 0: manifest, rename, spool, retention. Errors come back as values: the others wait for the answer."""
        try:
            if self.trial.newest_attempt() > self.attempt:
                shutil.rmtree(work, ignore_errors=True)
                return {"error": f"attempt {self.trial.newest_attempt()} has taken over", "fenced": True}
            manifest = Manifest(**{**asdict(manifest), "files": files})
            self.before_commit()
            write_json(work / MANIFEST, sealed(asdict(manifest)))
            final = self.trial.checkpoint(manifest.step)
            if final.exists() and manifest.anchor != manifest.step:  # verified at start or saved by us: the same bits
                shutil.rmtree(work, ignore_errors=True)
            else:
                discard(final)  # saved while its probe was owed, and no anchor then
                work.rename(final)
                fsync_folder(final.parent)
            self.committed(manifest)
            self._retire(manifest.anchor)
        except Exception as e:
            return {"error": explain(e), "fenced": False}
        return {"error": None, "fenced": False}

    def _retire(self, anchor: int | None) -> None:
        """Remove all but the newest `keep`, the newest `keep` anchors and the milestones."""
        steps = self.trial.committed()
        kept = {*steps[-self.keep :], anchor}
        if anchor is not None:
            kept |= {*[s for s in steps if s % self.anchor_every == 0][-self.keep :]}
        for step in steps:
            if step not in kept and not self.for_ever(step):
                discard(self.trial.checkpoint(step))


def discard(folder: Path) -> None:
    """Remove a checkpoint, if it is there. A name that no reader takes for a checkpoint first."""
    if folder.exists():
        gone = folder.with_name(f".gone-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def write(work: Path, staged: dict[str, Tensor], ranks: Ranks) -> None:
    """All ranks: torch's distributed files into a fresh folder, synced to disk."""
    if ranks.place.first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    writer = dcp.FileSystemWriter(work, thread_count=1, sync_files=True)
    dcp.save(staged, storage_writer=writer, process_group=ranks.disk)


def survey(work: Path, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file, each rank reading the ones it wrote; rank 0 the metadata too."""
    names = [f.name for f in work.iterdir() if f.name.startswith(f"__{ranks.rank}_")]
    if ranks.place.first:
        names.append(".metadata")
    mine = {name: fingerprint(work / name) for name in names}
    everybody: list[Any] = [None] * ranks.world
    dist.all_gather_object(everybody, mine, group=ranks.disk)
    return {name: value for part in everybody for name, value in sorted(part.items())}


def fingerprint(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def explain(error: BaseException) -> str:
    """One line from an exception of a save; torch hides the ranks' own errors one level down."""
    failures: Mapping[int, Any] = getattr(error, "failures", {})
    for rank, failure in sorted(failures.items()):
        inner = failure[0] if isinstance(failure, tuple) else failure
        return f"rank {rank}: {cause(inner)}"
    return cause(error)


def cause(error: BaseException) -> str:
    """The system's words when it was the system (a full disk), however deep; torch's writers bury them in text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return f"{os.strerror(seen.errno)}: {seen.filename}" if seen.filename else os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---- loading


def newest(trial: TrialDir, recipe: str, ranks: Ranks, anchors: bool = False) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint that verifies, None when there never was one, and what was set aside on the way.

    anchors: look at those alone. All ranks read a share of the files and agree. Raises CheckpointError when
    checkpoints exist and none verifies.
    """
    asides: list[str] = []
    steps = told(ranks, lambda: anchored(trial) if anchors else trial.committed())
    for step in reversed(steps):
        folder = trial.checkpoint(step)
        manifest = told(ranks, lambda folder=folder: read_manifest(folder))
        faults = [manifest] if isinstance(manifest, str) else verify(folder, manifest, ranks)
        if not faults:
            if manifest.recipe != recipe:
                raise CheckpointError(
                    f"checkpoint of recipe {manifest.recipe}, this trial is {recipe}",
                    where=str(folder),
                    now="it was copied here by hand; move it away",
                )
            return manifest, asides
        asides.append(f"step {step}: {'; '.join(faults[:3])}")
        if ranks.place.first:
            aside = trial.checkpoints / f"bad-step-{step}-{time.time_ns()}"
            folder.rename(aside)
            say(f"checkpoint: {asides[-1]}; set aside as {aside.name}")
        dist.barrier(ranks.disk)
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints verifies: {' | '.join(asides)}",
            where=str(trial.checkpoints),
            now="restore one, or move checkpoints/ away to begin again from step 0",
        )
    return None, asides


def anchored(trial: TrialDir) -> list[int]:
    """Steps whose checkpoint is an anchor, or cannot say whether it is one."""
    found = {step: read_manifest(trial.checkpoint(step)) for step in trial.committed()}
    return [step for step, m in found.items() if isinstance(m, str) or m.anchor == step]


def told(ranks: Ranks, ask: Callable[[], Any]) -> Any:
    """What rank 0 finds, on all ranks; an error of rank 0's is everybody's."""
    answer: list[Any] = [None]
    if ranks.place.first:
        try:
            answer = [ask()]
        except Exception as e:
            answer = [e]
    dist.broadcast_object_list(answer, 0, group=ranks.disk)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def read_manifest(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    try:
        plain = read_json(folder / MANIFEST)
        if plain is None:
            return f"no {MANIFEST}"
        seal = plain.pop("seal", None)
        if seal != sealed(plain)["seal"]:
            return f"{MANIFEST} does not match its own checksum"
        if plain["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint format {plain.get('format')}, this program reads {FORMAT}", where=str(folder)
            )
        return Manifest(**plain)
    except (TrialError, TypeError, json.JSONDecodeError) as e:
        return f"{MANIFEST}: {e}"


def sealed(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain mapping with the CRC-32 of its own JSON beside its values."""
    return {**plain, "seal": zlib.crc32(json.dumps(plain, sort_keys=True).encode())}


def verify(folder: Path, manifest: Manifest, ranks: Ranks) -> list[str]:
    """All ranks: read every byte, a share of the files each -> what is wrong, the same list everywhere."""
    mine: list[str] = []
    for name in sorted(manifest.files)[ranks.rank :: ranks.world]:
        mine += check(folder / name, *manifest.files[name])
    everybody: list[Any] = [None] * ranks.world
    dist.all_gather_object(everybody, mine, group=ranks.disk)
    found = [fault for part in everybody for fault in part]
    unreadable = [f for f in found if f.startswith("unreadable")]
    if unreadable:
        raise CheckpointError(
            unreadable[0], where=str(folder), now="the filesystem fails, not the file; try again later"
        )
    return found


def check(path: Path, size: int, crc: int) -> list[str]:
    """What is wrong with one file. Errors of the filesystem are told from wrong bytes, and tried three times."""
    error = ""
    for _ in range(3):
        try:
            found = fingerprint(path)
        except FileNotFoundError:
            return [f"{path.name} is missing"]
        except OSError as e:
            error = f"unreadable: {cause(e)}"
            time.sleep(0.2)
            continue
        if found[0] != size:
            return [f"{path.name} has {found[0]} bytes instead of {size}"]
        return [] if found[1] == crc else [f"{path.name} has CRC-32 {found[1]:08x} instead of {crc:08x}"]
    return [error]


def load(folder: Path, model: IJepa, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Fill model and optimiser in place from a verified checkpoint of any world size."""
    target = state(model, optimizer)
    updates = target["optim.updates"] = torch.zeros(())
    with torch.no_grad():
        dcp.load(target, storage_reader=dcp.FileSystemReader(folder), process_group=ranks.disk)
        for _, parameter in trained(model):
            optimizer.state[parameter]["step"].fill_(updates.item())


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, unsharded, on the CPU, in one process and without others."""
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # torch wonders whether one process was meant; it was
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def sweep_up(trial: TrialDir, attempt: int) -> None:
    """Rank 0, at start: remove what earlier attempts left unfinished."""
    for pattern in (".step-*", ".gone-*"):
        for folder in trial.checkpoints.glob(pattern):
            owner = folder.suffix.removeprefix(".")
            if not owner.isdigit() or int(owner) < attempt or pattern == ".gone-*":
                shutil.rmtree(folder, ignore_errors=True)


def describe(step: int, recipe: str, attempt: int, ranks: Ranks, counters: Mapping[str, float]) -> Manifest:
    """The manifest of a save that is about to start; files are filled in when they are written."""
    now = time.time_ns() // 1_000_000
    return Manifest(step, recipe, ranks.world, attempt, dict(counters), None, {}, versions(), now)
