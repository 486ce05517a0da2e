"""Requeues, cancellations and preemption; each function is the body of the test of its name.

The tests are in test_slow_faults.py and test_hydra_app.py.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

from processes import signal_all
from support.login_node import (
    HOLD,
    SMALL,
    TINY,
    LoginNode,
    assert_ended,
    causes,
    every_step_once,
    orders,
    stub_sweep,
)
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir


def a_trial_saved_while_the_controller_was_down_is_requeued_later(
    cluster: Cluster, folder: Path
) -> None:
    """USR2 while slurmctld is down: `jepa status` reports it, and nothing is lost."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "alone"))
    login.wait_step(trial, HOLD)
    cluster.stop_controller()
    signal_all(signal.SIGUSR2, login.ranks("n1"))
    login.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    status = login.status("alone")
    assert status["problem"], status
    assert status["trials"][0]["state"] in ("running", "unknown"), status
    checks = json.loads(login.jepa("doctor", "--json", check=False))
    remedies = [check["hint"] for check in checks if check["what"] == "Slurm answers"]
    assert remedies != [""], checks
    login.release()
    cluster.start_controller()
    login.wait_done([trial])
    assert_ended(login, trial, ["preempted", "done"])


def with_accounting_a_cancelled_trial_stays_cancelled_until_resume(
    cluster: Cluster, folder: Path
) -> None:
    """scancel of a running and of a pending index: stopped, left alone by submit, until resume.

    slurmdbd is stopped meanwhile, and a sweep that is submitted then runs nevertheless.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "word", seeds=2, more="limits: {gpus_in_flight: 1}")
    running, pending = login.submit(file)
    login.wait_step(running, HOLD)
    cluster.run("scancel", login.job("word", pending), login.job("word", running))
    both_stopped = {running.name: "stopped", pending.name: "stopped"}
    login.wait(lambda: login.states("word") == both_stopped, "both are stopped")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.release()
    cluster.stop_accounting()
    without = set(login.states("word").values())
    assert without <= {"stopped", "unknown"}, "slurmdbd is down: not forgotten"
    other = login.submit(login.sweep("blind", TINY, f"seeds: [7]\nresources:\n  - {SMALL}\n"))
    login.wait_done(other)
    assert set(login.states("blind").values()) == {"done"}
    cluster.start_accounting()
    login.jepa("resume", "word", "--yes")
    login.wait_done([running, pending])
    assert every_step_once(running), login.evidence()
    assert every_step_once(pending), login.evidence()


def requeue_is_disabled_and_the_trial_resumes_nevertheless(cluster: Cluster, folder: Path) -> None:
    """With JobRequeue=0 our jobs ask for the requeue themselves.

    Then an administrator forbids even that: the saved trial is interrupted, and `jepa submit`
    starts it again.
    """
    cluster.reconfigure(requeue=False)
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "refused")
    (trial,) = login.submit(file)
    login.wait_step(trial, HOLD)
    job = login.job("refused", trial)
    login.send_usr2(job)
    login.wait(lambda: trial.newest_attempt() == 2, "it is requeued because it asked for it")
    login.wait(lambda: cluster.jobs()[job] == "RUNNING", "Slurm reports it as running")
    cluster.run("scontrol", "update", f"jobid={job}", "requeue=0")
    login.send_usr2(job)
    login.wait(lambda: causes(trial) == ["preempted", "preempted"], "it has saved again")
    login.release()
    login.submit_until_done(trial, file)
    assert_ended(login, trial, ["preempted", "preempted", "done"])


def a_multirun_writes_trial_directories_resumes_and_reports_failures(
    cluster: Cluster, folder: Path
) -> None:
    """Hydra's own command line; three seeds: one undisturbed, one gets USR2, one fails."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, **{"2": "error"})
    multirun = start_multirun(login)

    def begun() -> bool:
        return len(list(login.root.trials.glob("*-s*/attempts/????.json"))) >= 3

    login.wait(lambda: begun() or multirun.poll() is not None, "three trials have begun")
    assert begun(), multirun.communicate()[0].decode()
    found: dict[int, TrialDir] = {}
    for path in login.root.trials.glob("*-s*"):
        seed = path.name.rsplit("-s", 1)[1].split("-")[0]
        found[int(seed)] = login.root.trial(path.name)
    login.wait_step(found[1], HOLD)
    (second,) = (job for job in cluster.jobs() if job.endswith("_1"))
    login.send_usr2(second)
    login.wait(lambda: causes(found[1])[:1] == ["preempted"], "it has saved")
    login.release()
    login.wait_done([found[0], found[1]])
    login.wait(lambda: multirun.poll() is not None, "the launcher has seen all jobs end")
    out = multirun.communicate()[0].decode()
    assert_ended(login, found[1], ["preempted", "done"])
    assert causes(found[2]) == ["error"]
    assert found[2].failed.exists()
    assert multirun.returncode != 0, out  # Hydra reports that one of its jobs failed
    states = cluster.jobs()
    assert any(job.endswith("_2") for job in states), states
    for job, state in states.items():
        expected = "FAILED" if job.endswith("_2") else "COMPLETED"
        assert state == expected, states
    resources = f"seeds: [0, 1]\nresources:\n  - {SMALL}\n"
    after = login.sweep("after", (*TINY, "runtime.compile=false"), resources)
    plan = json.loads(login.jepa("plan", str(after), "--json"))
    actions = {trial["name"]: trial["action"] for trial in plan["trials"]}
    same_trials = {found[0].name: "done", found[1].name: "done"}
    assert actions == same_trials, "a sweep of the same settings means the same trials"


def start_multirun(login: LoginNode) -> "subprocess.Popen[bytes]":
    """Start Hydra's multirun over three seeds with the Slurm launcher."""
    words = [
        sys.executable,
        "-m",
        "jepa_cluster",
        "-m",
        "hydra/launcher=slurm",
        "hydra.launcher.partition=low",
        "hydra.launcher.timeout_min=10",
        *TINY,
        "seed=0,1,2",
        "runtime.compile=false",
    ]
    return subprocess.Popen(
        words,
        cwd=login.folder,
        env={**login.cluster.env, **login.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def preemption_by_term_alone_saves_and_resumes(cluster: Cluster, folder: Path) -> None:
    """A default cluster sends TERM, waits for the grace period, sends KILL."""
    preempt(cluster, folder)


def preemption_that_sends_the_user_signal_first_saves_and_resumes(
    cluster: Cluster, folder: Path
) -> None:
    """A cluster with preempt_send_user_signal sends USR2 first."""
    cluster.reconfigure(preempt_user_signal=True)
    preempt(cluster, folder)


def with_accounting_a_preemption_that_cancels_its_job_leads_to_a_chained_job(
    cluster: Cluster, folder: Path
) -> None:
    """PreemptMode=CANCEL without a grace time: Slurm has ended the job when it sends TERM."""
    cluster.reconfigure(preempt_mode="CANCEL", grace=0)
    login = preempt(cluster, folder)
    first, chained = login.arrays("pushed")
    assert chained["succeeds"] == first["job"]


def preempt(cluster: Cluster, folder: Path) -> LoginNode:
    """Preempt a trial on two nodes by a job of the partition `high`."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "pushed", "{nodes: 2, procs_per_node: 2, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    login.wait(lambda: causes(trial)[:1] == ["preempted"], "it is preempted")
    login.release()
    login.wait_done([trial])
    assert_ended(login, trial, ["preempted", "done"])
    return login
