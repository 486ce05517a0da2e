"""Spools to MLflow: every settled point once, whatever dies in between."""

import base64
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from support import fake_trials

from jepa_cluster.errors import TrackingError
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.tracking import chart_view, collector_lock, mlflow_client, sync
from jepa_cluster.tracking.collector import Collector
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.spool import Spool

MASKS = ("mask.target_scale", "mask.target_aspect")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in it, made once (3 s) and copied."""
    folder = tmp_path_factory.mktemp("store")
    client, _ = mlflow_client.connect(Root(folder), f"sqlite:///{folder}/mlflow.db")
    client.search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Root:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Root(tmp_path)


def uri(root: Root) -> str:
    return f"sqlite:///{root.path / 'mlflow.db'}"


def assert_every_point_once(root: Root, trials: list[TrialDir]) -> None:
    """The tables hold what the spools say is settled: same value, same time, one row each, one run a trial."""
    found = fake_trials.stored(uri(root))
    for trial in trials:
        assert found.get(trial.name, {}) == {k: [v] for k, v in fake_trials.spooled(trial).items()}, trial.name
    assert fake_trials.doubled_runs(uri(root)) == []


def test_a_finished_sweep_arrives_whole_and_a_second_sync_sends_nothing(root: Root):
    """One experiment, one parent, one run a trial; equal points, params and states."""
    trials = fake_trials.sweep(root)
    for trial in trials:
        fake_trials.run(trial)
    first = sync.sync(root, uri=uri(root))
    assert (first.created, first.trials, first.states) == (7, 6, {"done": 6}) and first.points > 0
    second = sync.sync(root, uri=uri(root))
    assert (second.created, second.points) == (0, 0)
    assert_every_point_once(root, trials)
    client, _ = mlflow_client.connect(root, uri(root))
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags["jepa.kind"] == "sweep"]
    assert len(runs) == 7 and len(parents) == 1
    assert "Do stubs scale?" in parents[0].data.tags["mlflow.note.content"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    child = next(r for r in runs if r.data.tags.get("jepa.trial") == trials[0].name)
    assert child.info.run_name == "vit_a ts=.15-.2 s0"
    entries = json.loads(root.sweep("demo").plan.read_text())["trials"]
    for run in runs:  # its name, pasted, selects the trial
        if run in parents:
            continue
        selected = select(entries, [run.info.run_name])
        assert [entry["name"] for entry in selected] == [run.data.tags["jepa.trial"]]
        assert run.data.tags["jepa.setting"] in run.info.run_name
    assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert child.data.params["model.width"] == "32" and "optim.steps" not in child.data.params
    assert child.data.tags["jepa.horizon"] == "60"
    assert {a.path for a in client.list_artifacts(parents[0].info.run_id)} == {
        "sweep.yaml", "plan.json", "runs.json",
    }  # fmt: skip
    assert client.get_experiment(experiment.experiment_id).tags["jepa.parent"] == parents[0].info.run_id
    named = json.loads(Path(client.download_artifacts(parents[0].info.run_id, "runs.json", str(root.path))).read_text())
    assert named == {r.data.tags["jepa.trial"]: r.info.run_id for r in runs if r not in parents}


def test_a_run_tells_where_it_comes_from_and_what_it_cost(root: Root):
    """Attempts, code, versions and seconds as tags; the frozen config and every attempt as artifacts; on the parent
    what was planned and what was spent."""
    trial, other = fake_trials.sweep(root, models=("vit_a",))
    attempt = fake_trials.run(trial, stop=40, cause="preempted")
    trial.amend(attempt, {"versions": {"torch": "2.13", "python": "3.12"}, "seconds": {"train": 30.0, "init": 2.0}})
    fake_trials.run(trial)
    trial.amend(2, {"versions": {"torch": "2.14", "python": "3.12"}, "seconds": {"train": 10.0, "probe": 4.0}})
    plan = json.loads(root.sweep("demo").plan.read_text())
    plan["trials"] = [{**t, "hours": 0.5, "world": 2} for t in plan["trials"]]
    root.sweep("demo").plan.write_text(json.dumps(plan))
    sync.sync(root, uri=uri(root))
    client, _ = mlflow_client.connect(root, uri(root))
    runs = {r.data.tags.get("jepa.trial", ""): r for r in client.search_runs(["1"])}
    tags = runs[trial.name].data.tags
    assert (tags["jepa.attempts"], tags["jepa.code"], tags["jepa.host"]) == ("2", "abc1234", "stub")
    assert tags["jepa.versions"] == "python 3.12, torch 2.14" and tags["jepa.seconds"] == "train 40, probe 4, init 2"
    assert float(tags["jepa.gpu_hours"]) == pytest.approx(0.04, rel=0.01)
    files = {a.path for a in client.list_artifacts(runs[trial.name].info.run_id)}
    assert files == {"config.yaml", "identity.json", "attempts.json"}
    assert runs[trial.name].data.metrics["context_fraction"] == pytest.approx(0.26)
    assert client.list_artifacts(runs[other.name].info.run_id) == []
    parent = runs[""].data.tags
    assert float(parent["jepa.gpu_hours_planned"]) == 2.0 and parent["jepa.gpu_hours"] == tags["jepa.gpu_hours"]
    assert "2 planned" in parent["mlflow.note.content"]


def test_the_shipped_view_shows_what_the_sweep_varies(root: Root):
    """A contour where scale and aspect are both swept, a scatter where one is; one colour a model in every chart."""
    one, two = chart_view.page_state(["mask.target_scale"], "e"), chart_view.page_state(list(MASKS), "e")
    kinds = [[c["type"] for c in state["compareRunCharts"]] for state in (one, two)]
    assert "CONTOUR" not in kinds[0] and kinds[1].count("CONTOUR") == 1
    assert all(k.count("PARALLEL") == 1 and k.count("LINE") >= 3 for k in kinds)
    fake_trials.sweep(root)
    sync.sync(root, uri=uri(root))
    client, _ = mlflow_client.connect(root, uri(root))
    packed = json.loads(client.get_experiment("1").tags[chart_view.TAG])["state"].removeprefix("deflate;")
    shipped = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert shipped == chart_view.page_state(["model", "mask.target_scale"], "probe/class_error")
    runs = [r for r in client.search_runs(["1"]) if "jepa.trial" in r.data.tags]
    colors = {(r.data.params["model.name"], r.data.tags["mlflow.runColor"]) for r in runs}
    assert len(runs) == 6 and len(colors) == 3


class Refusing:
    """A client to whom the store refuses one run's batches, for a reason that will not go away."""

    def __init__(self, client: object) -> None:
        self._client, self.run = client, ""

    def log_batch(self, run_id: str, **what):
        self.run = self.run or (run_id if what.get("metrics") else "")
        if run_id == self.run:
            raise ConnectionError("this one never works")
        return self._client.log_batch(run_id, **what)

    def __getattr__(self, name: str):
        return getattr(self._client, name)


def test_one_run_that_never_works_does_not_keep_the_others_waiting(root: Root):
    """Its failure is reported by name; the other five arrive in the same round."""
    trials = fake_trials.sweep(root)
    for trial in trials:
        fake_trials.run(trial)
    client, _ = mlflow_client.connect(root, uri(root))
    report = Collector(root, Refusing(client), uri(root)).sync_once()
    assert list(report.lost) == [trials[0].name] and report.states == {"done": 5}
    assert "1 to be tried again" in str(report) and "this one never works" in str(report)
    assert_every_point_once(root, trials[1:])
    assert sync.sync(root, uri=uri(root)).states == {"done": 6}
    assert_every_point_once(root, trials)


def test_the_trainer_and_all_that_it_loads_never_load_mlflow():
    """Every module of the training floor and of the job, in a fresh process."""
    code = """if True:
        import importlib, pkgutil, sys
        import jepa_cluster.training, jepa_cluster.data, jepa_cluster.launch.worker.main
        for package in (jepa_cluster.training, jepa_cluster.data):
            for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        print("torch" in sys.modules, [m for m in sys.modules if m.startswith(("mlflow", "jepa_cluster.tracking"))])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout == "True []\n"


def test_watching_with_sync_leaves_nothing_unshipped(
    root: Root, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`jepa watch --until-done --sync` ends when all is done, and all is in the store by then."""
    from jepa_cluster import cli

    trials = fake_trials.sweep(root, models=("vit_a",))
    for trial in trials:
        fake_trials.run(trial)
    monkeypatch.setenv("JEPA_ROOT", str(root.path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main(["watch", "demo", "--until-done", "--sync"]) == 0
    assert "2 trials (2 done)" in capsys.readouterr().err
    assert_every_point_once(root, trials)


def test_only_settled_steps_are_shipped_and_history_goes_on_where_it_stopped(root: Root):
    """Rows after the last commit wait; a kill, a resume and a second attempt leave one run without a double."""
    trial, *_ = fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1])
    fake_trials.run(trial, stop=35, kill=True)
    sync.sync(root, uri=uri(root))
    assert {s for _, s in fake_trials.stored(uri(root))[trial.name]} == {0, 5, 10, 15, 20}
    assert sync.sync(root, uri=uri(root)).states == {"running": 1}
    fake_trials.run(trial, stop=45, cause="preempted")
    assert sync.sync(root, uri=uri(root)).states == {"cool-down": 1}
    fake_trials.run(trial)
    assert sync.sync(root, uri=uri(root)).states == {"done": 1}
    assert_every_point_once(root, [trial])
    assert max(s for _, s in fake_trials.stored(uri(root))[trial.name]) == 60


def test_a_torn_line_waits_and_a_damaged_one_is_counted(root: Root):
    """A half-written last line is shipped when it is whole; garbage in the middle costs that line alone."""
    trial, *_ = fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1])
    fake_trials.run(trial, stop=20, kill=True)
    with trial.metrics(1).open("ab") as f:
        f.write(b'\x00\xff garbage\n{"step": 25, "t": 5, "loss": 0.25}\n{"step": 30, "t": 6, "lo')
    sync.sync(root, uri=uri(root))
    with trial.metrics(1).open("ab") as f:
        f.write(b'ss": 0.5}\n{"commit": 30, "t": 7}\n')
    sync.sync(root, uri=uri(root))
    assert_every_point_once(root, [trial])
    assert fake_trials.stored(uri(root))[trial.name]["loss", 30] == [(6, 0.5)]
    client, _ = mlflow_client.connect(root, uri(root))
    run = client.search_runs(["1"], filter_string=f"tags.`jepa.trial` = '{trial.name}'")[0]
    assert run.data.tags["jepa.damaged_lines"] == "1"


def test_a_zombies_commit_is_not_shipped_before_its_successor_has_spoken(root: Root):
    """Attempt 2 is claimed but silent: what attempt 1 commits now may be void, so it waits."""
    trial, *_ = fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1])
    first = Spool(trial, trial.claim({"world": 2}))
    first.log(5, {"loss": 1.0})
    second = trial.claim({"world": 2})
    first.commit(5)
    sync.sync(root, uri=uri(root))
    assert fake_trials.stored(uri(root)) == {}
    trial.metrics(second).write_text('{"settled": -1, "attempt": 2, "t": 1}\n')
    heir = trial.metrics(second).open("a")
    heir.write('{"step": 5, "t": 9, "loss": 2.0}\n{"commit": 5, "t": 9}\n')
    heir.close()
    sync.sync(root, uri=uri(root))
    assert fake_trials.stored(uri(root))[trial.name] == {("loss", 5): [(9, 2.0)]}


def test_numbers_that_are_none_do_not_stop_the_rest(root: Root):
    """NaN and infinity are stored as MLflow stores them, names it would refuse are spelled with underscores."""
    trial, *_ = fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1])
    spool = Spool(trial, trial.claim({}))
    spool.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "odd=name": 1.0})
    spool.commit(1)
    sync.sync(root, uri=uri(root))
    points = fake_trials.stored(uri(root))[trial.name]
    assert set(points) == {("loss", 1), ("grad_norm", 1), ("odd_name", 1)}


def test_an_unreachable_server_is_one_clear_error_and_nothing_is_lost(root: Root):
    """No traceback, no long wait, the spools untouched; the same call works when the store is back."""
    trials = fake_trials.sweep(root, models=("vit_a",))
    fake_trials.run(trials[0])
    with pytest.raises(TrackingError, match="connection refused") as e:
        sync.sync(root, uri="http://someone:secret@127.0.0.1:9")
    assert "nothing is lost" in str(e.value) and "secret" not in str(e.value)
    sync.sync(root, uri=uri(root))
    assert_every_point_once(root, trials)


@pytest.mark.parametrize("where", ["file:///nowhere", "relative/path", "sqlite:////proc/none/mlflow.db"])
def test_a_store_that_cannot_be_is_refused_by_name(root: Root, where: str):
    """The URI, what is wrong with it, what to write instead."""
    fake_trials.sweep(root, models=("vit_a",))
    with pytest.raises(TrackingError):
        sync.sync(root, uri=where)


def test_two_collectors_do_not_write_at_once(root: Root):
    """The second names the one that runs; a lease left by a dead process or a day-old host is no obstacle."""
    with (
        collector_lock.hold(root, "x"),
        pytest.raises(TrackingError, match=f"pid {os.getpid()}"),
        collector_lock.hold(root, "x", 0.1),
    ):
        pass
    collector_lock.lease_path(root).write_text(json.dumps({"host": "elsewhere", "pid": 1, "t": time.time()}))
    with pytest.raises(TrackingError, match="elsewhere"), collector_lock.hold(root, "x", 0.1):
        pass
    collector_lock.lease_path(root).write_text('{"host": "elsewhere", "pid": 1, "t": 5.0}')
    with collector_lock.hold(root, "x", 0.1):
        assert collector_lock.holder(root)["pid"] == os.getpid()
    assert collector_lock.holder(root) is None


def test_a_collector_that_stood_still_too_long_gives_way(root: Root, monkeypatch: pytest.MonkeyPatch):
    """Another host took the lease over meanwhile: the next renewal is an error, not a second writer."""
    monkeypatch.setattr(collector_lock, "TTL", 0.0)
    with pytest.raises(TrackingError, match="took over: pid 7 on elsewhere"), collector_lock.hold(root, "x") as renew:
        renew()
        collector_lock.lease_path(root).write_text(json.dumps({"host": "elsewhere", "pid": 7, "t": time.time()}))
        renew()


class Failing:
    """A client whose calls fail now and then, before or after they did their work."""

    def __init__(self, client: object, rng: random.Random, rate: float) -> None:
        self._client, self._rng, self._rate = client, rng, rate

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            if self._rng.random() < self._rate:
                raise ConnectionError("request lost")
            answer = getattr(self._client, name)(*args, **kwargs)
            if self._rng.random() < self._rate:
                raise ConnectionError("answer lost")
            return answer

        return call


def test_lost_requests_and_lost_answers_double_nothing(root: Root):
    """A third of all calls fail on either way, runs being created among them; the store ends equal to the spools."""
    trials = fake_trials.sweep(root)
    client, _ = mlflow_client.connect(root, uri(root))
    collector = Collector(root, Failing(client, random.Random(3), 0.15), uri(root))
    failures = 0
    for round_ in range(400):
        for trial in trials:
            if round_ % 40 == 0 and not trial.done.exists():
                fake_trials.run(
                    trial, stop=min(60, 20 * (round_ // 40 + 1)), cause="done" if round_ >= 80 else "preempted"
                )
        try:
            report = collector.sync_once()
        except TrackingError:
            failures += 1
        else:
            failures += len(report.lost)
            if report.states == {"done": 6} and not report.lost:
                break
    assert failures > 20
    assert_every_point_once(root, trials)
    assert sync.sync(root, uri=uri(root)).points == 0


def test_a_collector_killed_twenty_times_ships_every_point_once(root: Root):
    """kill -9 at random moments while trials write; one collector at a time, each starting from the store alone."""
    trials = fake_trials.sweep(root, steps=(400,))
    rng = random.Random(5)
    stop = 0
    for kill in range(21):
        pid = os.fork()
        if pid == 0:
            client, _ = mlflow_client.connect(root, uri(root))
            with collector_lock.hold(root, uri(root)):
                collector = Collector(root, client, uri(root))
                while True:
                    collector.sync_once()
        stop += 20
        for trial in trials:
            fake_trials.run(trial, stop=min(stop, 400), cause="done" if stop >= 400 else "preempted", every=4)
        time.sleep(rng.uniform(0.02, 0.25) if kill < 20 else 0.4)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert sync.sync(root, uri=uri(root)).states == {"done": 6}
    assert_every_point_once(root, trials)


def test_rebuilding_gives_an_equal_store(root: Root):
    """The projection can be thrown away: runs, points, params and states come back from the trial directories."""
    trials = fake_trials.sweep(root)
    for trial in trials[:4]:
        fake_trials.run(trial)
    fake_trials.run(trials[4], stop=25, kill=True)

    def picture() -> dict[str, tuple]:
        client, _ = mlflow_client.connect(root, uri(root))
        experiment = client.get_experiment_by_name("demo")
        runs = client.search_runs([experiment.experiment_id])
        own = {"mlflow.parentRunId", "jepa.runs"}  # MLflow's own ids differ, in links too
        return {
            r.data.tags.get("jepa.trial", ""): (
                r.info.status, r.info.run_name, r.data.params,
                {k: re.sub(r"experiments/\d+", "", v) for k, v in r.data.tags.items() if k not in own},
            )
            for r in runs
        }  # fmt: skip

    sync.sync(root, uri=uri(root))
    before, points = picture(), fake_trials.stored(uri(root))
    report = sync.sync(root, uri=uri(root), rebuild=True)
    assert report.created == 7 and picture() == before
    assert fake_trials.stored(uri(root)) == points
    assert_every_point_once(root, trials)
