"""Ranks as real processes that start in a moment: forked from a server process that has imported torch once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from jepa_cluster.config import TrialConfig
from jepa_cluster.launch import job
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import Root, TrialDir

TIMINGS = ("images_per_s", "data_wait")
_launches = itertools.count()


class Ranks:
    """The processes of one attempt."""

    def __init__(self, trial: TrialDir, world: int, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(job.PRELOAD)
        launch = f"test-{os.getpid()}-{next(_launches)}"
        self.processes: list[ForkServerProcess] = []
        for rank in range(world):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "JEPA_LAUNCH": launch,
                "OMP_NUM_THREADS": "1",
                **environment,
            }
            self.processes.append(context.Process(target=job.enter, args=(str(trial.path), variables)))
            self.processes[-1].start()

    def kill(self, number: int, ranks: tuple[int, ...] | None = None) -> None:
        """Send a signal to some ranks, by default to all."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes by rank; -9 for a killed one."""
        for process in self.processes:
            process.join(seconds)
        alive = [p for p in self.processes if p.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, f"{len(alive)} ranks still ran after {seconds} s"
        return [p.exitcode for p in self.processes]


@pytest.fixture
def launch() -> Iterator[Callable[..., Ranks]]:
    """launch(trial, world=2, **environment) -> Ranks; whatever still runs at the end of the test is killed."""
    started: list[Ranks] = []

    def start(trial: TrialDir, world: int = 2, **environment: str) -> Ranks:
        started.append(Ranks(trial, world, environment))
        return started[-1]

    yield start
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.join(5)


@pytest.fixture
def new_trial(tmp_path: Path, tiny_config: Callable[..., TrialConfig]) -> Callable[..., TrialDir]:
    """new_trial(name of a root, **overrides) -> a frozen trial that nobody has tried yet."""

    def make(root: str = "root", **overrides: Any) -> TrialDir:
        config = tiny_config(**overrides)
        trial = Root(tmp_path / root).trial(config.name)
        trial.create(config)
        return trial

    return make


def weights(trial: TrialDir, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint (default: the newest), whole."""
    folder = trial.checkpoint(step or trial.committed()[-1])
    return _load_state_dict_from_keys(storage_reader=dcp.FileSystemReader(folder))


def assert_same_bits(a: TrialDir, b: TrialDir) -> None:
    """Final weights, moments and metric history are identical, but for timings."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"
    assert history(a) == history(b)


def history(trial: TrialDir) -> list[tuple[int, dict[str, float]]]:
    """Settled rows without timings."""
    found = spool.read(trial)
    return [(r.step, {k: v for k, v in r.values.items() if k not in TIMINGS}) for r in found.settled_rows]
