"""Collective calls of ranks through the store: results and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.saving_ranks import Ranks
from support.simulated_ranks import os_error

from jepa_cluster.errors import CheckpointError, Fenced, FilesystemFault, RankLost
from jepa_cluster.training import checkpoint_files
from jepa_cluster.training.save_protocol import SaveProtocol

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
