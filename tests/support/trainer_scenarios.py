"""Faults under the real trainer, over two nodes, with their measured cost.

conftest.py runs them as those of slurm_scenarios.py.
"""

import os
import signal
from pathlib import Path
from typing import Any

from support.login_node import LoginNode, assert_ended, causes, every_step_once
from support.slurm_scenarios import REAL
from testcluster import Cluster

from jepa_cluster.launch.scheduler import node_health
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.spool import read_lines

STEPS = 400
# Rank 0 waits in its first step for which the trial has a file `block`, once.
BLOCKED_STEPS = """

_set_lr_and_decay = set_lr_and_decay


def set_lr_and_decay(*arguments):
    import os
    import pathlib
    import time

    trials = pathlib.Path(ROOT).glob("trials/*/block")
    for block in trials:
        if os.environ["SLURM_PROCID"] == "0":
            block.rename(block.with_name("blocked"))
            time.sleep(3600)
    _set_lr_and_decay(*arguments)
"""
CHANGED = (f"optim.steps={STEPS}", "runtime.checkpoint_minutes=0.02")


def begin(
    cluster: Cluster, folder: Path, name: str, login: LoginNode | None = None
) -> tuple[LoginNode, TrialDir]:
    """Start a trial of one task on each of two nodes and wait until after its first commit."""
    login = login or LoginNode(cluster, folder, stub=False)
    base = [setting for setting in REAL if "optim.steps" not in setting]
    resources = "resources:\n  - {nodes: 2, procs_per_node: 1, time: 20m}"
    (trial,) = login.submit(login.sweep(name, [*base, *CHANGED], resources))
    login.wait(trial.committed, "a checkpoint is committed")
    login.wait_step(trial, trial.committed()[-1] + 5)
    return login, trial


def step_rows(trial: TrialDir, attempt: int) -> list[dict[str, Any]]:
    """The rows of an attempt's steps, without events and the probe of step 0."""
    rows, *_ = read_lines(trial.metrics(attempt))
    return [row for row in rows if row.get("step") and "event" not in row]


def cost(trial: TrialDir) -> dict[str, float]:
    """Return the steps trained twice and the seconds between the first two attempts."""
    last = step_rows(trial, 1)[-1]
    first = step_rows(trial, 2)[0]
    start = trial.attempts()[1]["start_step"]
    return {
        "steps": last["step"] - start,
        "seconds": (first["t"] - last["t"]) / 1000,
        "start": start,
    }


def a_power_cut_under_the_real_trainer(cluster: Cluster, folder: Path) -> dict[str, float]:
    """The node of rank 0 loses power; the other rank records it; the trial resumes.

    The other rank has its job requeued before Slurm notices the loss. When the node is back, this
    Slurm sometimes refuses the job its first step ("Invalid generic resource") and marks it failed.
    Such a trial is interrupted until it is submitted again.
    """
    login, trial = begin(cluster, folder, "cut")
    cluster.power_cut("n1")
    login.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    cluster.boot("n1")
    login.submit_until_done(trial, folder / "cut.yaml")
    assert causes(trial)[-1] == "done", login.evidence()
    assert every_step_once(trial, STEPS), login.evidence()
    return cost(trial)


def a_rank_that_is_killed_while_the_other_waits_for_it(
    cluster: Cluster, folder: Path
) -> dict[str, float]:
    """Rank 0's main thread is blocked, as by NCCL. srun sends TERM, and KILL after KillWait.

    KillWait is Slurm's default. A job whose rank gets that KILL ends as FAILED, and nothing
    requeues it.
    """
    cluster.reconfigure(kill_wait=30)
    login = LoginNode(cluster, folder, stub=False)
    with (login.clone / "jepa_cluster/training/sharded_adamw.py").open("a") as module:
        module.write(f"ROOT = {str(login.root.path)!r}\n{BLOCKED_STEPS}")
    login, trial = begin(cluster, folder, "blocked", login)
    (trial.path / "block").touch()
    login.wait((trial.path / "blocked").exists, "rank 0 waits")
    (rank,) = login.ranks(node="n2")
    os.kill(rank, signal.SIGKILL)
    login.wait_done([trial])
    (array,) = login.arrays("blocked")
    script = login.root.sweep("blocked").script(array["name"])
    assert "JEPA_KILL_WAIT=30" in script.read_text()
    assert "exit" in trial.attempts()[0], "a rank wrote the end"
    assert_ended(login, trial, ["lost", "done"], steps=STEPS)
    return cost(trial)


def preemption_by_the_high_partition_under_the_real_trainer(
    cluster: Cluster, folder: Path
) -> dict[str, float]:
    """TERM, the grace period, KILL; the trial runs again when the other job is done."""
    login, trial = begin(cluster, folder, "term")
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    login.wait_done([trial])
    assert_ended(login, trial, ["preempted", "done"], steps=STEPS)
    assert trial.attempts()[0]["end_step"] == trial.attempts()[1]["start_step"]
    return cost(trial)


def a_stopped_trial_continues_on_another_number_of_nodes(
    cluster: Cluster, folder: Path
) -> dict[str, float]:
    """As docs/howto/sweeps.md says: cancel, other `resources` in the sweep file, resume.

    Returns the largest relative difference of the losses from those of a trial that stayed.
    """
    (folder / "whole").mkdir()
    (folder / "whole" / "data").symlink_to(folder / "data")
    stayed, whole = begin(cluster, folder / "whole", "moved")
    stayed.wait_done([whole])
    login, trial = begin(cluster, folder, "moved")
    login.jepa("cancel", "moved", "--yes")
    login.wait(lambda: trial.attempts()[-1].get("ended"), "it is stopped")
    file = folder / "moved.yaml"
    file.write_text(
        file.read_text().replace("nodes: 2, procs_per_node: 1", "nodes: 1, procs_per_node: 2")
    )
    login.jepa("resume", str(file), "--yes")
    login.wait_done([trial])
    lists = [attempt["job_nodelist"] for attempt in trial.attempts()]
    assert [len(node_health.expand_node_list(nodes)) for nodes in lists] == [2, 1], lists
    assert every_step_once(trial, STEPS), login.evidence()
    expected = {row["step"]: row["loss"] for row in step_rows(whole, 1) if "loss" in row}
    rows = [row for row in step_rows(trial, 2) if "loss" in row]
    return {
        "start": trial.attempts()[1]["start_step"],
        "rows": len(rows),
        "difference": max(abs(row["loss"] / expected[row["step"]] - 1) for row in rows[:5]),
    }
