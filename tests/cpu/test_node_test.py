"""The test of a node before an attempt is claimed: what a rank concludes from its self-test."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support import nodes
from support.fake_trials import config

from jepa_cluster.errors import (
    SELF_TEST_FAILED,
    ExitCode,
    FilesystemFault,
    LaunchError,
    NodeFault,
    TrialError,
)
from jepa_cluster.launch.cluster.job_name import JobName
from jepa_cluster.launch.scheduler import diagnosis, node_health
from jepa_cluster.launch.worker import node_test
from jepa_cluster.launch.worker.attempt_claim import socket_name
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json

ALONE = DistEnv(0, 1, 0, 1, "7.0")
TWO_NODES = tuple(DistEnv(rank, 2, 0, 1, "7.0", node=rank) for rank in range(2))


LATE_RANK_1 = """
import sys, time
import torch.distributed as dist
from jepa_cluster.training import self_test
wait = dist.FileStore.wait
def late(store, keys, *limit):
    if sys.argv[2] == "1" and "passed 0" in keys:
        time.sleep(2)
    return wait(store, keys, *limit)
dist.FileStore.wait = late
self_test.main(sys.argv[1:])
"""


def new_trial(
    folder: Path,
    device: str,
) -> TrialDir:
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    settings = replace(settings, runtime=replace(settings.runtime, device=device))
    trial = Root(folder).trial_of(settings)
    trial.create(settings)
    return trial


def never() -> bool:
    return False


def use_python(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    body: str,
) -> None:
    """Replace the Python that runs the self-test by a shell script."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.fixture
def calls(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Be job 7 on n1, with the programs of a Slurm of eight nodes -> the file of their calls."""
    called = tmp_path / "calls"
    called.touch()
    answers = {
        "squeue": 'case "$*" in *Format*) echo RUNNING 0;; *) echo "(null)|gpu|1";; esac',
        "sinfo": 'for n in 1 2 3 4 5 6 7 8; do echo "n$n|idle"; done',
        "scontrol": "exit 0",
    }
    for name, answer in answers.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{called}"\n{answer}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    for name in ("JOB_ID", "PROCID", "JOB_NODELIST"):
        value = {"JOB_ID": "7", "PROCID": "0", "JOB_NODELIST": "n1"}[name]
        monkeypatch.setenv(f"SLURM_{name}", value)
    return called


def run_rank(
    trial: TrialDir,
    ends: Callable[[], bool],
    restarts: int = 0,
    prefix: Sequence[str] = (),
) -> int | None:
    """Run a rank of the job until `ends` -> None, or until it ends by itself -> its exit code."""
    words = (sys.executable, "-m", "jepa_cluster.launch.worker.main", str(trial.path))
    env = {**os.environ, "SLURM_RESTART_COUNT": str(restarts), "JEPA_KILL_WAIT": "3"}
    rank = subprocess.Popen([*prefix, *words], env=env)
    try:
        while rank.poll() is None and not ends():
            time.sleep(0.05)
        time.sleep(0.5)
        return rank.poll()
    finally:
        rank.kill()
        rank.wait()


def test_a_bad_node_makes_no_attempt_and_is_excluded_at_the_requeue(
    tmp_path: Path,
    calls: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with `retries.node: 0`. `jepa why` and `jepa nodes` show the start."""
    trial = new_trial(tmp_path / "root", "cuda")
    plan = trial.root.sweep("s").plan
    plan.parent.mkdir(parents=True)
    write_json(plan, {"retries": {"node": 0}})
    monkeypatch.setenv("SLURM_JOB_NAME", str(JobName.new("s", "A")))
    run_rank(trial, lambda: "update" in calls.read_text())
    assert not trial.attempts()
    assert not trial.failed.exists()
    (start,) = trial.ended_starts()
    assert start.get("cause") == "node"
    assert "torch sees no GPU here" in start.get("error", "")
    assert start.get("excluded") == ["n1"]
    words = [line for line in calls.read_text().splitlines() if line.startswith("scontrol")]
    assert words == ["scontrol requeue incomplete 7", "scontrol update JobId=7 ExcNodeList=n1"]
    row = {
        "name": trial.name,
        "index": 0,
        "state": "requeued",
        "note": "",
        "label": "x",
    }
    why = diagnosis.explain_trial(trial.root, "s", row, [])
    assert why["cause"] == "node"
    assert "torch sees no GPU here" in why["evidence"]
    assert why["rule"] == "runs again within retries.node, without n1"
    assert [attempt["attempt"] for attempt in why["tries"]] == [0]
    (fault,) = node_health.node_failures(trial.root)["n1"]["faults"]
    assert fault == {"trial": trial.name, "attempt": 0, "cause": "node"}


def test_a_trial_whose_nodes_are_all_bad_fails_within_its_budget(
    tmp_path: Path,
    calls: Path,
) -> None:
    """A quarter of eight nodes may be excluded; starts on others count against retries.node."""
    trial = new_trial(tmp_path / "root", "cuda")
    (trial.path / "logs").mkdir()
    for restarts in range(7):
        facts = {"excluded": [f"n{restarts + 2}"]} if restarts < 2 else {"excluded": []}
        record = {"cause": "node", "job_id": "7", "started": restarts, **facts}
        trial.end_start(f"7.{restarts}", record)
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(squeue.read_text().replace("RUNNING 0", "RUNNING 7"))
    run_rank(trial, trial.failed.exists, restarts=7)
    failed = read_json(trial.failed) or {}
    assert failed["cause"] == "node"
    assert "6 starts without an attempt, retries.node allows 5" in failed["error"]
    assert "requeue" not in calls.read_text()


def test_a_node_whose_filesystem_is_read_only_is_excluded(
    tmp_path: Path,
    calls: Path,
) -> None:
    """It is no refusal to this user: another node can write."""
    nodes.require()
    trial = new_trial(tmp_path / "root", "cpu")
    script = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'
    mount = ("unshare", "--mount", "sh", "-c", script, str(trial.root.path))
    assert run_rank(trial, lambda: "update" in calls.read_text(), prefix=mount) is None
    words = [line for line in calls.read_text().splitlines() if line.startswith("scontrol")]
    assert words == ["scontrol requeue incomplete 7", "scontrol update JobId=7 ExcNodeList=n1"]
    assert run_rank(trial, lambda: False, restarts=9, prefix=mount) == ExitCode.HANG
    assert not trial.attempts()
    assert not trial.failed.exists()


def test_a_missing_gpu_is_a_fault_of_the_node_and_no_attempt_is_opened(tmp_path: Path) -> None:
    with pytest.raises(NodeFault, match="torch sees no GPU here"):
        node_test.run(new_trial(tmp_path, "cuda"), ALONE, never, time.monotonic())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -SEGV $$", "ended by signal 11"),
        (f"echo '{SELF_TEST_FAILED}CUDA error' >&2; echo more; exit 1", "n1: CUDA error$"),
        ("exec sleep 60", "no answer within 0 s"),
    ],
)
def test_a_self_test_that_crashes_or_does_not_end_is_a_fault_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    if "sleep" in body:
        monkeypatch.setattr(node_test, "SELF_TEST_SECONDS", 0.3)
    use_python(monkeypatch, tmp_path, body)
    with pytest.raises(NodeFault, match=message):
        node_test.run(new_trial(tmp_path, "cuda"), ALONE, never, time.monotonic())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo \"ModuleNotFoundError: No module named 'torch'\"; exit 1", "ModuleNotFoundError"),
        ("kill -KILL $$", "ended by signal 9"),
    ],
)
def test_a_self_test_that_could_not_run_says_nothing_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    use_python(monkeypatch, tmp_path, body)
    with pytest.raises(FilesystemFault, match=message):
        node_test.run(new_trial(tmp_path, "cuda"), ALONE, never, time.monotonic())


@pytest.mark.parametrize("rank", TWO_NODES)
def test_a_trial_that_this_user_may_not_write_is_refused_on_each_node(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: DistEnv,
) -> None:
    trial = new_trial(tmp_path, "cpu")
    (trial.path / "logs").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "logs" and access(path, mode))
    with pytest.raises(LaunchError, match="you may not write to"):
        node_test.run(trial, rank, never, time.monotonic())


def test_a_signal_ends_the_wait_for_the_self_test(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_python(monkeypatch, tmp_path, "exec sleep 60")
    trial = new_trial(tmp_path, "cuda")
    assert not node_test.run(trial, ALONE, lambda: True, time.monotonic())


def test_a_node_whose_test_a_signal_has_cut_off_does_not_report_that_it_passed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_python(monkeypatch, tmp_path, "exec sleep 60")
    trial = new_trial(tmp_path, "cuda")
    node_test.run(trial, TWO_NODES[1], lambda: True, time.monotonic())
    assert trial.reported_ranks("7.0") == 0


def test_a_cpu_is_not_tested(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(node_test, "DRIVER_FILES", ())
    use_python(monkeypatch, tmp_path, "exit 1")
    for device in ("cpu", "auto"):
        node_test.run(new_trial(tmp_path / device, device), ALONE, never, time.monotonic())


def test_a_rank_that_is_late_at_the_end_of_the_test_passes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 has passed and ended by then. Each rank has a TMPDIR of its own."""
    monkeypatch.setattr(node_test, "SELF_TEST_SECONDS", 90.0)
    use_python(monkeypatch, tmp_path, f"exec {sys.executable} -c '{LATE_RANK_1}' cpu $4 2 $6")
    trial = new_trial(tmp_path, "cuda")
    passed: list[bool] = []

    def run_test(rank: int) -> None:
        env = DistEnv(rank, 2, rank, 2, "7.0")
        passed.append(node_test.run(trial, env, never, time.monotonic()))

    ranks = [threading.Thread(target=run_test, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert passed == [True, True]
    assert not (node_test.SHARED_FOLDER / socket_name(trial, ALONE)[1:]).exists()


def test_rank_0_opens_no_attempt_before_each_node_has_passed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It also removes what earlier launches have left."""
    trial = new_trial(tmp_path, "cpu")
    trial.report_node("6.0", 1, 1)
    waiting = threading.Thread(
        target=node_test.run, args=(trial, TWO_NODES[0], never, time.monotonic())
    )
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    node_test.run(trial, TWO_NODES[1], never, time.monotonic())
    waiting.join(30)
    assert not waiting.is_alive()
    assert list((trial.path / "logs").iterdir()) == []
    monkeypatch.setattr(node_test, "CLAIM_PATIENCE", 0.2)
    trial.stop.touch()
    assert not node_test.run(trial, TWO_NODES[0], never, time.monotonic())
    trial.stop.unlink()
    with pytest.raises(TrialError, match="the nodes of 1 ranks have not passed"):
        node_test.run(trial, TWO_NODES[0], never, time.monotonic())
