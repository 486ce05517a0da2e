"""Fixtures of attempts.py, nodes.py and save_faults.py, and `run_ranks`, for all tests here."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import sharded
from support.attempts import launch, new_trial, server, trained
from support.nodes import cluster, two_nodes
from support.save_faults import fault, undisturbed

from jepa_cluster.launch.scheduler.fork_server import ForkServer

__all__ = [
    "cluster",
    "fault",
    "launch",
    "new_trial",
    "server",
    "trained",
    "two_nodes",
    "undisturbed",
]


@pytest.fixture
def run_ranks(server: ForkServer, tmp_path: Path) -> Callable[..., list[Any]]:
    """run_ranks(function of sharded.py, world, *args) -> what each rank returned."""
    numbers = itertools.count()

    def run(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        return sharded.run(server, tmp_path / f"ranks{next(numbers)}", work, world, *args)

    return run
