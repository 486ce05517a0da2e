"""Saves by many ranks: what one fault does, and random schedules of many faults."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import save_schedules
from support.saving_ranks import PATIENCE, FaultyDisk, Ranks, raises, search
from support.simulated_ranks import ERRORS, os_error

from jepa_cluster.errors import CheckpointError, FilesystemFault
from jepa_cluster.training import checkpoint_files
from jepa_cluster.training.checkpoint_files import MANIFEST, Manifest, read_manifest
from jepa_cluster.training.save_protocol import SaveProtocol, SaveResult

MANIFEST_OF_STEP_1 = Manifest(
    step=1,
    recipe="recipe",
    world=2,
    attempt=1,
    counters={"images": 0.1},
    row={"loss": 0.5},
    files={"a": [3, 4]},
    versions={},
    t=0,
)


@pytest.mark.timeout(7200)
def test_random_faults_break_no_promise(schedules: int) -> None:
    """A failure names its seed and how to replay it; `save_schedules.Trial` has the promises."""
    figures = save_schedules.run_many(0, schedules, print)
    assert figures.counts["saves committed"] > schedules


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_one_rank_ends_that_save_alone(tmp_path: Path, error: str, rank: int) -> None:
    ranks = Ranks(tmp_path, 4)
    ranks.disks[rank].before["write_file"] = raises(error)
    failed = ranks.save(1, 1)
    assert os.strerror(os_error(error).errno or 0) in failed.error
    assert not failed.fenced
    assert ranks.names() == []
    assert ranks.save(2, 1) == SaveResult(1)
    assert ranks.whole(1)
    assert ranks.names() == ["step-00000001"]


def test_ranks_that_wait_for_a_folder_learn_why_there_is_none(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.disks[0].before["make_folder"] = raises("EDQUOT")
    results = ranks.each(lambda protocol: ranks.save_part(protocol, 1, 1))
    assert results[0].error == "Disk quota exceeded"
    assert results[1].error == "rank 0: Disk quota exceeded"
    assert results[2].error == "rank 0: Disk quota exceeded"
    assert ranks.scheduler.now < 1


def test_a_save_leaves_no_key_in_the_store(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    for number in (1, 2, 3):
        ranks.save(number, number)
    assert not ranks.store.values
    assert ranks.names() == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_late_writer_of_one_save_cannot_touch_the_next(tmp_path: Path, moment: str) -> None:
    """A thread of rank 1 writes or reports its part of save 1 while save 2 runs."""
    ranks = Ranks(tmp_path, 2)
    pause = ranks.scheduler.sleep
    late = ranks.protocol(1)
    late.disk = FaultyDisk()
    getattr(late.disk, moment)["write_file"] = lambda *_: pause(1.5 * PATIENCE)
    ranks.disks[1].before["write_file"] = lambda *_: pause(0.7 * PATIENCE)

    def rank_0() -> list[SaveResult]:
        protocol = ranks.protocols[0]
        return [ranks.save_part(protocol, 1, 1), ranks.save_part(protocol, 2, 1)]

    def rank_1() -> SaveResult:
        pause(1.2 * PATIENCE)
        return ranks.save_part(ranks.protocols[1], 2, 1)

    def late_rank_1() -> SaveResult:
        return ranks.save_part(late, 1, 1)

    (first, second), _, late_result = ranks.together(rank_0, rank_1, late_rank_1)
    assert "report-1" in first.error
    assert not second.error
    assert ("No such file" in late_result.error) == (moment == "before")
    assert ranks.names() == ["step-00000001"]
    assert ranks.whole(1)


@pytest.mark.parametrize("change", ["missing", "shorter", "surplus"])
def test_a_folder_that_differs_from_the_reports_is_not_committed(
    tmp_path: Path, change: str
) -> None:
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


def test_the_next_save_accepts_a_checkpoint_that_was_only_renamed(tmp_path: Path) -> None:
    """Rank 0 failed after the rename, so its callback was not called."""
    manifest = tmp_path / "step-00000001" / MANIFEST
    ranks = Ranks(tmp_path, 2)
    commits: list[int] = []
    ranks.protocols[0].on_commit = lambda manifest: commits.append(manifest.step)
    ranks.disks[0].after["rename"] = raises("EIO")
    assert ranks.save(1, 1).error
    assert commits == []
    before = manifest.stat().st_ino
    assert not ranks.save(2, 1).error
    assert commits == [1]
    assert ranks.names() == ["step-00000001"]
    assert before == manifest.stat().st_ino


def damage(folder: Path, step: int) -> None:
    """Change the last byte of the last shard."""
    path = max((folder / f"step-{step:08d}").glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_a_save_sets_a_damaged_checkpoint_of_its_step_aside(tmp_path: Path) -> None:
    assert not Ranks(tmp_path, 2, attempt=1).save(1, 1).error
    damage(tmp_path, 1)
    ranks = Ranks(tmp_path, 2, attempt=2)
    assert not ranks.save(1, 1).error
    assert ranks.whole(1)
    damaged, replaced = ranks.names()
    assert damaged.startswith("bad-step-00000001-")
    assert replaced == "step-00000001"


def test_a_damaged_checkpoint_is_passed_over_by_every_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for number in (1, 2):
        ranks.save(number, number)
    damage(tmp_path, 2)
    for manifest, passed in ranks.find():
        assert manifest.step == 1
        assert "step 2: shard-00001-of-00002.safetensors has CRC-32" in passed[0]
    damaged, valid = ranks.names()
    assert damaged.startswith("bad-step-0000")
    assert valid == "step-00000001"


def test_an_unreadable_file_is_an_error_on_every_rank_and_no_damage(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.save(1, 1)
    ranks.disks[1].fingerprint = raises("ESTALE")
    errors = ranks.find()
    assert len(errors) == 2
    for error in errors:
        assert type(error) is FilesystemFault
        assert error.what == "unreadable: Stale file handle"
    assert ranks.names() == ["step-00000001"]


def test_format_1_is_refused_and_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 1)
        data = replace(MANIFEST_OF_STEP_1, format=1).to_bytes()
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / MANIFEST).write_bytes(data)
    ranks = Ranks(tmp_path, 3)
    for error in ranks.find():
        assert isinstance(error, CheckpointError)
        assert error.what == "this checkpoint has format 1, this version reads format 3"
        assert error.hint
    assert ranks.names() == ["step-00000001"]


def test_a_superseded_attempt_neither_commits_nor_removes(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for number in (1, 2):
        ranks.save(number, number)

    def claim(_: Manifest) -> None:
        ranks.newest_attempt = 2

    ranks.protocols[0].on_commit = claim
    assert not ranks.save(3, 3).error
    assert ranks.names() == ["step-00000001", "step-00000002", "step-00000003"]
    fenced = ranks.save(4, 4)
    assert fenced.fenced
    assert "newer attempt" in fenced.error
    assert ranks.names() == ["step-00000001", "step-00000002", "step-00000003"]


def test_an_unfinished_save_is_renamed_and_synced_before_its_removal(tmp_path: Path) -> None:
    """An older attempt may be about to commit it, and a crash may undo a rename."""
    unfinished = ".step-00000001.1.1"
    half_removed = ".gone-step-00000002.1.77"
    of_newer_attempt = ".step-00000003.3.1"
    for name in (unfinished, half_removed, of_newer_attempt):
        (tmp_path / name).mkdir()
    ranks = Ranks(tmp_path, 1, attempt=2)
    ranks.each(SaveProtocol.remove_stale)
    calls = ranks.disks[0].calls
    assert calls[:2] == [("rename", unfinished), ("sync_folder", tmp_path.name)]
    assert sorted(calls[2:]) == [("remove", ".gone-step-00000001.1.1"), ("remove", half_removed)]
    assert ranks.names() == [of_newer_attempt]


def test_256_ranks_save(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 256)
    assert not ranks.save(1, 1).error
    assert not ranks.store.values
    folder = tmp_path / "step-00000001"
    last_shard = "shard-00255-of-00256.safetensors"
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    data = (folder / last_shard).read_bytes()
    assert len(files) == 256
    assert files[last_shard] == [len(data), zlib.crc32(data)]


def test_a_listing_that_shows_a_removed_checkpoint_is_read_again(tmp_path: Path) -> None:
    """An NFS client may serve a listing that is a minute old."""
    ranks = Ranks(tmp_path, 2)
    assert not ranks.save(1, 20).error
    listings = iter([[10], [10], [20]])

    def find(protocol: SaveProtocol) -> Any:
        return search(protocol, lambda: next(listings)).find("start")

    (first, passed_over), (second, _) = ranks.each(find)
    assert first.step == 20
    assert second.step == 20
    assert passed_over == []


def test_a_listing_that_stays_wrong_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)

    def find(protocol: SaveProtocol) -> str:
        with pytest.raises(FilesystemFault) as e:
            search(protocol, lambda: [10]).find("start")
        return e.value.what

    assert ranks.each(find) == ["the folder lists checkpoints that do not exist"] * 2


def test_a_save_replaces_a_checkpoint_of_its_step_with_other_counters(tmp_path: Path) -> None:
    """Another node could not read some images and replaced them."""
    ranks = Ranks(tmp_path, 2)
    assert not ranks.save(1, 1).error
    other = replace(MANIFEST_OF_STEP_1, counters={"corrupt_images": 2.0})
    results = ranks.each(lambda protocol: protocol.save(2, other, [b"rows"]))
    assert not results[0].error
    committed = read_manifest(tmp_path / "step-00000001")
    assert isinstance(committed, Manifest)
    assert committed.counters == other.counters
    assert any(name.startswith("bad-step-00000001-") for name in ranks.names())
