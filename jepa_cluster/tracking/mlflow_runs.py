"""One sweep's experiment in MLflow: its runs by our own keys, looked up before they are created.

In: an open client and a sweep. Out: runs that are found, created and brought up to date. MLflow
chooses a run's id. If a response is lost, the run is read again by our key before the next write,
and a duplicate that appears later is deleted. `jepa.settled`, a tag of the run, holds the step up
to which it is shipped. It travels with the points it counts, and the store commits points first.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jepa_cluster.errors import JepaError
from jepa_cluster.records import AttemptRecord
from jepa_cluster.tracking import mlflow_client, run_tags
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.spool import Row, now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment as MlflowExperiment
    from mlflow.entities import Metric, Run

PARENT = ""  # the parent run's key among an experiment's runs
EXPERIMENT = "experiment"  # the experiment's key among notes
REPLACED = " (replaced)"  # in tag and name of an experiment that was rebuilt
MAX_METRICS = 800  # per request; with params and tags (100 each at most) MLflow allows 1000 items
LATE_WRITE_SECONDS = 60.0  # after a lost response, in which its request may still be executed
READ_AGAIN_SECONDS = 3600.0  # after which what users did by hand is put right


class DeletedError(JepaError):
    """A user deleted the experiment of a sweep in MLflow."""


@dataclass
class RunRecord:
    """A run as the store holds it: what is needed to send only what is missing."""

    run_id: str
    name: str | None
    status: str
    tags: dict[str, str]
    is_deleted: bool = False
    has_params: bool = False

    @property
    def settled(self) -> int:
        """The step up to which metrics are shipped; -1 for none."""
        return int(self.number("jepa.settled", -1))

    def number(self, tag: str, default: float) -> float:
        """Return a tag as a number; the default where a user wrote something else into it."""
        with contextlib.suppress(ValueError):
            return float(self.tags.get(tag, default))
        return default


class Experiment:
    """A sweep's experiment and its runs, read once and then updated by what is sent."""

    def __init__(self, client: MlflowClient, root: Root, uri: str, sweep: str) -> None:
        self.client = client
        self.sweep = sweep
        found = find_experiment(client, root, sweep)
        self.notes: dict[str, str] = {}  # for runs of an experiment that is rebuilt
        if found is None:
            self.notes = archived_notes(client, root, sweep)
            found = create_experiment(client, root, uri, sweep)
        elif found.lifecycle_stage != "active":
            raise DeletedError(
                f"the experiment '{found.name}' was deleted in MLflow: restore it there, "
                f"or create it again with `jepa sync --rebuild {sweep}`",
                where=mlflow_client.redacted(uri),
            )
        self.id = found.experiment_id
        self.name = found.name
        self.tags = dict(found.tags)
        self.runs: dict[str, RunRecord] = {}
        self._uncertain: set[str] = set()
        self._read_again_at = time.monotonic() + READ_AGAIN_SECONDS
        self._load("")

    @property
    def stale(self) -> bool:
        """Whether everything is to be read again: a lost response may have left a duplicate."""
        return time.monotonic() > self._read_again_at

    def find(self, key: str) -> RunRecord | None:
        """Return the run of a trial, or of the sweep itself (PARENT); None when there is none."""
        if key in self._uncertain:
            self.runs.pop(key, None)
            where = f"tags.`jepa.trial` = '{key}'" if key else "tags.`jepa.kind` = 'sweep'"
            self._load(where)
            self._uncertain.discard(key)
        return self.runs.get(key)

    def mark_uncertain(self, key: str, refused: bool = False) -> None:
        """Note that a request about this run failed; it is read again before the next write.

        refused: the store answered, so that the run or the experiment was changed by a user.
        """
        self._uncertain.add(key)
        late = time.monotonic() + (0 if refused else LATE_WRITE_SECONDS)
        self._read_again_at = min(self._read_again_at, late)

    def create(self, key: str, name: str, tags: Mapping[str, str], start: int) -> RunRecord:
        """Create a run. start: Unix ms, 0 when unknown."""
        source = {
            "jepa.sweep": self.sweep,
            "mlflow.user": "jepa",
            "mlflow.source.name": "jepa sync",
        }
        if key in self.notes:
            source[run_tags.NOTE] = self.notes[key]
        cut = {tag: truncate(value) for tag, value in {**tags, **source}.items()}
        run = self.client.create_run(self.id, start_time=start or None, tags=cut, run_name=name)
        self.runs[key] = run_record(run)
        return self.runs[key]

    def send(
        self,
        run: RunRecord,
        tags: Mapping[str, str],
        rows: Iterable[Row] = (),
        params: Mapping[str, str] | None = None,
    ) -> tuple[int, int]:
        """Send rows and params, and the tags that changed, in few requests: tags in the last one.

        Returns the numbers of points and requests.
        """
        from mlflow.entities import Param, RunTag

        new_params = [Param(key, value) for key, value in (params or {}).items()]
        new_tags: dict[str, str] = {}
        for key, value in tags.items():
            if run.tags.get(key) != truncate(value):
                new_tags[key] = truncate(value)
        batches = metric_batches(rows)
        if not batches and (new_params or new_tags):
            batches.append(([], {}))
        if batches:
            batches[-1][1].update(new_tags)
        points = 0
        for metrics, sent_tags in batches:
            self.client.log_batch(
                run.run_id,
                metrics=metrics,
                params=new_params,
                tags=[RunTag(key, value) for key, value in sent_tags.items()],
            )
            run.tags.update(sent_tags)
            points += len(metrics)
            new_params = []
        run.has_params |= bool(params)
        return points, len(batches)

    def rename(self, run: RunRecord, label: str) -> None:
        """Name a run by its trial's label, unless a user renamed it."""
        if label != run.name == run.tags.get("jepa.label"):
            self.client.update_run(run.run_id, name=label)
            run.name = label

    def set_status(self, run: RunRecord, status: str, ended: int | None) -> None:
        """Set a run's status. ended: Unix ms, for a final status."""
        if status in ("FINISHED", "FAILED", "KILLED"):
            self.client.set_terminated(run.run_id, status, end_time=ended)
        else:
            self.client.update_run(run.run_id, status=status)
        run.status = status

    def _load(self, where: str) -> None:
        """Read all runs that a filter finds, and keep one of each key: that with most steps.

        It is restored if a user deleted it. The others are deleted.
        """
        found: dict[str, list[RunRecord]] = {}
        for run in map(run_record, search_runs(self.client, self.id, where)):
            kind = run.tags.get("jepa.kind")
            key = PARENT if kind == "sweep" else run.tags.get("jepa.trial")
            if key is not None and kind is not None:  # else a run that the user made
                found.setdefault(key, []).append(run)
        for key, runs in found.items():
            kept, *others = sorted(runs, key=lambda r: (-r.settled, r.is_deleted, r.run_id))
            for run in others:
                if not run.is_deleted:
                    self.client.delete_run(run.run_id)
            if kept.is_deleted:
                self.client.restore_run(kept.run_id)
                kept.is_deleted = False
            self.runs[key] = kept


def run_record(run: Run) -> RunRecord:
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        tags=dict(run.data.tags),
        is_deleted=run.info.lifecycle_stage != "active",
        has_params="parameters" in run.data.params,
    )


def find_experiment(client: MlflowClient, root: Root, sweep: str) -> MlflowExperiment | None:
    """Return the experiment of a sweep of this root, whatever the user renamed it to.

    It may be deleted. An experiment without the id of a root is of an earlier version. It is ours
    if all runs in it are.
    """
    found = _search_experiments(client, root.id(), sweep)
    if found:
        return found[0]
    named = client.get_experiment_by_name(sweep)
    if named is None or named.tags.get("jepa.kind") != "sweep" or "jepa.root" in named.tags:
        return None
    runs = search_runs(client, named.experiment_id, "tags.`jepa.kind` = 'trial'")
    are_ours = {_is_of_root(run, root) for run in runs}
    return named if are_ours == {True} else None


def _is_of_root(run: Run, root: Root) -> bool:
    """Whether a trial of this root had the attempt that a run without the id of a root names.

    Two roots may have trials of the same name, as the same settings have the same id.
    """
    tags = run.data.tags
    trial = root.trial(tags.get("jepa.trial", ""))
    if tags.get("jepa.attempts", "0") == "0":
        return trial.path.exists()
    wanted = tags.get("jepa.host", ""), tags.get("jepa.job", "")
    for attempt in trial.attempts():
        if (attempt.get("host", ""), attempt.get("job", "")) == wanted:
            return True
    return False


def _search_experiments(client: MlflowClient, root: str, sweep: str) -> list[MlflowExperiment]:
    """Return the experiments with these tags, active ones first, the newest first."""
    from mlflow.entities import ViewType

    where = f"tags.`jepa.root` = '{root}' and tags.`jepa.sweep` = '{sweep}'"
    found = client.search_experiments(ViewType.ALL, filter_string=where)
    return sorted(found, key=lambda e: (e.lifecycle_stage, -int(e.experiment_id)))


def create_experiment(client: MlflowClient, root: Root, uri: str, sweep: str) -> MlflowExperiment:
    """Create the experiment of a sweep; under another name if the sweep's name is taken."""
    name = sweep
    if client.get_experiment_by_name(name):
        name = f"{sweep} ({root.path.name} {root.id()})"
    folder = mlflow_client.artifact_folder(root, uri)
    location = f"{folder}/{sweep}" if folder else None
    tags = run_tags.experiment_tags(root, sweep)
    return client.get_experiment(client.create_experiment(name, location, tags=tags))


def archive_experiment(client: MlflowClient, root: Root, sweep: str) -> None:
    """Rename and delete the experiment. MLflow can restore it under its new name."""
    found = find_experiment(client, root, sweep)
    if found is None:
        return
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    client.set_experiment_tag(found.experiment_id, "jepa.root", f"{root.id()}{REPLACED}")
    client.set_experiment_tag(found.experiment_id, "jepa.sweep", sweep)
    client.rename_experiment(found.experiment_id, f"{sweep}{REPLACED} {now_ms()}")
    client.delete_experiment(found.experiment_id)


def archived_notes(client: MlflowClient, root: Root, sweep: str) -> dict[str, str]:
    """Return the notes in the newest archived experiment of a sweep, by the keys of its runs."""
    notes: dict[str, str] = {}
    for archived in _search_experiments(client, f"{root.id()}{REPLACED}", sweep)[:1]:
        where = f"tags.`{run_tags.NOTE}` LIKE '%'"
        for run in search_runs(client, archived.experiment_id, where):
            notes[run.data.tags.get("jepa.trial", PARENT)] = run.data.tags[run_tags.NOTE]
        notes[EXPERIMENT] = archived.tags.get(run_tags.NOTE, "")
    return notes


def search_runs(client: MlflowClient, experiment: str, where: str) -> Iterator[Run]:
    """Yield all runs, oldest first, page by page; the deleted ones too."""
    from mlflow.entities import ViewType

    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment],
            where,
            run_view_type=ViewType.ALL,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def metric_batches(rows: Iterable[Row]) -> list[tuple[list[Metric], dict[str, str]]]:
    """Return metrics of complete rows, about MAX_METRICS each, with the tag of what they settle."""
    batches: list[tuple[list[Metric], dict[str, str]]] = []
    for row in rows:
        new = to_metrics(row)
        if not batches or len(batches[-1][0]) + len(new) > MAX_METRICS:
            batches.append(([], {}))
        metrics, tags = batches[-1]
        metrics += new
        tags["jepa.settled"] = str(row.step)
    return batches


def to_metrics(row: Row) -> list[Metric]:
    """Return a row as MLflow's metrics, with those that are derived from it for MLflow's charts.

    flops_total_log10: because MLflow has no log axis over a metric.
    initial/<probe>: probes of the randomly initialised encoder, to compare with the trained one's.
    """
    from mlflow.entities import Metric

    values = dict(row.values)
    if values.get("flops_total", 0.0) > 0:
        values["flops_total_log10"] = math.log10(values["flops_total"])
    if row.step == 0:
        for name, value in row.values.items():
            if name.startswith("probe/"):
                values[f"initial/{name}"] = value
    return [Metric(metric_name(name), value, row.t, row.step) for name, value in values.items()]


def metric_name(name: str) -> str:
    """Replace the characters of a name that MLflow does not allow."""
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in name)


def truncate(text: str) -> str:
    """Cut a tag's value to MLflow's limit."""
    return text[:5000]


def end_time(attempts: Sequence[AttemptRecord]) -> int | None:
    """Return the newest end of an attempt in Unix ms; None when no record has one."""
    ends = [int(attempt.get("ended") or 0) for attempt in attempts]
    return max(ends, default=0) or None
