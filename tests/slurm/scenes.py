"""Faults that take Slurm a while to notice, each on a private cluster of its own, all at once in the background.

A function here is the body of the test of the same name in test_waiting.py, but for `night`, whose end test_sweep.py
looks at. conftest starts those that were selected.
"""

import json
import random
import signal
import time
from pathlib import Path

from desk import Desk, causes, every_step_once, orders, stub_sweep
from processes import signal_all
from testcluster import Cluster

NIGHT_STEPS = 100
REAL = (
    "model=vit_ti", "model.patch=8", "model.image=48", "model.depth=2", "model.heads=2", "model.mlp_ratio=2.0",
    "predictor.width=16", "predictor.depth=2", "predictor.heads=2", "mask.targets=2", "data=synthetic",
    f"optim.steps={NIGHT_STEPS}", "optim.warmup_steps=4", "optim.batch=16", "optim.precision=fp32",
    "probe.images=100", "probe.test_images=64", "runtime.log_every=1", "runtime.compile=false",
)  # fmt: skip
AXES = """\
grid:
  model.width: [32, 48]
resources:
  - {when: model.width == 32, nodes: 2, procs_per_node: 2, time: 20m}
  - {nodes: 2, procs_per_node: 1, time: 20m}
"""
PATIENCE = 400  # s; a rank imports for a dozen CPU seconds before its first step


def night(cluster: Cluster, folder: Path) -> Desk:
    """Two real trials, over two nodes × two tasks and × one: one told USR2, one requeued by an administrator, while
    conf/ and the code they were submitted from are edited; until both are done."""
    desk = Desk(cluster, folder, stub=False)
    file = desk.sweep("night", REAL, AXES)
    warned, requeued = desk.submit(file)
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    (desk.clone / "jepa_cluster/training/train.py").write_text("raise SystemExit('edited while trials were queued')\n")
    (desk.clone / "conf/model/vit_ti.yaml").write_text("model: {name: edited}\n")
    desk.wait_step(requeued, 10, seconds=PATIENCE)
    cluster.run("scontrol", "requeue", desk.job("night", requeued))
    desk.wait_step(warned, 10, seconds=PATIENCE)
    cluster.run("scancel", "-s", "USR2", desk.job("night", warned), check=False)
    desk.wait_done([warned, requeued], PATIENCE)
    return desk


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
    """The node hangs with the trial on it and comes back while the next attempt works: the fence holds.

    The old srun thaws too, and now and then Slurm lets it cancel "its" step, which is the new attempt's by then. Such a
    trial is interrupted, and submitting again is what a person, or cron, does about it.
    """
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.3)
    (trial,) = desk.submit(stub_sweep(desk, "ice", "{nodes: 1, procs_per_node: 1, time: 10m}"))
    desk.wait_step(trial, 5)
    cluster.freeze("n1")
    (trial.path / "alone").unlink()  # the frozen process cannot give its lock back, and it trains nothing meanwhile
    desk.wait_step(trial, 2, attempt=2, seconds=120)
    cluster.thaw("n1")

    def finished() -> bool:
        if desk.states("ice")[trial.name] == "interrupted":
            desk.submit(desk.folder / "ice.yaml")
        return trial.done.exists()

    desk.wait(finished, "the trial is done")
    desk.wait_done([trial])
    assert every_step_once(trial) and causes(trial)[-1] == "done", desk.evidence()


def slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(cluster: Cluster, folder: Path) -> None:
    """The tasks run on behind Slurm's back while it gives the node up and starts the job again on the other one."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=2)
    (trial,) = desk.submit(stub_sweep(desk, "deaf"))
    desk.wait_step(trial, 2)
    cluster.kill_slurmd("n1")
    (trial.path / "alone").unlink()  # two attempts will live at once: the fence, not a lock, keeps the older one out
    desk.wait(lambda: trial.newest_attempt() == 2, "Slurm starts the job again", 240)
    desk.wait_done([trial], 240)
    assert causes(trial)[1] == "done" and every_step_once(trial), desk.evidence()


def a_trial_that_saved_while_the_controller_was_down_goes_back_to_the_queue_later(
    cluster: Cluster, folder: Path
) -> None:
    """USR2 with nobody there to take the requeue; `jepa status` says that Slurm does not answer, and loses nothing."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.5)
    (trial,) = desk.submit(stub_sweep(desk, "alone"))
    desk.wait_step(trial, 2)
    cluster.stop_controller()
    tasks = [p for p in cluster.members("n1") if b"submitit" in Path(f"/proc/{p}/cmdline").read_bytes()]
    signal_all(signal.SIGUSR2, tasks)
    desk.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    status = json.loads(desk.jepa("status", "alone", "--json"))
    assert status["problem"] and status["trials"][0]["state"] in ("running", "unknown"), status
    cluster.start_controller()
    desk.wait_done([trial], 240)
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), desk.evidence()


def with_accounting_a_cancelled_trial_stays_cancelled_until_somebody_resumes_it(cluster: Cluster, folder: Path) -> None:
    """scancel of a running and of a pending index: stopped in the status, left alone by submit, taken up by resume."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, seconds=0.3)
    file = stub_sweep(desk, "word", seeds=2, more="limits: {gpus_in_flight: 1}")
    running, pending = desk.submit(file)
    desk.wait_step(running, 2)
    cluster.run("scancel", desk.job("word", pending), desk.job("word", running))
    desk.wait(lambda: set(desk.states("word").values()) == {"stopped"}, "status says stopped", 60)
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    cluster.stop_accounting()
    assert set(desk.states("word").values()) <= {"stopped", "unknown"}, "slurmdbd is down: not forgotten"
    cluster.start_accounting()
    desk.jepa("resume", "word", "--yes")
    desk.wait_done([running, pending], 240)
    assert every_step_once(running) and every_step_once(pending), desk.evidence()


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


def a_sweep_under_random_faults_ends_complete(cluster: Cluster, folder: Path, faults: int = 9) -> None:
    """Signals, requeues, kill -9, power cuts, a restarted controller, drawn from a seed; `jepa submit` as from cron."""
    desk, dice = Desk(cluster, folder, stub=True), random.Random(faults)
    orders(desk, seconds=0.5)
    file = stub_sweep(desk, "storm", seeds=max(4, faults // 2))
    trials = desk.submit(file)
    for _ in range(faults):
        time.sleep(dice.uniform(1, 4))
        node, fault = dice.choice(cluster.nodes), dice.choice(["USR2", "requeue", "kill", "power", "controller"])
        running = [job for job, state in cluster.jobs().items() if state == "RUNNING"]
        tasks = [p for p in cluster.members(node) if b"submitit" in Path(f"/proc/{p}/cmdline").read_bytes()]
        if fault == "USR2" and running:
            cluster.run("scancel", "-s", "USR2", dice.choice(running), check=False)
        elif fault == "requeue" and running:
            cluster.run("scontrol", "requeue", dice.choice(running), check=False)
        elif fault == "kill" and tasks:
            signal_all(signal.SIGKILL, [dice.choice(tasks)])
        elif fault == "power":
            cluster.power_cut(node)
            cluster.boot(node)
        elif fault == "controller":
            cluster.restart_controller()

    def complete() -> bool:
        for node, state in cluster.node_states().items():
            if state.startswith(("down", "drain")):
                cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        desk.jepa("submit", str(file), "--yes", check=False)
        return all(trial.done.exists() for trial in trials)

    desk.wait(complete, "the sweep is complete", 600)
    assert all(every_step_once(trial) for trial in trials), desk.evidence()
    assert not (desk.root.path / "twice").exists(), "two attempts of one trial trained at the same time"
