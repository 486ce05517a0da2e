"""One MLflow store for several roots and for users who write into it."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import fake_trials

from jepa_cluster.results import tables
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.tracking.collector import Collector
from jepa_cluster.tracking.run_tags import MAX_NOTE, NOTE, NOTE_BEGIN, merge_note, sweep_note
from jepa_cluster.trial.directory import Root, TrialDir

SCALES = fake_trials.SCALES[:1]


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def client(uri: str, tmp_path: Path) -> MlflowClient:
    return mlflow_client.connect(Root(tmp_path), uri)[0]


def new_root(folder: Path, stop: int | None = None) -> Root:
    """A root with the sweep demo of one trial, which the user stops at a step, or which is done."""
    root = Root(folder)
    for trial in fake_trials.sweep(root, "demo", ("vit_a",), SCALES):
        fake_trials.run(trial, stop=stop, **({"cause": "stopped"} if stop else {}))
        if stop:
            trial.stop.touch()
    return root


def runs(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """Return the runs of an experiment by trial; '' is the parent."""
    found = client.get_experiment_by_name(experiment)
    all_runs = client.search_runs([found.experiment_id])
    return {run.data.tags.get("jepa.trial", ""): run for run in all_runs}


def contents(client: MlflowClient, experiment: str) -> dict[str, object]:
    found = {key: (run.info, run.data) for key, run in runs(client, experiment).items()}
    tags = client.get_experiment_by_name(experiment).tags
    return {key: str(value) for key, value in found.items()} | {"tags": tags}


def test_two_roots_with_one_sweep_name_have_two_experiments(
    tmp_path: Path, uri: str, client: MlflowClient
):
    """The second root neither changes nor, by --rebuild, deletes what the first one sent."""
    sync.sync(new_root(tmp_path / "first"), uri=uri)
    before = contents(client, "demo")
    second = new_root(tmp_path / "second", stop=20)
    name = f"demo (second {second.id()})"
    report = sync.sync(second, uri=uri)
    assert report.renamed == {"demo": name}
    assert f"demo is the experiment '{name}' there" in str(report)
    assert contents(client, "demo") == before
    assert {run.info.status for run in runs(client, name).values()} == {"KILLED", "FINISHED"}

    assert sync.sync(second, uri=uri, rebuild=True).created == 2
    assert contents(client, "demo") == before
    assert sync.sync(second, uri=uri).created == 0
    moved = Root((tmp_path / "second").rename(tmp_path / "moved"))
    assert sync.sync(moved, uri=uri).created == 0


def test_an_experiment_of_an_earlier_version_stays_with_the_root_of_its_runs(
    tmp_path: Path, uri: str, client: MlflowClient
):
    """It has no id of a root. Another root with the same trials, which ran elsewhere, leaves it."""
    first = new_root(tmp_path / "first")
    sync.sync(first, uri=uri)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database, database:
        database.execute("delete from experiment_tags where key like 'jepa.root%'")
    before = contents(client, "demo")
    second = new_root(tmp_path / "second")
    for path in second.trials.iterdir():
        TrialDir(path).amend(1, {"host": "elsewhere"})
    name = f"demo (second {second.id()})"
    assert sync.sync(second, uri=uri).renamed == {"demo": name}
    assert contents(client, "demo") == before

    report = sync.sync(first, uri=uri)
    assert report.created == 0
    assert report.renamed == {}
    assert client.get_experiment_by_name("demo").tags["jepa.root"] == first.id()


def test_an_experiment_is_found_under_the_name_that_a_user_gave_it(
    tmp_path: Path, uri: str, client: MlflowClient
):
    """A deleted one is reported, and the sweeps after it are collected."""
    root = new_root(tmp_path / "root")
    sync.sync(root, uri=uri)
    experiment = client.get_experiment_by_name("demo").experiment_id
    client.rename_experiment(experiment, "my name")
    assert sync.sync(root, uri=uri).created == 0
    client.delete_experiment(experiment)
    for trial in fake_trials.sweep(root, "later", ("vit_b",), SCALES):
        fake_trials.run(trial)
    report = Collector(root, client, uri).sync_once()
    assert "'my name' was deleted in MLflow" in report.skipped["demo"]
    assert "jepa sync --rebuild demo" in report.skipped["demo"]
    assert report.created == 2


def test_what_users_write_into_notes_stays(tmp_path: Path, uri: str, client: MlflowClient):
    """While one collector runs, for the next one, and after --rebuild."""
    root = new_root(tmp_path / "root", stop=20)
    collector = Collector(root, client, uri)
    collector.sync_once()
    (trial,) = [key for key in runs(client, "demo") if key]
    experiment = client.get_experiment_by_name("demo")
    above = experiment.tags[NOTE].replace(NOTE_BEGIN, f"above\n\n{NOTE_BEGIN}") + "\n\nbelow"
    client.set_experiment_tag(experiment.experiment_id, NOTE, above)
    client.set_tag(runs(client, "demo")[""].info.run_id, NOTE, "all replaced")
    client.set_tag(runs(client, "demo")[trial].info.run_id, NOTE, "of the trial")

    fake_trials.run(root.trial(trial))
    collector.sync_once()
    for rebuild in (False, False, True):
        sync.sync(root, uri=uri, rebuild=rebuild)
        note = client.get_experiment_by_name("demo").tags[NOTE]
        assert note.startswith("above\n\n")
        assert note.endswith("\n\nbelow")
        assert note.count("1 done") == 1
        found = runs(client, "demo")
        note = found[""].data.tags[NOTE]
        assert note.startswith("all replaced\n\n")
        assert note.count("1 done") == 1
        assert found[trial].data.tags[NOTE] == "of the trial"


@pytest.mark.parametrize("stored", ["", "mine", "x" * MAX_NOTE])
def test_a_merged_note_keeps_the_users_text_and_is_merged_once(stored: str):
    """Our part is cut or left out where the limit leaves no room."""
    once = merge_note(stored, "ours " * 2000)
    assert once.startswith(stored)
    assert len(once) <= MAX_NOTE
    assert merge_note(once, "ours " * 2000) == once
    again = merge_note(once, "changed")
    assert again.startswith(stored)
    assert ("changed" in again) == (len(stored) < MAX_NOTE)


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        ("x" * 6000, "x" * 6000),  # more than we may write, less than MLflow's limit for a run
        (f"above {NOTE_BEGIN}\nours\nwritten below, the end mark is gone", "written below"),
    ],
)
def test_no_text_of_a_user_is_lost_from_a_note(
    tmp_path: Path, uri: str, client: MlflowClient, stored: str, kept: str
):
    root = new_root(tmp_path / "root", stop=20)
    sync.sync(root, uri=uri)
    parent = runs(client, "demo")[""].info.run_id
    client.set_tag(parent, NOTE, stored)
    sync.sync(root, uri=uri)
    assert kept in client.get_run(parent).data.tags[NOTE]


def test_the_note_of_a_large_sweep_says_that_mlflow_lists_a_part_of_its_runs(tmp_path: Path):
    fake_trials.sweep(Root(tmp_path), "small")
    fake_trials.sweep(Root(tmp_path), "large", ("vit_a",), SCALES, seeds=range(100))
    notes: dict[str, str] = {}
    for name in ("small", "large"):
        plan = tables.read_plan(Root(tmp_path), name)
        notes[name] = sweep_note(plan, {}, 0.0, tmp_path / "scaling.json", ("1", name))
    assert "Load more" not in notes["small"]
    assert "shows all 100 trials" in notes["large"]


def test_user_text_in_a_note_is_text(tmp_path: Path, uri: str, client: MlflowClient):
    """Markdown in a question is shown as the user typed it; links work below a static prefix."""
    root = new_root(tmp_path / "root")
    plan = root.sweep("demo").plan
    plan.write_text(plan.read_text().replace("Do stubs scale?", "[a](b) *c* <d> mask_scale $2 $4"))
    sync.sync(root, uri=uri)
    note = client.get_experiment_by_name("demo").tags[NOTE]
    assert r"\[a\](b) \*c\* \<d\> mask_scale \$2 \$4" in note
    assert "[Charts](#/experiments/" in note
    assert "[Scaling page](scaling/#sweeps=demo)" in note
