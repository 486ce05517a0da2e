"""One sweep's experiment as the store has it: its runs by our own keys, each looked for before it is made.

In: an open client and a sweep. Out: runs found, made, brought up to date. MLflow chooses a run's id, so a request
whose answer was lost leaves a doubt; a doubtful run is looked up by its key before anything else is sent to it, and
a twin that turns up later is deleted. `jepa.settled`, a tag of the run, says how far it is shipped; it travels with
the points it counts, and the store commits points before tags.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import mlflow_client, run_tags
from jepa_cluster.trial.layout import Root
from jepa_cluster.trial.spool import Row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PARENT = ""  # the parent run's key among an experiment's runs
PARAMS = 100  # params a request; MLflow's limit
BATCH = 800  # metrics a request; with 100 params and 100 tags MLflow's limit of 1000 things
LATE = 60.0  # s after a lost answer in which its request may still do its work


@dataclass
class Remote:
    """A run as the store has it: what we need to know to send only what is missing."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: set[str]

    @property
    def settled(self) -> int:
        return int(self.tags.get("jepa.settled", -1))


class Experiment:
    """A sweep's experiment and its runs, read once and then kept up to date by what we send."""

    def __init__(self, client: MlflowClient, root: Root, uri: str, sweep: str) -> None:
        self.client, self.sweep = client, sweep
        self.id = find_or_create(client, root, uri, sweep)
        self.runs: dict[str, Remote] = {}
        self._doubtful: set[str] = set()
        self._reread = math.inf
        self._gather("")

    @property
    def stale(self) -> bool:
        """A lost answer may have left a twin by now: read everything again."""
        return time.monotonic() > self._reread

    def find(self, key: str) -> Remote | None:
        """The run of a trial, or of the sweep itself (PARENT); None when the store has none."""
        if key in self._doubtful:
            self.runs.pop(key, None)
            self._gather(f"tags.`jepa.trial` = '{key}'" if key else "tags.`jepa.kind` = 'sweep'")
            self._doubtful.discard(key)
        return self.runs.get(key)

    def doubt(self, key: str) -> None:
        """Something sent to this run was not answered: what it did is unknown."""
        self._doubtful.add(key)
        self._reread = min(self._reread, time.monotonic() + LATE)

    def create(self, key: str, name: str, tags: Mapping[str, str], start: int) -> Remote:
        tags = {**tags, "jepa.sweep": self.sweep, "mlflow.user": "jepa", "mlflow.source.name": "jepa sync"}
        tags = {k: cut(v) for k, v in tags.items()}
        run = self.client.create_run(self.id, start_time=start or None, tags=tags, run_name=name)
        self.runs[key] = Remote(run.info.run_id, name, run.info.status, {**tags, **run.data.tags}, set())
        return self.runs[key]

    def send(
        self, remote: Remote, params: Mapping[str, str], rows: Iterable[Row], tags: Mapping[str, str]
    ) -> tuple[int, int]:
        """What the run lacks, in as few requests as the limits allow, the tags in the last -> (points, requests)."""
        from mlflow.entities import Param, RunTag

        lacking = [(k, v) for k, v in params.items() if k not in remote.params]
        settings = [lacking[i : i + PARAMS] for i in range(0, len(lacking), PARAMS)]
        points = list(batches(rows))
        news = {k: cut(v) for k, v in tags.items() if remote.tags.get(k) != cut(v)}
        requests = max(len(settings), len(points), 1 if news else 0)
        for i in range(requests):
            some = settings[i] if i < len(settings) else []
            metrics, settled = points[i] if i < len(points) else ([], None)
            told = {} if settled is None else {"jepa.settled": str(settled)}
            told |= news if i == requests - 1 else {}
            self.client.log_batch(
                remote.run_id,
                metrics=metrics,
                params=[Param(k, v) for k, v in some],
                tags=[RunTag(k, v) for k, v in told.items()],
            )
            remote.params.update(k for k, _ in some)
            remote.tags.update(told)
        return sum(len(metrics) for metrics, _ in points), requests

    def status(self, remote: Remote, status: str, ended: int | None) -> None:
        """ended: Unix ms, for a status that is an end."""
        if status in ("FINISHED", "FAILED", "KILLED"):
            self.client.set_terminated(remote.run_id, status, end_time=ended)
        else:
            self.client.update_run(remote.run_id, status=status)
        remote.status = status

    def _gather(self, which: str) -> None:
        """Take in all runs that the filter finds; of two with one key the one that holds more stays."""
        for run in search(self.client, self.id, which):
            kind = run.data.tags.get("jepa.kind")
            key = PARENT if kind == "sweep" else run.data.tags.get("jepa.trial")
            if key is None or kind is None:
                continue  # a person's own run
            remote = Remote(
                run.info.run_id, run.info.run_name or "", run.info.status, dict(run.data.tags), set(run.data.params)
            )
            if key in self.runs:
                remote, twin = sorted((self.runs[key], remote), key=lambda r: (-r.settled, r.run_id))
                self.client.delete_run(twin.run_id)
            self.runs[key] = remote


def find_or_create(client: MlflowClient, root: Root, uri: str, sweep: str) -> str:
    """The experiment's id. Raises TrackingError when a person deleted it."""
    found = client.get_experiment_by_name(sweep)
    if found is None:
        where = mlflow_client.artifact_folder(root, uri)
        return client.create_experiment(sweep, where and f"{where}/{sweep}", tags=run_tags.experiment())
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment '{sweep}' was deleted in MLflow",
            where=mlflow_client.public(uri),
            hint="restore it there, or make it anew: jepa sync --rebuild " + sweep,
        )
    return found.experiment_id


def search(client: MlflowClient, experiment: str, which: str) -> Iterator[Run]:
    """All active runs, oldest first, page by page."""
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment], which, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def batches(rows: Iterable[Row]) -> Iterator[tuple[list[Metric], int | None]]:
    """Metrics of whole rows, at most BATCH together, and the step that is settled with them. A wider row is cut, and
    only its last part settles it."""
    batch: list[Metric] = []
    settled: int | None = None
    for row in rows:
        wide = metrics(row)
        if batch and len(batch) + len(wide) > BATCH:
            yield batch, settled
            batch = []
        while len(wide) > BATCH:
            yield wide[:BATCH], None
            wide = wide[BATCH:]
        batch, settled = batch + wide, row.step
    if batch:
        yield batch, settled


def metrics(row: Row) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name(k), v, row.t, row.step) for k, v in measures(row.step, row.values)]


def measures(step: int, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """A row's values; log10 of its FLOPs, since MLflow's charts draw no log axis over a metric; and the probes of
    the freshly initialised encoder under names of their own, to stand beside the trained one's."""
    yield from values.items()
    compute = values.get("flops_total", 0.0)
    if compute > 0:
        yield "flops_total_log10", math.log10(compute)
    if step == 0:
        yield from ((f"initial/{k}", v) for k, v in values.items() if k.startswith("probe/"))


def name(metric: str) -> str:
    """A metric's name with only the characters MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in metric)


def cut(text: str) -> str:
    """A tag's value within MLflow's limit."""
    return text[:5000]


def ended(attempts: Sequence[Mapping[str, object]]) -> int | None:
    """Unix ms of the newest attempt's end; None when nobody wrote one down."""
    return max((int(str(a.get("ended") or 0)) for a in attempts), default=0) or None
