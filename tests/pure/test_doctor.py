"""`jepa doctor` without a cluster."""

from pathlib import Path

import pytest

from jepa_cluster.launch.cluster.profile import load_profile
from jepa_cluster.launch.ops import doctor
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.spool import now_ms


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
    excluded, starts = doctor._request(load_profile(Path("example")), root, node=False)
    assert (excluded.what, excluded.found) == ("excluded nodes", "n3")
    assert starts.ok
    assert "--exclude=n3" in asked[0]
