"""What `jepa why` prints of a trial."""

from pathlib import Path

import pytest
from support.fake_trials import config

from jepa_cluster.launch.scheduler import array_records, diagnosis, facts, slurm
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    trial = Root(tmp_path).trial_of(settings)
    trial.create(settings)
    return trial


def test_too_many_lost_jobs_fail_a_trial_until_the_user_retries_it(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """Slurm no longer knows three jobs, and two may be lost. `jepa why` names the budget."""
    root = trial.root
    array = {
        "name": "jepa.s.A.1",
        "trials": [trial.name],
        "job": "7",
        "submitted": 1,
        "nodes": 1,
        "procs_per_node": 1,
    }
    root.sweep("s").arrays.mkdir(parents=True)
    write_json(root.sweep("s").arrays / "jepa.s.A.1.json", array)
    write_json(root.sweep("s").plan, {"retries": {**RETRIES, "killed": 2}})
    monkeypatch.setattr(slurm, "squeue", lambda names: [])
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    for job in ("5", "6", "7"):
        trial.claim({"started": 1, "job_id": job})

    seen = facts.query_status(root, [trial.name]).trials[trial.name]
    assert seen.state == "failed"
    assert seen.marker == "FAILED"
    assert "retries.killed allows 2" in seen.note
    row = {
        "name": trial.name,
        "index": 0,
        "state": seen.state,
        "note": seen.note,
        "cause": "node",
        "label": "x",
    }
    found = diagnosis.explain_trial(root, "s", row, [])
    assert found["cause"] == "node"
    assert found["rule"] == "retries.node is used up"
    assert found["hint"].startswith("jepa nodes")
    trial.amend(3, {"forgiven": True})
    assert facts.query_status(root, [trial.name]).states == {trial.name: "interrupted"}


def test_a_held_trial_is_explained_by_what_to_type(trial: TrialDir):
    """Not by `jepa watch`, which would wait without end."""
    note = "held by a user: scontrol release 7_1"
    row = {"name": trial.name, "index": 0, "state": "queued", "held": True, "note": note}
    found = diagnosis.explain_trial(trial.root, "s", row, [])
    assert found["hint"] == "scontrol release 7_1"


def test_a_stopped_trial_stays_stopped_until_the_user_resumes_it(tmp_path: Path, trial: TrialDir):
    """The cause of the end of its last attempt does not matter."""
    trial.claim({"started": 1})
    row = {
        "name": trial.name,
        "index": 0,
        "state": "stopped",
        "note": "cancelled in Slurm: jepa resume",
        "label": "x",
    }
    found = diagnosis.explain_trial(Root(tmp_path), "s", row, [])
    assert found["cause"] == "stopped"
    assert found["evidence"] == "cancelled in Slurm: jepa resume"
    assert found["rule"] == "stays stopped until jepa resume"
    assert found["hint"] == "jepa resume s 0"


def test_what_a_job_printed_before_python_is_shown(trial: TrialDir):
    """The script of the job and its rank 0; the interpreter of the profile does not exist."""
    sweep = trial.root.sweep("s")
    sweep.arrays.mkdir(parents=True)
    array = {"name": "jepa.s.A.1", "trials": ["x", trial.name], "job": "7", "submitted": 1}
    write_json(sweep.array("jepa.s.A.1"), array)
    (sweep.jobs / "7_1").mkdir(parents=True)
    (sweep.jobs / "7_1.log").write_text("module: command not found\nsrun: error: n1: task 0\n")
    (sweep.jobs / "7_1/7_1_0_log.err").write_text("bash: /no/python: No such file or directory\n")
    row = {"name": trial.name, "index": 1, "state": "interrupted", "note": "Slurm: FAILED"}
    row["slurm_state"] = "FAILED"
    arrays = array_records.read(trial.root)
    found = diagnosis.explain_trial(trial.root, "s", {**row, "label": "x"}, arrays)
    assert found["cause"] == "not_started"
    assert found["evidence"] == "bash: /no/python: No such file or directory"
    assert found["log"][0] == "module: command not found"
    row |= {"state": "failed", "cause": "not_started", "note": "not_started 3 times"}
    failed = diagnosis.explain_trial(trial.root, "s", {**row, "label": "x"}, arrays)
    assert "jepa doctor --node" in failed["hint"]
    assert failed["rule"] == "retries.start is used up"
    assert failed["evidence"] == found["evidence"]


def test_three_jobs_without_an_attempt_fail_a_trial_until_the_user_retries_it(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """`jepa retry` writes `resumed` into the record of the next array."""
    root, sweep = trial.root, trial.root.sweep("s")
    monkeypatch.setattr(slurm, "squeue", lambda names: [])
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    sweep.arrays.mkdir(parents=True)
    sweep.jobs.mkdir()
    write_json(sweep.plan, {"retries": RETRIES})
    states: list[str] = []
    for job in range(4):
        array = {"name": f"jepa.s.A.{job}", "trials": [trial.name], "job": str(job)}
        resumed = {"resumed": True} if job == 3 else {}
        write_json(sweep.array(array["name"]), {**array, "submitted": job + 1, **resumed})
        (sweep.jobs / f"{job}.log").write_text("bash: /no/python\n")
        states.append(facts.query_status(root, [trial.name]).states[trial.name])
    assert states == ["interrupted", "interrupted", "failed", "interrupted"]
