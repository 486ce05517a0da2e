"""Which node a job's end speaks against, and how many may be left out. Slurm itself: tests/slurm."""

from typing import Any

import pytest

from jepa_cluster.launch import elsewhere, explain

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
        ([{"job_nodelist": "n3"}], []),  # no word: a kill, a power cut; once is no proof
        ([{"job_nodelist": "n3"}, {"job_nodelist": "n3"}], ["n3"]),
        ([{"job_nodelist": "n3"}, {"job_nodelist": "n4"}], []),
        ([{"job_nodelist": "n3"}, {**HANG, "job_nodelist": "n3", "cause": "preempted"}, {"job_nodelist": "n3"}], []),
    ],
)
def test_an_end_speaks_against_a_node_only_where_it_can_be_told_which(attempts: list[dict[str, Any]], found: list[str]):
    """The failing rank names it, or the attempt had one node only; twice without a word is a word too."""
    assert elsewhere.suspects(attempts) == found


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
def test_we_never_leave_out_so_many_nodes_that_a_trial_cannot_run(
    nodes: list[str], excluded: list[str], usable: int, wants: int, ours: int, found: list[str]
):
    """A quarter of what is usable at most, and as many must remain as the trial needs."""
    assert elsewhere.allowed(nodes, excluded, [f"n{i + 1}" for i in range(usable)], wants, ours) == found


def test_the_rank_whose_machine_failed_it_is_accused_alone():
    """In the ledger too: one node whole instead of four by a quarter."""
    assert explain.accused({**ECC, "job_nodelist": "n[1-4]", "node": "n3"}) == ["n3"]
    assert explain.accused({**HANG, "job_nodelist": "n[1-2]", "node": "n1"}) == ["n1", "n2"]
    assert explain.accused({"job_nodelist": "n1"}) == []
