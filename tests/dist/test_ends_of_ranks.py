"""Every end of a rank, in every phase: the attempt has a cause and the job is requeued.

A rank's process gets the variables of a Slurm task, and shell scripts for squeue and scontrol. The
test replaces srun: a task that ends badly makes it send TERM to the other one, and KILL after
KillWait. With NCCL the other rank's main thread waits without end; here it is blocked at the same
place.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.attempts import Ranks, wait_for
from support.faulty_rank import FAULTS, Fault, dump

from jepa_cluster.errors import ExitCode
from jepa_cluster.launch.scheduler.fork_server import ForkServer
from jepa_cluster.launch.submit import lost_attempts
from jepa_cluster.training.watchdog import POLL_SECONDS
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.failures import classify_attempt
from jepa_cluster.trial.status import TrialStatus

KILL_WAIT = 30.0  # s, Slurm's default
ENDS = {  # and the causes that may be recorded
    "SIGKILL": {"lost"},
    "SIGSTOP": {"hang", "lost"},  # lost: a rank that waited for its message was faster
    "block": {"hang", "lost"},
    "oom": {"gpu_oom"},
}
PLACES = {  # phase: the function in which the end comes, and calls of it before that
    "rendezvous": ("init", 0),
    "build": ("build_model", 0),
    "load": ("load", 0),
    "step": ("set_lr_and_decay", 3),
    "save": ("start", 0),
    "probe": ("measure", 0),
    "exit": ("final_barrier", 0),
}
BACKENDS = ("raises", "blocks")
QUICK = {("SIGKILL", "step", "blocks", 1), ("SIGKILL", "rendezvous", "raises", 0)}


def cells() -> list[object]:
    """Return (end, phase, backend, rank that ends)."""
    found: list[object] = []
    for end, phase, backend in itertools.product(ENDS, PLACES, BACKENDS):
        for rank in (0, 1):
            if rank == 1 or end in ("SIGKILL", "SIGSTOP"):
                cell = (end, phase, backend, rank)
                marks = () if cell in QUICK else (pytest.mark.slow,)
                found.append(pytest.param(*cell, marks=marks, id="-".join(map(str, cell))))
    return found


class SlurmTasks(Ranks):
    """Two tasks of job 7, with the programs of Slurm that a node has."""

    def __init__(
        self,
        server: ForkServer,
        trial: TrialDir,
        faults: list[Fault],
        kill_wait: float = KILL_WAIT,
    ) -> None:
        folder = trial.path.with_name("slurm")
        folder.mkdir()
        self.calls = folder / "calls"
        self.calls.touch()
        for name, answer in (("squeue", "echo RUNNING 0"), ("scontrol", "exit 0")):
            program = folder / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.calls}"\n{answer}\n')
            program.chmod(0o755)
        self.ranks = []
        self.log = folder / "log"
        for rank in range(2):
            variables = {
                "PATH": f"{folder}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "JEPA_KILL_WAIT": str(kill_wait),
                "OMP_NUM_THREADS": "1",
                FAULTS: dump(faults),
            }
            self.ranks.append(server.spawn(trial.path, variables, self.log))
        self.terminated = self.killed = False
        self.kill_at = math.inf

    @property
    def requeued(self) -> bool:
        return "requeue incomplete 7" in self.calls.read_text()

    def over(self, survivor: int) -> bool:
        """Do what srun does. Return whether the job is over, or is about to be.

        A stopped rank that is left gets KILL in the end.
        """
        codes = [process.poll() for process in self.ranks]
        if codes != [None, None] and not self.terminated:  # --kill-on-bad-exit, --wait
            self.terminated = True
            self.kill_at = time.monotonic() + KILL_WAIT
            self.kill(signal.SIGTERM)
        if time.monotonic() > self.kill_at and not self.killed:
            self.killed = not self.requeued
            self.kill(signal.SIGKILL)
        return self.requeued or codes[survivor] is not None


@dataclass
class Trials:
    new: Callable[..., TrialDir]
    trained: Callable[..., TrialDir]

    def make(self, phase: str, hang_seconds: float) -> TrialDir:
        """Return a trial whose attempt reaches the phase, at once for most of them."""
        overrides = {"runtime.hang_seconds": hang_seconds, "runtime.checkpoint_minutes": 0.0001}
        trial = self.new(**overrides)
        if phase == "load":  # a trial that was killed before DONE.json
            done = self.trained()
            shutil.copytree(done.path / "checkpoints", trial.checkpoints, dirs_exist_ok=True)
        return trial


@pytest.fixture
def trials(
    new_trial: Callable[..., TrialDir],
    trained: Callable[..., TrialDir],
) -> Trials:
    return Trials(new_trial, trained)


@pytest.mark.parametrize(("end", "phase", "backend", "rank"), cells())
def test_an_end_of_a_rank_is_recorded_and_the_job_is_requeued(
    server: ForkServer,
    trials: Trials,
    tmp_path: Path,
    end: str,
    phase: str,
    backend: str,
    rank: int,
) -> None:
    place, skip = PLACES[phase]
    hang_seconds = 12.0 if "hang" in ENDS[end] else 60.0
    trial = trials.make(phase, hang_seconds)
    faults = [Fault(place, rank, end, str(tmp_path / "struck"), skip=skip)]
    if backend == "blocks":
        faults.append(Fault(place, 1 - rank, "block", str(tmp_path / "blocked"), skip=skip))
    tasks = SlurmTasks(server, trial, faults)
    try:
        wait_for(lambda: tasks.over(1 - rank))
        assert not tasks.killed, "Slurm had to KILL a rank"
        struck = (tmp_path / "struck").stat().st_mtime
        (record,) = trial.attempts()
        cause = classify_attempt(record).cause
        # A rank wrote the end: `submit` and `watch` add Slurm's word, and no exit code.
        assert "exit" in record
        assert "slurm_state" not in record
        # The deadline: KillWait after the end of a rank, or after the watchdog's verdict on it.
        limit = KILL_WAIT + hang_seconds * ("hang" in ENDS[end])
        assert record["ended"] / 1000 - struck < limit
        if phase == "exit":
            assert trial.done.exists()
            assert cause == "done"
            return
        assert cause in ENDS[end], tasks.log.read_text()
        assert tasks.requeued
        assert not trial.failed.exists()
    finally:
        tasks.kill(signal.SIGKILL)


def phases(quick: str) -> list[object]:
    """Return every phase; all but one are slow tests."""
    slow = [pytest.param(phase, marks=pytest.mark.slow) for phase in PLACES if phase != quick]
    return [quick, *slow]


@pytest.mark.parametrize("phase", phases(quick="step"))
def test_after_kill_of_all_ranks_the_next_submit_records_the_cause(
    server: ForkServer, trials: Trials, tmp_path: Path, phase: str
) -> None:
    """No TERM comes first, so no rank writes anything; Slurm says that the job failed."""
    place, skip = PLACES[phase]
    trial = trials.make(phase, 60.0)
    struck = str(tmp_path / "struck")
    tasks = SlurmTasks(
        server, trial, [Fault(place, rank, "block", struck, skip=skip) for rank in range(2)]
    )
    wait_for(Path(struck).exists)
    tasks.kill(signal.SIGKILL)
    tasks.wait()
    job = trial.read_attempt(1).get("job_id", "")
    status = TrialStatus("interrupted", job=job, attempts=1, slurm_state="FAILED")
    assert trial.open_attempts() == ([] if phase == "exit" else [1])
    lost_attempts.write_ends(trial.root, {trial.name: status})
    (record,) = trial.attempts()
    assert record["cause"] == ("done" if phase == "exit" else "killed")
    assert record["ended"] >= record["started"]
    assert not tasks.requeued


@pytest.mark.parametrize("phase", phases(quick="step"))
def test_a_stop_of_the_user_ends_the_trial_after_the_phase(
    server: ForkServer, trials: Trials, tmp_path: Path, phase: str
) -> None:
    """In the load and the exit no step is left to stop before: the trial is done."""
    place, skip = PLACES[phase]
    trial = trials.make(phase, 60.0)
    tasks = SlurmTasks(server, trial, [Fault(place, 0, "block", str(tmp_path / "at"), skip=skip)])
    wait_for((tmp_path / "at").exists)
    trial.stop.touch()
    wait_for(lambda: trial.heartbeat.exists() or phase == "exit")
    time.sleep(4 * POLL_SECONDS)
    (tmp_path / "at.go").touch()
    stopped = ExitCode.DONE if phase in ("load", "exit") else ExitCode.STOPPED
    assert tasks.wait() == [stopped] * 2
    assert trial.attempts()[-1]["cause"] == stopped.cause
    assert not tasks.requeued


def test_a_step_longer_than_the_wait_for_dead_ranks_is_saved_after_term(
    server: ForkServer, new_trial: Callable[..., TrialDir], tmp_path: Path
) -> None:
    """Both ranks are alive, so the signal is a preemption, and the grace period counts."""
    trial = new_trial(**{"optim.steps": 400, "runtime.grace_seconds": 240.0})
    place, skip = PLACES["step"]
    kill_wait = 6.0
    seconds = kill_wait / 2 + 1
    markers = [tmp_path / f"struck-{rank}" for rank in range(2)]
    faults: list[Fault] = []
    for rank, marker in enumerate(markers):
        faults.append(Fault(place, rank, "sleep", str(marker), seconds=seconds, times=1, skip=skip))
    tasks = SlurmTasks(server, trial, faults, kill_wait)
    try:
        wait_for(lambda: all(marker.exists() for marker in markers))
        tasks.kill(signal.SIGTERM)
        wait_for(lambda: tasks.over(0))
        record = trial.attempts()[-1]
        assert record["cause"] == "preempted", tasks.log.read_text()
        assert record["end_step"] == trial.committed()[-1] > skip
        assert tasks.requeued
    finally:
        tasks.kill(signal.SIGKILL)
