"""Ranks as real processes, forked from a server process that has imported torch once."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_trial

from jepa_cluster.config import TrialConfig
from jepa_cluster.launch.scheduler import fork_server
from jepa_cluster.training import attempt_log, checkpoint
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir

TIMINGS = attempt_log.WALL_CLOCK_METRICS
_launches = itertools.count()


class Ranks:
    """The processes of one attempt."""

    def __init__(
        self,
        server: fork_server.ForkServer,
        trial: TrialDir,
        world: int,
        environment: dict[str, str],
    ) -> None:
        self.launch = launch = f"test-{os.getpid()}-{next(_launches)}"
        self.log = trial.path.with_name(f"{launch}.log")
        self.ranks: list[fork_server.RankProcess] = []
        for rank in range(world):
            variables = {
                "PATH": os.environ["PATH"],
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "JEPA_LAUNCH": launch,
                "OMP_NUM_THREADS": "1",
                **environment,
            }
            self.ranks.append(server.spawn(trial.path, variables, self.log))

    def kill(self, number: int, ranks: tuple[int, ...] | None = None) -> None:
        """Send a signal to some ranks, by default to all."""
        for rank, process in enumerate(self.ranks):
            if ranks is None or rank in ranks:
                process.send_signal(number)

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.ranks)

    def wait(self, seconds: float = 240.0) -> list[int | None]:
        """Exit codes by rank; -9 for a killed one."""
        end = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"ranks still ran after {seconds} s; see {self.log}")
            time.sleep(0.02)
        return [process.poll() for process in self.ranks]


def start_server(folder: Path, prefix: str = "") -> fork_server.ForkServer:
    """Start a fork server whose ranks run rank_program.

    folder: for its start script. prefix: a command that runs it.
    """
    code = Path(fork_server.__file__).parents[3]
    here = Path(__file__).parent
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={code}:{here.parent}\n"
        f"exec {prefix} {sys.executable} -P {here / 'rank_server.py'}\n"
    )
    program.chmod(0o755)
    return fork_server.ForkServer(str(program), code, {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fork_server.ForkServer]:
    """The process that ranks are forked from."""
    server = start_server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def launch(server: fork_server.ForkServer) -> Iterator[Callable[..., Ranks]]:
    """launch(trial, world=2, **environment) -> Ranks.

    Ranks that still run at the end of the test are killed.
    """
    started: list[Ranks] = []

    def start(trial: TrialDir, world: int = 2, **environment: str) -> Ranks:
        started.append(Ranks(server, trial, world, environment))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill(signal.SIGKILL)


@pytest.fixture
def new_trial(tmp_path: Path, tiny_config: Callable[..., TrialConfig]) -> Callable[..., TrialDir]:
    """new_trial(name of a root, **overrides) -> a frozen trial without an attempt."""

    def make(root: str = "root", **overrides: Any) -> TrialDir:
        config = tiny_config(**overrides)
        trial = Root(tmp_path / root).trial_of(config)
        trial.create(config)
        return trial

    return make


@pytest.fixture(scope="session")
def trained(
    server: fork_server.ForkServer, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrialDir]:
    """trained(**overrides) -> the trial that two ranks trained undisturbed.

    Made once: only a copy may be changed.
    """
    made: dict[str, TrialDir] = {}

    def train(**overrides: Any) -> TrialDir:
        key = repr(sorted(overrides.items()))
        if key not in made:
            config = tiny_trial.config(tiny_data, **overrides)
            made[key] = trial = Root(tmp_path_factory.mktemp("trained")).trial_of(config)
            trial.create(config)
            assert Ranks(server, trial, 2, {}).wait() == [0, 0]
        return made[key]

    return train


def wait_for(ready: Callable[[], object], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def assert_same_bits(a: TrialDir, b: TrialDir) -> None:
    """Final weights, moments and metric history are identical, except for timings."""
    left = checkpoint.load_unsharded(a.checkpoint(a.committed()[-1]))
    right = checkpoint.load_unsharded(b.checkpoint(b.committed()[-1]))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"
    assert history(a) == history(b)


def wait_for_step(trial: TrialDir, step: int) -> None:
    """Wait until the trial has logged this step."""

    def reached() -> bool:
        rows = spool.read(trial).rows
        return bool(rows) and rows[-1].step >= step

    wait_for(reached)


def steps_of(trial: TrialDir) -> list[int]:
    """Steps of the settled rows."""
    return [step for step, _ in history(trial)]


def history(trial: TrialDir) -> list[tuple[int, dict[str, float]]]:
    """Settled rows without timings."""
    found: list[tuple[int, dict[str, float]]] = []
    for row in spool.read(trial).settled_rows:
        values = {name: value for name, value in row.values.items() if name not in TIMINGS}
        found.append((row.step, values))
    return found


def kill_and_resume(
    launch: Callable[..., Ranks],
    trial: TrialDir,
    step: int,
) -> None:
    """Kill the ranks of a new trial at a step, and run it to its end from its checkpoint."""
    ranks = launch(trial)
    wait_for_step(trial, step)
    ranks.kill(signal.SIGKILL)
    ranks.wait()
    assert trial.committed(), "no checkpoint before the kill: the test would show nothing"
    assert launch(trial).wait() == [0, 0]
