"""Faults that take Slurm a while to notice, each on a private cluster of its own, all at once in the background.

A function here is the body of the test of the same name in test_waiting.py; conftest starts those that were selected.
"""

from pathlib import Path

from desk import Desk, causes, every_step_once, orders, stub_sweep
from testcluster import Cluster


def a_trial_longer_than_its_time_limit_pauses_and_goes_on(cluster: Cluster, folder: Path) -> None:
    """USR2 ahead of the limit of one minute, checkpoint, requeue, done in the next allocation."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=1.5)
    profile = cluster.profile.read_text().replace("signal_seconds: 30", "signal_seconds: 45")
    (folder / "short.yaml").write_text(profile)
    file = stub_sweep(desk, "long", "{nodes: 1, procs_per_node: 2, time: 1m}")
    (trial,) = desk.submit(file, "--cluster", str(folder / "short.yaml"))
    desk.wait_done([trial], 240)
    assert set(causes(trial)[:-1]) == {"preempted"} and every_step_once(trial), desk.evidence()


def a_power_cut_costs_only_the_unsaved_steps(cluster: Cluster, folder: Path) -> None:
    """The node of rank 0 and of the batch script goes dark; Slurm notices and requeues; the trial ends well."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.3)
    (trial,) = desk.submit(stub_sweep(desk, "dark", "{nodes: 2, procs_per_node: 1, time: 10m}"))
    desk.wait_step(trial, 5)
    cluster.power_cut("n1")
    desk.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    assert desk.states("dark") != {trial.name: "done"}
    cluster.boot("n1")
    desk.wait_done([trial], 240)
    assert causes(trial) == [None, "done"] and every_step_once(trial), desk.evidence()


def a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(cluster: Cluster, folder: Path) -> None:
    """The node hangs with the trial on it and comes back while the next attempt works: the fence holds."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.3)
    (trial,) = desk.submit(stub_sweep(desk, "ice", "{nodes: 1, procs_per_node: 1, time: 10m}"))
    desk.wait_step(trial, 5)
    cluster.freeze("n1")
    (trial.path / "alone").unlink()  # the frozen process cannot give its lock back, and it trains nothing meanwhile
    desk.wait_step(trial, 2, attempt=2, seconds=120)
    cluster.thaw("n1")
    desk.wait_done([trial], 240)
    assert every_step_once(trial) and causes(trial)[1] == "done", desk.evidence()


def preemption_by_term_alone_saves_and_comes_back(cluster: Cluster, folder: Path) -> None:
    """A stock cluster: TERM, the grace period, KILL."""
    pushed(cluster, folder)


def preemption_that_sends_the_user_signal_first_saves_and_comes_back(cluster: Cluster, folder: Path) -> None:
    """A cluster with preempt_send_user_signal: USR2 first."""
    cluster.reconfigure(preempt_user_signal=True)
    pushed(cluster, folder)


def pushed(cluster: Cluster, folder: Path) -> None:
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.3)
    (trial,) = desk.submit(stub_sweep(desk, "pushed", "{nodes: 2, procs_per_node: 2, time: 10m}"))
    desk.wait_step(trial, 3)
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    desk.wait_done([trial], 240)
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), desk.evidence()
