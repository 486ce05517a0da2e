"""Ask Slurm to run this job again, from one of its ranks.

In: a trial, this rank's `DistEnv` and the environment of the job. Out: a job that Slurm has
requeued and is about to kill, a chained job where Slurm refuses, or neither. Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from jepa_cluster.errors import JepaError, LaunchError
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.worker import chained_job, node_exclusion
from jepa_cluster.launch.worker.slurm_rank import launch_of
from jepa_cluster.training.preemption import SIGNALS
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_atomic

OURS_TO_REQUEUE = ("RUNNING", "SIGNALING")  # in any other state Slurm has already decided
# With `incomplete`, a job that the user cancelled meanwhile stays cancelled.
REQUEUE = ("scontrol", "requeue", "incomplete")
# How Slurm refuses a requeue for good.
NEVER = ("disabled", "Access/permission denied")

# Seconds from TERM to KILL where `submit` could not read it: Slurm's default.
KILL_WAIT = 30.0
# Share of it that the other ranks give the first one before they compete to request the requeue.
HEAD_START_SHARE = 1 / 6
# Seconds until the next rank may request it in place of one that is dead or got no answer.
TURN_SECONDS = 60.0
ANSWER_MARGIN = 10.0  # seconds before the end of its turn at which a rank stops asking
TURNS = 5
REQUEUE_SECONDS = 120.0  # in which a rank without a claim file repeats its request
RETRY_PAUSE = 2.0  # seconds between two requests
KILL_SECONDS = 300.0  # in which Slurm kills a job that it has requeued
ACCOUNTING_TRIES = 5  # one per second, until accounting knows how the job ends
STOP_TEXT = "cancelled in Slurm\n"
ACCEPTED, REFUSED = "accepted\n", "refused\n"  # content of a claim file once Slurm has answered


def kill_wait(env: Mapping[str, str]) -> float:
    """Return the seconds from TERM to KILL (KillWait), which `submit` has read for the job."""
    return float(env.get("JEPA_KILL_WAIT", KILL_WAIT))


def requeue_job(trial: TrialDir, launch: str, first: bool, files_work: bool = True) -> None:
    """Have one rank of the job ask Slurm for a requeue. Every rank calls this, before it ends.

    Returns when this process shall end. After an accepted request it waits to be killed, because
    Slurm takes a task that ends by itself for a result.

    first: this rank asks at once; normally rank 0. files_work: the ranks agree on one that asks by
    files in the trial. Otherwise the first rank asks, and the others only wait to be killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if files_work:
        requeue_from_one_rank(trial, launch, first)
    elif not first or request_requeue(trial, REQUEUE_SECONDS, files_work):
        sleep_until_killed()


def requeue_from_one_rank(trial: TrialDir, launch: str, first: bool) -> None:
    """Let the rank that creates the claim file of turn 0 ask Slurm.

    The others wait to be killed with the job.

    Ranks that are still alive after `TURN_SECONDS` compete for the file of turn 1, and so on for
    `TURNS` turns, so a rank that died or got no answer is replaced. The rank that got an answer
    writes it into its file, and the others act on it at the next turn. Where no file can be created
    (read-only or full disk), each rank asks, at a random time within the turn.

    launch: of this job and restart alone, the same on all ranks. first: the other ranks give this
    one a head start.
    """
    if not first:
        time.sleep(HEAD_START_SHARE * kill_wait(os.environ))
    for turn in range(TURNS):
        end = time.monotonic() + TURN_SECONDS
        claim = trial.requeue_claim(launch, turn)
        answer = _request_if_ours(trial, claim, first)
        if answer is None:
            time.sleep(max(0.0, end - time.monotonic()))
            answer = _recorded_answer(claim)
        if answer:
            sleep_until_killed()
        if answer is not None:
            return


def _request_if_ours(trial: TrialDir, claim: Path, first: bool) -> bool | None:
    """Ask Slurm if this rank creates the file, and record the answer in it.

    Returns None without an answer, and when it is another rank's turn.
    """
    created = False
    with contextlib.suppress(OSError):
        claim.parent.mkdir()
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        created = True
    except FileExistsError:
        return _recorded_answer(claim)
    except OSError as e:
        _print(f"{claim.name}: {e.strerror}; asking Slurm without it")
        if not first:
            time.sleep(random.uniform(0, TURN_SECONDS / 2))
    answer = request_requeue(trial, TURN_SECONDS - ANSWER_MARGIN)
    if created and answer is not None:
        with contextlib.suppress(OSError):
            claim.write_text(ACCEPTED if answer else REFUSED)
    return answer


def _recorded_answer(claim: Path) -> bool | None:
    """Return the recorded answer to another rank; None if there is none or it is unreadable."""
    try:
        return {ACCEPTED: True, REFUSED: False}.get(claim.read_text())
    except OSError:
        return None


def request_requeue(
    trial: TrialDir,
    patience: float,
    files_work: bool = True,
) -> bool | None:
    """Ask Slurm to requeue our own job, if Slurm still reports it running with our restart count.

    A job on a node that was suspended may run again elsewhere; its restart count differs then, and
    it is left alone. While the controller is down the request is repeated. Where scontrol is
    missing, requeues are disabled, or a preemption has cancelled the job (PreemptMode=CANCEL), a
    chained job is submitted instead, and this job shall end by itself.

    patience: seconds. files_work: the trial's files can be read. Returns True: accepted. False: it
    will not be requeued. None: Slurm did not answer.
    """
    job = slurm.own_job(os.environ)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            if _is_decided(trial, job):
                return False
            if files_work and node_exclusion.fail_start(trial, job, os.environ):
                return False
            if not shutil.which("scontrol") or not _requeue(job):
                chained_job.submit(trial, os.environ)
                return False
            node_exclusion.exclude(trial, job, launch_of(os.environ))
            return True
        except (JepaError, OSError) as e:
            _print(str(e).splitlines()[0])
            time.sleep(RETRY_PAUSE)
    _print(f"Slurm did not answer for {patience:.0f} s; job {job} is not requeued")
    return None


def _is_decided(trial: TrialDir, job: str) -> bool:
    """Return whether Slurm has already ended or requeued the job.

    A job that a preemption has cancelled gets a successor here.
    """
    if not shutil.which("squeue"):
        return False
    state, restarts = _state_and_restarts(job)
    ours = restarts == os.environ.get("SLURM_RESTART_COUNT", "0")
    if ours and state in OURS_TO_REQUEUE:
        return False
    # A job that a preemption has requeued has one restart more.
    if _end_of(trial, job, state) == "PREEMPTED" and ours:
        chained_job.submit(trial, os.environ)
    return True


def _state_and_restarts(job: str) -> tuple[str, str]:
    """Return what squeue says of the job. Raises LaunchError, SchedulerDown."""
    form = "--Format=State:20,RestartCnt:20"
    status = slurm.run_program("squeue", "--noheader", form, f"--jobs={job}").split()
    state, restarts = [*status, "unknown", ""][:2]
    return state, restarts


def _end_of(trial: TrialDir, job: str, state: str) -> str:
    """Return Slurm's word for the end of the job. Write STOP if a user cancelled it.

    Slurm soon forgets that.
    """
    end = ""
    for _ in range(ACCOUNTING_TRIES):
        end = slurm.end_state(job, state)
        if end.startswith("CANCELLED by"):
            write_atomic(trial.stop, STOP_TEXT)
        if end not in ("", "RUNNING"):
            break
        time.sleep(1)
    return end


def _requeue(job: str) -> bool:
    """Return False if Slurm refuses for good. Raises LaunchError, SchedulerDown otherwise."""
    try:
        slurm.run_program(*REQUEUE, job)
    except LaunchError as e:
        if any(word in e.what for word in NEVER):
            return False
        raise
    return True


def sleep_until_killed() -> None:
    end = time.monotonic() + KILL_SECONDS
    while time.monotonic() < end:
        time.sleep(1)


def _print(text: str) -> None:
    print(f"requeue: {text}", file=sys.stderr, flush=True)
