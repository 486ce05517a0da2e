"""Which node a failed attempt blames, and how many nodes a job may exclude."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.scheduler import node_health, retry_policy, slurm
from jepa_cluster.launch.scheduler.slurm import TaskPlacement
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

ECC = {
    "ended": 1,
    "cause": "error",
    "error": "RuntimeError: CUDA error: uncorrectable ECC error encountered",
}
NODE_FAULT = {"ended": 1, "cause": "node"}
HANG = {"ended": 1, "cause": "hang"}
LOST = {"ended": 1, "cause": "lost"}
PREEMPTED = {"ended": 1, "cause": "preempted"}
DONE = {"ended": 1, "cause": "done"}
USER_ERROR = {"ended": 1, "cause": "error", "error": "ZeroDivisionError"}
ON_N3 = {"job_nodelist": "n3"}
FOUR_NODES = {"job_nodelist": "n[1-4]"}
ECC_ON_N3 = {**ECC, **ON_N3}


@pytest.mark.parametrize(
    ("attempts", "found"),
    [
        pytest.param([], [], id="no attempt"),
        pytest.param([ECC_ON_N3], ["n3"], id="one node"),
        pytest.param([{**ECC, **FOUR_NODES, "node": "n3"}], ["n3"], id="named by the rank"),
        pytest.param([{**ECC, **FOUR_NODES}], [], id="one of four nodes"),
        pytest.param([{**NODE_FAULT, **FOUR_NODES, "node": "n3"}], ["n3"], id="self-test on n3"),
        pytest.param([{**NODE_FAULT, **ON_N3}], ["n3"], id="the only node lost power"),
        pytest.param([{**NODE_FAULT, **FOUR_NODES}], [], id="one of four lost power"),
        pytest.param([{**HANG, **ON_N3}], ["n3"], id="hang on one node"),
        pytest.param([{**HANG, **FOUR_NODES, "node": "n3"}], [], id="hang seen by n3"),
        pytest.param([{**LOST, **ON_N3}], [], id="lost rank"),
        pytest.param([{**PREEMPTED, **ON_N3}], [], id="preempted"),
        pytest.param([{**USER_ERROR, **ON_N3}], [], id="error of the user"),
        pytest.param([ECC_ON_N3, {**DONE, "job_nodelist": "n4"}], [], id="done later"),
        pytest.param([{**ECC_ON_N3, "forgiven": True}], [], id="retried by the user"),
        pytest.param([ON_N3], [], id="no record of its end"),
        pytest.param([{**ECC_ON_N3, "excluded": ["n3"]}], [], id="excluded already"),
        pytest.param([{**ECC_ON_N3, "exclude_refused": "too few"}], [], id="refused before"),
    ],
)
def test_an_attempt_blames_a_node_only_if_it_is_known(
    attempts: list[dict[str, Any]], found: list[str]
):
    """The failed rank names it, or the attempt had only one node."""
    assert node_exclusion.suspect_nodes(attempts) == found


@pytest.mark.parametrize(
    ("nodes", "excluded", "usable", "needed", "ours", "found"),
    [
        pytest.param(["n1"], [], 2, 1, 0, ["n1"], id="one of two"),
        pytest.param(["n1"], [], 1, 1, 0, [], id="the only node"),
        pytest.param(["n1"], [], 2, 2, 0, [], id="the trial needs both"),
        pytest.param(["n1"], ["n1"], 8, 1, 1, [], id="excluded already"),
        pytest.param(["n1"], ["n2"], 8, 1, 1, ["n1"], id="a quarter of eight"),
        pytest.param(["n1"], ["n2", "n3"], 8, 1, 2, [], id="more than a quarter"),
        pytest.param(["n1"], ["n2", "n3", "n4"], 8, 1, 0, ["n1"], id="excluded by the profile"),
        pytest.param(["n1", "n5"], ["n2", "n3", "n4"], 8, 4, 0, ["n1"], id="room for one"),
    ],
)
def test_enough_nodes_remain_for_a_trial(
    nodes: list[str], excluded: list[str], usable: int, needed: int, ours: int, found: list[str]
):
    """We exclude at most a quarter of the usable nodes."""
    names = [f"n{i + 1}" for i in range(usable)]
    chosen = node_exclusion.excludable(
        nodes,
        excluded=excluded,
        usable=names,
        nodes_needed=needed,
        excluded_by_us=ours,
    )
    assert chosen == found


def test_the_failure_history_counts_a_failure_for_the_node_of_the_rank():
    """A hang counts for all nodes of the job."""
    ecc = {**ECC, "job_nodelist": "n[1-4]", "node": "n3"}
    hang = {**HANG, "job_nodelist": "n[1-2]", "node": "n1"}
    assert node_health.accused_node(ecc) == ["n3"]
    assert node_health.accused_node(hang) == ["n1", "n2"]
    assert node_health.accused_node({"job_nodelist": "n1"}) == []


@pytest.fixture
def failed(tmp_path: Path) -> TrialDir:
    """Make a trial whose only attempt failed on n3."""
    (tmp_path / "attempts").mkdir()
    trial = TrialDir(tmp_path)
    trial.claim({**ECC, "job_nodelist": "n3"})
    return trial


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Collect the lists that scontrol sets. The job excludes n1, its partition has eight nodes."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm, "placement", lambda job: TaskPlacement("n1", "gpu", 1))
    monkeypatch.setattr(slurm, "usable_nodes", lambda partition: {f"n{i}" for i in range(1, 9)})
    monkeypatch.setattr(slurm, "exclude", lambda job, nodes: calls.append((job, list(nodes))))
    monkeypatch.setattr(node_exclusion, "UPDATE_TIMEOUT", 0.0)
    return calls


def test_a_requeued_job_extends_its_own_list_once(failed: TrialDir, updates: list[Any]) -> None:
    """The record names only the added node. A second call changes nothing."""
    assert node_exclusion.exclude(failed, "7_1", "7.0") == ["n1", "n3"]
    assert node_exclusion.exclude(failed, "7_1", "7.0") == []
    assert updates == [("7_1", ["n1", "n3"])]
    assert failed.attempts()[0]["excluded"] == ["n3"]


def test_for_a_chained_job_the_current_job_is_not_updated(
    failed: TrialDir, updates: list[Any]
) -> None:
    """The exclusion is recorded once sbatch has accepted it."""
    exclusion = node_exclusion.plan(failed, "7_1", "7.0")
    assert exclusion.nodes == ["n1", "n3"]
    assert "excluded" not in failed.attempts()[0]
    exclusion.save(failed, "7.0")
    assert failed.attempts()[0]["excluded"] == ["n3"]
    assert updates == []


BAD_START = {"cause": "node", "error": "self-test failed", "node": "n3", "job_id": "7"}


@pytest.mark.parametrize("failures", [1, 99])
def test_a_start_counts_until_slurm_has_excluded_its_node(
    tmp_path: Path,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    """One failed update does not cancel the exclusion."""
    monkeypatch.setattr(node_exclusion, "UPDATE_TIMEOUT", 1.0)
    trial = TrialDir(tmp_path)
    trial.end_start("7.0", BAD_START)
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    assert retry_policy.lost_starts(trial, env) == 1
    assert retry_policy.lost_starts(trial, env, undecided="7.0") == 0
    errors = [SchedulerDown("scontrol did not answer")] * failures
    update = slurm.exclude

    def exclude(job: str, nodes: list[str]) -> None:
        if errors:
            raise errors.pop()
        update(job, nodes)

    monkeypatch.setattr(slurm, "exclude", exclude)
    node_exclusion.exclude(trial, "7_1", "7.0")
    assert bool(updates) == (failures == 1)
    assert retry_policy.lost_starts(trial, env) == int(failures > 1)


@pytest.mark.parametrize("error", [SchedulerDown("no answer"), OSError("no more processes")])
def test_what_the_exclusion_raises_does_not_undo_the_requeue(
    failed: TrialDir,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """It is asked for again, and the nodes that were found stay."""
    monkeypatch.setattr(node_exclusion, "UPDATE_TIMEOUT", 1.0)
    errors = [error] * 2
    found = slurm.placement("7_1")

    def placement(job: str) -> TaskPlacement:
        if errors:
            raise errors.pop()
        return found

    monkeypatch.setattr(slurm, "placement", placement)
    assert node_exclusion.exclude(failed, "7_1", "7.0") == ["n1", "n3"]
    errors[:] = [error] * 99
    failed.claim({**ECC, "job_nodelist": "n4"})
    assert node_exclusion.exclude(failed, "7_1", "7.0") == []
    assert "n4" in failed.attempts()[1]["exclude_refused"]


def test_a_node_that_cannot_write_is_recorded_in_no_other_attempt(
    failed: TrialDir,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert node_exclusion.exclude(failed, "7_1", "7.0") == ["n1", "n5"]
    assert "excluded" not in failed.attempts()[0]


def test_without_a_retry_left_a_start_is_repeated_only_if_its_node_can_be_excluded(
    tmp_path: Path,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = Root(tmp_path).trial("tiny")
    trial.path.mkdir(parents=True)
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "5"}
    trial.end_start("7.5", BAD_START)
    assert not node_exclusion.fail_start(trial, "7", env)
    monkeypatch.setattr(slurm, "usable_nodes", lambda partition: {"n3"})
    assert not node_exclusion.fail_start(trial, "7", {**env, "SLURM_RESTART_COUNT": "4"})
    assert not trial.failed.exists()
    assert node_exclusion.fail_start(trial, "7", env)
    assert "6 starts without an attempt" in (read_json(trial.failed) or {})["error"]
    assert updates == []


def test_without_programs_of_slurm_a_node_cannot_be_excluded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As within a container. A start beyond the budget fails the trial instead of asking again."""
    monkeypatch.setenv("PATH", str(tmp_path))
    trial = Root(tmp_path).trial("tiny")
    trial.path.mkdir(parents=True)
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "5"}
    trial.end_start("7.5", BAD_START)
    assert node_exclusion.fail_start(trial, "7", env)
    assert "6 starts without an attempt" in (read_json(trial.failed) or {})["error"]
    assert "not installed" in trial.read_start("7.5")["exclude_refused"]


def refuse(*_: object) -> None:
    raise LaunchError("scontrol: Access/permission denied", where="scontrol update")


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("exclude", refuse, "n3: scontrol: Access/permission denied"),
        ("placement", refuse, "n3: scontrol: Access/permission denied"),
        ("usable_nodes", lambda partition: {"n3"}, "n3: too few nodes would be left"),
    ],
)
def test_a_refusal_of_slurm_is_recorded_in_the_attempt(
    failed: TrialDir,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    replacement: Callable[..., Any],
    reason: str,
) -> None:
    """The trial is requeued without the exclusion."""
    monkeypatch.setattr(slurm, name, replacement)
    node_exclusion.exclude(failed, "7_1", "7.0")
    assert failed.attempts()[0]["exclude_refused"] == reason
    assert "excluded" not in failed.attempts()[0]
