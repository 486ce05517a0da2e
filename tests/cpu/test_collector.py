"""The collector: its lock, failures of the store, kills, and a rebuild of the store."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import fake_trials
from test_tracking_sync import (
    assert_every_point_once,
    connect,
    finished_sweep,
    one_trial,
    run_of,
    send,
    stored,
    uri,
)

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import collector_lock, sync
from jepa_cluster.tracking.collector import Collector
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Root:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Root(tmp_path)


# ---- one collector at a time


def write_lease(
    root: Root,
    pid: int,
    time_: float,
) -> None:
    """Take the lock as a collector on another host would."""
    lease = {
        "host": "elsewhere",
        "pid": pid,
        "t": time_,
    }
    collector_lock.lease_path(root).write_text(json.dumps(lease))


def test_two_collectors_do_not_write_at_once(root: Root):
    """The second one's error has the pid of the first; the lock of a dead collector expires."""
    with collector_lock.hold(root, "x"):
        second = collector_lock.hold(root, "x", 0.1)
        with pytest.raises(TrackingError, match=f"pid {os.getpid()}"), second:
            pass
    write_lease(root, pid=1, time_=time.time())
    with pytest.raises(TrackingError, match="elsewhere"), collector_lock.hold(root, "x", 0.1):
        pass
    write_lease(root, pid=1, time_=5.0)
    with collector_lock.hold(root, "x", 0.1):
        assert collector_lock.holder(root)["pid"] == os.getpid()
    assert collector_lock.holder(root) is None


def test_a_collector_that_was_suspended_too_long_gives_way(
    root: Root, monkeypatch: pytest.MonkeyPatch
):
    """When another host has taken the lock, the next renewal is an error, not a second writer."""
    monkeypatch.setattr(collector_lock, "TTL", 0.0)
    with (
        pytest.raises(TrackingError, match="took over: pid 7 on elsewhere"),
        collector_lock.hold(root, "x") as renew,
    ):
        renew()
        write_lease(root, pid=7, time_=time.time())
        renew()


# ---- calls that fail


class RefusesOneRun:
    """A client whose store always refuses the batches of the first run that it gets."""

    def __init__(self, client: object) -> None:
        self._client = client
        self.run = ""

    def log_batch(self, run_id: str, **what):
        if not self.run and what.get("metrics"):
            self.run = run_id
        if run_id == self.run:
            raise ConnectionError("this one never works")
        return self._client.log_batch(run_id, **what)

    def __getattr__(self, name: str):
        return getattr(self._client, name)


def test_one_run_that_never_works_does_not_keep_the_others_waiting(root: Root):
    """The report has the trial that failed; the other five arrive in the same round."""
    trials = finished_sweep(root)
    client = RefusesOneRun(connect(root))
    report = Collector(root, client, uri(root)).sync_once()
    assert list(report.lost) == [trials[0].name]
    assert report.states == {"done": 5}
    assert "1 to be tried again" in str(report)
    assert "this one never works" in str(report)
    assert_every_point_once(root, trials[1:])
    assert send(root).states == {"done": 6}
    assert_every_point_once(root, trials)


def test_a_torn_plan_keeps_no_other_sweep_waiting(root: Root):
    """The torn sweep is sorted first; the report has its name and the reason."""
    trials = finished_sweep(root)
    torn = root.sweep("a-torn")
    torn.path.mkdir(parents=True)
    torn.plan.write_text("")
    report = Collector(root, connect(root), uri(root)).sync_once()
    assert list(report.lost) == ["a-torn"]
    assert "plan.json is not valid JSON" in str(report)
    assert report.states == {"done": 6}
    assert_every_point_once(root, trials)


class Failing:
    """A client whose calls sometimes fail, before or after they did their work."""

    def __init__(self, client: object, rng: random.Random, rate: float) -> None:
        self._client = client
        self._rng = rng
        self._rate = rate

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            if self._rng.random() < self._rate:
                raise ConnectionError("request lost")
            answer = getattr(self._client, name)(*args, **kwargs)
            if self._rng.random() < self._rate:
                raise ConnectionError("answer lost")
            return answer

        return call


def advance(
    trials: list[TrialDir],
    stop: int,
    steps: int,
    **options: int,
) -> None:
    """Run an attempt of each trial up to step `stop` of `steps`."""
    cause = "done" if stop >= steps else "preempted"
    for trial in trials:
        fake_trials.run(trial, stop=min(stop, steps), cause=cause, **options)


def test_lost_requests_and_lost_answers_double_nothing(root: Root):
    """With 15 % of requests and of answers lost, the store ends equal to the spools."""
    trials = fake_trials.sweep(root)
    client = Failing(connect(root), random.Random(3), 0.15)
    collector = Collector(root, client, uri(root))
    failures = 0
    for round_ in range(400):
        if round_ in (0, 40, 80):
            advance(trials, stop=20 * (round_ // 40 + 1), steps=60)
        try:
            report = collector.sync_once()
        except TrackingError:
            failures += 1
            continue
        failures += len(report.lost)
        if report.states == {"done": 6} and not report.lost:
            break
    assert failures > 20
    assert_every_point_once(root, trials)
    assert send(root).points == 0


def collect_until_killed(root: Root) -> int:
    """Fork a process that syncs again and again. Returns its pid."""
    pid = os.fork()
    if pid == 0:
        client = connect(root)
        with collector_lock.hold(root, uri(root)):
            collector = Collector(root, client, uri(root))
            while True:
                collector.sync_once()
    return pid


def test_a_collector_killed_twenty_times_ships_every_point_once(root: Root):
    """kill -9 at random moments while trials write; each collector starts from the store alone."""
    trials = fake_trials.sweep(root, steps=(400,))
    rng = random.Random(5)
    for kill in range(21):
        pid = collect_until_killed(root)
        advance(trials, stop=20 * (kill + 1), steps=400, every=4)
        time.sleep(rng.uniform(0.02, 0.25) if kill < 20 else 0.4)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert send(root).states == {"done": 6}
    assert_every_point_once(root, trials)


# ---- rebuild


def stored_runs(root: Root) -> dict[str, tuple[object, ...]]:
    """Return trial -> status, name, params and tags of its run, without MLflow's own ids."""
    client = connect(root)
    experiment = client.get_experiment_by_name("demo")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        tags = {}
        for key, value in run.data.tags.items():
            if key not in ("mlflow.parentRunId", "jepa.runs"):
                tags[key] = re.sub(r"experiments/\d+", "", value)
        name = tags.get("jepa.trial", "")
        found[name] = (run.info.status, run.info.run_name, run.data.params, tags)
    return found


def test_rebuilding_gives_an_equal_store(root: Root):
    """Runs, points, params and states come back from the trial directories."""
    trials = fake_trials.sweep(root)
    for trial in trials[:4]:
        fake_trials.run(trial)
    fake_trials.run(trials[4], stop=25, kill=True)
    send(root)
    before = stored_runs(root)
    points = stored(root)
    report = sync.sync(root, uri=uri(root), rebuild=True)
    assert report.created == 7
    assert stored_runs(root) == before
    assert stored(root) == points
    assert_every_point_once(root, trials)


# ---- states


def test_a_new_trial_is_queued_when_an_array_names_it(root: Root):
    """Nothing changes in its directory; the collector runs on."""
    trial = one_trial(root)
    client = connect(root)
    collector = Collector(root, client, uri(root))
    assert collector.sync_once().states == {"new": 1}
    folder = root.sweep("demo").arrays
    folder.mkdir()
    write_json(folder / "jepa.demo.A.json", {"trials": [trial.name]})
    assert collector.sync_once().states == {"queued": 1}
    assert run_of(client, trial).data.tags["jepa.state"] == "queued"
