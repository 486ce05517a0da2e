"""Disks that fill up, files that rot, successors that come too soon: nothing committed is lost, nothing is silent."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.attempts import Ranks, assert_same_bits, history, wait_for

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.evaluate import evaluate
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import read

MILESTONES = {"optim.steps": 12, "runtime.milestone_every": 4}


def limit_files(ranks: Ranks, size: int) -> None:
    """No file of these processes may grow beyond `size` bytes: their writes fail as on a full disk, half-way."""
    for process in ranks.ranks:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def alone(trained: Callable[..., TrialDir]) -> TrialDir:
    """An undisturbed trial, which other tests read too."""
    return trained(**MILESTONES)


def copied(trial: TrialDir, root: Path) -> TrialDir:
    """The same trial in another root."""
    shutil.copytree(trial.path, root / "trials" / trial.name)
    return Root(root).trial(trial.name)


def test_a_disk_that_takes_no_checkpoint_delays_it_and_is_reported(
    launch: Callable, new_trial: Callable, alone: TrialDir
) -> None:
    """Saves fail, training goes on, the last commit stays; when there is room again the trial ends as ever."""
    trial = new_trial("full", **{**MILESTONES, "runtime.checkpoint_minutes": 0.005})
    ranks = launch(trial)
    wait_for(lambda: trial.attempts() and read(trial).rows)
    limit_files(ranks, 32 << 10)
    wait_for(lambda: [e for e in read(trial).events if e["event"] == "checkpoint_failed"])
    assert ranks.running
    limit_files(ranks, resource.RLIM_INFINITY)
    assert ranks.wait() == [0, 0]
    failed = next(e for e in read(trial).events if e["event"] == "checkpoint_failed")
    assert "File too large" in failed["error"]
    assert not list(trial.checkpoints.glob(".*"))
    assert_same_bits(alone, trial)


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_taken(
    launch: Callable, alone: TrialDir, tmp_path: Path
) -> None:
    """A flipped bit, a truncated file, a lost manifest: each is found, named and passed over; the bits are the same."""
    for fault in ("bit", "cut", "manifest"):
        trial = copied(alone, tmp_path / fault)
        trial.done.unlink()
        newest = trial.checkpoint(trial.committed()[-1])
        victim = newest / ("manifest.json" if fault == "manifest" else "shard-00001-of-00002.safetensors")
        data = bytearray(victim.read_bytes())
        if fault == "bit":
            data[len(data) // 2] ^= 1
        victim.write_bytes(data if fault == "bit" else data[: len(data) // 2])
        ranks = launch(trial)
        assert ranks.wait() == [0, 0]
        assert [e["event"] for e in read(trial).events] == ["checkpoint_set_aside"]
        assert trial.attempts()[-1]["start_step"] == 8
        assert list(trial.checkpoints.glob("bad-step-00000012-*"))
        assert_same_bits(alone, trial)


def test_without_a_good_checkpoint_the_trial_fails_and_does_not_begin_again(
    launch: Callable, alone: TrialDir, tmp_path: Path
) -> None:
    """Every checkpoint damaged: one clear error that names them, exit code 1, FAILED.json, nothing trained."""
    alone = copied(alone, tmp_path)
    rows = history(alone)
    alone.done.unlink()
    for step in alone.committed():
        (alone.checkpoint(step) / "shard-00000-of-00002.safetensors").write_bytes(b"")
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    failed = read_json(alone.failed)
    assert failed is not None and "none of the" in failed["error"] and "0 bytes instead of" in failed["error"]
    assert alone.attempts()[-1]["cause"] == "error"
    assert history(alone) == rows
    alone.failed.unlink()  # `jepa retry` alone cures nothing: the damaged ones are set aside by now
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    failed = read_json(alone.failed)
    assert failed is not None and "none of the" in failed["error"] and "bad-step-" in failed["error"]
    assert alone.committed() == [] and history(alone) == rows


def test_a_zombie_commits_nothing_after_its_successor_started(launch: Callable, new_trial: Callable) -> None:
    """Two launches of one trial: the first notices the second's number, leaves with 77 and saves nothing more."""
    trial = new_trial("zombie", **{"optim.steps": 400})
    first = launch(trial)
    wait_for(lambda: trial.attempts() and read(trial).rows)
    trial.claim({"launch": "another", "address": "127.0.0.1:1"})
    assert first.wait() == [ExitCode.FENCED] * 2
    assert trial.committed() == []
    assert json.loads(trial.attempt(1).read_text())["cause"] == "fenced"


def test_a_preempted_trial_goes_on_at_other_world_sizes_with_the_same_samples(
    launch: Callable, new_trial: Callable, alone: TrialDir
) -> None:
    """4 -> 2 -> 1 -> 4 ranks: masks, schedules and probes' images are the same, the loss agrees to 1e-5."""
    trial = new_trial("elastic", **{**MILESTONES, "runtime.procs_per_node": 4})
    for world, step in ((4, 3), (2, 6), (1, 9)):
        ranks = launch(trial, world)
        wait_for(lambda step=step: (rows := read(trial).rows) and rows[-1].step >= step)
        ranks.kill(15)
        assert ranks.wait() == [ExitCode.PREEMPTED] * world
    assert launch(trial, 4).wait() == [0] * 4
    one, other = history(alone), history(trial)
    assert [s for s, _ in one] == [s for s, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        for name in a.keys() & b.keys():
            exact = "fraction" in name or name in ("lr", "weight_decay", "momentum", "images_seen")
            if exact or name in ("loss", "val/loss"):
                assert b[name] == pytest.approx(a[name], abs=1e-12 if exact else 1e-5), name


def test_the_costly_probes_read_a_trial_and_write_nothing(alone: TrialDir) -> None:
    """`jepa probe`: accuracies of the newest weights, and not one file of the trial is touched."""
    before = {p: p.stat().st_mtime_ns for p in alone.path.rglob("*")}
    found = evaluate(alone, limit=64)
    assert found["step"] == 12
    assert all(0 <= found[name] <= 1 for name in ("logistic_1pct_top1", "attentive_top1"))
    assert {p: p.stat().st_mtime_ns for p in alone.path.rglob("*")} == before
