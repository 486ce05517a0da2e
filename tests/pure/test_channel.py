"""Collective calls of ranks through the store: results and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.saving_ranks import Ranks
from support.simulated_ranks import os_error

from jepa_cluster.errors import CheckpointError, Fenced, FilesystemFault, RankLost
from jepa_cluster.training import checkpoint_files
from jepa_cluster.training.channel import Channel, SystemClock
from jepa_cluster.training.save_protocol import SaveProtocol
from jepa_cluster.training.watchdog import LONGEST_LOOK

ERRORS = [Fenced("a newer attempt"), CheckpointError("damaged"), os_error("EIO")]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    def fail_on_rank_0(protocol: SaveProtocol) -> object:
        if protocol.channel.rank == 0:
            return protocol.channel.gather("all", fail)
        return protocol.channel.gather("all", lambda: 1)

    ranks = Ranks(tmp_path, 3)
    raised = ranks.each(lambda protocol: protocol.channel.from_rank0("one", fail))
    raised += ranks.each(fail_on_rank_0)
    expected = FilesystemFault if isinstance(error, OSError) else type(error)
    assert len(raised) == 6
    for each in raised:
        assert type(each) is expected
        assert each.what == checkpoint_files.describe(error)


def test_gather_names_the_rank_that_is_missing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    results = ranks.each(lambda protocol: protocol.channel.gather("all", lambda: 1), [0, 1, 3])
    assert len(results) == 3
    for error in results:
        assert type(error) is RankLost
        assert error.what == "no word of rank 2 for 5 s"


class PausedClock(SystemClock):
    """A clock of a process that is paused once, after two seconds."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.time = self.slept = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.time += seconds
        if self.slept > 2.0:
            self.time += self.pause
            self.pause = 0.0


class EmptyStore:
    """A store in which no rank has posted anything."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def check(self, keys: list[str]) -> bool:
        return False

    def add(self, key: str, amount: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


def test_seconds_in_which_the_process_was_paused_are_not_waited() -> None:
    """A laptop that sleeps, or a job that Slurm suspends: the others are paused, too."""
    clock = PausedClock(pause=1000.0)
    store: Any = EmptyStore()
    channel = Channel(store, 0, 2, attempt=1, patience=10.0, clock=clock)
    with pytest.raises(RankLost, match="no word of rank 1 for 10 s"):
        channel.read("all", ["rank 1"])
    assert clock.slept == pytest.approx(10.0, abs=2 * LONGEST_LOOK)
