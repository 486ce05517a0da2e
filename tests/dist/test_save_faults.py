"""Faults of disks, nodes and ranks around a save: no hang, true reports, nothing lost.

Real processes on two nodes with real filesystems; faults that a machine cannot be made to produce
come from faulty_rank.py. Each trial ends with the bits of an undisturbed one. The slow ones are in
test_save_faults_slow.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.attempts import wait_for
from support.nodes import SPARE, Cluster, Ext4, Filesystem, NodeRanks, Quota, Tmpfs
from support.save_faults import (
    KILLS,
    MILESTONE,
    OFTEN,
    STEPS,
    Strike,
    assert_every_checkpoint_verifies,
    assert_unharmed,
    failures,
    finish,
    heartbeat_error,
    kill_an_attempt,
    last_step,
    new_trial,
    release,
    wait_for_strike,
)

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.directory import TrialDir

NO_SPACE = "No space left on device"
Config = Callable[..., TrialConfig]


# ---- disks


@pytest.mark.parametrize(("kind", "world"), [(Ext4, 4), (Tmpfs, 2)])
def test_a_full_disk_delays_checkpoints_and_is_reported(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    kind: type[Filesystem],
    world: int,
) -> None:
    """Training continues to its last step; events, record and heartbeat hold the failure.

    With space again, the trial ends well.
    """
    disk = cluster.filesystem(kind)
    trial = new_trial(disk, tiny_config, **OFTEN)
    second = fault("make_folder", 0, "block", skip=1, times=1)
    ranks = cluster.start(trial, world, [second])
    wait_for_strike(second, ranks)
    disk.fill(SPARE)
    release(second)
    wait_for(lambda: last_step(trial) == STEPS)
    wait_for(lambda: failures(trial))
    assert_every_checkpoint_verifies(trial)
    wait_for(lambda: NO_SPACE in heartbeat_error(trial))
    disk.fill(0)
    assert ranks.running
    assert not trial.done.exists()
    assert_every_checkpoint_verifies(trial)
    disk.make_room()
    assert ranks.wait() == [0] * world
    (event,) = failures(trial)
    assert NO_SPACE in event["error"]
    assert NO_SPACE in trial.attempts()[-1]["failed_saves"]["error"]
    assert_unharmed(undisturbed[world], trial)


def test_a_quota_that_is_reached_delays_checkpoints(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """The user may create no file during two saves, so the event reaches the disk after them."""
    disk = cluster.filesystem(Quota)
    trial = new_trial(disk, tiny_config, **OFTEN)
    second = fault("make_folder", 0, "block", skip=1, times=1)
    fourth = fault("make_folder", 0, "block", skip=3, times=1)
    ranks = cluster.start(trial, 2, [second, fourth])
    wait_for_strike(second, ranks)
    before = trial.committed()
    disk.fill(0)
    release(second)
    wait_for_strike(fourth, ranks)
    assert trial.committed() == before
    assert_every_checkpoint_verifies(trial)
    disk.make_room()
    release(fourth)
    assert ranks.wait() == [0, 0]
    (event,) = failures(trial)
    assert "Disk quota exceeded" in event["error"]
    assert_unharmed(undisturbed[2], trial)


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_whose_mount_becomes_read_only_delays_checkpoints(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    node: int,
) -> None:
    """The node of rank 0, or the other one, may not create a file for a while; the others could."""
    disk = cluster.filesystem()
    trial = new_trial(disk, tiny_config, **OFTEN)
    second = fault("make_folder", 0, "block", skip=1, times=1)
    ranks = cluster.start(trial, 4, [second])
    wait_for_strike(second, ranks)
    cluster.nodes[node].make_read_only(disk.path)
    release(second)
    wait_for(lambda: last_step(trial) == STEPS and failures(trial))
    assert_every_checkpoint_verifies(trial)
    if node == 1:  # on node 0 rank 0 cannot write its record
        wait_for(lambda: "failed_saves" in trial.attempts()[-1])
    assert ranks.running
    assert not trial.done.exists()
    cluster.nodes[node].make_writable(disk.path)
    assert ranks.wait() == [0] * 4
    (event,) = failures(trial)
    assert "Read-only file system" in event["error"]
    assert_unharmed(undisturbed[4], trial)


@pytest.mark.parametrize(
    ("world", "patience"), [(4, "enough"), pytest.param(2, "too short", marks=pytest.mark.slow)]
)
def test_a_slow_mkdir_of_rank_0_mixes_up_no_saves(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    world: int,
    patience: str,
) -> None:
    """The others wait for the folder or give this save up; no checkpoint mixes two saves."""
    slow = fault("make_folder", 0, "sleep", match=".step-", seconds=0.7)
    overrides = {"runtime.hang_seconds": 300.0}
    if patience == "too short":
        slow = replace(slow, seconds=9.0, times=2)
        overrides = {"runtime.hang_seconds": 15.0, **OFTEN}
    trial = new_trial(cluster.filesystem(), tiny_config, **overrides)
    assert cluster.start(trial, world, [slow]).wait() == [0] * world
    assert len(failures(trial)) == (patience == "too short")
    assert_unharmed(undisturbed[world], trial)


def test_a_write_error_of_one_rank_ends_that_save_only(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """EIO in the middle of one rank's file in two separate saves leaves two events and no harm."""
    trial = new_trial(cluster.filesystem(), tiny_config)
    steps = (6, 12)
    faults = [fault("chunk", 3, "EIO", match=f".step-{s:08d}", times=1, skip=2) for s in steps]
    assert cluster.start(trial, 4, faults).wait() == [0] * 4
    for event, step in zip(failures(trial), steps, strict=True):
        assert event["step"] == step
        assert event["error"].startswith("rank 3: Input/output error:")
    assert trial.committed() == [3, 9, 12]
    assert_unharmed(undisturbed[4], trial)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_back_is_not_given_up(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """After EIO the ranks read again; when it lasts, all ranks leave for a restart."""
    trial = new_trial(cluster.filesystem(), tiny_config)
    fatal = fault("make_folder", 0, "block", match=f".step-{STEPS:08d}")
    ranks = cluster.start(trial, 2, [fatal])
    wait_for_strike(fatal, ranks)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    for place, rank, match in (
        ("fingerprint", 1, "shard-"),
        ("read_file", 0, "manifest.json"),
        ("rows_into", 1, ""),
    ):
        lasting = fault(place, rank, "EIO", match=match)
        assert cluster.start(trial, 2, [lasting]).wait() == [ExitCode.HANG] * 2
        record = trial.attempts()[-1]
        assert record["cause"] == "infrastructure"
        assert "Input/output error" in record["error"]
        assert trial.committed() == [3, 6, 9]
        assert not trial.failed.exists()
        assert_every_checkpoint_verifies(trial)
    passing = [fault("fingerprint", 1, "EIO", match="shard-", times=2)]
    assert cluster.start(trial, 2, passing).wait() == [0, 0]
    assert trial.attempts()[-1]["start_step"] == 9
    assert_unharmed(undisturbed[2], trial)


def test_a_disk_that_is_full_when_done_is_due_delays_it(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """The last checkpoint is in its place, and not one byte is left for DONE.

    The disk is filled after the last save has removed older checkpoints, and once more after a
    heartbeat that was being written then has freed the block of the one before.
    """
    disk = cluster.filesystem()
    trial = new_trial(disk, tiny_config, **OFTEN)
    first_try = fault("mark_done", 0, "block", times=1)
    second_try = fault("mark_done", 0, "block", skip=1, times=1)
    ranks = cluster.start(trial, 2, [first_try, second_try])
    wait_for_strike(first_try, ranks)
    disk.fill(0)
    wait_for(lambda: not list(trial.heartbeat.parent.glob(f".{trial.heartbeat.name}*")))
    disk.fill(0)
    release(first_try)
    wait_for_strike(second_try, ranks)
    assert not trial.done.exists()
    disk.make_room()
    release(second_try)
    assert ranks.wait() == [0, 0]
    assert_unharmed(undisturbed[2], trial)


# ---- kills


def test_kills_between_and_inside_saves_lose_nothing_that_was_committed(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """Each kill is followed by another attempt.

    Killed are a rank between saves and inside one, a node of two ranks in a commit, and the other
    node in the last commit.
    """
    trial = new_trial(cluster.filesystem(), tiny_config)
    for kill in KILLS:
        if kill.ordinary:
            kill_an_attempt(cluster, trial, 4, kill, fault)
    finish(cluster, trial, 4)
    assert_unharmed(undisturbed[4], trial)


# ---- a wait that may last, and waits that must end


@pytest.mark.slow
def test_a_slow_last_save_that_makes_progress_is_no_hang(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """Rank 1 needs more than `hang_seconds` for its file; the others wait with it."""
    trial = new_trial(cluster.filesystem(), tiny_config, **{"runtime.hang_seconds": 12.0})
    slow = fault("chunk", 1, "sleep", match=f".step-{STEPS:08d}", seconds=1.0, times=14)
    assert cluster.start(trial, 2, [slow]).wait() == [0, 0]
    assert len(trial.attempts()) == 1
    assert not failures(trial)
    assert_unharmed(undisturbed[2], trial)


@pytest.mark.slow
def test_hangs_outside_the_loop_are_recorded(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """One rank blocks in the rendezvous, the build or the load: all leave, with the cause recorded.

    In the load the rank that waits for the other may give up first and record it as lost. The
    trials run at the same time.
    """
    messages = {"hang": "without progress", "lost": "no word of rank 1"}
    causes = {"init": {"hang"}, "build_model": {"hang"}, "load": set(messages)}
    disks = {place: cluster.filesystem() for place in causes}
    fatal = fault("make_folder", 0, "block", match=f".step-{2 * MILESTONE:08d}")
    ranks = cluster.start(new_trial(disks["load"], tiny_config), 2, [fatal])
    wait_for_strike(fatal, ranks)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    overrides = {"runtime.hang_seconds": 15.0}
    trials = {place: new_trial(disks[place], tiny_config, **overrides) for place in causes}
    attempts: dict[str, NodeRanks] = {}
    for place, trial in trials.items():
        attempts[place] = cluster.start(trial, 2, [fault(place, 1, "block")])
    for place, ranks in attempts.items():
        assert ranks.wait() == [ExitCode.HANG] * 2, place
        record = trials[place].attempts()[-1]
        assert record["cause"] in causes[place]
        assert messages[record["cause"]] in record["error"]
    trial = new_trial(disks["load"], tiny_config)  # the same trial with a long `hang_seconds`
    finish(cluster, trial, 2)
    assert_unharmed(undisturbed[2], trial)
