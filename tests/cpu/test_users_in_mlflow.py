"""What users do by hand in MLflow: the projection stays right, and what is theirs stays."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from support import fake_trials

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.tracking.chart_view import COLOR
from jepa_cluster.tracking.collector import Collector
from jepa_cluster.tracking.run_tags import NOTE
from jepa_cluster.trial.directory import Root, TrialDir

SCALES = fake_trials.SCALES[:1]
PARENT = ""
OURS = (
    "jepa.gpu_hours",
    "jepa.settled",
    "jepa.state",
    "jepa.setting",
    "mlflow.parentRunId",
    "axis.model",
)


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Root:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Root(tmp_path)


def uri(root: Root) -> str:
    return f"sqlite:///{root.path / 'mlflow.db'}"


@pytest.fixture
def client(root: Root) -> MlflowClient:
    return mlflow_client.connect(root, uri(root))[0]


def one_trial(root: Root, sweep: str = "demo", model: str = "vit_a") -> TrialDir:
    """Write a sweep of one trial, which has ended its first half."""
    (trial,) = fake_trials.sweep(root, sweep, (model,), SCALES)
    fake_trials.run(trial, stop=30, cause="preempted")
    return trial


def experiment_of(client: MlflowClient, sweep: str = "demo") -> str:
    found = client.search_experiments(ViewType.ALL, filter_string=f"tags.`jepa.sweep` = '{sweep}'")
    (experiment,) = found
    return experiment.experiment_id


def runs_of(client: MlflowClient, sweep: str = "demo") -> dict[str, Run]:
    """Return the active runs of a sweep by trial; PARENT is the sweep's own run."""
    found: dict[str, Run] = {}
    for run in client.search_runs([experiment_of(client, sweep)]):
        tags = run.data.tags
        if "jepa.kind" not in tags:
            continue
        key = tags.get("jepa.trial", PARENT)
        assert key not in found, f"two runs of '{key}'"
        found[key] = run
    return found


def assert_every_point_once(root: Root, trials: list[TrialDir]) -> None:
    stored = fake_trials.stored(uri(root))
    for trial in trials:
        wanted = {key: [value] for key, value in fake_trials.spooled(trial).items()}
        assert stored.get(trial.name, {}) == wanted, trial.name


# ---- experiments


def test_a_deleted_experiment_is_left_alone_and_the_other_sweeps_arrive(
    root: Root, client: MlflowClient
):
    """`jepa sync` names it and ends well; `jepa sync demo` is an error; restored, it goes on."""
    trial = one_trial(root)
    sync.sync(root, uri=uri(root))
    experiment = experiment_of(client)
    client.delete_experiment(experiment)
    later = one_trial(root, "later", "vit_b")
    fake_trials.run(trial)

    report = sync.sync(root, uri=uri(root))
    assert report.sweeps == ["later"]
    assert "the experiment 'demo' was deleted in MLflow" in str(report)
    assert "jepa sync --rebuild demo" in str(report)
    with pytest.raises(TrackingError, match="'demo' was deleted in MLflow"):
        sync.sync(root, ["demo"], uri=uri(root))
    assert client.get_experiment(experiment).lifecycle_stage == "deleted"

    client.restore_experiment(experiment)
    sync.sync(root, uri=uri(root))
    assert_every_point_once(root, [trial, later])


def test_an_experiment_deleted_under_a_collector_keeps_no_other_sweep_waiting(
    root: Root, client: MlflowClient
):
    """Its runs are refused for one round, after which it is left alone."""
    trials = fake_trials.sweep(root, "demo", seeds=range(2))
    for trial in trials:
        fake_trials.run(trial, stop=30, cause="preempted")
    collector = Collector(root, client, uri(root))
    collector.sync_once()
    client.delete_experiment(experiment_of(client))
    for trial in trials:
        fake_trials.run(trial)
    later = one_trial(root, "later", "vit_b")

    assert "later" in collector.sync_once().sweeps
    assert_every_point_once(root, [later])
    report = collector.sync_once()
    assert report.lost == {}
    assert list(report.skipped) == ["demo"]


# ---- runs


def test_a_deleted_run_comes_back_with_its_note_and_what_it_missed(
    root: Root, client: MlflowClient
):
    """A trial's run and the parent run: restored rather than made again."""
    trial = one_trial(root)
    sync.sync(root, uri=uri(root))
    before = {key: run.info.run_id for key, run in runs_of(client).items()}
    client.set_tag(before[trial.name], NOTE, "look at this one")
    for run in before.values():
        client.delete_run(run)
    fake_trials.run(trial)

    report = sync.sync(root, uri=uri(root))
    found = runs_of(client)
    assert report.created == 0
    assert {key: run.info.run_id for key, run in found.items()} == before
    assert found[trial.name].data.tags[NOTE] == "look at this one"
    assert found[trial.name].data.tags["mlflow.parentRunId"] == before[PARENT]
    assert_every_point_once(root, [trial])


def test_a_run_deleted_under_a_collector_comes_back(root: Root, client: MlflowClient):
    trial = one_trial(root)
    collector = Collector(root, client, uri(root))
    collector.sync_once()
    for run in runs_of(client).values():
        client.delete_run(run.info.run_id)
    fake_trials.run(trial)
    for _ in range(2):
        collector.sync_once()
    assert runs_of(client).keys() == {trial.name, PARENT}
    assert_every_point_once(root, [trial])


def test_runs_lie_below_the_parent_run_that_exists(root: Root, client: MlflowClient):
    """After the parent run was removed for good (`mlflow gc`), or its tag was changed by hand."""
    trial = one_trial(root)
    fake_trials.run(trial)
    sync.sync(root, uri=uri(root))
    parent = runs_of(client)[PARENT].info.run_id
    client.delete_tag(parent, "jepa.kind")
    client.set_tag(runs_of(client)[trial.name].info.run_id, "axis.model", "by hand")
    sync.sync(root, uri=uri(root))

    found = runs_of(client)
    tags = found[trial.name].data.tags
    assert found[PARENT].info.run_id != parent
    assert tags["mlflow.parentRunId"] == found[PARENT].info.run_id
    assert tags["axis.model"] == "vit_a"


def colors_of(client: MlflowClient) -> dict[str, str | None]:
    return {key: run.data.tags.get(COLOR) for key, run in runs_of(client).items()}


def test_a_colour_of_ours_follows_the_sizes_and_one_of_a_user_stays(
    root: Root, client: MlflowClient
):
    """Sizes that are added later change the scale of colours."""
    first = fake_trials.sweep(root, "demo", ("vit_a", "vit_b"), SCALES)
    sync.sync(root, uri=uri(root))
    before = colors_of(client)
    client.set_tag(runs_of(client)[first[0].name].info.run_id, COLOR, "#123456")
    trials = fake_trials.sweep(root, "demo", ("vit_a", "vit_b", "vit_c"), SCALES)
    for trial in trials:
        fake_trials.run(trial)
    sync.sync(root, uri=uri(root))
    after = colors_of(client)
    assert after[trials[0].name] == "#123456"
    assert after[trials[1].name] != before[trials[1].name]
    assert after[trials[2].name] == before[trials[1].name]


@pytest.mark.parametrize("coloured", ["before", "under the collector"])
def test_colours_of_finished_runs_follow_the_sizes(root: Root, client: MlflowClient, coloured: str):
    """Nothing in the directories of their trials changes, and one collector runs on."""
    first = fake_trials.sweep(root, "demo", ("vit_a", "vit_b"), SCALES)
    for trial in first:
        fake_trials.run(trial)
    collector = Collector(root, client, uri(root))
    collector.sync_once()
    before = colors_of(client)
    client.set_tag(runs_of(client)[first[0].name].info.run_id, COLOR, "#123456")
    if coloured == "before":
        collector = Collector(root, client, uri(root))
    trials = fake_trials.sweep(root, "demo", ("vit_a", "vit_b", "vit_c"), SCALES)
    report = collector.sync_once()
    assert report.points == 0
    after = colors_of(client)
    assert after[first[0].name] == "#123456"
    assert after[first[1].name] != before[first[1].name]
    assert after[trials[2].name] == before[first[1].name]


def relabel(root: Root, label: str) -> None:
    """Give the only trial of the sweep another label, as an edit of its axes does."""
    path = root.sweep("demo").plan
    plan = json.loads(path.read_text())
    plan["trials"][0]["label"] = label
    path.write_text(json.dumps(plan))


def test_a_run_is_renamed_with_its_label_unless_a_user_renamed_it(root: Root, client: MlflowClient):
    """A sweep that varies one more setting has longer labels, also of finished trials."""
    trial = one_trial(root)
    fake_trials.run(trial)
    sync.sync(root, uri=uri(root))
    relabel(root, "vit_a ts=.15-.2 lr=.001 s0")
    sync.sync(root, uri=uri(root))
    assert runs_of(client)[trial.name].info.run_name == "vit_a ts=.15-.2 lr=.001 s0"

    client.update_run(runs_of(client)[trial.name].info.run_id, name="my favourite")
    relabel(root, "vit_a lr=.001 s0")
    sync.sync(root, uri=uri(root))
    run = runs_of(client)[trial.name]
    assert run.info.run_name == "my favourite"
    assert run.data.tags["jepa.label"] == "vit_a lr=.001 s0"


# ---- everything at once


class User:
    """Does by hand, in a random order, what MLflow's pages offer.

    own: what the user made and wrote, which must be there in the end: (run, key) -> value.
    """

    def __init__(self, client: MlflowClient, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.own: dict[tuple[str, str], str] = {}
        self.experiment = experiment_of(client)
        self.name = "demo"

    def act(self) -> None:
        active = self.client.get_experiment(self.experiment).lifecycle_stage == "active"
        if not active:
            self.client.restore_experiment(self.experiment)
            return
        weights = {
            self.delete: 2,
            self.rename: 2,
            self.write: 3,
            self.edit: 3,
            self.add: 1,
            self.delete_experiment: 1,
        }
        (action,) = self.rng.choices(list(weights), list(weights.values()))
        action()

    def runs(self) -> list[Run]:
        return self.client.search_runs([self.experiment], run_view_type=ViewType.ALL)

    def pick(self) -> str:
        """Return a run of ours; a deleted one is restored first."""
        ours = [run for run in self.runs() if "jepa.kind" in run.data.tags]
        run = self.rng.choice(ours)
        if run.info.lifecycle_stage != "active":
            self.client.restore_run(run.info.run_id)
        return run.info.run_id

    def delete(self) -> None:
        run = self.pick()
        self.client.delete_run(run)

    def rename(self) -> None:
        name = f"name {self.rng.random()}"
        if self.rng.random() < 0.3:
            self.name = name
            self.client.rename_experiment(self.experiment, name)
            return
        run = self.pick()
        self.client.update_run(run, name=name)
        self.own[run, "name"] = name

    def write(self) -> None:
        """Write into a note, and a tag of the user's own."""
        run = self.pick()
        text = f"text {self.rng.random()}"
        stored = self.client.get_run(run).data.tags.get(NOTE, "")
        self.client.set_tag(run, NOTE, f"{text} {stored}")
        self.client.set_tag(run, "reviewed", text)
        self.own[run, "reviewed"] = self.own[run, NOTE] = text

    def edit(self) -> None:
        """Change a tag that is ours."""
        run = self.pick()
        tags = self.client.get_run(run).data.tags
        for key in OURS:
            if key in tags and self.rng.random() < 0.5:
                self.client.set_tag(run, key, "by hand")

    def add(self) -> None:
        """Make a run without our tags."""
        made = self.client.create_run(self.experiment, run_name="mine")
        self.client.log_metric(made.info.run_id, "loss", 1.0)
        self.own[made.info.run_id, "name"] = "mine"

    def delete_experiment(self) -> None:
        self.client.delete_experiment(self.experiment)


def rounds(rng: random.Random, trials: list[TrialDir]) -> Iterator[None]:
    """Advance the trials to their ends in 20 rounds."""
    for number in range(20):
        for trial in trials:
            if rng.random() < 0.3 and not trial.done.exists():
                stop = 60 if number > 15 else rng.choice([20, 40, 60])
                cause = "done" if stop == 60 else "preempted"
                fake_trials.run(trial, stop=stop, cause=cause)
        yield
    for trial in trials:
        if not trial.done.exists():
            fake_trials.run(trial)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_users_do_the_projection_is_right_and_theirs_stays(
    root: Root, client: MlflowClient, seed: int
):
    """Random deeds of a user between rounds of collectors that live on or begin anew."""
    rng = random.Random(seed)
    trials = fake_trials.sweep(root, "demo", ("vit_a", "vit_b"), SCALES)
    collector = Collector(root, client, uri(root))
    collector.sync_once()
    user = User(client, rng)
    for _ in rounds(rng, trials):
        for _ in range(rng.randrange(3)):
            user.act()
        if rng.random() < 0.4:
            collector = Collector(root, client, uri(root))
        collector.sync_once()
    if client.get_experiment(user.experiment).lifecycle_stage != "active":
        client.restore_experiment(user.experiment)
    sync.sync(root, uri=uri(root))

    found = runs_of(client)
    assert found.keys() == {PARENT, *(trial.name for trial in trials)}
    assert_every_point_once(root, trials)
    assert client.get_experiment(user.experiment).name == user.name
    for trial in trials:
        run = found[trial.name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["jepa.state"] == "done"
        assert run.data.tags["axis.model"] in run.data.tags["jepa.label"]
        assert run.data.tags["mlflow.parentRunId"] == found[PARENT].info.run_id
    for (run, key), value in user.own.items():
        kept = client.get_run(run)
        if key == "name":
            assert kept.info.run_name == value
        else:
            assert value in kept.data.tags[key]
