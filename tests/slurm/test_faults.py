"""What people do around a submission, with stubs in place of the trainer: real Slurm, the real command line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import SMALL, STEPS, TINY, Desk, causes, every_step_once, orders, stub_sweep
from testcluster import Cluster


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Iterator[Desk]:
    """A desk whose trials are stubs of 30 steps that wait at the fifth."""
    found = Desk(cluster, tmp_path, stub=True)
    orders(found, hold=5)
    yield found
    assert not (found.root.path / "twice").exists(), "two attempts of one trial trained at the same time"


@pytest.mark.parametrize("moment", ["_sbatch", "_record"])
def test_a_crash_while_submitting_neither_doubles_nor_orphans(desk: Desk, moment: str) -> None:
    """The submitter dies before sbatch, or after it and before its record; the next submit puts it right."""
    file, before = stub_sweep(desk, "crash", seeds=2), desk.cluster.jobs()
    dying = f"import os, jepa_cluster.launch.submit as s; s.{moment} = lambda *a, **k: os._exit(9)"
    command = f"{dying}; from jepa_cluster import cli; cli.main(['submit', '{file}', '--yes'])"
    desk.cluster.run(sys.executable, "-c", command, check=False, cwd=desk.folder, env=desk.environment())
    trials = desk.submit(file)
    desk.release()
    desk.wait_done(trials)
    assert all(causes(t) == ["done"] and every_step_once(t) for t in trials), desk.evidence()
    assert len(desk.arrays("crash")) == 1 and len(desk.cluster.jobs()) - len(before) == 2


def test_two_people_submitting_one_sweep_hand_every_trial_over_once(desk: Desk) -> None:
    """Both at the same moment; a third submit finds nothing to do."""
    file = stub_sweep(desk, "rush", seeds=3)
    words = [sys.executable, "-m", "jepa_cluster", "submit", str(file), "--yes"]
    environment = {**desk.cluster.env, **desk.environment()}
    both = [subprocess.Popen(words, cwd=desk.folder, env=environment) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    (array,) = desk.arrays("rush")
    trials = desk.trials("rush")
    assert array["trials"] == [t.name for t in trials]
    desk.release()
    desk.wait_done(trials)
    assert all(causes(t) == ["done"] for t in trials)


def test_a_sweep_longer_than_an_array_may_be_is_cut(desk: Desk) -> None:
    """MaxArraySize=3, which limits the index: five trials are arrays of three and two, and all run."""
    desk.cluster.reconfigure(max_array=3)
    try:
        trials = desk.submit(stub_sweep(desk, "wide", seeds=5))
        assert sorted(len(a["trials"]) for a in desk.arrays("wide")) == [2, 3]
        desk.release()
        desk.wait_done(trials)
        assert all(causes(t) == ["done"] for t in trials)
    finally:
        desk.cluster.clean()
        desk.cluster.reconfigure(max_array=1001)


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
