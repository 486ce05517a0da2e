"""`jepa submit`: directories of trials that several sweeps have."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.submitted_sweep import SWEEP, Submitted

from jepa_cluster import cli
from jepa_cluster.errors import LaunchError, TrialError
from jepa_cluster.launch.cluster.profile import load_profile
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit import submit, trial_writer
from jepa_cluster.launch.submit.plan import Plan, make_plan
from jepa_cluster.sweep import sweep_file, yaml_source
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.status import TrialStatus

# One trial of SWEEP, by other axes.
OTHER = SWEEP.replace("model: [vit_ti, vit_s]", "model: [vit_ti]").replace(
    "mask.targets: [2, 4]", "optim.batch: [32]\n  mask.targets: [2]"
)


def plan_of(text: str, name: str, root: Root) -> Plan:
    sweep = sweep_file.from_source(yaml_source.parse(text, f"{name}.yaml"), name)
    return make_plan(sweep, load_profile(), root)


def test_a_directory_is_named_by_the_axes_of_the_sweep_that_made_it(submitted: Submitted):
    """Another sweep finds it by the identity of the trial."""
    first = submitted.trials[0]
    assert first.name.startswith("vit_ti-targets2-s0-")
    other = plan_of(OTHER, "other", submitted.root)
    assert list(other.trials) == [first.name]
    alone = plan_of(OTHER, "other", Root(submitted.root.path / "alone"))
    (name,) = alone.trials
    assert name == first.name.replace("-targets2", "-batch32-targets2")


def test_two_submits_at_once_never_make_two_directories_of_one_trial(submitted: Submitted):
    """The second one has planned before the first one made the directory."""
    root = Root(submitted.root.path / "alone")
    late = plan_of(OTHER, "other", root)
    first = submitted.trials[0]
    root.trials.mkdir(parents=True)
    first.path.rename(root.trial(first.name).path)
    with pytest.raises(LaunchError, match="another submit has just made the directory"):
        submit.submit(late)
    assert list(root.names_by_id().values()) == [first.name]


def test_a_sweep_whose_trials_are_all_done_elsewhere_is_registered(
    submitted: Submitted, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """Nothing starts, but its question has a page. A second submit writes nothing."""
    first = submitted.trials[0]
    write_json(first.done, {"step": 1, "t": 1, "metrics": {}})
    (folder / "other.yaml").write_text(OTHER)
    cli.main(["submit", "other.yaml", "--yes"])
    assert "nothing to do" in capsys.readouterr().out
    (trial,) = submitted.root.sweep("other").planned()
    assert trial["name"] == first.name
    assert "other" in (read_json(first.point) or {})
    written = submitted.root.sweep("other").plan.stat().st_mtime_ns
    cli.main(["submit", "other.yaml", "--yes"])
    assert submitted.root.sweep("other").plan.stat().st_mtime_ns == written


def test_a_trial_that_is_edited_out_stays_in_the_list_until_it_is_over(
    submitted: Submitted, folder: Path, document: Callable[..., Any]
):
    """It waits in the local queue, where `jepa cancel` finds it by its index."""
    first, *_, last = submitted.trials
    queue = submitted.root.local / "queue"
    queue.mkdir(parents=True)
    (queue / f"1-000000000000001-00000-{last.name}.json").write_text("{}")
    for trial in submitted.trials[:2]:
        write_json(trial.done, {"step": 1, "t": 1, "metrics": {}})
    fewer = SWEEP.replace("model: [vit_ti, vit_s]", "model: [vit_ti]")
    (folder / "ask.yaml").write_text(fewer)
    assert document("submit", "ask.yaml", "--yes")["dropped"] == [last.name]
    rows = document("status", "ask")["trials"]
    assert [row["state"] for row in rows] == ["done", "done", "queued"]
    assert rows[2]["name"] == last.name
    assert rows[2]["note"].endswith("no longer asked for: jepa cancel")
    assert document("cancel", "ask", "2", "--yes") == {"trials": [last.name]}
    assert document("status", "ask", "2")["trials"][0]["state"] == "stopped"
    document("submit", "ask.yaml", "--yes")
    assert [row["name"] for row in document("status", "ask")["trials"]] == [
        first.name,
        submitted.trials[1].name,
    ]


def test_a_trial_that_was_edited_out_is_named_when_it_is_resumed(
    submitted: Submitted, capsys: pytest.CaptureFixture[str]
):
    """It cannot start. Trials that can start do."""
    first, *_, last = submitted.trials
    fewer = SWEEP.replace("model: [vit_ti, vit_s]", "model: [vit_ti]")
    plan = plan_of(fewer, "ask", submitted.root)
    with pytest.raises(LaunchError, match=f"no longer in the sweep, so not started: {last.name}"):
        submit._report_dropped(plan, {last.name}, others_start=False)
    submit._report_dropped(plan, {first.name, last.name}, others_start=True)
    assert last.name in capsys.readouterr().err
    with pytest.raises(LaunchError, match="no longer in the sweep"):
        submit.submit(plan, only=[last.name])


def test_some_trials_of_a_sweep_are_resumed_and_the_others_left(submitted: Submitted):
    """Of one that failed without an attempt, FAILED.json is the only trace."""
    plan = plan_of(SWEEP, "ask", submitted.root)
    first, second, *_ = plan.trials
    failed = TrialStatus("failed", "not_started 3 times", marker="FAILED")
    status = replace(plan.status, trials={**plan.status.trials, first: failed})
    assert submit._resumable(plan, status, {first, second}) == [first, second]
    actions = plan.actions.changed(plan.trials, "leave").changed([first], "resume")
    assert [actions.starts(name) for name in plan.trials] == [True, False, False, False]


def test_a_selected_branch_starts_with_its_trunk(submitted: Submitted) -> None:
    length = "optim.epochs=2, optim.warmup_epochs=0.2"
    forked = SWEEP.replace(length, "optim=wsd, optim.warmup_epochs=null, optim.warmup_steps=1")
    forked = forked.replace("resources", "fork: {at: [4, 8]}\nresources")
    plan = plan_of(forked, "forked", submitted.root)
    branch = next(name for name, trial in plan.trials.items() if trial.trunk)
    selected = plan.select([branch])
    assert set(selected.actions.start) == {branch, plan.trials[branch].trunk}


def test_the_intent_of_a_chained_job_is_left_to_the_job_that_submits_it(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    """It calls sbatch without the lock of the root; one that is older than that was refused."""
    monkeypatch.setattr(slurm, "squeue", lambda names: [])
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)
    folder = submitted.root.sweep("ask")
    folder.intents.mkdir()
    now = now_ms()
    for name, submitted_at in (("new", now), ("old", now - 3_600_000)):
        intent = {"name": name, "trials": [], "submitted": submitted_at, "succeeds": "7"}
        write_json(folder.intent(name), intent)
    submit.adopt_orphans(submitted.root)
    assert [path.name for path in sorted(folder.intents.iterdir())] == ["new.json", "old.void"]


def test_the_files_of_few_trials_are_synced_at_once(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(SWEEP, "few", Root(submitted.root.path / "few"))
    calls: list[object] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    monkeypatch.setattr(trial_writer, "sync_filesystem", calls.append)
    trial_writer.write_trials(plan)
    assert calls == [plan.root.trials]


def test_many_trials_are_written_by_several_processes(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    """As by one process; and what one of them finds is raised."""
    monkeypatch.setattr(trial_writer, "MANY", 1)
    plan = plan_of(SWEEP, "many", Root(submitted.root.path / "many"))
    trial_writer.write_trials(plan)
    expected = {trial.name: trial.read_config() for trial in submitted.trials}
    assert {name: plan.root.trial(name).read_config() for name in plan.trials} == expected

    broken = plan.root.trial(next(iter(plan.trials)))
    write_json(broken.identity, {"identity_version": 2, "recipe": {}})
    with pytest.raises(TrialError, match=f"{broken.name} holds another recipe"):
        trial_writer.write_trials(plan)
