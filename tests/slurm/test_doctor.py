"""`jepa doctor` on clusters that are not as their profile says: each fault is named, and what to do about it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.login_node import LoginNode
from testcluster import Cluster

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path) -> LoginNode:
    return LoginNode(cluster, tmp_path, stub=False)


@pytest.fixture
def doctor(login: LoginNode) -> Iterator[Doctor]:
    """doctor('--node', partition='nowhere') -> checks by name, with these lines of the profile changed."""

    def examine(*words: str, env: dict[str, str] | None = None, **lines: object) -> dict[str, Any]:
        kept = [x for x in login.cluster.profile.read_text().splitlines() if x.split(":")[0] not in lines]
        profile = login.folder / "changed.yaml"
        profile.write_text("\n".join([*kept, *(f"{k}: {json.dumps(v)}" for k, v in lines.items())]))
        told = login.jepa("doctor", "--cluster", str(profile), "--json", *words, check=False, **(env or {}))
        return {c["what"]: c for c in json.loads(told)}

    yield examine
    assert not list(login.root.path.glob(".doctor-*")), "it leaves nothing behind"


def wrong(checks: dict[str, Any]) -> set[str]:
    """Those that failed, but for the two that speak of this machine's disk."""
    assert all(c["hint"] for c in checks.values() if not c["ok"]), "whatever is wrong comes with what to do"
    return {name for name, c in checks.items() if not c["ok"]} - {"free disk", "root"}


def test_a_cluster_as_its_profile_says_passes_and_a_node_confirms_it(doctor: Doctor, login: LoginNode) -> None:
    """--node: one job finds the root, the clock, Python, USR2 and the requeue in order, and is gone afterwards."""
    checks = doctor("--node")
    assert not wrong(checks) and checks["root"]["ok"], checks
    for what in ("shared filesystem", "clock of a node", "Python of a node", "USR2 of a node", "requeue of a node"):
        assert checks[what]["ok"] and not checks[what]["hint"], checks[what]
    assert "no sacct" in checks["accounting"]["found"] and checks["accounting"]["hint"]
    assert not login.cluster.run("squeue", "-h", "-t", "PENDING,RUNNING")


def test_a_profile_that_asks_for_what_the_cluster_has_not_is_told_line_by_line(doctor: Doctor) -> None:
    """Partition, time, GPUs, CPUs, the lead time of the signal."""
    nowhere = doctor(partition="nowhere")
    assert wrong(nowhere) == {"partition", "a trial would start"} and "low" in nowhere["partition"]["hint"], nowhere
    checks = doctor(time="9d", gpus_per_node=16, procs_per_node=16, cpus_per_proc=64, signal_seconds=20)
    named = {"time", "GPUs of a node", "CPUs of a node", "time limit", "a trial would start"}
    assert wrong(checks) == named, checks


def test_a_cluster_that_cuts_arrays_to_nothing_or_disables_requeue_is_told(doctor: Doctor, login: LoginNode) -> None:
    """MaxArraySize=1, JobRequeue=0, preemption with USR2 and a grace shorter than trials count on; and fake GPUs that
    the profile takes for real ones."""
    login.cluster.reconfigure(max_array=1, requeue=False, preempt_user_signal=True, grace=10)
    try:
        checks = doctor("--node", runtime={"grace_seconds": 30})
    finally:
        login.cluster.reconfigure(max_array=1001, requeue=True, preempt_user_signal=False, grace=20)
    assert wrong(checks) == {"MaxArraySize", "GPUs torch sees"}, checks
    assert "--node" in checks["requeue"]["hint"] and checks["requeue of a node"]["ok"], "our jobs ask for it themselves"
    assert "USR2" in checks["preemption"]["found"] and "grace_seconds: 10" in checks["preemption"]["hint"]


def test_a_node_with_a_wrong_clock_without_python_or_signals_is_told(doctor: Doctor) -> None:
    """What the profile's set-up lines do to a job, they do to the doctor's job."""
    late = 'date() { command date -d "-1 hour" "$@"; }'
    deaf = "trap '' USR2; trap() { :; }"
    checks = doctor("--node", python="/no/python", setup=[late, deaf])
    assert wrong(checks) == {"clock of a node", "Python of a node", "USR2 of a node"}, checks
    assert "-360" in checks["clock of a node"]["found"]


def test_a_root_that_nodes_do_not_see_is_told(doctor: Doctor, login: LoginNode) -> None:
    """Something else is mounted over it there; without namespaces of their own, nodes are told to look elsewhere."""
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
    """A shell whose PATH has Python only."""
    told = subprocess.run(
        [sys.executable, "-m", "jepa_cluster", "doctor", "--json", "--cluster", str(login.cluster.profile)],
        env={**login.environment(), "PATH": "/nowhere"}, cwd=login.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    checks = {c["what"]: c for c in json.loads(told.stdout)}
    assert told.returncode == 1 and "sbatch" in checks["Slurm's programs"]["found"]
