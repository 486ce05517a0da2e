"""Save and find checkpoints from many ranks, by numbered messages instead of collectives.

In: a key-value store that every rank reaches, a filesystem and a clock. Out: a committed folder
`step-N`, or an error as a value; at the start of an attempt, the newest checkpoint that verifies.
Imports neither torch nor CUDA, so a test can run it with hundreds of ranks as threads.

One save. Every key carries the attempt, the number of the save and the rank, so a message of one
save can never be taken for a message of another:

    rank 0                                                 every other writing rank
    1. creates .step-N.<attempt>.<number>
    2. posts `folder`                                ->    waits for `folder`
    3. writes and syncs its file                           writes and syncs its file
    4. waits for every report                        <-    posts `report-<rank>`: size and
                                                           CRC-32, or its error
    5. compares the files in the folder with the reports
    6. writes and syncs manifest.json, syncs the folder
    7. renames the folder to step-N, syncs the parent
    8. removes checkpoints that are no longer needed

An error at any point ends this save and nothing else. Every wait ends after `patience` seconds
without progress.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jepa_cluster.errors import CheckpointError, Fenced, FilesystemFault
from jepa_cluster.training.channel import Channel
from jepa_cluster.training.checkpoint_files import (
    MANIFEST,
    Disk,
    Manifest,
    check_file,
    checkpoint_folder,
    describe,
    quarantine_path,
    read_manifest,
    read_verified,
)
from jepa_cluster.trial.directory import STEP_WIDTH, checkpoint_steps

LEFTOVERS = "leftovers"  # topic of the ranks that wait until unfinished folders are removed
# Pause and number of looks at a listing that shows a removed checkpoint.
GONE_SECONDS = 1.0
GONE_LOOKS = 90


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, as rank 0 sees it.

    error: '' when the checkpoint is committed. fenced: by a newer attempt. warning: what failed
    after the commit.
    """

    step: int
    error: str = ""
    fenced: bool = False
    warning: str = ""


@dataclass(eq=False)
class SaveProtocol:
    """Saves of one attempt into one folder.

    `save` runs on every writing rank, in one thread at a time.

    Called on rank 0: before_commit makes the metric rows durable, on_commit notes that they are
    settled, steps_to_keep returns which stay.
    unfinished: numbers of failed saves whose keys another rank may still read.
    """

    folder: Path
    attempt: int
    writers: int
    channel: Channel
    disk: Disk
    superseded: Callable[[], bool]
    before_commit: Callable[[], None] = lambda: None
    on_commit: Callable[[Manifest], None] = lambda manifest: None
    steps_to_keep: Callable[[list[int]], set[int]] = set
    unfinished: list[int] = field(default_factory=list[int])

    def checkpoint(self, step: int) -> Path:
        return checkpoint_folder(self.folder, step)

    def committed(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return checkpoint_steps(self.disk.names(self.folder))

    def save(self, number: int, manifest: Manifest, chunks: Iterable[Any]) -> SaveResult:
        """This rank's part of save `number`.

        chunks: the bytes of this rank's file. Raises nothing.
        """
        step, rank = manifest.step, self.channel.rank
        try:
            if rank == 0:
                return self._lead(number, manifest, chunks)
            return SaveResult(step, self._follow(number, step, chunks))
        except Exception as e:
            return SaveResult(step, describe(e))

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
        name = f"shard-{self.channel.rank:05d}-of-{self.writers:05d}.safetensors"
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
            heard = True
            self._compare(work, reports)
            files = {report["name"]: (report["size"], report["crc"]) for report in reports}
            manifest = replace(manifest, files=files, shards=self.writers)
            self._commit(topic, work, manifest)
        except Exception as e:
            self.disk.remove(work)
            return SaveResult(manifest.step, describe(e), isinstance(e, Fenced))
        finally:
            self._forget(number, others, heard)
        return SaveResult(manifest.step, warning=self._after_commit(manifest))

    def _open(self, topic: str, work: Path) -> None:
        """Create the folder of this save. Post its name, or the error, to the waiting ranks."""
        try:
            self.remove_stale(topic)
            self.disk.make_folder(work)
        except Exception as e:
            self.channel.post(topic, "folder", {"error": f"rank 0: {describe(e)}"})
            raise
        self.channel.post(topic, "folder", {"name": work.name})

    def _compare(self, work: Path, reports: Sequence[Mapping[str, Any]]) -> None:
        """Raise unless every writing rank reported a file and the folder holds exactly these."""
        failed = [
            f"rank {rank}: {report['error']}"
            for rank, report in enumerate(reports)
            if "error" in report
        ]
        if failed:
            raise CheckpointError("; ".join(failed[:3]))
        reported = {report["name"]: report["size"] for report in reports}
        found = self.disk.sizes(work)
        if found != reported or len(reported) != self.writers:
            apart = sorted(set(found.items()) ^ set(reported.items()))
            raise CheckpointError(
                f"the folder does not hold what was written: {apart[:3]}", where=str(work)
            )

    def _commit(self, topic: str, work: Path, manifest: Manifest) -> None:
        if self.superseded():
            raise self.fenced_error()
        self.before_commit()
        self.disk.write_file(work / MANIFEST, [manifest.to_bytes()], self.channel.on_progress)
        self.disk.sync_folder(work)
        final = self.checkpoint(manifest.step)
        if self.disk.exists(final) and self._is_same(topic, final, manifest):
            self.disk.remove(work)
        else:
            self.disk.rename(work, final)
        self.disk.sync_folder(self.folder)

    def _is_same(self, topic: str, final: Path, manifest: Manifest) -> bool:
        """Whether another attempt's checkpoint of this step is valid and of the same history.

        Otherwise it is set aside.
        """
        found = read_verified(final, self.disk, lambda: self.channel.advance(topic))
        same = isinstance(found, Manifest) and (found.recipe, found.counters) == (
            manifest.recipe,
            manifest.counters,
        )
        if not same:
            self.disk.rename(final, quarantine_path(final))
        return same

    def fenced_error(self) -> Fenced:
        return Fenced(
            f"a newer attempt than {self.attempt} owns this trial", where=str(self.folder)
        )

    def _forget(self, number: int, others: Sequence[str], heard: bool) -> None:
        """Delete the keys of saves that all ranks have ended (heard); keep them for later else."""
        self.unfinished.append(number)
        if not heard:
            return
        with contextlib.suppress(Exception):
            while self.unfinished:
                self.channel.forget(f"save-{self.unfinished[0]}", ["folder", *others])
                del self.unfinished[0]

    def _after_commit(self, manifest: Manifest) -> str:
        """Note the commit; remove surplus checkpoints unless a newer attempt may read them.

        Returns '' or what failed; the checkpoint is committed all the same.
        """
        try:
            self.on_commit(manifest)
            steps = self.committed()
            kept = self.steps_to_keep(steps)
            surplus = [step for step in steps if step not in kept]
            if surplus and not self.superseded():
                for step in surplus:
                    self.delete(step)
        except Exception as e:
            return describe(e)
        return ""

    def delete(self, step: int) -> None:
        """Remove a checkpoint: first the name that readers look for, durably, then its files."""
        final = self.checkpoint(step)
        if self.disk.exists(final):
            gone = self.folder / f".gone-{final.name}.{self.attempt}.{time.time_ns()}"
            self.disk.rename(final, gone)
            self.disk.sync_folder(self.folder)
            self.disk.remove(gone)
            self.channel.on_progress()

    def remove_stale(self, topic: str = LEFTOVERS) -> None:
        """Remove the unfinished folders of this attempt and of older ones.

        topic: under which other ranks wait meanwhile.

        An unfinished save is `.step-STEP.ATTEMPT.SAVE`. It is renamed to `.gone-...` before its
        files are removed, so that an older attempt cannot commit it meanwhile. The renames are
        synced first: after a crash no name of a save has lost files. Errors are ignored, because
        the next attempt tries again.
        """
        gone: list[Path] = []
        for name in self.disk.names(self.folder):
            owner = name.split(".")[2:3]  # the attempt, in names of unfinished saves
            if owner and owner[0].isdigit() and int(owner[0]) > self.attempt:
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
                self.channel.advance(topic)


@dataclass(eq=False)
class CheckpointSearch:
    """One search for the newest checkpoint that verifies. Every rank reads a share of the files.

    candidates: lists steps, oldest first. accept: returns a reason against a manifest, or ''.
    source: the folder of another trial, where nothing is touched. In the attempt's own folder a
    damaged checkpoint is set aside. A checkpoint that another attempt removes meanwhile is not
    damaged: the folder is listed again.
    """

    protocol: SaveProtocol
    channel: Channel
    candidates: Callable[[], list[int]]
    accept: Callable[[Manifest], str]
    source: Path | None = None
    skipped: set[int] = field(default_factory=set[int])
    faults: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.disk = self.protocol.disk
        self.folder = self.source or self.protocol.folder
        self.is_own = self.source is None

    def find(self, topic: str) -> tuple[Manifest | None, list[str]]:
        """Every rank: the newest candidate that verifies, or None, and why others were passed over.

        Raises FilesystemFault on every rank when a file cannot be read.
        """
        damaged: tuple[int, str] | None = None
        for turn in itertools.count():
            pick = functools.partial(self._pick, f"{topic}/{turn}/candidate", damaged)
            found = self.channel.from_rank0(f"{topic}/{turn}/candidate", pick)
            if found["manifest"] is None:
                return None, found["passed"]
            manifest = Manifest(**found["manifest"])
            damage = self._verify(f"{topic}/{turn}/verify", manifest)
            if not damage:
                return manifest, found["passed"]
            damaged = (manifest.step, "; ".join(damage[:3]))
        raise AssertionError("unreachable")

    def _verify(self, topic: str, manifest: Manifest) -> list[str]:
        """Every rank: read a share of the files; return what is wrong, the same on every rank."""
        folder = checkpoint_folder(self.folder, manifest.step)
        rank, world = self.channel.rank, self.channel.world

        def check_share() -> list[str]:
            faults: list[str] = []
            for name in sorted(manifest.files)[rank::world]:
                size, crc = manifest.files[name]
                progress = lambda: self.channel.advance(topic)  # noqa: E731
                faults += check_file(folder / name, size, crc, self.disk, progress)
            return faults

        return [fault for part in self.channel.gather(topic, check_share) for fault in part]

    def _pick(self, topic: str, damaged: tuple[int, str] | None) -> dict[str, Any]:
        """Rank 0: the newest candidate whose manifest is right, and why others are not.

        It lists again while the listing shows checkpoints that are gone (NFS). damaged: step and
        damage of the candidate before.
        """
        if damaged:
            self._pass_over(*damaged)
        for _ in range(GONE_LOOKS):
            if self.is_own:
                self.disk.revalidate(self.folder)
            if found := self._newest_candidate():
                return found
            self.channel.advance(topic)
            self.channel.clock.sleep(GONE_SECONDS)
        what = "the folder lists checkpoints that do not exist"
        raise FilesystemFault(what, where=str(self.folder))

    def _newest_candidate(self) -> dict[str, Any] | None:
        """None when the listing showed one that is gone."""
        for step in reversed(self.candidates()):
            if step in self.skipped:
                continue
            manifest = self._read_manifest(step)
            fault = manifest if isinstance(manifest, str) else self.accept(manifest)
            if isinstance(manifest, Manifest) and not fault:
                return {"manifest": {**asdict(manifest), "tensors": {}}, "passed": self.faults}
            if not self._pass_over(step, fault):
                return None
        return {"manifest": None, "passed": self.faults}

    def _read_manifest(self, step: int) -> Manifest | str:
        """Another format is an error in the own folder, else a reason against the manifest."""
        try:
            return read_manifest(checkpoint_folder(self.folder, step), self.disk)
        except CheckpointError as e:
            if self.is_own:
                raise
            return e.what

    def _pass_over(self, step: int, fault: str) -> bool:
        """Skip a checkpoint, and set it aside in the own folder. False if it is gone."""
        path = checkpoint_folder(self.folder, step)
        if not self.disk.exists(path):
            return False
        if self.is_own:
            if self.protocol.superseded():
                raise self.protocol.fenced_error()
            try:
                self.disk.rename(path, quarantine_path(path))
            except FileNotFoundError:
                return False
        self.faults.append(f"step {step}: {fault}")
        self.skipped.add(step)
        return True
