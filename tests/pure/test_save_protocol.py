"""Saves by many ranks: what one fault does, and random schedules of many faults."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import save_schedules
from support.simulated_disk import content, folder_fault
from support.simulated_ranks import ERRORS, Clock, Faults, Process, Scheduler, SimulatedStore, WatchedChannel, os_error

from jepa_cluster.errors import CheckpointError, Fenced, FilesystemFault, RankLost
from jepa_cluster.training import checkpoint_files
from jepa_cluster.training.checkpoint_files import MANIFEST, Disk, Manifest, read_manifest, row_range
from jepa_cluster.training.save_protocol import SaveProtocol, SaveResult

PATIENCE = 5.0  # virtual seconds
MANIFEST_OF_STEP_1 = Manifest(1, "recipe", 2, 1, {"images": 0.1}, {"loss": 0.5}, {"a": [3, 4]}, {}, 0)


class FaultyDisk(Disk):
    """A real filesystem. before, after: method -> called with its arguments; once."""

    def __init__(self) -> None:
        self.before: dict[str, Callable[..., None]] = {}
        self.after: dict[str, Callable[..., None]] = {}
        self.calls: list[tuple[str, str]] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        self.calls.append((name, arguments[0].name))
        self.before.pop(name, lambda *_: None)(*arguments)
        result = getattr(Disk, name)(self, *arguments)
        self.after.pop(name, lambda *_: None)(*arguments)
        return result

    def make_folder(self, path: Path) -> None:
        self._call("make_folder", path)

    def write_file(self, path: Path, chunks: Iterable[Any], on_progress: Callable[[], None]) -> tuple[int, int]:
        return self._call("write_file", path, chunks, on_progress)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", source, target)

    def sync_folder(self, path: Path) -> None:
        self._call("sync_folder", path)

    def remove(self, folder: Path) -> None:
        self._call("remove", folder)

    def pause(self, seconds: float) -> None:
        pass


class Ranks:
    """The ranks of one attempt on a real folder, in virtual time."""

    def __init__(self, folder: Path, world: int, attempt: int = 1) -> None:
        self.folder, self.world, self.attempt = folder, world, attempt
        self.scheduler = Scheduler(0)
        self.store = SimulatedStore(Faults(self.scheduler, PATIENCE))
        self.newest_attempt = attempt
        self.progress_at: dict[str, float] = {}
        self.disks = [FaultyDisk() for _ in range(world)]
        self.protocols = [self.protocol(rank) for rank in range(world)]

    def protocol(self, rank: int) -> SaveProtocol:
        store = self.store.of(Process(f"rank {rank}"), rank)
        channel = WatchedChannel(store, rank, self.world, self.attempt, PATIENCE, Clock(self.scheduler))
        channel.progress_at = self.progress_at
        superseded = lambda: self.newest_attempt > self.attempt  # noqa: E731
        protocol = SaveProtocol(self.folder, self.attempt, self.world, channel, self.disks[rank], superseded)
        protocol.steps_to_keep = lambda steps: set(steps[-2:])
        return protocol

    def together(self, *functions: Callable[[], Any]) -> list[Any]:
        """Call the functions, each in a task of its own -> their results or exceptions."""
        results: list[Any] = [None] * len(functions)

        def keep(index: int) -> None:
            try:
                results[index] = functions[index]()
            except Exception as e:
                results[index] = e

        for index in range(len(functions)):
            self.scheduler.spawn(Process(f"{index}"), f"{index}", lambda index=index: keep(index))
        self.scheduler.run()
        assert not self.scheduler.violations
        return results

    def each(self, function: Callable[[SaveProtocol], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        chosen = self.protocols if ranks is None else [self.protocols[rank] for rank in ranks]
        return self.together(*[lambda protocol=protocol: function(protocol) for protocol in chosen])

    def save(self, number: int, step: int) -> SaveResult:
        """-> the result on rank 0."""
        return self.each(lambda protocol: self.save_part(protocol, number, step))[0]

    def save_part(self, protocol: SaveProtocol, number: int, step: int) -> SaveResult:
        data = content(self.attempt, number, step, protocol.channel.rank)
        manifest = Manifest(step, "recipe", self.world, self.attempt, {}, None, {}, {}, 0)
        return protocol.save(number, manifest, [data])

    def find(self) -> list[Any]:
        return self.each(lambda protocol: protocol.find_valid("start", protocol.committed, lambda manifest: ""))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def whole(self, step: int) -> bool:
        folder = self.protocols[0].checkpoint(step)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return not folder_fault(folder.name, files)


def raises(name: str) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise os_error(name)

    return fail


@pytest.mark.timeout(7200)
def test_random_faults_break_no_promise(schedules: int) -> None:
    """`save_schedules.Trial` lists the promises. A failure names the seed and the command that replays it."""
    figures = save_schedules.run_many(0, schedules, print)
    assert figures.counts["saves committed"] > schedules


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_one_rank_ends_that_save_alone(tmp_path: Path, error: str, rank: int) -> None:
    ranks = Ranks(tmp_path, 4)
    ranks.disks[rank].before["write_file"] = raises(error)
    failed = ranks.save(1, 1)
    assert os.strerror(os_error(error).errno or 0) in failed.error and not failed.fenced
    assert ranks.names() == []
    assert ranks.save(2, 1) == SaveResult(1) and ranks.whole(1)
    assert ranks.names() == ["step-00000001"]


def test_ranks_that_wait_for_a_folder_learn_why_there_is_none(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.disks[0].before["make_folder"] = raises("EDQUOT")
    results = ranks.each(lambda protocol: ranks.save_part(protocol, 1, 1))
    assert [result.error for result in results] == ["Disk quota exceeded", *["rank 0: Disk quota exceeded"] * 2]
    assert ranks.scheduler.now < 1


def test_a_save_leaves_no_key_in_the_store(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    for number in (1, 2, 3):
        ranks.save(number, number)
    assert not ranks.store.values and ranks.names() == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_late_writer_of_one_save_cannot_touch_the_next(tmp_path: Path, moment: str) -> None:
    """Rank 1 writes, or reports, its part of save 1 while save 2 of the same step runs, in a second thread."""
    ranks = Ranks(tmp_path, 2)
    pause = ranks.scheduler.sleep
    late = ranks.protocol(1)
    late.disk = FaultyDisk()
    getattr(late.disk, moment)["write_file"] = lambda *_: pause(1.5 * PATIENCE)
    ranks.disks[1].before["write_file"] = lambda *_: pause(0.7 * PATIENCE)

    def rank_0() -> list[SaveResult]:
        return [ranks.save_part(ranks.protocols[0], number, 1) for number in (1, 2)]

    def rank_1() -> SaveResult:
        pause(1.2 * PATIENCE)
        return ranks.save_part(ranks.protocols[1], 2, 1)

    (first, second), _, of_late = ranks.together(rank_0, rank_1, lambda: ranks.save_part(late, 1, 1))
    assert "report-1" in first.error and not second.error
    assert ("No such file" in of_late.error) == (moment == "before")
    assert ranks.names() == ["step-00000001"] and ranks.whole(1)


@pytest.mark.parametrize("change", ["missing", "shorter", "surplus"])
def test_a_folder_that_holds_anything_else_than_was_reported_is_not_committed(tmp_path: Path, change: str) -> None:
    ranks = Ranks(tmp_path, 2)

    def tamper(path: Path, *_: Any) -> None:
        if change == "missing":
            path.unlink()
        elif change == "shorter":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.with_name("another").touch()

    ranks.disks[1].after["write_file"] = tamper
    assert "does not hold what was written" in ranks.save(1, 1).error
    assert ranks.names() == []


def test_a_failure_after_the_rename_leaves_a_checkpoint_that_the_next_save_accepts(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    commits: list[int] = []
    ranks.protocols[0].on_commit = lambda manifest: commits.append(manifest.step)
    ranks.disks[0].after["rename"] = raises("EIO")
    assert ranks.save(1, 1).error and commits == []
    before = (tmp_path / "step-00000001" / MANIFEST).stat().st_ino
    assert not ranks.save(2, 1).error and commits == [1]
    assert ranks.names() == ["step-00000001"] and before == (tmp_path / "step-00000001" / MANIFEST).stat().st_ino


def damage(folder: Path, step: int) -> None:
    path = max((folder / f"step-{step:08d}").glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_and_replaced(tmp_path: Path) -> None:
    assert not Ranks(tmp_path, 2, attempt=1).save(1, 1).error
    damage(tmp_path, 1)
    ranks = Ranks(tmp_path, 2, attempt=2)
    assert not ranks.save(1, 1).error and ranks.whole(1)
    assert [name[:18] for name in ranks.names()] == ["bad-step-00000001-", "step-00000001"]


def test_a_damaged_checkpoint_is_passed_over_by_every_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for number in (1, 2):
        ranks.save(number, number)
    damage(tmp_path, 2)
    for manifest, passed in ranks.find():
        assert manifest.step == 1 and "step 2: shard-00001-of-00002.safetensors has CRC-32" in passed[0]
    assert [name[:13] for name in ranks.names()] == ["bad-step-0000", "step-00000001"]


def test_a_file_that_cannot_be_read_is_an_error_on_every_rank_and_no_damage(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.save(1, 1)
    ranks.disks[1].fingerprint = raises("ESTALE")
    errors = ranks.find()
    assert [type(error) for error in errors] == [FilesystemFault] * 2
    assert {error.what for error in errors} == {"unreadable: Stale file handle"}
    assert ranks.names() == ["step-00000001"]


def test_format_1_is_refused_and_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 1)
        data = replace(MANIFEST_OF_STEP_1, format=1).to_bytes()
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / MANIFEST).write_bytes(data)
    ranks = Ranks(tmp_path, 3)
    for error in ranks.find():
        assert isinstance(error, CheckpointError)
        assert error.what == "this checkpoint has format 1, this version reads format 3" and error.hint
    assert ranks.names() == ["step-00000001"]


def test_a_manifest_that_lost_a_bit_is_known_by_its_seal(tmp_path: Path) -> None:
    data = MANIFEST_OF_STEP_1.to_bytes()
    parsed = checkpoint_files.parse_manifest(data, tmp_path)
    assert replace(parsed, files=dict(parsed.files)) == MANIFEST_OF_STEP_1 and parsed.settled_through == 0
    for text in (data.replace(b"0.5", b"0.4"), data.replace(b'"attempt": 1', b'"attempt": 2'), data[:-5]):
        assert text != data
        with pytest.raises(ValueError):
            checkpoint_files.parse_manifest(text, tmp_path)


def test_row_range_is_the_rule_of_torch_chunk() -> None:
    import torch

    for rows in (*range(1, 40), 257, 1024):
        for parts in (1, 2, 3, 4, 7, 8, 16, 33):
            chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(parts)]
            chunks += [[]] * (parts - len(chunks))
            assert [list(range(*row_range(rows, part, parts))) for part in range(parts)] == chunks


def test_a_superseded_attempt_neither_commits_nor_removes_a_checkpoint(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for number in (1, 2):
        ranks.save(number, number)

    def claim(_: Manifest) -> None:
        ranks.newest_attempt = 2

    ranks.protocols[0].on_commit = claim
    assert not ranks.save(3, 3).error
    assert ranks.names() == ["step-00000001", "step-00000002", "step-00000003"]
    fenced = ranks.save(4, 4)
    assert fenced.fenced and "newer attempt" in fenced.error
    assert ranks.names() == ["step-00000001", "step-00000002", "step-00000003"]


def test_an_unfinished_save_is_renamed_and_that_is_synced_before_its_files_are_removed(tmp_path: Path) -> None:
    """An older attempt may be about to commit it, and a crash may undo a rename."""
    for name in (".step-00000001.1.1", ".gone-step-00000002.1.77", ".step-00000003.3.1"):
        (tmp_path / name).mkdir()
    ranks = Ranks(tmp_path, 1, attempt=2)
    ranks.each(lambda protocol: protocol.remove_stale(2))
    removed = [".gone-step-00000001.1.1", ".gone-step-00000002.1.77"]
    calls = ranks.disks[0].calls
    assert calls[:2] == [("rename", ".step-00000001.1.1"), ("sync_folder", tmp_path.name)]
    assert sorted(calls[2:]) == [("remove", name) for name in removed]
    assert ranks.names() == [".step-00000003.3.1"], "of a younger attempt"


@pytest.mark.parametrize("error", [Fenced("a newer attempt"), CheckpointError("damaged"), os_error("EIO")])
def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    ranks = Ranks(tmp_path, 3)
    shared = ranks.each(lambda protocol: protocol.channel.from_rank0("one", fail))
    gathered = ranks.each(
        lambda protocol: protocol.channel.gather("all", fail if protocol.channel.rank == 0 else lambda: 1)
    )
    expected = FilesystemFault if isinstance(error, OSError) else type(error)
    assert [type(each) for each in (*shared, *gathered)] == [expected] * 6
    assert {each.what for each in (*shared, *gathered)} == {checkpoint_files.describe(error)}


def test_gather_names_the_rank_that_is_missing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    results = ranks.each(lambda protocol: protocol.channel.gather("all", lambda: 1), [0, 1, 3])
    assert [type(each) for each in results] == [RankLost] * 3
    assert {each.what for each in results} == {"no word of rank 2 for 5 s"}


def test_256_ranks_save(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 256)
    assert not ranks.save(1, 1).error and not ranks.store.values
    manifest = json.loads((tmp_path / "step-00000001" / MANIFEST).read_bytes())
    data = (tmp_path / "step-00000001" / "shard-00255-of-00256.safetensors").read_bytes()
    assert len(manifest["files"]) == 256
    assert manifest["files"]["shard-00255-of-00256.safetensors"] == [len(data), zlib.crc32(data)]


def test_a_listing_that_shows_a_removed_checkpoint_is_read_again(tmp_path: Path) -> None:
    """An NFS client may serve a listing that is a minute old. What it shows is gone; what it does not show is newer."""
    ranks = Ranks(tmp_path, 2)
    assert not ranks.save(1, 20).error
    listings = iter([[10], [10], [20]])
    found = ranks.each(lambda protocol: protocol.find_valid("start", lambda: next(listings), lambda manifest: ""))
    assert [manifest.step for manifest, _ in found] == [20, 20] and found[0][1] == []


def test_a_listing_that_never_becomes_right_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)

    def find(protocol: SaveProtocol) -> str:
        with pytest.raises(FilesystemFault) as e:
            protocol.find_valid("start", lambda: [10], lambda manifest: "")
        return e.value.what

    assert ranks.each(find) == ["the folder lists checkpoints that do not exist"] * 2


def test_a_checkpoint_of_another_history_is_not_taken_for_one_of_the_same_step(tmp_path: Path) -> None:
    """Another node could not read some images and replaced them; the counters differ."""
    ranks = Ranks(tmp_path, 2)
    assert not ranks.save(1, 1).error
    other = replace(MANIFEST_OF_STEP_1, counters={"corrupt_images": 2.0})
    results = ranks.each(lambda protocol: protocol.save(2, other, [b"rows"]))
    assert not results[0].error
    committed = read_manifest(tmp_path / "step-00000001")
    assert isinstance(committed, Manifest) and committed.counters == other.counters
    assert [name for name in ranks.names() if name.startswith("bad-step-00000001-")]
