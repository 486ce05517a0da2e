"""`jepa doctor` names each fault of a cluster that differs from its profile, with a remedy."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials
from support.login_node import LoginNode
from testcluster import Cluster

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path) -> LoginNode:
    fake_trials.data_root(tmp_path / "data")
    return LoginNode(cluster, tmp_path, stub=False)


@pytest.fixture
def doctor(login: LoginNode) -> Iterator[Doctor]:
    yield examination(login)
    assert not list(login.root.path.glob(".doctor-*")), "it leaves nothing behind"


def examination(login: LoginNode) -> Doctor:
    """doctor('--node', partition='nowhere') -> checks by name, with a changed profile."""

    def examine(*words: str, env: dict[str, str] | None = None, **lines: object) -> dict[str, Any]:
        text = ""
        for line in login.cluster.profile.read_text().splitlines():
            if line.split(":")[0] not in lines:
                text += f"{line}\n"
        for name, value in lines.items():
            text += f"{name}: {json.dumps(value)}\n"
        profile = login.folder / "changed.yaml"
        profile.write_text(text)
        command = ("doctor", "--cluster", str(profile), "--json", *words)
        return by_name(login.jepa(*command, check=False, **(env or {})))

    return examine


def by_name(document: str) -> dict[str, Any]:
    """The checks of the command's document by their names."""
    return {check["what"]: check for check in json.loads(document)}


def wrong(checks: dict[str, Any]) -> set[str]:
    """Return the checks that failed, but for the two that depend on this machine's disk."""
    failed: set[str] = set()
    for name, check in checks.items():
        if not check["ok"]:
            assert check["hint"], f"{name} has no remedy"
            failed.add(name)
    return failed - {"free disk", "root"}


def test_a_cluster_as_its_profile_says_passes_and_a_node_confirms_it(
    doctor: Doctor, login: LoginNode
) -> None:
    """With --node one job checks the root, the clock, Python, USR2 and the requeue, and ends."""
    checks = doctor("--node")
    assert not wrong(checks), checks
    assert checks["root"]["ok"], checks
    for what in (
        "shared filesystem",
        "clock of a node",
        "Python of a node",
        "USR2 of a node",
        "requeue of a node",
        "tasks",
        "cores of a task",
        "memory of a node",
        "signals at the start",
        "interface",
        "all-reduce",
    ):
        assert checks[what]["ok"], checks[what]
        assert not checks[what]["hint"], checks[what]
    assert checks["tasks"]["found"] == "4 of 4 on n1, n2"
    assert "4 tasks on 2 nodes: " in checks["all-reduce"]["found"]
    assert "no sacct" in checks["accounting"]["found"]
    assert checks["accounting"]["hint"]
    assert not login.cluster.run("squeue", "-h", "-t", "PENDING,RUNNING")


def test_each_line_of_a_profile_that_the_cluster_cannot_meet_is_named(
    doctor: Doctor,
) -> None:
    """Partition, time, GPUs, CPUs, the lead time of the signal."""
    nowhere = doctor(partition="nowhere")
    assert wrong(nowhere) == {"partition", "a trial would start"}, nowhere
    assert "low" in nowhere["partition"]["hint"], nowhere
    checks = doctor(
        time="9d", gpus_per_node=16, procs_per_node=16, cpus_per_proc=64, signal_seconds=20
    )
    named = {"time", "GPUs of a node", "CPUs of a node", "time limit", "a trial would start"}
    assert wrong(checks) == named, checks


@pytest.mark.slow
def test_typed_gpus_memory_and_time_are_asked_for_as_slurm_takes_them(
    cluster_with_real_times: Cluster, tmp_path: Path
) -> None:
    """A100 GPUs, by gpu_type or by gres. KillWait is 30 s, GraceTime 60 s."""
    fake_trials.data_root(tmp_path / "data")
    doctor = examination(LoginNode(cluster_with_real_times, tmp_path, stub=False))
    request = {"nodes": 1, "mem_gb": 1.5, "time": "0-00:20:00", "sbatch": {"wckey": None}}
    for gpus in (
        {"gpus_per_node": 8, "gpu_type": "a100"},
        {"gpus_per_node": 0, "sbatch": {"gres": "gpu:a100:8", "wckey": None}},
    ):
        checks = doctor(**{**request, **gpus})
        assert not wrong(checks), checks
        assert "KILL 60 s later" in checks["preemption"]["found"]
    checks = doctor(**request, gpus_per_node=8, gpu_type="h100")
    assert wrong(checks) == {"GPUs of a node", "a trial would start"}, checks


@pytest.mark.slow
def test_a_node_that_binds_tasks_to_cores_gives_each_task_those_it_asks_for(
    cluster_with_affinity: Cluster, tmp_path: Path
) -> None:
    """task/affinity with TaskPluginParam=Cores: a task gets both cores, or one of them.

    `cpus-per-task: null` removes the option, as if the profile did not ask for its cores.
    """
    fake_trials.data_root(tmp_path / "data")
    doctor = examination(LoginNode(cluster_with_affinity, tmp_path, stub=False))
    both = {
        "procs_per_node": 1,
        "cpus_per_proc": 2,
    }
    checks = doctor("--node", **both)
    assert not wrong(checks), checks
    found = checks["cores of a task"]["found"]
    assert found == "2, the profile asks for 2"
    without = {"cpus-per-task": None}
    checks = doctor("--node", **both, sbatch=without)
    assert wrong(checks) == {"cores of a task"}, checks
    found = checks["cores of a task"]["found"]
    assert found == "1, the profile asks for 2"


def test_a_cluster_without_arrays_or_requeue_is_named(doctor: Doctor, login: LoginNode) -> None:
    """MaxArraySize=1, JobRequeue=0, preemption with USR2, a short grace period, fake GPUs."""
    login.cluster.reconfigure(max_array=1, requeue=False, preempt_user_signal=True, grace=10)
    try:
        one = {"nodes": 1, "procs_per_node": 1, "runtime": {"grace_seconds": 30}}
        checks = doctor("--node", **one)
    finally:
        login.cluster.reconfigure(max_array=1001, requeue=True, preempt_user_signal=False, grace=30)
    assert wrong(checks) == {"MaxArraySize", "preemption", "GPUs torch sees"}, checks
    assert checks["requeue of a node"]["ok"], "our jobs ask for it themselves"
    assert "USR2" in checks["preemption"]["found"]
    assert "grace_seconds: 10" in checks["preemption"]["hint"]


def test_a_node_with_a_wrong_clock_or_without_python_or_signals_is_named(doctor: Doctor) -> None:
    """The profile's set-up lines act on the doctor's job as on any job."""
    late = 'date() { command date -d "-1 hour" "$@"; }'
    deaf = "trap '' USR2; trap() { :; }"
    checks = doctor("--node", python="/no/python", setup=[late, deaf])
    assert wrong(checks) == {"clock of a node", "Python of a node", "USR2 of a node"}, checks
    assert "-360" in checks["clock of a node"]["found"]


def test_a_line_of_setup_that_fails_on_a_node_is_named(doctor: Doctor) -> None:
    checks = doctor("--node", setup=["true", "module load nothing"])
    assert wrong(checks) == {"setup of a node"}, checks
    assert "module load nothing" in checks["setup of a node"]["found"]


def test_a_root_that_nodes_do_not_see_is_named(doctor: Doctor, login: LoginNode) -> None:
    """Another filesystem is mounted over the root there.

    Without namespaces of their own, nodes fail to enter the folder instead.
    """
    login.root.path.mkdir(exist_ok=True)
    if not login.cluster.namespaces:
        elsewhere = ["cd() { false; }"]
        assert wrong(doctor("--node", setup=elsewhere)) == {"shared filesystem"}
        return
    for node in login.cluster.nodes:
        login.cluster.hide(node, login.root.path)
    try:
        assert wrong(doctor("--node")) == {"shared filesystem"}
    finally:
        for node in login.cluster.nodes:
            login.cluster.power_cut(node)


def test_a_machine_without_slurms_programs_names_them(login: LoginNode) -> None:
    """The PATH of the shell is empty."""
    command = [sys.executable, "-m", "jepa_cluster", "doctor", "--json", "--cluster"]
    done = subprocess.run(
        [*command, str(login.cluster.profile)],
        env={**login.environment(), "PATH": "/nowhere"},
        cwd=login.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    checks = by_name(done.stdout)
    assert done.returncode == 1
    assert "sbatch" in checks["Slurm's programs"]["found"]
