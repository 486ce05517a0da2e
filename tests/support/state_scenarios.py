"""Ends and waits that Slurm reports late or not at all.

Each function is the body of the test of its name in test_slow_faults.py.
"""

import os
import signal
import time
from pathlib import Path

from processes import signal_all
from support.login_node import HOLD, LoginNode, assert_ended, orders, stub_sweep
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

FORGETFUL = 2  # s after which slurmctld forgets a job that has ended
SEEN = 20  # the same, so that `status` sees the word of a cancelled job on a busy machine


def states(login: LoginNode, sweep: str) -> list[str]:
    return [row["state"] for row in login.status(sweep)["trials"]]


def forget(login: LoginNode, *jobs: str) -> None:
    """Wait until slurmctld, which has no accounting, knows nothing of these jobs."""
    login.wait(lambda: not login.cluster.jobs().keys() & {*jobs}, "slurmctld has forgotten them")


def silence(trial: TrialDir) -> None:
    """Make the heartbeat of a trial older than the limit."""
    long_ago = time.time() - 200
    os.utime(trial.heartbeat, (long_ago, long_ago))


def what_slurm_has_forgotten_runs_again_unless_it_was_cancelled(
    cluster: Cluster, folder: Path
) -> None:
    """A killed trial, and one that was cancelled while it waited, both gone from squeue."""
    cluster.reconfigure(min_job_age=FORGETFUL)
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "forgotten", seeds=2, more="limits: {gpus_in_flight: 1}")
    killed, cancelled = login.submit(file)
    login.wait_step(killed, HOLD)
    jobs = [login.job("forgotten", trial) for trial in (cancelled, killed)]
    login.scancel(jobs[0])
    signal_all(signal.SIGKILL, login.ranks())
    forget(login, *jobs)
    silence(killed)
    assert states(login, "forgotten") == ["interrupted", "stopped"]
    login.release()
    assert "jepa resume forgotten state=stopped" in login.jepa("submit", str(file), "--yes")
    login.wait_done([killed])
    assert states(login, "forgotten") == ["done", "stopped"]
    assert cancelled.stop.exists()
    assert not cancelled.attempts()


def a_resumed_trial_that_is_requeued_and_lost_is_interrupted(
    cluster: Cluster, folder: Path
) -> None:
    """Its first job was cancelled, which the older record still says; the newer one is silent."""
    cluster.reconfigure(min_job_age=SEEN)
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "twice")
    (trial,) = login.submit(file)
    login.wait_step(trial, HOLD)
    first = login.job("twice", trial)
    login.scancel(first)
    login.wait(lambda: states(login, "twice") == ["stopped"], "it is stopped")
    login.jepa("resume", "twice", "--yes")
    login.wait_step(trial, HOLD, attempt=2)
    second = login.job("twice", trial)
    assert second != first
    cluster.run("scontrol", "requeue", second)
    login.wait_step(trial, HOLD, attempt=3)
    signal_all(signal.SIGKILL, login.ranks(job=second))
    forget(login, first, second)
    silence(trial)
    assert states(login, "twice") == ["interrupted"]
    login.release()
    login.submit(file)
    login.wait_done([trial])
    assert_ended(login, trial, ["preempted", "preempted", "unknown", "done"])


def a_preemption_that_suspends_a_trial_ends_no_attempt(cluster: Cluster, folder: Path) -> None:
    """SUSPEND and GANG: the job waits in memory, and continues where it was."""
    cluster.reconfigure(preempt_mode="SUSPEND")
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "paused", "{nodes: 2, procs_per_node: 2, time: 10m}")
    (trial,) = login.submit(file)
    login.wait_step(trial, HOLD)
    job = login.job("paused", trial)
    urgent = ("sbatch", "--parsable", "-p", "high", "-N2", "-c16", "--wrap", "sleep 600")
    other = cluster.run(*urgent, cwd=folder).strip()
    login.wait(lambda: cluster.jobs()[job] == "SUSPENDED", "it is suspended")
    (row,) = login.status("paused")["trials"]
    assert row["state"] == "running"
    assert "suspended" in row["note"]
    silence(trial)
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    time.sleep(5)  # longer than the limit of the stub's watchdog
    login.release()
    login.scancel(other)
    login.wait_done([trial])
    assert_ended(login, trial, ["done"])
