"""What a rank concludes after a signal about the other ranks, and which record it closes."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
from support.saving_ranks import Ranks

from jepa_cluster.errors import ExitCode
from jepa_cluster.training import forced_exit
from jepa_cluster.training.channel import Channel
from jepa_cluster.training.dist_env import DistEnv, listen
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler
from jepa_cluster.training.watchdog import PhaseTimer
from jepa_cluster.trial.directory import Root, TrialDir

GRACE = 600.0
KILL_WAIT = 30.0


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    made = Root(tmp_path).trial("tiny")
    (made.path / "attempts").mkdir(parents=True)
    return made


def signalled(
    trial: TrialDir, rank: int, world: int, attempt: int = 1, name: str = "SIGTERM"
) -> ForcedExit:
    """A rank that got a signal and has not met the others."""
    handler = PreemptionHandler()
    handler.kill_wait, handler.grace = KILL_WAIT, GRACE
    handler.request_stop(name)
    env = DistEnv(rank, world, rank, world, "7.0")
    hooks = JobHooks(kill_wait=KILL_WAIT)
    return ForcedExit(trial, env, PhaseTimer(), handler, hooks, attempt)


def meet(exits: ForcedExit, ranks: Ranks) -> None:
    """Give a rank its channel to the others."""
    exits.new_channel = lambda: ranks.protocol(exits.env.rank).channel


def raises_no_store() -> Channel:
    raise RuntimeError("no store")


def seconds_left(exits: ForcedExit) -> float:
    """Seconds from the signal to the deadline."""
    return exits.handler.deadline() - (exits.handler.since or math.nan)


@pytest.mark.parametrize("world", [1, 3])
def test_the_grace_period_counts_once_all_ranks_have_answered(trial: TrialDir, world: int) -> None:
    ranks = Ranks(trial.path, world)
    exits = [signalled(trial, rank, world) for rank in range(world)]
    for each in exits:
        assert seconds_left(each) == pytest.approx(KILL_WAIT / 2)
        meet(each, ranks)
    ranks.together(*[each._call_roll for each in exits])
    for each in exits:
        assert each.silent == ""
        assert seconds_left(each) == pytest.approx(GRACE - 15)


@pytest.mark.parametrize("silent", [0, 2])
def test_no_rank_waits_longer_when_one_does_not_answer(trial: TrialDir, silent: int) -> None:
    """A rank hears from rank 0 that all have answered; without that nothing changes."""
    ranks = Ranks(trial.path, 3)
    exits = [signalled(trial, rank, 3) for rank in range(3) if rank != silent]
    for each in exits:
        meet(each, ranks)
    ranks.together(*[each._call_roll for each in exits])
    for each in exits:
        assert each.silent
        assert seconds_left(each) == pytest.approx(KILL_WAIT / 2)


@pytest.mark.parametrize(("world", "seconds"), [(1, GRACE - 15), (2, KILL_WAIT / 2)])
def test_other_ranks_may_die_between_two_signals(
    trial: TrialDir, world: int, seconds: float
) -> None:
    """TERM after the warning before the time limit; a rank alone needs no answer."""
    ranks = Ranks(trial.path, world)
    exits = [signalled(trial, rank, world, name="SIGUSR2") for rank in range(world)]
    for each in exits:
        meet(each, ranks)
    ranks.together(*[each._call_roll for each in exits])
    for each in exits:
        assert each.silent == ""
        each.handler.request_stop("SIGTERM")
        assert seconds_left(each) == pytest.approx(seconds, abs=1.0)


def test_a_rank_that_has_not_seen_the_claim_leaves_the_record_to_rank_0(trial: TrialDir) -> None:
    """Rank 0 opened the attempt meanwhile; it listens as long as it lives."""
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        trial.claim({"launch": "7.0", "address": f"127.0.0.1:{port}"})
        late = signalled(trial, 1, 2, attempt=0)
        assert late._record(ExitCode.PREEMPTED, "preempted", "no time to save")
        assert "cause" not in trial.attempts()[-1]
    assert late._record(ExitCode.PREEMPTED, "preempted", "no time to save")
    assert trial.attempts()[-1]["cause"] == "lost"


def test_rank_0_is_preempted_by_a_signal_during_its_claim(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks leave when they see no claim, so they are not lost."""
    monkeypatch.setattr(forced_exit, "exit_rank", lambda code: None)
    exits = signalled(trial, 0, 2, attempt=0)
    left = threading.Event()
    exits.hooks = JobHooks(lambda files_work: left.set(), kill_wait=0.5)
    exits.start()
    while exits.silent:
        time.sleep(0.01)
    exits.attempt = trial.claim({"launch": "7.0", "address": "127.0.0.1:1"})
    assert left.wait(60)
    assert trial.attempts()[-1]["cause"] == "preempted"
    exits.new_channel = raises_no_store  # ends the roll call


def test_rank_0_closes_a_record_that_it_is_still_writing(trial: TrialDir) -> None:
    exits = signalled(trial, 0, 2, attempt=0)
    trial.claim({"launch": "7.0", "address": "127.0.0.1:1"})
    assert exits._record(ExitCode.PREEMPTED, "preempted", "no time to save")
    assert trial.attempts()[-1]["cause"] == "preempted"


@pytest.mark.parametrize("may_retry", [True, False])
def test_a_bad_node_is_no_free_start_once_rank_0_has_opened_the_attempt(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch, may_retry: bool
) -> None:
    """`retries` decides, and the start has no record of its own."""
    monkeypatch.setattr(forced_exit, "exit_rank", lambda code: None)
    trial.claim({"launch": "7.0", "address": "127.0.0.1:1"})
    exits = signalled(trial, 1, 2, attempt=0)
    ends: list[str] = []
    requeues: list[bool] = []

    def end_start(cause: str, error: str) -> str:
        ends.append(cause)
        return ""

    hooks = {"requeue": requeues.append, "end_start": end_start}
    exits.hooks = JobHooks(**hooks, may_retry=lambda: may_retry)
    exits.on_claim_error("self-test of the GPU failed", "node")
    assert trial.attempts()[-1]["cause"] == "node"
    assert ends == []
    assert requeues == [True] * may_retry
    assert trial.failed.exists() == (not may_retry)
