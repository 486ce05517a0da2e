"""Which node a job's end speaks against, and how many may be left out. Slurm itself: tests/slurm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.scheduler import node_health, slurm
from jepa_cluster.launch.scheduler.slurm import TaskPlacement
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.trial.directory import TrialDir

ECC = {"ended": 1, "cause": "error", "error": "RuntimeError: CUDA error: uncorrectable ECC error encountered"}
HANG = {"ended": 1, "cause": "hang"}


@pytest.mark.parametrize(
    ("attempts", "found"),
    [
        ([], []),
        ([{**ECC, "job_nodelist": "n3"}], ["n3"]),
        ([{**ECC, "job_nodelist": "n[1-4]", "node": "n3"}], ["n3"]),
        ([{**ECC, "job_nodelist": "n[1-4]"}], []),  # one of four: nobody knows which
        ([{**HANG, "job_nodelist": "n3"}], ["n3"]),
        ([{**HANG, "job_nodelist": "n[3-4]", "node": "n3"}], []),  # who complains of a hang is not who hangs
        ([{"ended": 1, "cause": "lost", "job_nodelist": "n3"}], []),
        ([{"ended": 1, "cause": "preempted", "job_nodelist": "n3"}], []),
        ([{"ended": 1, "cause": "error", "error": "ZeroDivisionError", "job_nodelist": "n3"}], []),
        ([{**ECC, "job_nodelist": "n3"}, {"ended": 1, "cause": "done", "job_nodelist": "n4"}], []),
        ([{**ECC, "job_nodelist": "n3", "forgiven": True}], []),  # a person has seen to it
        ([{"job_nodelist": "n3"}], []),  # no record of its end: a kill, a power cut
        ([{**ECC, "job_nodelist": "n3", "excluded": ["n3"]}], []),  # done already
        ([{**ECC, "job_nodelist": "n3", "exclude_refused": "n3: too few nodes would be left"}], []),
    ],
)
def test_an_end_speaks_against_a_node_only_where_it_is_known_which(attempts: list[dict[str, Any]], found: list[str]):
    """The failing rank names it, or the attempt had one node only."""
    assert node_exclusion.suspect_nodes(attempts) == found


@pytest.mark.parametrize(
    ("nodes", "excluded", "usable", "wants", "ours", "found"),
    [
        (["n1"], [], 2, 1, 0, ["n1"]),
        (["n1"], [], 1, 1, 0, []),  # it is all there is
        (["n1"], [], 2, 2, 0, []),  # the trial needs both
        (["n1"], ["n1"], 8, 1, 1, []),  # it is out already
        (["n1"], ["n2"], 8, 1, 1, ["n1"]),  # a quarter of eight
        (["n1"], ["n2", "n3"], 8, 1, 2, []),
        (["n1"], ["n2", "n3", "n4"], 8, 1, 0, ["n1"]),  # those of the profile do not count as ours
        (["n1", "n5"], ["n2", "n3", "n4"], 8, 4, 0, ["n1"]),
    ],
)
def test_we_never_exclude_so_many_nodes_that_a_trial_cannot_run(
    nodes: list[str], excluded: list[str], usable: int, wants: int, ours: int, found: list[str]
):
    """A quarter of what is usable at most, and as many must remain as the trial needs."""
    names = [f"n{i + 1}" for i in range(usable)]
    chosen = node_exclusion.excludable(nodes, excluded=excluded, usable=names, nodes_needed=wants, excluded_by_us=ours)
    assert chosen == found


def test_the_rank_whose_machine_failed_it_is_accused_alone():
    """In the ledger too: one node whole instead of four by a quarter."""
    assert node_health.accused_node({**ECC, "job_nodelist": "n[1-4]", "node": "n3"}) == ["n3"]
    assert node_health.accused_node({**HANG, "job_nodelist": "n[1-2]", "node": "n1"}) == ["n1", "n2"]
    assert node_health.accused_node({"job_nodelist": "n1"}) == []


@pytest.fixture
def failed(tmp_path: Path) -> TrialDir:
    """A trial whose only attempt failed on n3."""
    (tmp_path / "attempts").mkdir()
    trial = TrialDir(tmp_path)
    trial.claim({**ECC, "job_nodelist": "n3"})
    return trial


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """A partition of eight nodes, in which the job excludes n1; collects what scontrol is asked to set."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm, "placement", lambda job: TaskPlacement("n1", "gpu", 1))
    monkeypatch.setattr(slurm, "usable_nodes", lambda partition: {f"n{i}" for i in range(1, 9)})
    monkeypatch.setattr(slurm, "exclude", lambda job, nodes: calls.append((job, list(nodes))))
    monkeypatch.setattr(node_exclusion, "UPDATE_TIMEOUT", 0.0)
    return calls


def test_a_requeued_job_extends_its_own_list_once(failed: TrialDir, updates: list[Any]) -> None:
    """The job excludes n1 already; the record names only what was added, and a second call changes nothing."""
    assert node_exclusion.exclude_failed_node(failed, "7_1") == ["n1", "n3"]
    assert node_exclusion.exclude_failed_node(failed, "7_1") == []
    assert updates == [("7_1", ["n1", "n3"])] and failed.attempts()[0]["excluded"] == ["n3"]


def test_a_chained_job_gets_the_list_and_the_job_that_ends_is_not_updated(failed: TrialDir, updates: list[Any]) -> None:
    assert node_exclusion.exclude_failed_node(failed, "7_1", chained=True) == ["n1", "n3"]
    assert updates == [] and failed.attempts()[0]["excluded"] == ["n3"]


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
def test_what_slurm_refuses_is_recorded_in_the_attempt(
    failed: TrialDir,
    updates: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    replacement: Callable[..., Any],
    reason: str,
) -> None:
    """The trial is requeued all the same."""
    monkeypatch.setattr(slurm, name, replacement)
    assert node_exclusion.exclude_failed_node(failed, "7_1") == []
    assert failed.attempts()[0]["exclude_refused"] == reason and "excluded" not in failed.attempts()[0]
