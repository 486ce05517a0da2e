"""Faults under the real trainer, over two nodes: the cost is measured, not guessed. Played as slurm_scenarios.py is."""

from pathlib import Path

from support.login_node import LoginNode, causes, every_step_once
from support.slurm_scenarios import PATIENCE, REAL
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.spool import read_lines

STEPS = 400
BASE = (*(b for b in REAL if "optim.steps" not in b), f"optim.steps={STEPS}", "runtime.checkpoint_minutes=0.02")


def begin(cluster: Cluster, folder: Path, name: str) -> tuple[LoginNode, TrialDir]:
    """A trial of one task on each of two nodes, some way behind its first commit."""
    login = LoginNode(cluster, folder, stub=False)
    (trial,) = login.submit(login.sweep(name, BASE, "resources:\n  - {nodes: 2, procs_per_node: 1, time: 20m}"))
    login.wait(trial.committed, "a checkpoint is committed", PATIENCE)
    login.wait_step(trial, trial.committed()[-1] + 5)
    return login, trial


def cost(trial: TrialDir) -> dict[str, float]:
    """What lay between the first attempt and the second: steps trained twice, seconds from a step to the next one."""
    before, after = ([r for r in read_lines(trial.metrics(n))[0] if r.get("step") and "event" not in r] for n in (1, 2))
    start = trial.attempts()[1]["start_step"]
    return {"steps": before[-1]["step"] - start, "seconds": (after[0]["t"] - before[-1]["t"]) / 1000, "start": start}


def a_power_cut_under_the_real_trainer(cluster: Cluster, folder: Path) -> dict[str, float]:
    """The node of rank 0 goes dark; the rank that is left says so, and the trial goes on from its newest commit.

    That rank has its job requeued before Slurm misses the node. When the node is back, this Slurm now and then refuses
    the job its first step ("Invalid generic resource") and calls it failed. Such a trial is interrupted, and submitting
    again is what a person, or cron, does about it.
    """
    login, trial = begin(cluster, folder, "cut")
    cluster.power_cut("n1")
    login.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    cluster.boot("n1")

    def finished() -> bool:
        if login.states("cut")[trial.name] == "interrupted":
            login.submit(login.folder / "cut.yaml")
        return trial.done.exists()

    login.wait(finished, "the trial is done", PATIENCE)
    login.wait_done([trial])
    assert causes(trial)[-1] == "done" and every_step_once(trial, STEPS), login.evidence()
    return cost(trial)


def preemption_by_the_high_partition_under_the_real_trainer(cluster: Cluster, folder: Path) -> dict[str, float]:
    """TERM, the grace period, KILL, and back when the other job is done."""
    login, trial = begin(cluster, folder, "term")
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    login.wait_done([trial], PATIENCE)
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial, STEPS), login.evidence()
    assert trial.attempts()[0]["end_step"] == trial.attempts()[1]["start_step"]
    return cost(trial)
