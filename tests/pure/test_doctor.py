"""Each line of `jepa doctor` fails when it should, and says what to do.

tests/slurm/test_doctor_on_slurm.py has those that a real cluster can make.
"""

from pathlib import Path

import pytest

from jepa_cluster.config import Runtime
from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.cluster.profile import Profile, load_profile
from jepa_cluster.launch.ops import doctor, node_check
from jepa_cluster.launch.ops.node_check import Check
from jepa_cluster.launch.ops.node_task import TaskReport
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit import quota
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.spool import now_ms

SLURM = Profile("slurm", nodes=1, procs_per_node=2, cpus_per_proc=2, mem_gb=8.0, gpus_per_node=2)
PARTITION = "PartitionName=low Default=YES GraceTime=20 Hidden=NO PreemptMode=REQUEUE"
PREEMPTED = {"PreemptType": "preempt/partition_prio", "KillWait": "10 sec"}


def assert_fails(
    check: Check,
    what: str,
    found: str,
) -> None:
    assert (check.what, check.ok) == (what, False)
    assert found in check.found
    assert check.hint


def test_nodes_that_submit_excludes_by_their_record_are_named_and_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The profile's request may be accepted with these nodes and refused without them."""
    root = Root(tmp_path)
    trial = root.trial("a")
    trial.path.mkdir(parents=True)
    for _ in range(2):
        number = trial.claim({"job_nodelist": "n3"})
        trial.end_attempt(number, {"cause": "hang", "ended": now_ms()})
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "usable_nodes", lambda partition: {"n1", "n2", "n3"})
    monkeypatch.setattr(slurm, "run_program", lambda *words: asked.append(words) or "")
    (starts,) = doctor._request(load_profile(Path("example")), root, node=False)
    assert starts.ok
    assert starts.found.endswith("without n3, see jepa nodes")
    assert "--exclude=n3" in asked[0]


# ---- this machine


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    root = Root(tmp_path / "file" / "root")
    assert_fails(doctor._root(root, SLURM, False), "root", "Not a directory")


def test_a_root_that_the_nodes_do_not_share_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A local queue may have it there."""
    monkeypatch.setattr(doctor, "_filesystem", lambda path: "ext4")
    assert_fails(doctor._root(Root(tmp_path), SLURM, False), "root", "on ext4")
    assert doctor._root(Root(tmp_path), Profile("local"), False).ok


def test_a_clock_that_differs_from_the_file_servers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    later = tmp_path.stat().st_mtime + 3600
    monkeypatch.setattr(doctor.time, "time", lambda: later)
    check = doctor._root(Root(tmp_path), SLURM, False)
    assert (check.what, check.ok) == ("clock", False)


@pytest.mark.parametrize(("free", "left"), [(1e9, None), (1e12, 1e9)])
def test_a_disk_or_a_quota_without_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, left: float | None
):
    monkeypatch.setattr(doctor, "free_bytes", lambda path: free)
    monkeypatch.setattr(quota, "bytes_left", lambda path: left)
    assert_fails(doctor._disk(Root(tmp_path)), "free disk", "1 GB")


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path):
    missing = Profile("slurm", runtime={"data_root": str(tmp_path)})
    assert_fails(doctor._data(missing), "data", "missing")


def test_packages_that_a_local_trial_lacks_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no_such_package"))
    assert_fails(doctor._packages(), "environment", "not here: no_such_package")


def test_a_trial_with_more_processes_than_slots_is_named():
    local = Profile("local", procs_per_node=3, slots=2)
    assert_fails(doctor._slots(local), "slots", "a trial takes 3")


# ---- the cluster


def signal_checks(
    root: Root,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Check]:
    """Return the checks of a cluster with GraceTime=20 after a save that took so many seconds."""
    trial = root.trial("vit_a")
    trial.path.mkdir(parents=True)
    trial.amend(trial.claim({"started": 1}), {"save_seconds": seconds} if seconds else {})
    monkeypatch.setattr(slurm, "run_program", lambda *words: PARTITION)
    profile = Profile("slurm", runtime={"grace_seconds": 20})
    return {check.what: check for check in doctor._signals(profile, root, PREEMPTED)}


def test_a_trial_that_counts_on_more_than_the_grace_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slurm, "run_program", lambda *words: PARTITION)
    checks = {c.what: c for c in doctor._signals(Profile("slurm"), Root(tmp_path), PREEMPTED)}
    assert_fails(checks["preemption"], "preemption", "KILL 20 s later (GraceTime of partition low)")
    assert f"{Runtime.grace_seconds:g} s" in checks["preemption"].found
    assert "grace_seconds: 20" in checks["preemption"].hint


def test_a_save_longer_than_the_grace_time_is_named_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The attempt that measured it still runs."""
    check = signal_checks(Root(tmp_path), 21.5, monkeypatch)["a save"]
    assert_fails(check, "a save", "the longest took 21.5 s, of vit_a; a preempted job has 20 s")
    assert "runtime.checkpoint_minutes" in check.hint


@pytest.mark.parametrize(
    ("seconds", "found"), [(19.5, "the longest took 19.5 s"), (0, "none was measured yet")]
)
def test_a_save_that_fits_or_that_is_unknown_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, found: str
):
    check = signal_checks(Root(tmp_path), seconds, monkeypatch)["a save"]
    assert check.ok
    assert found in check.found


def test_accounting_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: program)
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    check = doctor._accounting({"AccountingStorageType": "accounting_storage/slurmdbd"})
    assert_fails(check, "accounting", "sacct does not answer")


def test_a_full_limit_of_jobs_in_the_queue_is_named(monkeypatch: pytest.MonkeyPatch):
    """Without a QOS of the profile the default one counts, and not one that a trial never has."""
    limits = "MaxSubmitJobs=9(1) GrpSubmitJobs=N(3)\n"

    def run(program: str, *words: str) -> str:
        if program == "sacctmgr":
            return "here|lab|lab|scav||\n"
        return limits + ("MaxSubmitJobsPU=5(5)" if "qos=scav" in words else "MaxSubmitJobsPU=2(2)")

    monkeypatch.setattr(slurm, "run_program", run)
    check = doctor._submit_limit(SLURM, {"ClusterName": "here"})
    assert_fails(check, "MaxSubmitJobs", "5, 5 of them used")


def test_without_sacctmgr_the_limits_of_the_user_are_read(monkeypatch: pytest.MonkeyPatch):
    def run(program: str, *words: str) -> str:
        if program == "sacctmgr":
            raise SchedulerDown("sacctmgr is not installed here")
        return "MaxSubmitJobs=9(9)\n"

    monkeypatch.setattr(slurm, "run_program", run)
    assert_fails(doctor._submit_limit(SLURM, {}), "MaxSubmitJobs", "9, 9 of them used")


def test_a_request_that_slurm_refuses_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(*words: str) -> str:
        raise LaunchError("sbatch: Requested node configuration is not available")

    monkeypatch.setattr(slurm, "run_program", refuse)
    check = doctor._test_only(SLURM, ())
    assert_fails(check, "a trial would start", "node configuration")


def test_a_controller_that_is_down_ends_the_checks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def down(*words: str) -> str:
        raise SchedulerDown("scontrol did not answer", hint="try again later")

    monkeypatch.setattr(doctor.shutil, "which", lambda program: program)
    monkeypatch.setattr(slurm, "run_program", down)
    *_, last = doctor.run_checks(SLURM, Root(tmp_path))
    assert_fails(last, "Slurm answers", "did not answer")


# ---- a node


def test_a_job_that_does_not_start_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(node_check, "PENDING_TIMEOUT", 0.0)
    monkeypatch.setattr(slurm, "run_program", lambda *words: "PENDING|Resources|")
    (check,) = node_check._check_start(SLURM, Root(tmp_path), "7", tmp_path)
    assert_fails(check, "a node", "waits for free nodes")


def test_a_node_that_refuses_requeues_or_signals_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Python does not start there either, so no task is compared with the profile."""

    def refuse(*words: str) -> str:
        raise LaunchError("scontrol: Requested operation is presently disabled")

    monkeypatch.setattr(node_check, "SIGNAL_TIMEOUT", 0.0)
    monkeypatch.setattr(slurm, "signal", lambda ids, name: None)
    monkeypatch.setattr(slurm, "run_program", refuse)
    facts = {"clock": "0", "node": "n1", "scontrol": "/bin/scontrol", "python": "not found"}
    for name, text in facts.items():
        (tmp_path / name).write_text(text)
    checks = list(node_check._check_node(SLURM, Root(tmp_path), "7", tmp_path))
    named = {check.what: check for check in checks if not check.ok}
    assert_fails(named["requeue of a node"], "requeue of a node", "presently disabled")
    assert_fails(named["USR2 of a node"], "USR2 of a node", "does not reach")
    assert_fails(named["Python of a node"], "Python of a node", "not found")
    assert_fails(named["clock of a node"], "clock of a node", "s from the filesystem's")


HEALTHY: TaskReport = {
    "node": "n1",
    "cores": 2,
    "memory_gb": 8.0,
    "blocked": True,
    "interface": "eth0",
    "gpus": 2,
    "gb_per_s": 1.0,
    "error": "",
}


def test_two_healthy_tasks_are_what_a_trial_asks_for():
    checks = list(node_check._check_tasks(SLURM, [HEALTHY, HEALTHY]))
    assert [check.what for check in checks if not check.ok] == []
    assert len(checks) == 7


@pytest.mark.parametrize(
    ("what", "fault", "found"),
    [
        ("cores of a task", {"cores": 1}, "1, the profile asks for 2"),
        ("memory of a node", {"memory_gb": 4.0}, "4 GB, the profile asks for 8.0"),
        ("signals at the start", {"blocked": False}, "USR2 and TERM"),
        ("interface", {"interface": "", "node": "n2"}, "no route to rank 0 from n2"),
        ("all-reduce", {"error": "RuntimeError: timed out"}, "timed out"),
        ("all-reduce", {"gb_per_s": 0.002}, "0.002 GB/s"),
        ("GPUs torch sees", {"gpus": 0}, "0, a trial takes 2"),
    ],
)
def test_one_faulty_task_fails_its_line_and_no_other(
    what: str, fault: dict[str, object], found: str
):
    checks = node_check._check_tasks(SLURM, [HEALTHY, {**HEALTHY, **fault}])
    (failed,) = [check for check in checks if not check.ok]
    assert_fails(failed, what, found)


@pytest.mark.parametrize("tasks", [[], [HEALTHY]])
def test_a_task_that_did_not_report_is_named(tasks: list[TaskReport]):
    check, *rest = node_check._check_tasks(SLURM, tasks)
    assert_fails(check, "tasks", f"{len(tasks)} of 2")
    assert all(other.ok for other in rest)
