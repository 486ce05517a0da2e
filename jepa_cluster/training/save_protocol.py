"""Save and find checkpoints from many ranks, by numbered messages instead of collectives.

In: a key-value store that every rank reaches, a filesystem and a clock. Out: a committed folder `step-N`, or an error
as a value; at the start of an attempt, the newest checkpoint that verifies. Imports neither torch nor CUDA, so a test
can run it with hundreds of ranks as threads.

One save. Every key carries the attempt, the number of the save and the rank, so a message of one save can never be
taken for a message of another:

    rank 0                                                 every other writing rank
    1. creates .step-N.<attempt>.<number>
    2. posts `folder`                                ->    waits for `folder`
    3. writes and syncs its file                           writes and syncs its file
    4. waits for every report                        <-    posts `report-<rank>`: size and CRC-32, or its error
    5. compares the files in the folder with the reports
    6. writes and syncs manifest.json, syncs the folder
    7. renames the folder to step-N, syncs the parent
    8. removes checkpoints that are no longer needed

An error at any point ends this save and nothing else. Every wait ends after `patience` seconds without progress.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from jepa_cluster.errors import CheckpointError, Fenced, JepaError, RankLost
from jepa_cluster.trial.layout import STEP_WIDTH

MANIFEST = "manifest.json"
FORMAT = 2
CHUNK = 8 << 20  # bytes between two reports of progress
SYNC_EVERY = 256 << 20  # bytes between two fsyncs of one file, so that the last one is short
PROGRESS_SECONDS = 1.0  # between two looks at the progress of the other ranks
LONGEST_PAUSE = 0.25  # seconds between two looks at the store
SEEN_SECONDS = 10.0  # that rank 0 waits until every rank has read an error, before it raises it itself
GONE_SECONDS = 1.0  # before a folder is listed again that still showed a removed checkpoint
READS = 3  # of a file that the filesystem cannot read, before that is an error
_COMMITTED = re.compile(r"step-(\d+)")


class CheckpointGone(CheckpointError):
    """An older attempt removed the checkpoint while it was read; a newer one is committed."""


_ERRORS = {error.__name__: error for error in (CheckpointError, CheckpointGone, Fenced, RankLost)}


# ---- the manifest


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, stored as manifest.json.

    shards: number of files, one per writing rank. File k holds rows `row_range(rows, k, shards)` of every sharded
    tensor; file 0 holds the tensors that are not sharded.
    tensors: name -> [dtype, global shape, whether it is sharded].
    files: name -> [bytes, CRC-32].
    counters: running totals at `step`. row: metrics of `step` whose probe has not run yet, else null.
    anchor: the step that a rollback would return to, null where divergence is not watched. watch: detector state.
    """

    step: int
    recipe: str
    world: int
    attempt: int
    counters: Mapping[str, float]
    row: Mapping[str, float] | None
    files: Mapping[str, Sequence[int]]
    versions: Mapping[str, str]
    t: int
    format: int = FORMAT
    shards: int = 1
    tensors: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, "Sequence[Any]"])
    anchor: int | None = None
    watch: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def whole(self) -> int:
        """Last step whose metric row is complete given this checkpoint."""
        return self.step if self.row is None else self.step - 1

    @property
    def settles(self) -> int:
        """Last step that no later attempt can undo once this checkpoint is committed."""
        return self.whole if self.anchor is None else min(self.whole, self.anchor)

    def to_bytes(self) -> bytes:
        """JSON with its own CRC-32 as `seal`."""
        values = asdict(self)
        return json.dumps({**values, "seal": _seal(values)}, indent=1, sort_keys=True).encode() + b"\n"


def _seal(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """Raises ValueError when the text is damaged, CheckpointError when it is of another format."""
    values = json.loads(data)
    seal = values.pop("seal", None)
    if seal != _seal(values):
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"this checkpoint has format {values.get('format')}, this version reads format {FORMAT}",
            where=str(folder),
            now="finish the trial with the code snapshot that wrote it, or move checkpoints/ away to train from step 0",
        )
    return Manifest(**values)


def row_range(rows: int, part: int, parts: int) -> tuple[int, int]:
    """[start, stop) of the rows that part number `part` of `parts` holds: torch.chunk's rule, which FSDP2 follows."""
    size = -(-rows // parts)
    start = min(part * size, rows)
    return start, min(start + size, rows)


# ---- the filesystem


class Disk:
    """The filesystem operations that a save needs. Tests replace it by one that fails."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write_file(self, path: Path, chunks: Iterable[Any], on_progress: Callable[[], None]) -> tuple[int, int]:
        """Create a file, write the chunks, sync -> (bytes, CRC-32) of what was handed over."""
        size = crc = unsynced = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                left = memoryview(chunk).cast("B")
                while left:
                    piece = left[:CHUNK]
                    written = os.write(fd, piece)
                    crc = zlib.crc32(piece[:written], crc)
                    size += written
                    unsynced += written
                    left = left[written:]
                    on_progress()
                    if unsynced >= SYNC_EVERY:
                        os.fsync(fd)
                        unsynced = 0
            os.fsync(fd)
        finally:
            os.close(fd)
        return size, crc

    def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    def fingerprint(self, path: Path, on_progress: Callable[[], None]) -> tuple[int, int]:
        """(bytes, CRC-32) of a file."""
        size = crc = 0
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
                on_progress()
        return size, crc

    def names(self, folder: Path) -> list[str]:
        """Names in a folder; none when there is no such folder."""
        try:
            return sorted(path.name for path in folder.iterdir())
        except FileNotFoundError:
            return []

    def sizes(self, folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    def exists(self, path: Path) -> bool:
        return path.exists()

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def sync_folder(self, path: Path) -> None:
        """Make creations, renames and removals in this folder durable."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def remove(self, folder: Path) -> None:
        """Remove a folder; what cannot be removed now is removed before a later save."""
        shutil.rmtree(folder, ignore_errors=True)


# ---- messages


class Store(Protocol):
    """The part of torch.distributed.TCPStore that is used. No call blocks until a key is there."""

    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def delete_key(self, key: str, /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Channel:
    """Messages between the ranks of one attempt, each under a topic that is used once.

    patience: seconds that a wait lasts while nobody makes progress. on_progress: called when this rank, or a rank
    that it waits for, makes progress.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        attempt: int,
        patience: float,
        clock: SystemClock | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.attempt, self.prefix = attempt, f"attempt-{attempt}"
        self.patience, self.clock, self.on_progress = patience, clock or SystemClock(), on_progress
        self._reported = -PROGRESS_SECONDS

    def post(self, topic: str, name: str, value: Any) -> None:
        self.store.set(self._key(topic, name), json.dumps(value))

    def read(self, topic: str, names: Sequence[str], patience: float | None = None) -> list[Any]:
        """The messages of these names, in their order. Raises RankLost after `patience` seconds without progress."""
        patience = patience or self.patience
        keys = [self._key(topic, name) for name in names]
        if not keys:
            return []
        progress, look, pause = None, 0.0, 0.001
        deadline = self.clock.now() + patience
        while not self.store.check(keys):
            now = self.clock.now()
            if now >= look:
                seen = self.store.add(self._key(topic, "progress"), 0)
                if progress is not None and seen != progress:
                    deadline = now + patience
                    self.on_progress()
                progress, look = seen, now + PROGRESS_SECONDS
            if now >= deadline:
                missing = [name for name, key in zip(names, keys, strict=True) if not self.store.check([key])]
                raise RankLost(f"no word of {', '.join(missing[:8])} for {patience:.0f} s", where=topic)
            self.clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def advance(self, topic: str) -> None:
        """This rank has made progress; ranks that wait for it wait on."""
        self.on_progress()
        now = self.clock.now()
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            self.store.add(self._key(topic, "progress"), 1)

    def forget(self, topic: str, names: Iterable[str]) -> None:
        for name in (*names, "progress"):
            self.store.delete_key(self._key(topic, name))

    def from_rank0(self, topic: str, fn: Callable[[], Any]) -> Any:
        """Call `fn` on rank 0 and return its result on every rank; its exception is raised on every rank."""
        if self.rank == 0:
            self.post(topic, "answer", _outcome(fn))
        return self._result(topic, self.read(topic, ["answer"])[0])

    def gather(self, topic: str, fn: Callable[[], Any]) -> list[Any]:
        """Call `fn` on every rank and return all results, by rank; the first exception is raised on every rank."""
        self.post(topic, f"rank {self.rank}", _outcome(fn))
        if self.rank == 0:
            names = [f"rank {rank}" for rank in range(self.world)]
            self.post(topic, "answer", _outcome(lambda: self.read(topic, names)))
        return [self._result(topic, each) for each in self._result(topic, self.read(topic, ["answer"])[0])]

    def _result(self, topic: str, outcome: Mapping[str, Any]) -> Any:
        """The value of an outcome, or its exception. Rank 0 raises last: its process holds the store, and when it ends
        another rank could not read the reason any more."""
        if "error" not in outcome:
            return outcome["value"]
        if self.rank:
            self.post(topic, f"seen by rank {self.rank}", True)
        else:
            with contextlib.suppress(RankLost):
                self.read(topic, [f"seen by rank {rank}" for rank in range(1, self.world)], SEEN_SECONDS)
        kind = _ERRORS.get(outcome["error"], CheckpointError)
        raise kind(outcome["what"], where=outcome.get("where", ""), now=outcome.get("now", ""))

    def _key(self, topic: str, name: str) -> str:
        return f"{self.prefix}/{topic}/{name}"


def _outcome(fn: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": fn()}
    except JepaError as e:
        return {"error": type(e).__name__, "what": e.what, "where": e.where, "now": e.now}
    except Exception as e:
        return {"error": "", "what": describe(e)}


def describe(error: BaseException) -> str:
    """One line: what the system says and which file, or the exception's type and first line."""
    if isinstance(error, JepaError):
        return error.what
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# ---- saving


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, as rank 0 sees it. error: '' when the checkpoint is committed. fenced: by a newer attempt.
    warning: why checkpoints that are no longer needed could not be removed."""

    step: int
    error: str = ""
    fenced: bool = False
    warning: str = ""


class SaveProtocol:
    """Saves of one attempt into one folder. `save` runs on every writing rank, in one thread at a time."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        writers: int,
        channel: Channel,
        disk: Disk,
        superseded: Callable[[], bool],
    ) -> None:
        self.folder, self.attempt, self.writers = folder, attempt, writers
        self.channel, self.disk, self.superseded = channel, disk, superseded
        self.main_channel = channel  # of the main thread, for `find_valid` and `decline`
        self.before_commit: Callable[[], None] = lambda: None  # rank 0: make the metric rows durable
        self.on_commit: Callable[[Manifest], None] = lambda manifest: None  # rank 0: note that the rows are settled
        self.to_keep: Callable[[list[int]], set[int]] = set  # rank 0: which of the committed steps stay
        self._unfinished: list[int] = []  # numbers of failed saves whose keys another rank may still read

    def checkpoint(self, step: int) -> Path:
        return self._in(self.folder, step)

    @staticmethod
    def _in(folder: Path, step: int) -> Path:
        return folder / f"step-{step:0{STEP_WIDTH}d}"

    def committed(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        found = (_COMMITTED.fullmatch(name) for name in self.disk.names(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def save(self, number: int, manifest: Manifest, chunks: Iterable[Any]) -> SaveResult:
        """This rank's part of save `number`. chunks: the bytes of this rank's file. Raises nothing."""
        step, rank = manifest.step, self.channel.rank
        try:
            if rank == 0:
                return self._lead(number, manifest, chunks)
            return SaveResult(step, self._follow(number, step, chunks))
        except Exception as e:
            return SaveResult(step, describe(e))

    def decline(self, number: int, step: int, reason: str) -> SaveResult:
        """Take no part in save `number`, and tell so to whoever waits for this rank. Raises nothing.

        Called from the main thread, while another thread may run `save`.
        """
        name = f"report-{self.channel.rank}"
        if self.channel.rank == 0:
            name = "folder"
            self._unfinished.append(number)
        with contextlib.suppress(Exception):
            self.main_channel.post(f"save-{number}", name, {"error": reason, "declined": True})
        return SaveResult(step, reason)

    def shard_name(self, rank: int) -> str:
        return f"shard-{rank:05d}-of-{self.writers:05d}.safetensors"

    def _follow(self, number: int, step: int, chunks: Iterable[Any]) -> str:
        """A writing rank other than 0 -> '' or its error."""
        topic, name = f"save-{number}", f"report-{self.channel.rank}"
        try:
            (opened,) = self.channel.read(topic, ["folder"])
            if "error" in opened:
                return opened["error"]
            report = self._write_shard(topic, self.folder / opened["name"], chunks)
        except Exception as e:
            self.channel.post(topic, name, {"error": describe(e)})
            return describe(e)
        self.channel.post(topic, name, report)
        return ""

    def _write_shard(self, topic: str, work: Path, chunks: Iterable[Any]) -> dict[str, Any]:
        name = self.shard_name(self.channel.rank)
        size, crc = self.disk.write_file(work / name, chunks, lambda: self.channel.advance(topic))
        return {"name": name, "size": size, "crc": crc}

    def _lead(self, number: int, manifest: Manifest, chunks: Iterable[Any]) -> SaveResult:
        topic, others = f"save-{number}", [f"report-{rank}" for rank in range(1, self.writers)]
        work = self.folder / f".step-{manifest.step:0{STEP_WIDTH}d}.{self.attempt}.{number}"
        heard = False
        try:
            self._open(topic, work)
            own = self._write_shard(topic, work, chunks)
            reports = [own, *self.channel.read(topic, others)]
            heard = not any("declined" in report for report in reports)
            self._compare(work, reports)
            files = {report["name"]: (report["size"], report["crc"]) for report in reports}
            self._commit(work, replace(manifest, files=files, shards=self.writers))
        except Exception as e:
            self.disk.remove(work)
            return SaveResult(manifest.step, describe(e), isinstance(e, Fenced))
        finally:
            self._forget(number, others, heard)
        return SaveResult(manifest.step, warning=self._prune())

    def _open(self, topic: str, work: Path) -> None:
        """Create the folder of this save. Nobody writes before; an error is told to those who wait for it."""
        try:
            self.remove_leftovers(self.attempt)
            self.disk.make_folder(work)
        except Exception as e:
            self.channel.post(topic, "folder", {"error": f"rank 0: {describe(e)}"})
            raise
        self.channel.post(topic, "folder", {"name": work.name})

    def _compare(self, work: Path, reports: Sequence[Mapping[str, Any]]) -> None:
        """Raises unless every writing rank has reported a file, and the folder holds exactly these, of these sizes."""
        failed = [f"rank {rank}: {report['error']}" for rank, report in enumerate(reports) if "error" in report]
        if failed:
            raise CheckpointError("; ".join(failed[:3]))
        reported = {report["name"]: report["size"] for report in reports}
        found = self.disk.sizes(work)
        if found != reported or len(reported) != self.writers:
            apart = sorted(set(found.items()) ^ set(reported.items()))
            raise CheckpointError(f"the folder does not hold what was written: {apart[:3]}", where=str(work))

    def _commit(self, work: Path, manifest: Manifest) -> None:
        if self.superseded():
            raise self._fenced()
        self.before_commit()
        self.disk.write_file(work / MANIFEST, [manifest.to_bytes()], lambda: None)
        self.disk.sync_folder(work)
        final = self.checkpoint(manifest.step)
        if self.disk.exists(final) and self._replaces(final):
            self.disk.remove(work)
        else:
            self.disk.rename(work, final)
        self.disk.sync_folder(self.folder)
        self.on_commit(manifest)

    def _replaces(self, final: Path) -> bool:
        """Whether a checkpoint of this step that another attempt committed is whole; a damaged one is set aside."""
        faults = self._faults(final)
        if faults:
            self.disk.rename(final, self._aside(final))
        return not faults

    def _fenced(self) -> Fenced:
        return Fenced(f"a newer attempt than {self.attempt} owns this trial", where=str(self.folder))

    def _aside(self, folder: Path) -> Path:
        return folder.with_name(f"bad-{folder.name}-{time.time_ns()}")

    def _faults(self, folder: Path) -> list[str]:
        manifest = read_manifest(folder, self.disk)
        if isinstance(manifest, str):
            return [manifest]
        checks = (check_file(folder / name, *kept, self.disk) for name, kept in manifest.files.items())
        return [fault for faults in checks for fault in faults]

    def _forget(self, number: int, others: Sequence[str], heard: bool) -> None:
        """Delete the keys of this save and of earlier ones, when all ranks have ended them (heard); else later."""
        self._unfinished.append(number)
        if not heard:
            return
        with contextlib.suppress(Exception):
            for each in [each for each in self._unfinished if each <= number]:
                self.channel.forget(f"save-{each}", ["folder", *others])
                self._unfinished.remove(each)

    def _prune(self) -> str:
        """Remove what is no longer needed, unless a newer attempt may be reading it -> '' or why that failed."""
        try:
            steps = self.committed()
            kept = self.to_keep(steps)
            surplus = [step for step in steps if step not in kept]
            if surplus and not self.superseded():
                for step in surplus:
                    self.discard(step)
        except Exception as e:
            return describe(e)
        return ""

    def discard(self, step: int) -> None:
        """Remove a checkpoint: first the name that readers look for, durably, then its files."""
        final = self.checkpoint(step)
        if self.disk.exists(final):
            gone = self.folder / f".gone-{final.name}.{self.attempt}.{time.time_ns()}"
            self.disk.rename(final, gone)
            self.disk.sync_folder(self.folder)
            self.disk.remove(gone)

    def remove_leftovers(self, attempt: int) -> None:
        """Remove what saves of this attempt and of older ones left unfinished; a younger attempt's are not touched.

        A folder is renamed before its files are removed, so that an older attempt cannot commit it meanwhile. The
        renames are synced first, so that no crash brings a committed name back without its files.
        """
        gone: list[Path] = []
        for name in self.disk.names(self.folder):
            owner = name.split(".")[2:3]
            if owner and owner[0].isdigit() and int(owner[0]) > attempt:
                continue
            if name.startswith(".gone-"):
                gone.append(self.folder / name)
            elif name.startswith(".step-"):
                gone.append(self.folder / f".gone-{name[1:]}")
                with contextlib.suppress(OSError):
                    self.disk.rename(self.folder / name, gone[-1])
        with contextlib.suppress(OSError):
            if gone:
                self.disk.sync_folder(self.folder)
            for folder in gone:
                self.disk.remove(folder)

    # ---- finding a checkpoint

    def find_valid(
        self,
        topic: str,
        candidates: Callable[[], list[int]],
        accept: Callable[[Manifest], str],
        source: Path | None = None,
    ) -> tuple[Manifest | None, list[str]]:
        """Every rank: the newest candidate that verifies, or None, and why others were passed over.

        Every rank reads a share of the files. In the attempt's own folder a damaged checkpoint is set aside; in
        `source`, the folder of another trial, nothing is touched. A checkpoint that another attempt removes meanwhile
        is no damage: the folder is listed again. accept: a reason against a manifest, or ''.
        Raises CheckpointError on every rank when the filesystem cannot read a file.
        """
        folder, passed, skip = source or self.folder, list[str](), set[int]()
        pending: list[tuple[int, str]] = []

        def pass_over(step: int, fault: str) -> None:
            path = self._in(folder, step)
            if not self.disk.exists(path):
                self.main_channel.clock.sleep(GONE_SECONDS)  # a cached listing may still show it
                return
            passed.append(f"step {step}: {fault}")
            skip.add(step)
            if source is None:
                if self.superseded():
                    raise self._fenced()
                self.disk.rename(path, self._aside(path))

        def pick() -> dict[str, Any]:
            while pending:
                pass_over(*pending.pop())
            for step in reversed(candidates()):
                if step in skip:
                    continue
                try:
                    manifest = read_manifest(self._in(folder, step), self.disk)
                except CheckpointError as e:
                    if source is None:
                        raise
                    manifest = e.what
                fault = manifest if isinstance(manifest, str) else accept(manifest)
                if isinstance(manifest, Manifest) and not fault:
                    return {"manifest": {**asdict(manifest), "tensors": {}}, "passed": passed}
                pass_over(step, fault)
            return {"manifest": None, "passed": passed}

        for turn in itertools.count():
            found = self.main_channel.from_rank0(f"{topic}/{turn}/candidate", pick)
            if found["manifest"] is None:
                return None, found["passed"]
            manifest = Manifest(**found["manifest"])
            faults = self._verify(f"{topic}/{turn}/verify", self._in(folder, manifest.step), manifest)
            if not faults:
                return manifest, found["passed"]
            pending.append((manifest.step, "; ".join(faults[:3])))
        raise AssertionError("unreachable")

    def _verify(self, topic: str, folder: Path, manifest: Manifest) -> list[str]:
        """Every rank: read a share of the files -> what is wrong, the same list on every rank."""

        def share() -> list[str]:
            faults: list[str] = []
            for name in sorted(manifest.files)[self.main_channel.rank :: self.main_channel.world]:
                path = folder / name
                faults += check_file(path, *manifest.files[name], self.disk, lambda: self.main_channel.advance(topic))
            return faults

        return [fault for part in self.main_channel.gather(topic, share) for fault in part]


def read_manifest(folder: Path, disk: Disk | None = None) -> Manifest | str:
    """The manifest, or what is wrong with it. Raises CheckpointError for another format or an unreadable file."""
    try:
        disk = disk or Disk()
        return parse_manifest(_retried(disk, lambda: disk.read_file(folder / MANIFEST)), folder)
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except OSError as e:
        raise _unreadable(e) from e
    except (ValueError, TypeError, AttributeError) as e:
        return str(e) if MANIFEST in str(e) else f"{MANIFEST}: {e}"


def check_file(
    path: Path, size: int, crc: int, disk: Disk | None = None, on_progress: Callable[[], None] = lambda: None
) -> list[str]:
    """What is wrong with one file. Raises CheckpointError when the filesystem cannot read it."""
    try:
        disk = disk or Disk()
        found = _retried(disk, lambda: disk.fingerprint(path, on_progress))
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except OSError as e:
        raise _unreadable(e) from e
    if found[0] != size:
        return [f"{path.name} has {found[0]} bytes instead of {size}"]
    return [] if found[1] == crc else [f"{path.name} has CRC-32 {found[1]:08x} instead of {crc:08x}"]


def _retried(disk: Disk, read: Callable[[], Any]) -> Any:
    for left in reversed(range(READS)):
        try:
            return read()
        except OSError as e:
            if not left or e.errno in (errno.ENOENT, errno.ENOTDIR):
                raise
            disk.pause(0.2)
    raise AssertionError("unreachable")


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(
        f"unreadable: {describe(error)}", now="the filesystem fails, not the file; try again when it works"
    )
