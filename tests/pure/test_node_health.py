"""The failure history of nodes, and the node lists of Slurm."""

from pathlib import Path

import pytest

from jepa_cluster.launch.scheduler import node_health
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.spool import now_ms


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("gpu-n1", ["gpu-n1"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("r[1-2]i[0-1]", ["r1i0", "r1i1", "r2i0", "r2i1"]),
        ("gpu[08-10]-ib,n1", ["gpu08-ib", "gpu09-ib", "gpu10-ib", "n1"]),
        ("c[1-2,5]x[3].rack", ["c1x3.rack", "c2x3.rack", "c5x3.rack"]),
        ("a[1-2],b[9-11]", ["a1", "a2", "b9", "b10", "b11"]),
    ],
)
def test_a_node_list_is_expanded_with_its_leading_zeros(nodelist: str, names: list[str]):
    assert node_health.expand_node_list(nodelist) == names


def test_a_fault_counts_one_over_the_accused_nodes_and_half_after_a_week(tmp_path: Path):
    root = Root(tmp_path)
    now = now_ms()
    trial = root.trial("a")
    trial.path.mkdir(parents=True)
    (root.trials / "notes.txt").touch()  # of a user
    for age in (0, node_health.HALF_LIFE):
        number = trial.claim({"job_nodelist": "n[1-2]"})
        trial.end_attempt(number, {"cause": "hang", "ended": now - age})
    number = trial.claim({"job_nodelist": "n[1,3]"})
    trial.add_to_attempt(number, {"pace": {"hosts": ["n1", "n3"], "slow": [1.5, 1.0]}})
    ledger = node_health.node_failures(root)
    assert list(ledger) == ["n1", "n2", "n3"]
    assert ledger["n1"]["score"] == pytest.approx(0.75, abs=1e-3)
    assert [fault["attempt"] for fault in ledger["n2"]["faults"]] == [1, 2]
    assert ledger["n1"]["attempts"] == 3
    assert ledger["n1"]["slow"] == 1.5
    assert ledger["n3"]["score"] == 0
    assert ledger["n2"]["slow"] is None
    assert node_health.bad_nodes(root) == []
    for _ in range(2):
        number = trial.claim({"job_nodelist": "n1"})
        trial.end_attempt(number, {"cause": "hang", "ended": now})
    assert node_health.bad_nodes(root) == ["n1"]
