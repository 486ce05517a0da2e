"""Signals and the environment of a rank, without torch: real signals to real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.worker import slurm_rank
from jepa_cluster.training import dist_env


def run(code: str) -> subprocess.Popen[str]:
    """A Python process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )


GUARDED = """
import sys, time
from jepa_cluster.training.preemption import PreemptionHandler
handler = PreemptionHandler().install()
handler.set_deadline(0.2, lambda: (print("deadline", handler.signal, flush=True), __import__("os")._exit(75)))
print("ready", flush=True)
"""


def test_a_signal_raises_the_flag_while_the_main_thread_is_in_c() -> None:
    """The main thread waits for a lock in C, as in a collective; the flag is raised and the deadline kept."""
    process = run(GUARDED + "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "deadline SIGUSR2\n"
    assert process.wait(10) == 75


def test_a_signal_held_back_while_python_starts_arrives_once_the_handler_is_installed() -> None:
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


def test_after_ignore_signals_no_signal_turns_success_into_failure() -> None:
    """A late USR2 during the interpreter's shutdown is ignored."""
    process = run(GUARDED + "handler.ignore_signals(); print('down', flush=True); time.sleep(0.3)")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "down\n"]
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_the_handler_and_the_worker_need_no_torch() -> None:
    """Importing everything up to `train` brings neither torch nor timm."""
    heavy = "('torch', 'timm', 'mlflow')"
    code = f"import sys, jepa_cluster.launch.worker.main; print([m for m in {heavy} if m in sys.modules])"
    process = run(code)
    assert process.communicate()[0] == "[]\n"


RANK_THAT_HANGS = """
import os, sys
from pathlib import Path
from jepa_cluster.launch.worker import requeue
from jepa_cluster.training.preemption import exit_rank
from jepa_cluster.trial.directory import TrialDir
requeue.HEAD_START, requeue.TURN_SECONDS, requeue.ANSWER_MARGIN, requeue.TURNS = 0.5, 2.0, 0.5, 3
requeue.KILL_SECONDS = 60.0
requeue.requeue_job(TrialDir(Path(sys.argv[2])), "7.0", sys.argv[1] == "0")
exit_rank(76)
"""


@pytest.fixture
def slurm_programs(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """slurm_programs(squeue, scontrol) puts two shell scripts on PATH; each call appends a line to tmp_path/calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "logs").mkdir()

    def install(squeue: str, scontrol: str) -> None:
        for name, body in (("squeue", squeue), ("scontrol", scontrol)):
            path = programs / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
            path.chmod(0o755)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "7")
        yield install


def hang(world: int, trial: Path) -> list[subprocess.Popen[bytes]]:
    """All ranks of a job leave after a hang, each in its own process."""
    return [subprocess.Popen([sys.executable, "-c", RANK_THAT_HANGS, str(r), str(trial)]) for r in range(world)]


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def calls(folder: Path, program: str) -> int:
    """How often a program of Slurm was called."""
    path = folder / "calls"
    return sum(line.startswith(program) for line in path.read_text().splitlines()) if path.exists() else 0


def wait_for(ready: Callable[[], object], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.05)


def test_one_rank_of_a_hung_job_asks_slurm_for_the_requeue(
    slurm_programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Eight ranks leave at the same time; Slurm gets one question and one request, and all wait to be killed."""
    slurm_programs("echo RUNNING 0", "exit 0")
    ranks = hang(8, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
        time.sleep(3)  # longer than a turn
        assert calls(tmp_path, "scontrol requeue 7") == calls(tmp_path, "scontrol") == 1
        assert calls(tmp_path, "squeue") == 1
        assert [r.poll() for r in ranks] == [None] * 8, "a task that ends by itself would be taken for a result"
    finally:
        end(ranks)


def test_a_rank_that_dies_before_it_asks_is_replaced(
    slurm_programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    """The first squeue kills its caller. At the next turn one of the other ranks asks."""
    slurm_programs(
        f'test -e "{tmp_path}/died" || {{ : > "{tmp_path}/died"; kill -9 $PPID; }}; echo RUNNING 0', "exit 0"
    )
    ranks = hang(8, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
        time.sleep(3)
        assert calls(tmp_path, "scontrol") == 1 and calls(tmp_path, "squeue") == 2
        assert sorted(str(r.poll()) for r in ranks) == ["-9"] + ["None"] * 7
    finally:
        end(ranks)


def test_the_other_ranks_ask_when_rank_0_is_gone(slurm_programs: Callable[[str, str], None], tmp_path: Path) -> None:
    """Rank 0 died after the ranks had agreed to stop."""
    slurm_programs("echo RUNNING 0", "exit 0")
    ranks = hang(4, tmp_path)
    try:
        ranks[0].kill()
        wait_for(lambda: calls(tmp_path, "scontrol"))
        time.sleep(1)
        assert calls(tmp_path, "scontrol") == 1
    finally:
        end(ranks)


def test_all_ranks_end_when_slurm_refuses_the_requeue(
    slurm_programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Slurm has already decided (the job is being cancelled): nobody asks again, and nobody waits for a kill."""
    slurm_programs("echo CANCELLED 0", "exit 0")
    ranks = hang(4, tmp_path)
    try:
        assert [r.wait(20) for r in ranks] == [76] * 4
        assert calls(tmp_path, "squeue") == 1 and calls(tmp_path, "scontrol") == 0
    finally:
        end(ranks)


def test_a_disk_that_takes_no_file_does_not_keep_the_job_from_its_requeue(
    slurm_programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Creating the file fails with another error than "exists": rank 0 asks without it."""
    slurm_programs("echo RUNNING 0", "exit 0")
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").write_text("not a folder")
    ranks = hang(1, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
    finally:
        end(ranks)


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
def test_a_rank_reads_the_variables_of_either_launcher(env: dict[str, str], expected: tuple[int, ...]) -> None:
    """Our own variables, Slurm's, or none: (rank, world, local rank, local world)."""
    slurm = slurm_rank.is_slurm_task(env)
    found = slurm_rank.from_slurm(env) if slurm else dist_env.from_environment(env)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == expected
    assert slurm == ("SLURM_JOB_ID" in env)


def test_a_local_launcher_inside_a_slurm_job_is_no_slurm_task() -> None:
    """Its ranks read the launcher's variables, and no rank asks Slurm for a requeue."""
    env = dist_env.local_environment(1, 2, "here") | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert not slurm_rank.is_slurm_task(env)
    assert dist_env.from_environment(env).world_size == 2


def test_training_names_no_program_or_variable_of_slurm() -> None:
    """What the trainer needs of the scheduler comes in as arguments."""
    folder = Path(dist_env.__file__).parent
    slurm = re.compile(r"\b(SLURM\w*|squeue|scontrol|sbatch|scancel|sacct|srun)\b")
    named = {path.name: slurm.findall(path.read_text()) for path in folder.glob("*.py")}
    assert not {name: words for name, words in named.items() if words}


def test_an_impossible_rank_is_refused_with_the_variables() -> None:
    """Rank 2 of 2 cannot be."""
    with pytest.raises(LaunchError, match="rank 2 of 2") as e:
        dist_env.from_environment({"RANK": "2", "WORLD_SIZE": "2"})
    assert "RANK=2" in e.value.where
