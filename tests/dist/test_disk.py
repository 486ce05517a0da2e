"""Full disks, damaged files, attempts that overlap: every fault is reported, no commit is lost."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.attempts import Ranks, assert_same_bits, history, wait_for, wait_for_step

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.evaluate import evaluate
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import read

MILESTONES = {"optim.steps": 12, "runtime.milestone_every": 4}
EXACT = ("lr", "weight_decay", "momentum", "images_seen")  # the same at any world size


def limit_files(
    ranks: Ranks,
    size: int,
) -> None:
    """Limit the files of these processes to `size` bytes: longer writes fail half-way."""
    for process in ranks.ranks:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def alone(trained: Callable[..., TrialDir]) -> TrialDir:
    """An undisturbed trial, which other tests read too."""
    return trained(**MILESTONES)


def failed_saves(trial: TrialDir) -> list[dict[str, Any]]:
    return [event for event in read(trial).events if event["event"] == "checkpoint_failed"]


def copied(trial: TrialDir, root: Path) -> TrialDir:
    """The same trial in another root."""
    shutil.copytree(trial.path, root / "trials" / trial.name)
    return Root(root).trial(trial.name)


def test_a_disk_that_takes_no_checkpoint_delays_it_and_is_reported(
    launch: Callable, new_trial: Callable, alone: TrialDir
) -> None:
    """Saves fail, training continues, the last commit stays; with space the trial ends well."""
    trial = new_trial("full", **MILESTONES, **{"runtime.checkpoint_minutes": 0.005})
    ranks = launch(trial)
    wait_for(lambda: trial.attempts() and read(trial).rows)
    limit_files(ranks, 32 << 10)
    wait_for(lambda: failed_saves(trial))
    assert ranks.running
    limit_files(ranks, resource.RLIM_INFINITY)
    assert ranks.wait() == [0, 0]
    assert "File too large" in failed_saves(trial)[0]["error"]
    assert not list(trial.checkpoints.glob(".*"))
    assert_same_bits(alone, trial)


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_taken(
    launch: Callable, alone: TrialDir, tmp_path: Path
) -> None:
    """A flipped bit, a truncated file, a lost manifest: each is found, named and passed over.

    The trial ends with the same bits.
    """
    shard = "shard-00001-of-00002.safetensors"
    for fault, name in (("bit", shard), ("cut", shard), ("manifest", "manifest.json")):
        trial = copied(alone, tmp_path / fault)
        trial.done.unlink()
        victim = trial.checkpoint(trial.committed()[-1]) / name
        data = bytearray(victim.read_bytes())
        middle = len(data) // 2
        if fault == "bit":
            data[middle] ^= 1
        else:
            data = data[:middle]
        victim.write_bytes(data)
        assert launch(trial).wait() == [0, 0]
        (event,) = read(trial).events
        assert event["event"] == "checkpoint_set_aside"
        assert trial.attempts()[-1]["start_step"] == 8
        assert list(trial.checkpoints.glob("bad-step-00000012-*"))
        assert_same_bits(alone, trial)


def test_without_a_valid_checkpoint_the_trial_fails_and_does_not_restart(
    launch: Callable, alone: TrialDir, tmp_path: Path
) -> None:
    """One error names the damaged checkpoints; exit code 1, FAILED.json, nothing is trained."""
    alone = copied(alone, tmp_path)
    rows = history(alone)
    alone.done.unlink()
    for step in alone.committed():
        (alone.checkpoint(step) / "shard-00000-of-00002.safetensors").write_bytes(b"")
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    failed = read_json(alone.failed)
    assert failed is not None
    assert "none of the" in failed["error"]
    assert "0 bytes instead of" in failed["error"]
    assert alone.attempts()[-1]["cause"] == "error"
    assert history(alone) == rows
    # `jepa retry` alone cures nothing: the damaged ones are set aside by now
    alone.failed.unlink()
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    failed = read_json(alone.failed)
    assert failed is not None
    assert "none of the" in failed["error"]
    assert "bad-step-" in failed["error"]
    assert alone.committed() == []
    assert history(alone) == rows


def test_an_older_attempt_commits_nothing_after_the_next_one_started(
    launch: Callable, new_trial: Callable
) -> None:
    """The first of two launches reads the second's number, exits with 77 and saves nothing more."""
    trial = new_trial("zombie", **{"optim.steps": 400})
    first = launch(trial)
    wait_for(lambda: trial.attempts() and read(trial).rows)
    trial.claim({"launch": "another", "address": "127.0.0.1:1"})
    assert first.wait() == [ExitCode.FENCED] * 2
    assert trial.committed() == []
    assert trial.read_attempt(1).get("cause") == "fenced"


def test_a_preempted_trial_resumes_at_other_world_sizes_with_the_same_samples(
    launch: Callable, new_trial: Callable, alone: TrialDir
) -> None:
    """4 -> 2 -> 1 -> 4 ranks: same masks, schedules and probe images; the loss agrees to 1e-5."""
    trial = new_trial("elastic", **{**MILESTONES, "runtime.procs_per_node": 4})
    for world, step in ((4, 3), (2, 6), (1, 9)):
        ranks = launch(trial, world)
        wait_for_step(trial, step)
        ranks.kill(signal.SIGTERM)
        assert ranks.wait() == [ExitCode.PREEMPTED] * world
    assert launch(trial, 4).wait() == [0] * 4
    for (step, expected), (other_step, found) in zip(history(alone), history(trial), strict=True):
        assert step == other_step
        for name in expected.keys() & found.keys():
            if name in EXACT or "fraction" in name:
                assert found[name] == pytest.approx(expected[name], abs=1e-12), name
            elif name in ("loss", "val/loss"):
                assert found[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_costly_probes_read_a_trial_and_write_nothing(alone: TrialDir) -> None:
    """`jepa probe` evaluates the newest weights and changes no file of the trial."""

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in alone.path.rglob("*")}

    before = times()
    found = evaluate(alone, limit=64)
    assert found["step"] == 12
    assert 0 <= found["logistic_1pct_top1"] <= 1
    assert 0 <= found["attentive_top1"] <= 1
    assert times() == before
