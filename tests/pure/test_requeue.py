"""Ranks that hang or cannot join an attempt: one of them asks Slurm for the requeue.

Real processes, no torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jepa_cluster.launch.scheduler import retry_policy
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

SlurmPrograms = Callable[[str, str], None]

RANK_THAT_HANGS = """
import os, sys
from pathlib import Path
from jepa_cluster.launch.worker import requeue
from jepa_cluster.training.preemption import exit_rank
from jepa_cluster.trial.directory import TrialDir
os.environ["JEPA_KILL_WAIT"] = "3"
requeue.TURN_SECONDS, requeue.ANSWER_MARGIN, requeue.TURNS = 2.0, 0.5, 3
requeue.KILL_SECONDS = 60.0
files_work = sys.argv[3] == "files work"
requeue.requeue_job(TrialDir(Path(sys.argv[2])), "7.0", sys.argv[1] == "0", files_work)
exit_rank(76)
"""


@pytest.fixture
def slurm_programs(tmp_path: Path) -> Iterator[SlurmPrograms]:
    """Put shell scripts for squeue and scontrol on PATH.

    Each call of a script appends a line to tmp_path/calls.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "logs").mkdir()

    def install(
        squeue: str,
        scontrol: str,
    ) -> None:
        for name, body in (("squeue", squeue), ("scontrol", scontrol)):
            path = programs / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
            path.chmod(0o755)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "7")
        yield install


def hang(
    world: int,
    trial: Path,
    files: str = "files work",
) -> list[subprocess.Popen[bytes]]:
    """Let all ranks of a job leave after a hang, each in a process of its own."""
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(world):
        command = [sys.executable, "-c", RANK_THAT_HANGS, str(rank), str(trial), files]
        ranks.append(subprocess.Popen(command))
    return ranks


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def calls(
    folder: Path,
    program: str,
) -> int:
    """Return how often a program of Slurm was called."""
    path = folder / "calls"
    if not path.exists():
        return 0
    lines = path.read_text().splitlines()
    return sum(line.startswith(program) for line in lines)


def wait_for(
    ready: Callable[[], object],
    seconds: float = 30.0,
) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.05)


def test_one_rank_of_a_hung_job_asks_slurm_for_the_requeue(
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """Eight ranks leave at the same time. Slurm gets one squeue and one requeue.

    All ranks then wait to be killed: Slurm would take the end of a task for a result.
    """
    slurm_programs("echo RUNNING 0", "exit 0")
    ranks = hang(8, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
        time.sleep(3)  # longer than a turn
        assert calls(tmp_path, "scontrol") == 1
        assert calls(tmp_path, "scontrol requeue incomplete 7") == 1
        assert calls(tmp_path, "squeue") == 1
        for rank in ranks:
            assert rank.poll() is None
    finally:
        end(ranks)


def test_another_rank_asks_when_the_first_one_dies_before_its_request(
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """The first squeue kills its caller."""
    died = f'"{tmp_path}/died"'
    kill_once = f"test -e {died} || {{ : > {died}; kill -9 $PPID; }}"
    slurm_programs(f"{kill_once}; echo RUNNING 0", "exit 0")
    ranks = hang(8, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
        time.sleep(3)
        assert calls(tmp_path, "scontrol") == 1
        assert calls(tmp_path, "squeue") == 2
        codes = Counter(rank.poll() for rank in ranks)
        assert codes == {-9: 1, None: 7}
    finally:
        end(ranks)


def test_the_other_ranks_ask_when_rank_0_is_gone(
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """Rank 0 dies after the ranks have agreed to stop."""
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
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """The job is being cancelled: no rank asks again, and none waits to be killed.

    The trial is stopped, also when Slurm has forgotten that.
    """
    slurm_programs("echo CANCELLED 0", "exit 0")
    ranks = hang(4, tmp_path)
    try:
        for rank in ranks:
            assert rank.wait(20) == 76
        assert calls(tmp_path, "squeue") == 1
        assert calls(tmp_path, "scontrol") == 0
        assert (tmp_path / "STOP").read_text() == "cancelled in Slurm\n"
    finally:
        end(ranks)


def test_rank_0_asks_even_if_the_disk_takes_no_file(
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """Creating the file of the asking rank fails with another error than "exists"."""
    slurm_programs("echo RUNNING 0", "exit 0")
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").write_text("not a folder")
    ranks = hang(1, tmp_path)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol"))
    finally:
        end(ranks)


def test_a_job_whose_filesystem_hangs_is_requeued(
    slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """Nothing is read before the request. Here a read waits for the writer of a pipe."""
    slurm_programs("echo RUNNING 0", "exit 0")
    os.mkfifo(TrialDir(tmp_path)._start("7.0"))
    ranks = hang(2, tmp_path, "files hang")
    try:
        wait_for(lambda: calls(tmp_path, "scontrol requeue incomplete 7"))
    finally:
        end(ranks)


# ---- ranks that cannot join an attempt

RANK_THAT_CANNOT_CLAIM = """
import errno, os, signal, sys
from jepa_cluster.launch.worker import main
from jepa_cluster.trial import attempts

path, place, error = sys.argv[1:]

def fail(*arguments):
    code = getattr(errno, error)
    raise OSError(code, os.strerror(code), "attempts")

if place == "signal":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
else:
    setattr(attempts, place, fail)
main.run(path)
"""
PLACES = {  # a function of trial/attempts.py that fails, and whether the attempt was opened by then
    "require_writable": False,
    "names_in": False,
    "write_new": False,
    "fsync_folder": True,
}
ERRORS = ("EIO", "ESTALE", "ENOSPC", "EDQUOT", "EACCES")


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    made = Root(tmp_path / "root").trial("tiny")
    made.path.mkdir(parents=True)
    return made


def start_rank(
    trial: TrialDir, place: str, error: str = "", rank: int = 0, restarts: int = 0
) -> subprocess.Popen[bytes]:
    """Start a rank that cannot claim. place: a function that fails, or "signal" for a TERM.

    The node of the other rank has passed its test.
    """
    trial.report_node(f"7.{restarts}", 1 - rank, 1)
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "JEPA_KILL_WAIT": "3",
    }
    command = [sys.executable, "-c", RANK_THAT_CANNOT_CLAIM, str(trial.path), place, error]
    return subprocess.Popen(command, env={**os.environ, **variables})


@pytest.mark.parametrize(
    ("place", "error"),
    [*((place, "EIO") for place in PLACES), *(("write_new", error) for error in ERRORS[1:])],
)
def test_the_job_of_a_rank_0_that_cannot_claim_its_trial_is_requeued(
    trial: TrialDir, slurm_programs: SlurmPrograms, tmp_path: Path, place: str, error: str
) -> None:
    slurm_programs("echo RUNNING 0", "exit 0")
    rank = start_rank(trial, place, error)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol") or rank.poll() is not None)
        assert calls(tmp_path, "scontrol") == 1
        causes = [attempt.get("cause") for attempt in trial.attempts()]
        assert causes == ["infrastructure"] * PLACES[place]
        assert not trial.failed.exists()
    finally:
        end([rank])


def test_the_job_of_another_rank_that_cannot_read_the_attempts_is_requeued(
    trial: TrialDir, slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    slurm_programs("echo RUNNING 0", "exit 0")
    rank = start_rank(trial, "names_in", "ESTALE", rank=1)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol") or rank.poll() is not None)
        assert calls(tmp_path, "scontrol") == 1
    finally:
        end([rank])


@pytest.mark.parametrize(
    ("place", "restarts", "reason"),
    [
        ("write_new", 5, "retries.node allows 5"),
        ("names_in", retry_policy.UNCOUNTED_RESTARTS, "attempts cannot be read"),
    ],
)
def test_a_trial_that_cannot_be_claimed_fails_with_its_reason_once_its_budget_is_used_up(
    trial: TrialDir,
    slurm_programs: SlurmPrograms,
    tmp_path: Path,
    place: str,
    restarts: int,
    reason: str,
) -> None:
    slurm_programs(f"echo RUNNING {restarts}", "exit 0")
    rank = start_rank(trial, place, "EDQUOT", restarts=restarts)
    try:
        assert rank.wait(30) == 76
        assert calls(tmp_path, "scontrol") == 0
        failed = read_json(trial.failed)
        assert failed
        assert failed["cause"] == "infrastructure"
        assert "quota exceeded" in failed["error"]
        assert reason in failed["error"]
    finally:
        end([rank])


def test_a_job_whose_attempts_cannot_be_read_is_requeued_after_many_normal_requeues(
    trial: TrialDir, slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    """One I/O error after six attempts is no seventh lost start."""
    for restarts in range(6):
        trial.claim({"job_id": "7", "launch": f"7.{restarts}"})
    slurm_programs("echo RUNNING 6", "exit 0")
    rank = start_rank(trial, "names_in", "ESTALE", restarts=6)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol") or rank.poll() is not None)
        assert calls(tmp_path, "scontrol") == 1
        assert not trial.failed.exists()
    finally:
        end([rank])


@pytest.mark.parametrize("restarts", [0, 5, 9])
def test_a_rank_0_that_is_preempted_before_its_claim_always_asks_for_the_requeue(
    trial: TrialDir, slurm_programs: SlurmPrograms, tmp_path: Path, restarts: int
) -> None:
    slurm_programs(f"echo RUNNING {restarts}", "exit 0")
    rank = start_rank(trial, "signal", restarts=restarts)
    try:
        wait_for(lambda: calls(tmp_path, "scontrol") or rank.poll() is not None)
        assert calls(tmp_path, "scontrol") == 1
        assert not trial.attempts()
        assert not trial.failed.exists()
        assert [start.get("cause") for start in trial.ended_starts()] == ["preempted"]
        env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
        assert retry_policy.lost_starts(trial, env) == restarts
    finally:
        end([rank])


@pytest.mark.parametrize(("restarts", "requests"), [(0, 1), (9, 0)])
def test_another_rank_asks_after_a_signal_only_within_the_budget(
    trial: TrialDir,
    slurm_programs: SlurmPrograms,
    tmp_path: Path,
    restarts: int,
    requests: int,
) -> None:
    """The signal may come from the end of rank 0. Beyond the budget it waits to be killed."""
    slurm_programs(f"echo RUNNING {restarts}", "exit 0")
    rank = start_rank(trial, "signal", rank=1, restarts=restarts)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(5)
        assert rank.poll() is None
        assert calls(tmp_path, "scontrol") == requests
        assert not trial.ended_starts()
        assert not trial.failed.exists()
    finally:
        end([rank])


def test_a_start_that_failed_counts_also_when_its_requeue_sends_a_signal(
    trial: TrialDir, slurm_programs: SlurmPrograms, tmp_path: Path
) -> None:
    slurm_programs("echo RUNNING 0", "exit 0")
    rank = start_rank(trial, "write_new", "EIO")
    try:
        wait_for(lambda: calls(tmp_path, "scontrol") or rank.poll() is not None)
        rank.terminate()
        time.sleep(3)  # longer than the deadline of a preempted rank
        assert rank.poll() is None
        assert [start.get("cause") for start in trial.ended_starts()] == ["infrastructure"]
        env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
        assert retry_policy.lost_starts(trial, env) == 1
    finally:
        end([rank])
