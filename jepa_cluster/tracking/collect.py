"""Spools -> MLflow: settled steps only, each exactly once, with the timestamps that stand in the spool.

In: a root and an open store. Out: one experiment a sweep, one parent run with the question, the plan and the
figures, one child run a trial for ever. What was shipped is a tag of the run itself (`jepa.settled`), sent after
the points it counts, so a collector killed anywhere sends at most what is already there, which MLflow's key
(run, name, timestamp, step, value) makes a no-op. After any failure it forgets what it believed and reads the
store again. It never touches a trial directory and knows no scheduler.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import TrialConfig, to_plain
from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import curves, lease, notes, store, views
from jepa_cluster.tracking.tail import Tail, signature
from jepa_cluster.trial.layout import Root, TrialDir, read_json
from jepa_cluster.trial.spool import Row, now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000  # metrics a request; MLflow's limit
PARAMS = 100  # params a request; MLflow's limit
PARENT = ""  # the parent run's key among an experiment's runs
STATUS = {
    "queued": "SCHEDULED", "running": "RUNNING", "cool-down": "SCHEDULED",
    "stopped": "KILLED", "failed": "FAILED", "done": "FINISHED",
}  # fmt: skip
FIGURES = ("scaling.json", "scaling.html", "scaling.png", "results.md")
TAGS_NOT_PARAMS = ("optim.steps", "optim.epochs")  # the horizon


@dataclass
class Report:
    """What one round did. points: metric values sent."""

    uri: str
    sweeps: list[str] = field(default_factory=list[str])
    trials: int = 0
    created: int = 0
    points: int = 0
    states: dict[str, int] = field(default_factory=dict[str, int])

    def __str__(self) -> str:
        states = ", ".join(f"{n} {s}" for s, n in sorted(self.states.items())) or "none"
        return (
            f"{len(self.sweeps)} sweeps, {self.trials} trials ({states}): "
            f"{self.created} runs made, {self.points} points sent to {store.public(self.uri)}"
        )


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


@dataclass
class Local:
    """One trial of one sweep as this process follows it."""

    sweep: str
    trial: TrialDir
    entry: Mapping[str, Any]
    tail: Tail
    config: TrialConfig | None = None
    seen: object = None  # signature of the files at the last complete visit
    moved: bool = True  # something may be settled that is not shipped


def sync(root: Root, sweeps: Sequence[str] | None = None, uri: str | None = None, rebuild: bool = False) -> Report:
    """Bring the store up to date once, as the root's only writer. Raises TrackingError; nothing is lost by it.

    rebuild: put the sweeps' experiments aside (renamed and deleted, so MLflow can still restore them) and make
    them again from the trial directories.
    """
    client, uri = store.connect(root, uri)
    with lease.hold(root, uri):
        if rebuild:
            with store.reaching(uri):
                for sweep in sweeps or root.sweeps():
                    put_aside(client, sweep)
        return Collector(root, client, uri).round(sweeps)


def put_aside(client: MlflowClient, sweep: str) -> None:
    """Free the experiment's name; what it held can be restored in MLflow under its new name."""
    found = client.get_experiment_by_name(sweep)
    if found is None:
        return
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    client.rename_experiment(found.experiment_id, f"{sweep} (replaced {now_ms()})")
    client.delete_experiment(found.experiment_id)


def follow(
    root: Root,
    uri: str,
    every: float,
    stop: threading.Event,
    say: Callable[[str], None],
    sweeps: Sequence[str] | None = None,
) -> None:
    """Collect every `every` seconds until told to stop; a store that is away is told once and tried again."""
    told = ""
    while not stop.is_set():
        try:
            client, uri = store.connect(root, uri)
            with lease.hold(root, uri) as renew:
                collector = Collector(root, client, uri)
                while not stop.is_set():
                    report = collector.round(sweeps)
                    if report.points or report.created:
                        say(str(report))
                    told = ""
                    renew()
                    stop.wait(every)
        except TrackingError as e:
            if str(e) != told:
                told = str(e)
                say(f"jepa: {told}\n  next:  trying again every few seconds")
            stop.wait(5)


class Collector:
    """Follows all sweeps of a root. Call `round` again and again; hold the lease meanwhile."""

    def __init__(self, root: Root, client: MlflowClient, uri: str) -> None:
        self.root, self.client, self.uri = root, client, uri
        self._experiments: dict[str, str] = {}
        self._remote: dict[str, dict[str, Remote]] = {}
        self._local: dict[tuple[str, str], Local] = {}
        self._plans: dict[str, tuple[object, Mapping[str, Any]]] = {}
        self._notes: dict[str, str] = {}
        self._files: dict[str, tuple[object, str]] = {}

    def round(self, sweeps: Sequence[str] | None = None) -> Report:
        """Ship what is settled and not yet shipped. Raises TrackingError; then the next round starts afresh."""
        report = Report(self.uri)
        try:
            with store.reaching(self.uri):
                for sweep in sweeps or self.root.sweeps():
                    self._sweep(sweep, report)
        except TrackingError:
            self._experiments.clear()
            self._remote.clear()
            self._local.clear()
            self._notes.clear()
            raise
        return report

    def _sweep(self, sweep: str, report: Report) -> None:
        plan = self._plan(sweep)
        runs = self._runs(sweep)
        report.sweeps.append(sweep)
        if PARENT not in runs:
            runs[PARENT] = self._create(sweep, sweep, {"jepa.kind": "sweep"}, int(plan.get("submitted") or 0))
            report.created += 1
        states: dict[str, int] = {}
        for entry in plan.get("trials") or ():
            name = str(entry["name"])
            local = self._local.get((sweep, name))
            if local is None:
                trial = self.root.trial(name)
                local = self._local[sweep, name] = Local(sweep, trial, entry, Tail(trial))
            if name not in runs:
                runs[name] = self._create(
                    sweep,
                    f"{curves.short(curves.in_order(entry.get('point') or {}, plan.get('axes') or ())) or name}"
                    f" s{entry.get('seed', 0)}",
                    {"jepa.kind": "trial", "jepa.trial": name, "mlflow.parentRunId": runs[PARENT].run_id},
                    int(plan.get("submitted") or 0),
                )
                report.created += 1
            report.points += self._trial(local, runs[name])
            state = runs[name].tags.get("jepa.state", "queued")
            states[state] = states.get(state, 0) + 1
            report.states[state] = report.states.get(state, 0) + 1
            report.trials += 1
        self._parent(sweep, plan, runs[PARENT], states)

    # ---- reading the store -------------------------------------------------------------------------------------

    def _plan(self, sweep: str) -> Mapping[str, Any]:
        path = self.root.sweep(sweep) / "plan.json"
        mark = path.stat().st_mtime_ns if path.exists() else None
        if sweep not in self._plans or self._plans[sweep][0] != mark:
            self._plans[sweep] = (mark, curves.plan_of(self.root, sweep))
        return self._plans[sweep][1]

    def _runs(self, sweep: str) -> dict[str, Remote]:
        """Runs of the sweep's experiment by trial name, the parent under PARENT. Read once, then kept up to date."""
        if sweep in self._remote:
            return self._remote[sweep]
        found = self.client.get_experiment_by_name(sweep)
        if found is None:
            where = store.artifact_folder(self.root, self.uri)
            experiment = self.client.create_experiment(sweep, where and f"{where}/{sweep}", tags=notes.experiment())
        elif found.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment '{sweep}' was deleted in MLflow",
                where=store.public(self.uri),
                now="restore it there, or make it anew: jepa sync --rebuild " + sweep,
            )
        else:
            experiment = found.experiment_id
        self._experiments[sweep] = experiment
        runs: dict[str, Remote] = {}
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [experiment], max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
            )
            for run in page:
                kind = run.data.tags.get("jepa.kind")
                key = PARENT if kind == "sweep" else run.data.tags.get("jepa.trial")
                if key is None or kind is None:
                    continue  # a person's own run
                remote = Remote(
                    run.info.run_id, run.info.run_name or "", run.info.status, dict(run.data.tags), set(run.data.params)
                )
                if key in runs:  # a request whose answer was lost did its work late
                    first, remote = sorted((runs[key], remote), key=lambda r: (-r.settled, r.run_id))
                    self.client.delete_run(remote.run_id)
                    remote = first
                runs[key] = remote
            token = page.token
            if not token:
                break
        self._remote[sweep] = runs
        return runs

    # ---- writing it --------------------------------------------------------------------------------------------

    def _create(self, sweep: str, name: str, tags: dict[str, str], start: int) -> Remote:
        tags = {**tags, "jepa.sweep": sweep, "mlflow.user": "jepa", "mlflow.source.name": "jepa sync"}
        run = self.client.create_run(self._experiments[sweep], start_time=start or None, tags=tags, run_name=name)
        return Remote(run.info.run_id, name, run.info.status, {**tags, **run.data.tags}, set())

    def _trial(self, local: Local, remote: Remote) -> int:
        """Effects first: params, points, then tags and status. -> points sent."""
        mark = signature(local.trial)
        if mark == local.seen or (local.seen is None and finished(local.trial, remote)):
            local.seen = mark
            return 0
        attempts = local.trial.attempts()
        sent = 0
        local.config = local.config or curves.config_of(local.trial)
        if local.config and "parameters" not in remote.params:
            self._params(remote, local.config)
        local.moved = local.tail.read() or local.moved
        if local.moved and not local.tail.awaits(attempts):
            sent = self._points(local, remote)
            local.moved = False
        state = curves.state(local.trial, attempts)
        self._tags(remote, notes.trial(local.entry, local.config, attempts, state, local.tail.history()))
        if remote.status != STATUS[state]:
            self._status(remote, STATUS[state], attempts)
        local.seen = mark
        return sent

    def _params(self, remote: Remote, config: TrialConfig) -> None:
        from mlflow.entities import Param

        flat = {**dict(flatten(to_plain(config.recipe))), **notes.numbers(config.recipe)}
        wanted = [Param(k, v) for k, v in flat.items() if k not in remote.params and k not in TAGS_NOT_PARAMS]
        for i in range(0, len(wanted), PARAMS):
            self.client.log_batch(remote.run_id, params=wanted[i : i + PARAMS])
        remote.params |= {p.key for p in wanted}

    def _points(self, local: Local, remote: Remote) -> int:
        history = local.tail.history()
        rows = [r for r in history.settled_rows if r.step > remote.settled]
        sent = 0
        for batch in batches(rows):
            sent += self._ship(remote, batch)
        local.tail.forget(remote.settled)
        return sent

    def _ship(self, remote: Remote, rows: Sequence[Row]) -> int:
        """Whole rows, then the tag that says so: the store commits metrics before tags."""
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(name(k), v, r.t, r.step) for r in rows for k, v in measures(r)]
        settled = str(rows[-1].step)
        for i in range(0, len(metrics), BATCH):
            last = i + BATCH >= len(metrics)
            self.client.log_batch(
                remote.run_id, metrics=metrics[i : i + BATCH], tags=[RunTag("jepa.settled", settled)] if last else []
            )
        remote.tags["jepa.settled"] = settled
        return len(metrics)

    def _tags(self, remote: Remote, wanted: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        news = {k: v[:5000] for k, v in wanted.items() if remote.tags.get(k) != v[:5000]}
        if news:
            self.client.log_batch(remote.run_id, tags=[RunTag(k, v) for k, v in news.items()])
            remote.tags.update(news)

    def _status(self, remote: Remote, status: str, attempts: Sequence[Mapping[str, Any]]) -> None:
        if status in ("FINISHED", "FAILED", "KILLED"):
            ended = max((int(a.get("ended") or 0) for a in attempts), default=0)
            self.client.set_terminated(remote.run_id, status, end_time=ended or None)
        else:
            self.client.update_run(remote.run_id, status=status)
        remote.status = status

    def _parent(self, sweep: str, plan: Mapping[str, Any], remote: Remote, states: Mapping[str, int]) -> None:
        folder, charts = self.root.sweep(sweep), views.link("", self._experiments[sweep])
        files = [p for n in ("sweep.yaml", "plan.json", *FIGURES) if (p := folder / n).exists()]
        stats = tuple((p.name, p.stat().st_mtime_ns) for p in files)
        if self._files.get(sweep, (None, ""))[0] != stats:  # 5 MB of page are not read again every second
            self._files[sweep] = stats, digest(files)
        mark = self._files[sweep][1]
        if remote.tags.get("jepa.files") != mark:
            for path in files:
                self.client.log_artifact(remote.run_id, str(path))
        self._tags(remote, {**notes.parent(plan, states, folder / "scaling.json", charts), "jepa.files": mark})
        self._page(sweep, remote.tags["mlflow.note.content"])
        over = bool(states) and not (set(states) - {"done", "failed", "stopped"})
        if remote.status != (wanted := "FINISHED" if over else "RUNNING"):
            self._status(remote, wanted, ())

    def _page(self, sweep: str, note: str) -> None:
        """The experiment's own page: its note, and the chart view it opens with."""
        if self._notes.get(sweep) == note:
            return
        self.client.set_experiment_tag(self._experiments[sweep], "mlflow.note.content", note)
        self.client.set_experiment_tag(self._experiments[sweep], views.TAG, views.tag())
        self._notes[sweep] = note


def finished(trial: TrialDir, remote: Remote) -> bool:
    """Everything of a finished trial is in the store already: no spool needs to be opened."""
    if remote.tags.get("jepa.state") != "done" or remote.status != STATUS["done"]:
        return False
    done = read_json(trial.done)
    return done is not None and int(done.get("step", -1)) <= remote.settled


def batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Whole rows, at most BATCH values together (a wider row goes alone)."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        width = 2 * len(row.values) + 1
        if batch and size + width > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += width
    if batch:
        yield batch


def measures(row: Row) -> Iterator[tuple[str, float]]:
    """A row's values; log10 of its FLOPs, since MLflow's charts draw no log axis over a metric; and the probes of
    the freshly initialised encoder under names of their own, to stand beside the trained one's."""
    yield from row.values.items()
    compute = row.values.get("flops_total", 0.0)
    if compute > 0:
        yield "flops_total_log10", math.log10(compute)
    if row.step == 0:
        yield from ((f"initial/{k}", v) for k, v in row.values.items() if k.startswith("probe/"))


def name(metric: str) -> str:
    """A metric's name with only the characters MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in metric)


def flatten(values: Mapping[str, Any], dot: str = "") -> Iterator[tuple[str, str]]:
    """{'model': {'width': 64}} -> ('model.width', '64')."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{dot}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{dot}{key}", str(value)


def digest(files: Sequence[Path]) -> str:
    """12 hex digits over names and contents."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
