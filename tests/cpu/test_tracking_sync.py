"""Spools to MLflow: every settled point once, and what runs, parents and charts hold."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.errors import TrackingError
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.tracking import chart_view, mlflow_client, mlflow_runs, sync
from jepa_cluster.tracking.collector import Collector
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import Spool


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Root:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Root(tmp_path)


Points = dict[tuple[str, int], list[tuple[int, float]]]  # (metric, step) -> time and value


def uri(root: Root) -> str:
    return f"sqlite:///{root.path / 'mlflow.db'}"


def connect(root: Root) -> MlflowClient:
    client, _ = mlflow_client.connect(root, uri(root))
    return client


def send(root: Root) -> sync.SyncReport:
    """Sync the root into its database, as `jepa sync` does."""
    return sync.sync(root, uri=uri(root))


def stored(root: Root) -> dict[str, Points]:
    """Return trial -> its points in the database."""
    return fake_trials.stored(uri(root))


def points_of(root: Root, trial: TrialDir) -> Points:
    return stored(root)[trial.name]


def assert_every_point_once(root: Root, trials: list[TrialDir]) -> None:
    """The tables hold each settled point of the spools once, in one run per trial."""
    found = stored(root)
    for trial in trials:
        wanted = {key: [value] for key, value in fake_trials.spooled(trial).items()}
        assert found.get(trial.name, {}) == wanted, trial.name
    assert fake_trials.doubled_runs(uri(root)) == []


def one_trial(root: Root) -> TrialDir:
    """Write a sweep of one model and scale. Returns its first trial."""
    return fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1])[0]


def run_of(client: MlflowClient, trial: TrialDir) -> Run:
    (run,) = client.search_runs(["1"], filter_string=f"tags.`jepa.trial` = '{trial.name}'")
    return run


def artifacts(client: MlflowClient, run: Run) -> set[str]:
    return {file.path for file in client.list_artifacts(run.info.run_id)}


# ---- what a synced sweep holds


def finished_sweep(root: Root) -> list[TrialDir]:
    trials = fake_trials.sweep(root)
    for trial in trials:
        fake_trials.run(trial)
    return trials


def test_a_finished_sweep_arrives_whole_and_a_second_sync_sends_nothing(root: Root):
    """One experiment, one parent, one run per trial; equal points and states."""
    trials = finished_sweep(root)
    first = send(root)
    assert first.created == 7
    assert first.trials == 6
    assert first.states == {"done": 6}
    assert first.points > 0
    second = send(root)
    assert second.created == 0
    assert second.points == 0
    assert_every_point_once(root, trials)


def test_the_parent_run_knows_the_plan_before_any_trial_has_arrived(
    root: Root, monkeypatch: pytest.MonkeyPatch
):
    """So the page can show the question, the axes, and how many trials are still to come."""
    created: list[tuple[str, dict[str, str]]] = []
    create = mlflow_runs.Experiment.create

    def note(self, key, name, tags, start):
        created.append((key, dict(tags)))
        return create(self, key, name, tags, start)

    monkeypatch.setattr(mlflow_runs.Experiment, "create", note)
    finished_sweep(root)
    send(root)
    (key, tags), *trials = created
    assert key == mlflow_runs.PARENT
    assert len(trials) == int(tags["jepa.trials"]) == 6
    assert tags["jepa.question"] == "Do stubs scale?"
    assert json.loads(tags["jepa.axes"]) == ["model", "mask.target_scale"]


def test_a_run_has_the_name_params_and_tags_of_its_trial(root: Root):
    """The name of a run selects its trial; its parent has the files of the sweep."""
    trials = finished_sweep(root)
    send(root)
    client = connect(root)
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["jepa.kind"] == "sweep"]
    assert len(runs) == 7
    assert len(parents) == 1
    (parent,) = parents
    assert "Do stubs scale?" in parent.data.tags["mlflow.note.content"]
    assert {run.info.status for run in runs} == {"FINISHED"}

    entries = json.loads(root.sweep("demo").plan.read_text())["trials"]
    run_ids = {}
    for run in runs:
        if run in parents:
            continue
        tags = run.data.tags
        run_ids[tags["jepa.trial"]] = run.info.run_id
        selected = select(entries, [run.info.run_name])
        assert [entry["name"] for entry in selected] == [tags["jepa.trial"]]
        assert tags["jepa.setting"] in run.info.run_name

    child = run_of(client, trials[0])
    assert child.info.run_name == "vit_a ts=.15-.2 s0"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["model.width"] == "32"
    assert "optim.steps" not in child.data.params
    assert child.data.tags["jepa.horizon"] == "60"

    assert artifacts(client, parent) == {"sweep.yaml", "plan.json", "runs.json"}
    tags = client.get_experiment(experiment.experiment_id).tags
    assert tags["jepa.parent"] == parent.info.run_id
    path = client.download_artifacts(parent.info.run_id, "runs.json", str(root.path))
    assert json.loads(Path(path).read_text()) == run_ids


def test_a_run_tells_where_it_comes_from_and_what_it_cost(root: Root):
    """Attempts, code, versions and seconds are tags; config and attempts are artifacts.

    The parent has the planned and the spent GPU-hours.
    """
    trial, other = fake_trials.sweep(root, models=("vit_a",))
    first = fake_trials.run(trial, stop=40, cause="preempted")
    record = {
        "versions": {"torch": "2.13", "python": "3.12"},
        "seconds": {"train": 30.0, "init": 2.0},
    }
    trial.amend(first, record)
    fake_trials.run(trial)
    record = {
        "versions": {"torch": "2.14", "python": "3.12"},
        "seconds": {"train": 10.0, "probe": 4.0},
    }
    trial.amend(2, record)
    plan = json.loads(root.sweep("demo").plan.read_text())
    for entry in plan["trials"]:
        entry.update(hours=0.5, world=2)
    root.sweep("demo").plan.write_text(json.dumps(plan))
    send(root)

    client = connect(root)
    run = run_of(client, trial)
    tags = run.data.tags
    assert tags["jepa.attempts"] == "2"
    assert tags["jepa.code"] == "abc1234"
    assert tags["jepa.host"] == "stub"
    assert tags["jepa.versions"] == "python 3.12, torch 2.14"
    assert tags["jepa.seconds"] == "train 40, probe 4, init 2"
    assert float(tags["jepa.gpu_hours"]) == pytest.approx(0.04, rel=0.01)
    assert artifacts(client, run) == {"config.yaml", "identity.json", "attempts.json"}
    assert run.data.metrics["context_fraction"] == pytest.approx(0.26)
    assert artifacts(client, run_of(client, other)) == set()

    (parent,) = client.search_runs(["1"], filter_string="tags.`jepa.kind` = 'sweep'")
    assert float(parent.data.tags["jepa.gpu_hours_planned"]) == 2.0
    assert parent.data.tags["jepa.gpu_hours"] == tags["jepa.gpu_hours"]
    assert "2 planned" in parent.data.tags["mlflow.note.content"]


def test_the_shipped_view_has_one_colour_per_model_and_mixes_no_sizes(root: Root):
    """No contour: it would mix sizes, horizons and seeds."""
    kinds = [chart["type"] for chart in chart_view.page_state()["compareRunCharts"]]
    assert "CONTOUR" not in kinds
    assert kinds.count("PARALLEL") == 1
    assert kinds.count("LINE") >= 3

    fake_trials.sweep(root)
    send(root)
    client = connect(root)
    tag = json.loads(client.get_experiment("1").tags[chart_view.TAG])
    packed = tag["state"].removeprefix("deflate;")
    shipped = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert shipped == chart_view.page_state()
    runs = client.search_runs(["1"], filter_string="tags.`jepa.trial` LIKE '%'")
    colors = {(run.data.params["model.name"], run.data.tags["mlflow.runColor"]) for run in runs}
    assert len(runs) == 6
    assert len(colors) == 3


def test_watching_with_sync_leaves_nothing_unshipped(
    root: Root, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`jepa watch --until-done --sync` ends when all trials are done and in the store."""
    trials = fake_trials.sweep(root, models=("vit_a",))
    for trial in trials:
        fake_trials.run(trial)
    monkeypatch.setenv("JEPA_ROOT", str(root.path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main(["watch", "demo", "--until-done", "--sync"]) == 0
    assert "2 trials (2 done)" in capsys.readouterr().err
    assert_every_point_once(root, trials)


def test_the_status_of_a_run_follows_the_state_of_its_trial(root: Root):
    """An attempt that is killed without a word, retries that are used up, STOP before the start.

    No file changes when a heartbeat stops; the same collector notices it. The parent ends with the
    last trial.
    """
    killed, lost, stopped, done = fake_trials.sweep(root, models=("vit_a", "vit_b"))
    plan = read_json(root.sweep("demo").plan)
    write_json(root.sweep("demo").plan, {**(plan or {}), "retries": {"killed": 0}})
    fake_trials.run(killed, stop=35, kill=True)
    fake_trials.run(lost, stop=35, kill=True)
    killed.heartbeat.touch()
    stopped.stop.touch()
    client = connect(root)
    collector = Collector(root, client, uri(root))

    def statuses() -> list[str]:
        report = collector.sync_once()
        assert not report.lost
        (experiment,) = client.search_experiments(filter_string="name = 'demo'")
        runs = client.search_runs([experiment.experiment_id])
        by_name = {run.data.tags.get("jepa.trial", ""): run.info.status for run in runs}
        return [by_name[name] for name in (killed.name, lost.name, stopped.name, done.name, "")]

    assert statuses() == ["RUNNING", "FAILED", "KILLED", "SCHEDULED", "RUNNING"]
    long_ago = time.time() - 200
    os.utime(killed.heartbeat, (long_ago, long_ago))
    assert statuses()[0] == "FAILED"
    fake_trials.run(done)
    assert statuses() == ["FAILED", "FAILED", "KILLED", "FINISHED", "FINISHED"]


# ---- which points are shipped


def test_only_settled_steps_are_shipped_and_history_continues(root: Root):
    """Rows after the last commit wait; a kill and two more attempts leave one run and no double."""
    trial = one_trial(root)
    fake_trials.run(trial, stop=35, kill=True)
    send(root)
    steps = {step for _, step in points_of(root, trial)}
    assert steps == {0, 5, 10, 15, 20}
    assert send(root).states == {"interrupted": 1}
    fake_trials.run(trial, stop=45, cause="preempted")
    assert send(root).states == {"interrupted": 1}
    fake_trials.run(trial)
    assert send(root).states == {"done": 1}
    assert_every_point_once(root, [trial])
    steps = {step for _, step in points_of(root, trial)}
    assert max(steps) == 60


def test_a_torn_line_waits_and_a_damaged_one_is_counted(root: Root):
    """A half-written last line is shipped once it is whole; a damaged line is the only one lost."""
    trial = one_trial(root)
    fake_trials.run(trial, stop=20, kill=True)
    with trial.metrics(1).open("ab") as f:
        f.write(b"\x00\xff garbage\n")
        f.write(b'{"step": 25, "t": 5, "loss": 0.25}\n')
        f.write(b'{"step": 30, "t": 6, "lo')
    send(root)
    with trial.metrics(1).open("ab") as f:
        f.write(b'ss": 0.5}\n')
        f.write(b'{"commit": 30, "t": 7}\n')
    send(root)
    assert_every_point_once(root, [trial])
    assert points_of(root, trial)["loss", 30] == [(6, 0.5)]
    run = run_of(connect(root), trial)
    assert run.data.tags["jepa.damaged_lines"] == "1"


def test_a_late_commit_waits_for_the_first_line_of_the_next_attempt(root: Root):
    """While attempt 2 is claimed but silent, what attempt 1 commits may still be void."""
    trial = one_trial(root)
    first = Spool(trial, trial.claim({"world": 2}))
    first.log(5, {"loss": 1.0})
    second = trial.claim({"world": 2})
    first.commit(5)
    send(root)
    assert stored(root) == {}
    trial.metrics(second).write_text('{"settled": -1, "attempt": 2, "t": 1}\n')
    with trial.metrics(second).open("a") as spool:
        spool.write('{"step": 5, "t": 9, "loss": 2.0}\n')
        spool.write('{"commit": 5, "t": 9}\n')
    send(root)
    assert points_of(root, trial) == {("loss", 5): [(9, 2.0)]}


def test_numbers_that_are_not_finite_do_not_stop_the_rest(root: Root):
    """NaN and infinity are stored; characters that MLflow refuses in names become underscores."""
    trial = one_trial(root)
    spool = Spool(trial, trial.claim({}))
    values = {
        "loss": float("nan"),
        "grad_norm": float("inf"),
        "odd=name": 1.0,
    }
    spool.log(1, values)
    spool.commit(1)
    send(root)
    points = points_of(root, trial)
    assert set(points) == {("loss", 1), ("grad_norm", 1), ("odd_name", 1)}


# ---- stores that cannot be used


def test_an_unreachable_server_is_one_clear_error_and_nothing_is_lost(root: Root):
    """The same call works when the store is back."""
    trials = fake_trials.sweep(root, models=("vit_a",))
    fake_trials.run(trials[0])
    with pytest.raises(TrackingError, match="connection refused") as e:
        sync.sync(root, uri="http://someone:secret@127.0.0.1:9")
    assert "nothing is lost" in str(e.value)
    assert "secret" not in str(e.value)
    send(root)
    assert_every_point_once(root, trials)


@pytest.mark.parametrize(
    "where", ["file:///nowhere", "relative/path", "sqlite:////proc/none/mlflow.db"]
)
def test_a_store_that_cannot_be_is_refused(root: Root, where: str):
    """A folder, a relative path and a database that cannot be made are a TrackingError."""
    fake_trials.sweep(root, models=("vit_a",))
    with pytest.raises(TrackingError):
        sync.sync(root, uri=where)


MODULES_OF_THE_TRAINER = """
import importlib, pkgutil, sys
import jepa_cluster.training, jepa_cluster.data, jepa_cluster.launch.worker.main

for package in (jepa_cluster.training, jepa_cluster.data):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
tracking = [name for name in sys.modules if name.startswith(("mlflow", "jepa_cluster.tracking"))]
print("torch" in sys.modules, tracking)
"""


@pytest.mark.slow
def test_the_trainer_and_all_that_it_loads_never_load_mlflow():
    """Every module of training, data and the worker, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MODULES_OF_THE_TRAINER],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    assert done.stdout == "True []\n"
