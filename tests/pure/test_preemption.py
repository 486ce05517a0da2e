"""The guard and the place of a rank, without torch: real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from jepa_cluster.errors import LaunchError
from jepa_cluster.training import place


def run(code: str) -> subprocess.Popen[str]:
    """A Python process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )


GUARDED = """
import sys, time
from jepa_cluster.training.preemption import Guard
guard = Guard().install()
guard.at_deadline(0.2, lambda: (print("deadline", guard.signal, flush=True), __import__("os")._exit(75)))
print("ready", flush=True)
"""


def test_a_signal_raises_the_flag_while_the_main_thread_is_in_c() -> None:
    """The main thread waits for a lock in C, as in a collective; the flag is raised and the deadline kept."""
    process = run(GUARDED + "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "deadline SIGUSR2\n"
    assert process.wait(10) == 75


def test_a_signal_held_back_while_python_starts_arrives_when_the_guard_stands() -> None:
    """Started under a blocked mask, as launchers do; the signal comes before the first line of Python runs."""
    held = {signal.SIGUSR2, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        process = run(GUARDED + "import time; time.sleep(30)")
        process.send_signal(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "deadline SIGTERM\n"
    assert process.wait(10) == 75


def test_after_standing_down_no_signal_turns_success_into_failure() -> None:
    """A late USR2 during the interpreter's shutdown is ignored."""
    process = run(GUARDED + "guard.stand_down(); print('down', flush=True); time.sleep(0.3)")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "down\n"]
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_the_guard_and_the_job_stand_before_torch_is_imported() -> None:
    """Importing everything up to the door brings neither torch nor timm."""
    code = "import sys, jepa_cluster.launch.job; print([m for m in ('torch', 'timm', 'mlflow') if m in sys.modules])"
    process = run(code)
    assert process.communicate()[0] == "[]\n"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2)),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_PROCID": "2",
                "SLURM_NTASKS": "5",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
            },
            (2, 5, 0, 2),
        ),
    ],
)
def test_a_rank_finds_its_place_in_either_launchers_words(env: dict[str, str], expected: tuple[int, ...]) -> None:
    """Our own variables, Slurm's, or none: (rank, world, local rank, local world)."""
    found = place.find(env)
    assert (found.rank, found.world, found.local_rank, found.local_world) == expected
    assert found.slurm == ("SLURM_JOB_ID" in env)


def test_an_impossible_place_is_refused_with_the_variables() -> None:
    """Rank 2 of 2 cannot be."""
    with pytest.raises(LaunchError, match="rank 2 of 2") as e:
        place.find({"RANK": "2", "WORLD_SIZE": "2"})
    assert "RANK=2" in e.value.where
