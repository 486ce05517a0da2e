"""What a trial of a plan still needs, and what a sweep has cost so far."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.submitted_sweep import Submitted

from jepa_cluster import cli
from jepa_cluster.launch.scheduler import local
from jepa_cluster.launch.submit.plan import remaining_gpu_hours
from jepa_cluster.records import PlannedTrial
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import now_ms

Document = Callable[..., Any]
HOUR = 3_600_000  # ms


@pytest.mark.parametrize(
    ("begins", "step", "gpu_hours"),
    [
        (0, 0, 8.0),
        (0, 25, 6.0),
        (0, 100, 0.0),
        (80, 0, 8.0),  # a branch that has not begun: its estimate is that of its own 20 steps
        (80, 90, 4.0),
        (80, 100, 0.0),
    ],
)
def test_a_trial_needs_the_part_of_its_estimate_that_is_left(
    begins: int, step: int, gpu_hours: float
):
    """It has four processes for two hours. A branch trains only the steps after its begin."""
    trial: PlannedTrial = {
        "name": "x",
        "id": "x",
        "label": "x",
        "point": {},
        "seed": 0,
        "class": "A",
        "world": 4,
        "steps": 100,
        "hours": 2.0,
        "trunk": "trunk" if begins else None,
        "begins": begins,
    }
    assert remaining_gpu_hours(trial, step) == pytest.approx(gpu_hours)


def run_for(
    trial: TrialDir,
    hours: float,
    **ended: Any,
) -> None:
    """Write an attempt of two ranks that began so many hours ago."""
    begun = {"launch": "x", "world": 2, "started": now_ms() - round(hours * HOUR)}
    number = trial.claim(begun)
    trial.metrics(number).touch()
    trial.amend(number, ended)


def test_plan_status_and_export_count_the_same_hours(
    submitted: Submitted, document: Document, monkeypatch: pytest.MonkeyPatch
):
    """One attempt was killed without a word, one runs, one is of a trial that was edited out."""
    killed, dropped, running, _ = submitted.trials
    run_for(killed, 1)
    run_for(running, 2)
    run_for(dropped, 3)
    running.heartbeat.touch()
    queue = {trial.name: local.QueuedTrial("running") for trial in (running, dropped)}
    monkeypatch.setattr(local, "list_trials", lambda root: queue)
    file = submitted.root.sweep("ask").plan
    plan = json.loads(file.read_text())
    first, edited_out, third, _ = plan["trials"]
    write_json(file, {**plan, "trials": [first, third], "dropped": [edited_out]})
    stored = submitted.root.sweep("ask").sweep_file
    text = stored.read_text()
    stored.write_text(text.replace("mask.targets: [2, 4]", "mask.targets: [2]"))
    assert stored.read_text() != text
    spent = document("plan", "ask")["spent"]
    assert spent == pytest.approx(2 + 4 + 6, abs=0.02)
    assert document("status", "ask")["gpu_hours"] == pytest.approx(spent, abs=0.02)
    rows = document("export", "ask")
    assert sum(row["gpu_hours"] for row in rows) == pytest.approx(spent, abs=0.02)


def test_plan_compares_what_finished_trials_took_with_what_was_planned(
    submitted: Submitted, document: Document, capsys: pytest.CaptureFixture[str]
):
    """The estimate is that of the last submit. An unfinished trial is not compared."""
    assert document("plan", "ask")["finished"] == {"planned": 0.0, "took": 0.0}
    done, unfinished, *_ = submitted.trials
    file = submitted.root.sweep("ask").plan
    plan = json.loads(file.read_text())
    for entry in plan["trials"]:
        entry |= {"hours": 3.0, "world": 2}
    write_json(file, plan)
    run_for(done, 4, ended=now_ms(), end_step=40, cause="done")
    write_json(done.done, {"step": 40, "t": 1, "metrics": {}})
    run_for(unfinished, 1, ended=now_ms(), end_step=7, cause="preempted")
    finished = document("plan", "ask")["finished"]
    assert finished["planned"] == 6.0
    assert finished["took"] == pytest.approx(8.0, abs=0.02)
    cli.main(["plan", "ask"])
    out = " ".join(capsys.readouterr().out.split())
    assert "finished trials took 8 process-h, planned were 6" in out


def test_the_attempts_of_a_canary_count_once_in_what_a_sweep_has_cost(
    submitted: Submitted, document: Document, capsys: pytest.CaptureFixture[str]
):
    """Also where a trial has the same recipe, and against the limit of the sweep."""
    trial, *_ = submitted.trials
    canary, other = (
        submitted.root.trial(f"canary.{sweep}.A.{'0' * 12}.{trial.name}")
        for sweep in ("ask", "other")
    )
    for each in (canary, other):
        each.create(trial.read_config())
        write_json(each.canary, {"class": "A", "t": 1})
    for hours in (2, 3):
        run_for(canary, hours, ended=now_ms(), end_step=40, cause="done")
    run_for(trial, 1, ended=now_ms(), end_step=7, cause="preempted")
    run_for(other, 9, ended=now_ms(), end_step=40, cause="done")
    spent = document("plan", "ask")["spent"]
    assert spent == pytest.approx(2 * (2 + 3 + 1), abs=0.02)
    assert document("status", "ask")["gpu_hours"] == pytest.approx(spent, abs=0.02)

    file = submitted.root.sweep("ask").sweep_file
    file.write_text(file.read_text().replace("gpu_hours: 100", "gpu_hours: 11.9"))
    assert cli.main(["submit", "ask", "--yes"])
    assert "12.00 spent and" in capsys.readouterr().err
