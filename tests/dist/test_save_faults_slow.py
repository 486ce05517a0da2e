"""Slow tests of saves: kills at every point and at random moments, ranks stopped for 20 s.

Run by `make test-slow`.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest
from support.attempts import wait_for
from support.nodes import SPARE, Cluster, NodeRanks
from support.save_faults import (
    AGAIN,
    KILLS,
    MILESTONE,
    OFTEN,
    Strike,
    assert_done_is_true,
    assert_unharmed,
    failures,
    finish,
    kill_an_attempt,
    last_step,
    new_trial,
    release,
    wait_for_strike,
)

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.directory import TrialDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
Config = Callable[..., TrialConfig]
RANDOM_KILLS = 16  # inside saves, per world size
STOPPED = 20.0  # seconds


@pytest.mark.parametrize("world", [2, 4])
def test_a_kill_at_every_point_of_a_save(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    world: int,
) -> None:
    for kills in (KILLS[:-1], KILLS[-1:]):
        trial = new_trial(cluster.filesystem(), tiny_config)
        for kill in kills:
            kill_an_attempt(cluster, trial, world, kill, fault)
        finish(cluster, trial, world)
        assert_unharmed(undisturbed[world], trial)


def saving(trial: TrialDir) -> bool:
    """Whether a save of the newest attempt is in progress."""
    return bool(list(trial.checkpoints.glob(f".step-*.{trial.newest_attempt()}.*")))


def kill_at_random(
    trial: TrialDir,
    ranks: NodeRanks,
    chance: random.Random,
) -> bool:
    """Kill one rank, a node or all at a random moment of a save.

    Returns whether a save was in progress then.
    """

    def saves_or_ended() -> bool:
        if not ranks.running:
            return True
        return saving(trial) and trial.attempts()[-1].get("launch") == ranks.launch

    wait_for(saves_or_ended)
    time.sleep(chance.uniform(0, 0.6))
    everyone = tuple(range(len(ranks.ranks)))
    one = (chance.choice(everyone),)
    node = ranks.of_node(chance.randrange(2))
    victims = chance.choice([one, node, everyone])
    inside = saving(trial) and ranks.running
    ranks.kill(signal.SIGKILL, victims)
    return inside


@pytest.mark.parametrize("world", [2, 4])
def test_kills_at_random_moments_of_saves(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    world: int,
) -> None:
    """Saves take half a second, one after another; every commit verifies and the bits agree.

    A rank that waits for a dead one in the last save has no collective that tells it.
    """
    chance = random.Random(world)
    struck = 0
    slow = [fault("chunk", rank, "sleep", seconds=0.005) for rank in range(world)]
    while struck < RANDOM_KILLS:
        overrides = {"runtime.hang_seconds": 30.0, **OFTEN}
        trial = new_trial(cluster.filesystem(), tiny_config, **overrides)
        while not trial.done.exists() and struck < RANDOM_KILLS:
            ranks = cluster.start(trial, world, slow)
            struck += kill_at_random(trial, ranks, chance)
            assert set(ranks.wait()) <= {0, *AGAIN}
            assert_done_is_true(trial)
        finish(cluster, trial, world)
        assert_unharmed(undisturbed[world], trial)
        cluster.end_attempts()


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (4, 3)])
def test_a_rank_that_stops_for_20_s_inside_a_save_delays_it(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    world: int,
    rank: int,
) -> None:
    """SIGSTOP and SIGCONT inside its file, within `hang_seconds`: one attempt is enough."""
    trial = new_trial(cluster.filesystem(), tiny_config)
    inside = fault("chunk", rank, "block", match=f".step-{MILESTONE:08d}", skip=2)
    ranks = cluster.start(trial, world, [inside])
    wait_for_strike(inside, ranks)
    ranks.kill(signal.SIGSTOP, (rank,))
    release(inside)
    time.sleep(STOPPED)
    assert ranks.running
    assert not trial.done.exists()
    ranks.kill(signal.SIGCONT, (rank,))
    assert ranks.wait() == [0] * world
    assert len(trial.attempts()) == 1
    assert not failures(trial)
    assert_unharmed(undisturbed[world], trial)


@pytest.mark.parametrize(("stopped", "killed"), [(0, 1), (3, 1), (1, 0)])
def test_a_stopped_rank_that_continues_during_the_next_attempt_harms_nothing(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    stopped: int,
    killed: int,
) -> None:
    """One rank is stopped in a save, another killed, the trial started again.

    20 s later the stopped rank continues.
    """
    trial = new_trial(cluster.filesystem(), tiny_config, **{"runtime.hang_seconds": 15.0})
    inside = fault("chunk", stopped, "block", match=f".step-{MILESTONE:08d}", skip=2)
    first = cluster.start(trial, 4, [inside])
    wait_for_strike(inside, first)
    first.kill(signal.SIGSTOP, (stopped,))
    release(inside)
    first.kill(signal.SIGKILL, (killed,))
    others = [process for rank, process in enumerate(first.ranks) if rank not in (stopped, killed)]
    wait_for(lambda: all(process.poll() is not None for process in others))
    assert {process.poll() for process in others} == {ExitCode.HANG}
    end = time.monotonic() + STOPPED
    held = fault("chunk", 2, "block", match=f".step-{2 * MILESTONE:08d}", skip=2)
    second = cluster.start(trial, 4, [held])
    wait_for_strike(held, second)
    time.sleep(max(0.0, end - time.monotonic()))
    first.kill(signal.SIGCONT, (stopped,))
    wait_for(lambda: not first.running)
    assert first.wait()[stopped] in (ExitCode.HANG, ExitCode.FENCED)
    release(held)
    second.wait()
    assert_done_is_true(trial)
    finish(cluster, trial, 4)
    assert_unharmed(undisturbed[4], trial)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_no_rank_lives_on_after_done(
    cluster: Cluster,
    undisturbed: dict[int, TrialDir],
    tiny_config: Config,
    fault: Strike,
    number: int,
) -> None:
    """Rank 0 is killed or stopped right after it has written DONE: the others leave with 0."""
    trial = new_trial(cluster.filesystem(), tiny_config)
    leaving = fault("final_barrier", 0, "block")
    ranks = cluster.start(trial, 4, [leaving])
    wait_for_strike(leaving, ranks)
    ranks.kill(number, (0,))
    wait_for(lambda: all(process.poll() is not None for process in ranks.ranks[1:]))
    assert {process.poll() for process in ranks.ranks[1:]} == {0}
    assert_unharmed(undisturbed[4], trial)


def test_a_preemption_while_the_disk_is_full_leaves_with_the_last_commit(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """TERM while no save is possible: the attempt ends as preempted within the grace period."""
    disk = cluster.filesystem()
    trial = new_trial(disk, tiny_config, **OFTEN, **{"runtime.grace_seconds": 8.0})
    second = fault("make_folder", 0, "block", skip=1, times=1)
    ranks = cluster.start(trial, 2, [second])
    wait_for_strike(second, ranks)
    before = trial.committed()
    disk.fill(SPARE)
    release(second)
    wait_for(lambda: failures(trial))
    ranks.kill(signal.SIGTERM)
    assert ranks.wait() == [ExitCode.PREEMPTED] * 2
    assert trial.committed() == before
    assert trial.attempts()[-1]["cause"] == "preempted"
    assert_done_is_true(trial)
    disk.make_room()
    finish(cluster, trial, 2)
    assert_unharmed(undisturbed[2], trial)


def test_a_write_that_never_returns_ends_as_a_hang(
    cluster: Cluster, undisturbed: dict[int, TrialDir], tiny_config: Config, fault: Strike
) -> None:
    """A rank's save thread blocks in step 6: that save fails, and its watchdog ends the attempt."""
    trial = new_trial(cluster.filesystem(), tiny_config, **{"runtime.hang_seconds": 15.0})
    stuck = fault("chunk", 1, "block", match=f".step-{2 * MILESTONE:08d}", skip=2)
    assert cluster.start(trial, 2, [stuck]).wait() == [ExitCode.HANG] * 2
    (event,) = failures(trial)
    assert event["step"] == 2 * MILESTONE
    assert "no word of report-1" in event["error"]
    assert last_step(trial) > 2 * MILESTONE
    record = trial.attempts()[-1]
    assert record["cause"] == "hang"
    assert "the save makes no progress" in record["error"]
    assert trial.committed() == [MILESTONE]
    finish(cluster, trial, 2)
    assert_unharmed(undisturbed[2], trial)
