"""A rank that hangs is reported with its collectives, a slow one with its step time."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest
from support.attempts import wait_for, wait_for_step
from support.faulty_rank import FAULTS, Fault, dump

from jepa_cluster.errors import ExitCode
from jepa_cluster.launch.scheduler import node_health
from jepa_cluster.trial.spool import read


def test_a_hang_leaves_stacks_and_the_flight_recorder_in_the_logs(
    launch: Callable, new_trial: Callable
) -> None:
    """Rank 0's watchdog writes the stacks of all threads and the collective that did not end."""
    trial = new_trial(**{"optim.steps": 400, "runtime.hang_seconds": 10.0})
    ranks = launch(trial)
    wait_for_step(trial, 5)
    ranks.kill(signal.SIGSTOP, (1,))
    wait_for(lambda: ranks.ranks[0].poll() is not None, 120)
    ranks.kill(signal.SIGKILL)
    assert ranks.ranks[0].poll() == ExitCode.HANG
    log = (trial.logs(1) / "rank0.err").read_text()
    assert "stacks of all threads follow" in log
    assert "train.py" in log
    assert "began and did not end" in log
    flight = json.loads((trial.logs(1) / "rank0.flight.json").read_text())
    assert flight[-1]["retired"] is False
    assert flight[0]["retired"] is True
    assert any("train.py" in frame["filename"] for frame in flight[-1]["frames"])
    assert trial.attempts()[-1]["cause"] == "hang"


@pytest.mark.slow
def test_ranks_that_arrive_late_are_no_hang_while_they_arrive(
    launch: Callable, new_trial: Callable
) -> None:
    """The last of four comes later than `hang_seconds`, but not that long after the one before."""
    trial = new_trial(**{"runtime.hang_seconds": 20.0})
    markers = [trial.path.with_name(f"late-{rank}") for rank in (2, 3)]
    late = [Fault("init", rank, "SIGSTOP", str(markers[rank - 2])) for rank in (2, 3)]
    ranks = launch(trial, 4, **{FAULTS: dump(late)})
    wait_for(lambda: all(marker.exists() for marker in markers))
    for rank in (2, 3):
        time.sleep(12.0)
        ranks.kill(signal.SIGCONT, (rank,))
    assert ranks.wait() == [0] * 4


def test_a_slow_rank_is_seen_in_the_attempts_record_and_in_the_nodes(
    launch: Callable, new_trial: Callable
) -> None:
    """Each matrix product of rank 1's straggler probe takes 20 ms longer.

    Steps take both ranks equally long; the straggler probe tells them apart.
    """
    trial = new_trial(**{"optim.steps": 30, "runtime.log_every": 3})
    marker = str(trial.path.with_name("slow"))
    slow_products = Fault("matmul", 1, "sleep", marker, seconds=0.02)
    ranks = launch(trial, **{FAULTS: dump([slow_products])})
    assert ranks.wait() == [0, 0]
    record = trial.attempts()[-1]
    fast, slow = record["pace"]["slow"]
    assert fast == 1.0
    assert slow > 1.5
    assert 0 < record["goodput"] < 1
    assert sum(record["seconds"].values()) > 0
    assert record["seconds"]["compile"] > 0
    (node,) = node_health.node_failures(trial.root).values()
    assert node["slow"] == pytest.approx((fast + slow) / 2)
    expected = {
        "images_per_s",
        "images_per_s_rank",
        "data_wait",
        "checkpoint_stall",
        "memory_gb",
        "lost_steps",
    }
    assert expected <= read(trial).settled_rows[-1].values.keys()


def test_a_rank_that_cannot_finish_its_step_exits_before_the_kill(
    launch: Callable, new_trial: Callable
) -> None:
    """TERM while the other rank is stopped: the deadline thread ends the attempt in time.

    It records the attempt as lost, because rank 1 does not answer.
    """
    trial = new_trial(
        **{"optim.steps": 400, "runtime.grace_seconds": 4.0, "runtime.checkpoint_minutes": 0.005}
    )
    ranks = launch(trial)
    wait_for(trial.committed)
    ranks.kill(signal.SIGSTOP, (1,))
    begun = time.monotonic()
    ranks.kill(signal.SIGTERM, (0,))
    wait_for(lambda: ranks.ranks[0].poll() is not None)
    assert time.monotonic() - begun < 4.0 + 2.0
    ranks.kill(signal.SIGKILL)
    assert ranks.ranks[0].poll() == ExitCode.HANG
    record = trial.attempts()[-1]
    assert record["cause"] == "lost"
    assert "left with the commit of step" in record["error"]
    assert record["end_step"] == trial.committed()[-1]
