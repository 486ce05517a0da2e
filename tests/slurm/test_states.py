"""What Slurm says of trials, and their states: stub trials, real Slurm, the real command line.

test_status.py and test_facts.py of tests/pure have the table; here are the rows that Slurm prints.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import signal_all
from support.login_node import TINY, LoginNode, orders, stub_sweep
from testcluster import Cluster, ClusterError

CLASSES = """\
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
resources:
  - {when: seed < 2, nodes: 1, procs_per_node: 1, time: 10m}
  - {when: seed < 4, nodes: 1, procs_per_node: 1, time: 11m}
  - {when: seed < 6, nodes: 1, procs_per_node: 1, time: 12m}
  - {nodes: 1, procs_per_node: 1, time: 13m}
"""


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path) -> LoginNode:
    return node(cluster, tmp_path)


@pytest.fixture(scope="module")
def accounting(slurm: None) -> Iterator[Cluster]:
    """A private Slurm with slurmdbd."""
    with Cluster(nodes=2, cpus=16, gpus=8, grace=20, accounting=True) as cluster:
        yield cluster


def node(cluster: Cluster, folder: Path) -> LoginNode:
    found = LoginNode(cluster, folder, stub=True)
    orders(found, hold=5)
    return found


def in_order(login: LoginNode, sweep: str) -> list[str]:
    return [row["state"] for row in login.status(sweep)["trials"]]


def test_waiting_tasks_that_were_cancelled_stay_stopped_in_whatever_way(login: LoginNode) -> None:
    """Several ids, a bracket, a name; then one task whose array runs and ends.

    Slurm prints one row for an array that was cancelled as a whole, and none for a single task.
    """
    login.drain()
    file = login.sweep("away", TINY, CLASSES)
    trials = login.submit(file)
    ids, bracket, name, single = (array["job"] for array in login.arrays("away"))
    arrays = {array["job"]: array["name"] for array in login.arrays("away")}
    login.scancel(f"{ids}_0", f"{ids}_1")
    login.scancel(f"{bracket}_[0-1]")
    login.scancel("-n", arrays[name])
    login.scancel(f"{single}_0")
    assert in_order(login, "away") == ["stopped"] * 7 + ["queued"]
    exported = json.loads(login.jepa("export", "away", "--json"))
    assert [row["state"] for row in exported] == in_order(login, "away")
    assert json.loads(login.jepa("sync", "--json"))["states"] == {"stopped": 7, "queued": 1}
    login.undrain()
    login.release()
    login.wait_done(trials[7:])
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert "jepa resume away state=stopped" in login.jepa("submit", str(file), "--yes")
    assert in_order(login, "away") == ["stopped"] * 7 + ["done"]
    assert all(trial.stop.exists() for trial in trials[:7])
    assert len(login.arrays("away")) == 4


@pytest.mark.slow
def test_a_lost_queue_neither_starts_nor_stops_what_ran(
    accounting: Cluster, tmp_path: Path
) -> None:
    """slurmctld starts without its state: accounting says "CANCELLED", but not by whom.

    What ran is interrupted; what was cancelled before stays stopped.
    """
    login = node(accounting, tmp_path)
    file = stub_sweep(login, "cold", seeds=2)
    ran, cancelled = trials = login.submit(file)
    login.wait_step(ran, 5)
    login.wait_step(cancelled, 5)
    accounting.run("scancel", login.job("cold", cancelled))
    login.wait(lambda: in_order(login, "cold")[1] == "stopped", "it is stopped")
    accounting.stop_controller()
    for node_name in accounting.nodes:
        accounting.power_cut(node_name)
    for saved in (accounting.dir / "state").glob("*job*"):
        saved.unlink()
    accounting.start_controller()
    accounting.clean()
    heartbeat = time.time() - 200
    for trial in trials:
        age(trial.heartbeat, heartbeat)
    login.wait(
        lambda: in_order(login, "cold") == ["interrupted", "stopped"],
        "accounting knows the ends",
    )
    login.release()
    login.submit(file)
    login.wait_done([ran])
    assert in_order(login, "cold") == ["done", "stopped"]
    assert cancelled.stop.exists()


@pytest.mark.slow
def test_scancel_of_all_jobs_of_the_user_stops_them(login: LoginNode) -> None:
    """Slurm prints one row for all waiting tasks of an array, and one for the task that ran."""
    file = stub_sweep(login, "all", seeds=3, more="limits: {gpus_in_flight: 1}")
    trials = login.submit(file)
    login.wait_step(trials[0], 5)
    login.scancel("-u", login.cluster.user)
    login.wait(lambda: in_order(login, "all") == ["stopped"] * 3, "all are stopped")
    login.release()
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    assert in_order(login, "all") == ["stopped"] * 3
    assert not trials[1].attempts()
    assert len(login.arrays("all")) == 1
    login.jepa("resume", "all", "--yes")
    login.wait_done(trials)


@pytest.mark.slow
def test_a_spent_budget_of_gpu_minutes_holds_a_trial(
    cluster_with_gpu_limits: Cluster, tmp_path: Path
) -> None:
    """AssocGrpGRESMinutes: time does not cure it, so `watch` does not wait; a new budget does."""
    cluster = cluster_with_gpu_limits
    login = node(cluster, tmp_path)
    budget = ("sacctmgr", "-i", "modify", "user", cluster.user, "set")
    cluster.run(*budget, "grptresmins=gres/gpu=0")
    show = ("scontrol", "show", "assoc_mgr", "flags=assoc")
    cluster.until(lambda: "gres/gpu=0(" in cluster.run(*show), "the limit holds")
    file = stub_sweep(login, "spent")
    (trial,) = login.submit(file)
    job = login.job("spent", trial)
    reason = "AssocGrpGRESMinutes"
    login.wait(lambda: login.pending_reason(job) == reason, reason)
    (row,) = login.status("spent")["trials"]
    assert row["state"] == "queued"
    assert row["held"]
    assert "the budget of the account is spent" in row["note"]
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.jepa("watch", "spent", "--until-done", check=False)
    cluster.run(*budget, "grptresmins=gres/gpu=-1")
    login.release()
    login.wait_done([trial])


def age(path: Path, when: float) -> None:
    if path.exists():
        os.utime(path, (when, when))


@pytest.mark.slow
def test_a_scancel_of_a_running_trial_leaves_its_marker(
    accounting: Cluster, tmp_path: Path
) -> None:
    """The ending rank asks accounting, because squeue says COMPLETING."""
    login = node(accounting, tmp_path)
    (trial,) = login.submit(stub_sweep(login, "marked"))
    login.wait_step(trial, 5)
    accounting.run("scancel", login.job("marked", trial))
    login.wait(trial.stop.exists, "the rank has written STOP")
    assert trial.stop.read_text() == "cancelled in Slurm\n"
    login.wait(lambda: in_order(login, "marked") == ["stopped"], "it is stopped")


@pytest.mark.slow
def test_accounting_that_is_down_makes_no_trial_start_twice(
    accounting: Cluster, tmp_path: Path
) -> None:
    """slurmctld has forgotten the job, and slurmdbd is down: submit refuses, and repeats later."""
    login = node(accounting, tmp_path)
    file = stub_sweep(login, "deaf")
    (trial,) = login.submit(file)
    login.wait_step(trial, 5)
    job = login.job("deaf", trial)
    signal_all(signal.SIGKILL, login.ranks(job=job))
    login.wait(lambda: accounting.jobs()[job] == "FAILED", "it has ended")
    accounting.stop_accounting()
    accounting.stop_controller()
    for saved in (accounting.dir / "state").glob("*job*"):
        saved.unlink()
    accounting.start_controller()
    try:
        age(trial.heartbeat, time.time() - 200)
        assert in_order(login, "deaf") == ["unknown"]
        refused = login.jepa("submit", str(file), "--yes", check=False)
        assert "started" not in refused
        assert len(login.arrays("deaf")) == 1
    finally:
        accounting.start_accounting()


@pytest.mark.slow
def test_a_held_trial_says_what_to_type_and_watch_does_not_wait_for_it(login: LoginNode) -> None:
    """requeuehold of a running task, and a waiting one that a user holds."""
    file = stub_sweep(login, "kept", seeds=2)
    running, other = login.submit(file)
    login.wait_step(running, 5)
    login.wait_step(other, 5)
    job = login.job("kept", running)
    login.cluster.run("scontrol", "requeuehold", job)
    login.wait(lambda: login.status("kept")["trials"][0]["held"], "Slurm holds it")
    (row, _) = login.status("kept")["trials"]
    assert row["state"] == "queued"
    assert row["note"].endswith(f"scontrol release {job}")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.release()
    login.wait_done([other])
    login.jepa("watch", "kept", "--until-done", check=False)
    login.cluster.run("scontrol", "release", job)
    login.wait_done([running])


@pytest.mark.slow
def test_a_maintenance_is_named_with_its_end(login: LoginNode) -> None:
    """A job of ten minutes waits for it; a shorter one would start."""
    flags = ("user=root", "flags=maint,ignore_jobs", "nodes=ALL", "reservationname=care")
    times = ("starttime=now+5minutes", "duration=60")
    login.cluster.run("scontrol", "create", "reservation", *times, *flags)
    try:
        login.submit(stub_sweep(login, "care"))

        def note() -> str:
            return login.status("care")["trials"][0]["note"]

        login.wait(lambda: "maintenance until" in note(), "the reason is given")
        assert "a shorter time would start now" in note()
    finally:
        login.cluster.run("scancel", "-u", "root", check=False)
        login.cluster.run("scontrol", "delete", "reservationname=care")


@pytest.mark.slow
def test_a_trial_that_is_edited_out_is_listed_and_can_be_cancelled(login: LoginNode) -> None:
    """It runs on after a submit without it; `jepa cancel` selects it."""
    file = stub_sweep(login, "edited", seeds=2)
    kept, dropped = login.submit(file)
    login.wait_step(dropped, 5)
    stub_sweep(login, "edited", seeds=1)
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    rows = login.status("edited")["trials"]
    assert [row["name"] for row in rows] == [kept.name, dropped.name]
    assert rows[1]["note"].endswith("no longer asked for: jepa cancel")
    login.jepa("cancel", "edited", "1", "--yes")
    login.wait(lambda: in_order(login, "edited")[1] == "stopped", "it is stopped")
    login.release()
    login.wait_done([kept])
    assert not dropped.done.exists()


@pytest.mark.slow
def test_a_cluster_in_a_federation_is_refused_before_anything_is_submitted(
    accounting: Cluster, tmp_path: Path
) -> None:
    """Its jobs may run on another cluster; slurmdbd tells slurmctld of the federation."""
    login = node(accounting, tmp_path)
    name = accounting.run("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster").strip()
    accounting.run("sacctmgr", "-i", "add", "federation", "allied", f"clusters={name}")

    def federation() -> str:
        return accounting.run("scontrol", "show", "federation").strip()

    try:
        login.wait(lambda: "allied" in federation(), "slurmctld knows the federation")
        file = stub_sweep(login, "allied")
        with pytest.raises(ClusterError, match="this cluster is in the federation allied"):
            login.jepa("submit", str(file), "--yes")
        assert "allied" not in login.jepa("status")
        checks = json.loads(login.jepa("doctor", "--json", check=False))
        (found,) = [check for check in checks if check["what"] == "federation"]
        assert not found["ok"]
        assert found["found"] == "allied"
    finally:
        accounting.run("sacctmgr", "-i", "delete", "federation", "allied")
    login.wait(lambda: not federation(), "slurmctld is alone again")
    (trial,) = login.submit(file)
    login.release()
    login.wait_done([trial])
