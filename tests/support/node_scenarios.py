"""Faults of nodes and a time limit; each function is the body of a test in test_slow_faults.py."""

import json
from pathlib import Path

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


def a_trial_longer_than_its_time_limit_is_requeued_and_resumes(
    cluster: Cluster, folder: Path
) -> None:
    """USR2 before the limit of one minute, checkpoint, requeue, done in the next allocation."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    profile = cluster.profile.read_text().replace("signal_seconds: 30", "signal_seconds: 45")
    (folder / "short.yaml").write_text(profile)
    file = stub_sweep(login, "long", "{nodes: 1, procs_per_node: 2, time: 1m}")
    (trial,) = login.submit(file, "--cluster", str(folder / "short.yaml"))
    login.wait(lambda: causes(trial)[:1] == ["preempted"], "Slurm has warned it of its limit")
    login.release()
    login.wait_done([trial])
    assert set(causes(trial)[:-1]) == {"preempted"}, login.evidence()
    assert every_step_once(trial), login.evidence()


def with_accounting_a_power_cut_costs_only_the_unsaved_steps(
    cluster: Cluster, folder: Path
) -> None:
    """The node of rank 0 and of the batch script loses power; Slurm requeues the job.

    No rank is left to write the end of the first attempt: `submit` writes it, by accounting.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "dark", "{nodes: 2, procs_per_node: 1, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.power_cut("n1")
    login.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    assert login.states("dark") != {trial.name: "done"}
    cluster.boot("n1")
    login.release()
    login.wait_done([trial])
    login.submit(folder / "dark.yaml")
    assert_ended(login, trial, ["node", "done"])


def a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(
    cluster: Cluster, folder: Path
) -> None:
    """The node is frozen and thaws while the next attempt runs: the fence holds.

    The old srun thaws too. Sometimes Slurm lets it cancel "its" step, which is the new attempt's by
    then. Such a trial is interrupted until it is submitted again.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "ice", "{nodes: 1, procs_per_node: 1, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.freeze("n1")
    # the frozen process cannot give its lock back, and it trains nothing meanwhile
    (trial.path / "alone").unlink()
    login.wait_step(trial, HOLD, attempt=2)
    cluster.thaw("n1")
    login.release()
    login.submit_until_done(trial, folder / "ice.yaml")
    assert every_step_once(trial), login.evidence()
    assert causes(trial)[-1] == "done", login.evidence()


def slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(
    cluster: Cluster, folder: Path
) -> None:
    """The tasks continue unknown to Slurm, which starts the job again on the other node."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "deaf"))
    login.wait_step(trial, HOLD)
    cluster.kill_slurmd("n1")
    # two attempts will live at once: the fence, not a lock, keeps the older one out
    (trial.path / "alone").unlink()
    login.wait_step(trial, HOLD, attempt=2)
    login.release()
    login.wait_done([trial])
    login.wait(lambda: len(login.ranks()) == 0, "the older attempt has gone too")
    assert causes(trial)[1] == "done", login.evidence()
    assert every_step_once(trial), login.evidence()


def a_node_that_breaks_its_trials_is_left_out_when_they_run_again(
    cluster: Cluster, folder: Path
) -> None:
    """Trials that fail on n1 run again without it, and later submissions exclude it."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, broken="n1")
    trials = login.submit(stub_sweep(login, "broken", seeds=2))
    login.wait_done(trials)
    for trial in trials:
        nodes = [record["job_nodelist"] for record in trial.attempts()]
        assert nodes == ["n1", "n2"], login.evidence()
        record = trial.attempts()[0]
        assert record["cause"] == "error"
        assert record["node"] == "n1"
        assert record["excluded"] == ["n1"]
        assert every_step_once(trial)
    assert json.loads(login.jepa("nodes", "--json"))["n1"]["score"] > 1.9
    assert len(login.arrays("broken")) == 1
    file = login.sweep("later", TINY, f"seeds: [9]\nresources:\n  - {SMALL}\n")
    (later,) = json.loads(login.jepa("submit", str(file), "--dry-run", "--json"))
    assert "#SBATCH --exclude=n1\n" in later["script"], "the ledger counts for what is submitted"


# Replaces training/self_test.py, which needs a GPU.
GPU_OF_N1_IS_BROKEN = """
import os, sys
from jepa_cluster.errors import SELF_TEST_FAILED
error = f"{SELF_TEST_FAILED}cuda:0 computes a wrong matrix product"
sys.exit(os.environ["SLURMD_NODENAME"] == "n1" and error)
"""


def a_node_that_fails_the_gpu_test_makes_no_attempt(cluster: Cluster, folder: Path) -> None:
    """Each trial goes to the other node; `why` and `nodes` show the start on the bad one."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (login.clone / "jepa_cluster/training/self_test.py").write_text(GPU_OF_N1_IS_BROKEN)
    file = login.sweep("gpu", [*TINY, "runtime.device=cuda"], f"resources:\n  - {SMALL}\n")
    (trial,) = login.submit(file)
    login.wait_step(trial, HOLD)
    (start,) = trial.ended_starts()
    assert start.get("cause") == "node", login.evidence()
    assert start.get("excluded") == ["n1"]
    (attempt,) = trial.attempts()
    assert attempt.get("job_nodelist") == "n2"
    (fault,) = json.loads(login.jepa("nodes", "--json"))["n1"]["faults"]
    assert fault["attempt"] == 0
    (why,) = json.loads(login.jepa("why", "gpu", "--json"))
    assert [each["attempt"] for each in why["tries"]] == [0, 1]
    login.release()
    login.wait_done([trial])
