"""What a cluster and its people do to jobs, with stubs in place of the trainer: real Slurm, the real command line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import SMALL, STEPS, TINY, Desk, causes, every_step_once, leaked, orders, stub_sweep
from testcluster import Cluster

from jepa_cluster.trial import spool


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Iterator[Desk]:
    """A desk whose trials are stubs of 30 steps in nine seconds."""
    found = Desk(cluster, tmp_path, stub=True)
    orders(found, seconds=0.3)
    yield found
    assert not (found.root.path / "twice").exists(), "two attempts of one trial trained at the same time"


def test_a_night_of_signals_requeues_and_cancels_ends_as_it_should(desk: Desk) -> None:
    """Nine trials, one fate each; the controller restarts in between; the submitting shell was inside an allocation."""
    orders(desk, seconds=0.3, **{"2": "slow", "3": "slow", "4": "error", "5": "slow"})
    night = stub_sweep(desk, "night", seeds=9, more="limits: {gpus_in_flight: 8}")
    calm, requeued, cancelled, racing, wrong, stopped, usr2, last, pending = desk.submit(night, **leaked())
    for trial in (calm, requeued, cancelled, racing, stopped, usr2, last):
        desk.wait_step(trial, 1)
    desk.cluster.run("scancel", desk.job("night", pending))
    desk.cluster.run("scancel", "-s", "USR2", desk.job("night", usr2), desk.job("night", last))
    desk.cluster.run("scontrol", "requeue", desk.job("night", requeued))
    desk.cluster.run("scancel", desk.job("night", cancelled))
    desk.cluster.run("scancel", "-s", "USR2", desk.job("night", racing))
    desk.cluster.run("scancel", desk.job("night", racing))
    desk.jepa("cancel", "night", "seed=5", "--yes")
    desk.cluster.restart_controller()
    desk.wait_done([calm, usr2, last, requeued])
    assert causes(calm) == ["done"], "a neighbour's requeue left it alone"
    assert causes(usr2) == causes(last) == ["preempted", "done"]
    for trial in (calm, usr2, last, requeued):
        assert every_step_once(trial), desk.evidence()
    assert {row.attempt for row in spool.read(usr2).rows} == {1, 2}, "the second attempt went on where the first ended"
    assert causes(wrong) == ["error"] and "a bug of the user's" in wrong.failed.read_text()
    desk.wait(lambda: not desk.cluster.run("squeue", "-h"), "nothing is left in the queue")
    for trial in (cancelled, racing, stopped):
        assert not trial.done.exists() and len(trial.attempts()) == 1, desk.evidence()
    assert not pending.attempts()


@pytest.mark.parametrize("moment", ["_sbatch", "_record"])
def test_a_crash_while_submitting_neither_doubles_nor_orphans(desk: Desk, moment: str) -> None:
    """The submitter dies before sbatch, or after it and before its record; the next submit puts it right."""
    orders(desk, seconds=0.5)
    file, before = stub_sweep(desk, "crash", seeds=2), desk.cluster.jobs()
    dying = f"import os, jepa_cluster.launch.submit as s; s.{moment} = lambda *a, **k: os._exit(9)"
    command = f"{dying}; from jepa_cluster import cli; cli.main(['submit', '{file}', '--yes'])"
    desk.cluster.run(sys.executable, "-c", command, check=False, cwd=desk.folder, env=desk.environment())
    trials = desk.submit(file)
    desk.wait_done(trials)
    assert all(causes(t) == ["done"] and every_step_once(t) for t in trials), desk.evidence()
    assert len(desk.arrays("crash")) == 1 and len(desk.cluster.jobs()) - len(before) == 2


def test_two_people_submitting_one_sweep_hand_every_trial_over_once(desk: Desk) -> None:
    """Both at the same moment, on a cluster whose arrays may hold three tasks; a third submit finds nothing to do."""
    orders(desk, seconds=0.01)
    desk.cluster.reconfigure(max_array=3)
    file = stub_sweep(desk, "rush", seeds=5)
    words = [sys.executable, "-m", "jepa_cluster", "submit", str(file), "--yes"]
    environment = {**desk.cluster.env, **desk.environment()}
    both = [subprocess.Popen(words, cwd=desk.folder, env=environment) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    trials = desk.submit(file)
    assert sorted(len(a["trials"]) for a in desk.arrays("rush")) == [2, 3]
    desk.wait_done(trials)
    assert all(causes(t) == ["done"] for t in trials)
    assert set(desk.states("rush").values()) == {"done"}


def test_cool_down_branches_wait_for_their_trunks_whoever_submitted_them(desk: Desk) -> None:
    """Their array depends on the trunks'; a trunk that is in the queue already is found, and waited for, too."""
    orders(desk, seconds=0.01)
    fork = desk.sweep("fork", (*TINY, "optim=wsd"), f"fork: {{at: [10, {STEPS}]}}\nresources:\n  - {SMALL}")
    desk.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    branch, trunk = desk.submit(fork)
    for _ in range(2):
        job = desk.job("fork", branch)
        assert f"afterany:{desk.job('fork', trunk)}" in desk.cluster.run("squeue", "-h", "-o", "%E", "-j", job)
        desk.cluster.run("scancel", job)
        desk.wait(lambda: desk.states("fork")[branch.name] == "stopped", "the branch is cancelled")
        desk.jepa("resume", "fork", "0", "--yes")
    assert desk.states("fork") == {branch.name: "queued", trunk.name: "queued"}
    desk.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=resume")
    desk.wait_done([branch, trunk])
    assert branch.attempts()[0]["started"] > trunk.attempts()[0]["ended"]
