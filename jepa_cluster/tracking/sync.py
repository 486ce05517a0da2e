"""Spools -> MLflow: settled steps only, each exactly once, with the timestamps that stand in the spool.

In: a root and an open store. Out: one experiment a sweep, one parent run with the question, the plan and the
figures, one child run a trial for ever. What was shipped is a tag of the run itself (`jepa.settled`), sent after
the points it counts, so a collector killed anywhere sends at most what is already there, which MLflow's key
(run, name, timestamp, step, value) makes a no-op. A failed request puts one run in doubt, which is read again; when
nothing gets through, all is forgotten and read again. It never touches a trial directory and knows no scheduler.
"""

from __future__ import annotations

import gc
import hashlib
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import JepaError, TrackingError, plural
from jepa_cluster.results import tables
from jepa_cluster.schema import to_dict
from jepa_cluster.tracking import chart_view, collector_lock, mlflow_client, run_tags
from jepa_cluster.tracking.mlflow_runs import PARENT, Experiment, Remote, ended
from jepa_cluster.tracking.spool_tail import Signature, Tail, papers, signature
from jepa_cluster.trial.layout import Root, TrialDir, read_json
from jepa_cluster.trial.spool import Row, now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRIES = 3  # further rounds of `sync` for what failed
PATIENCE = 5  # requests that fail one after another before the store counts as away
STATUS = {
    "queued": "SCHEDULED", "running": "RUNNING", "cool-down": "SCHEDULED",
    "stopped": "KILLED", "failed": "FAILED", "done": "FINISHED",
}  # fmt: skip
OVER = {"stopped", "failed", "done"}
FIGURES = ("scaling.json", "scaling.html", "scaling.png")
TAGS_NOT_PARAMS = ("optim.steps", "optim.epochs")  # the horizon


@dataclass
class Report:
    """What one round did. points: metric values sent; requests: that carried them; lost: what failed, by trial."""

    uri: str
    sweeps: list[str] = field(default_factory=list[str])
    trials: int = 0
    created: int = 0
    points: int = 0
    requests: int = 0
    lost: dict[str, str] = field(default_factory=dict[str, str])
    states: dict[str, int] = field(default_factory=dict[str, int])

    def __str__(self) -> str:
        states = ", ".join(f"{n} {s}" for s, n in sorted(self.states.items())) or "none"
        return (
            f"{plural(len(self.sweeps), 'sweep')}, {plural(self.trials, 'trial')} ({states}): "
            f"{self.created} runs made, {self.points} points sent to {mlflow_client.public(self.uri)}"
            + (f"; {len(self.lost)} to be tried again: {next(iter(self.lost.values()))}" if self.lost else "")
        )

    def after(self, earlier: Report) -> Report:
        """This round's picture, with what both did."""
        return replace(
            self,
            created=self.created + earlier.created,
            points=self.points + earlier.points,
            requests=self.requests + earlier.requests,
        )


@dataclass
class Local:
    """One trial of one sweep as this process follows it."""

    sweep: str
    trial: TrialDir
    entry: Mapping[str, Any]
    tail: Tail
    config: TrialConfig | None = None
    seen: Signature | None = None  # signature of the files at the last complete visit
    moved: bool = True  # something may be settled that is not shipped


def sync(root: Root, sweeps: Sequence[str] | None = None, uri: str | None = None, rebuild: bool = False) -> Report:
    """Bring the store up to date once, as the root's only writer. Raises TrackingError; nothing is lost by it.

    rebuild: put the sweeps' experiments aside (renamed and deleted, so MLflow can still restore them) and make
    them again from the trial directories.
    """
    client, uri = mlflow_client.connect(root, uri)
    with collector_lock.hold(root, uri) as renew:
        if rebuild:
            with mlflow_client.reaching(uri):
                for sweep in sweeps or root.sweeps():
                    put_aside(client, sweep)
        collector = Collector(root, client, uri, renew)
        report = whole = collector.round(sweeps)
        for _ in range(TRIES):
            if not report.lost:
                break
            report = collector.round(sweeps)
            whole = report.after(whole)
    if whole.lost:
        name, why = next(iter(whole.lost.items()))
        raise TrackingError(
            f"{len(whole.lost)} of {whole.trials + len(whole.lost)} runs were not brought up to date: {why}",
            where=name,
            hint="nothing is lost, the spools stay; run 'jepa sync' again",
        )
    return whole


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
            client, uri = mlflow_client.connect(root, uri)
            with collector_lock.hold(root, uri) as renew:
                collector = Collector(root, client, uri, renew)
                gc.freeze()  # mlflow's half a million objects need not be looked through while points pass by
                lost = set[str]()
                while not stop.is_set():
                    report = collector.round(sweeps)
                    if report.points or report.created or report.lost.keys() - lost:
                        say(str(report))
                    told, lost = "", set(report.lost)
                    stop.wait(every)
        except JepaError as e:
            if str(e) != told:
                told = str(e)
                say(f"jepa: {told}\n  next:  trying again every few seconds")
            stop.wait(2)


class Collector:
    """Follows all sweeps of a root. Call `round` again and again; hold the lease meanwhile."""

    def __init__(self, root: Root, client: MlflowClient, uri: str, renew: Callable[[], None] = lambda: None) -> None:
        self.root, self.client, self.uri, self.renew = root, client, uri, renew
        self._experiments: dict[str, Experiment] = {}
        self._local: dict[tuple[str, str], Local] = {}
        self._plans: dict[str, tuple[object, Mapping[str, Any]]] = {}
        self._notes: dict[str, dict[str, str]] = {}
        self._files: dict[str, tuple[object, str]] = {}
        self._failures = 0  # in a row

    def round(self, sweeps: Sequence[str] | None = None) -> Report:
        """Ship what is settled and not yet shipped. What a failed request belongs to is in `Report.lost` and tried
        again in the next round. Raises TrackingError when nothing gets through; then that round starts afresh."""
        report = Report(self.uri)
        try:
            with mlflow_client.reaching(self.uri):
                for sweep in sweeps or self.root.sweeps():
                    self._sweep(sweep, report)
        except JepaError:
            self._experiments.clear()
            self._local.clear()
            self._notes.clear()
            raise
        return report

    def _sweep(self, sweep: str, report: Report) -> None:
        plan = self._plan(sweep)
        there = self._experiments.get(sweep)
        if there is None or there.stale:
            there = self._experiments[sweep] = Experiment(self.client, self.root, self.uri, sweep)
        report.sweeps.append(sweep)
        begun = int(plan.get("submitted") or 0)
        with self._trying(there, PARENT, report):
            if there.find(PARENT) is None:
                there.create(PARENT, sweep, {"jepa.kind": "sweep"}, begun)
                report.created += 1
        parent = there.runs.get(PARENT)
        if parent is None:
            return
        states: dict[str, int] = {}
        spent = 0.0
        for entry in plan.get("trials") or ():
            key = str(entry["name"])
            with self._trying(there, key, report):
                remote = self._trial(self._follow(sweep, entry), there, parent, plan, report)
                state = remote.tags.get("jepa.state", "queued")
                states[state] = states.get(state, 0) + 1
                spent += float(remote.tags.get("jepa.gpu_hours", 0))
        for state, n in states.items():
            report.states[state] = report.states.get(state, 0) + n
        report.trials += sum(states.values())
        with self._trying(there, PARENT, report):
            self._parent(there, plan, parent, states, spent)

    @contextmanager
    def _trying(self, there: Experiment, key: str, report: Report) -> Generator[None]:
        """A failure costs the run it happens to, until PATIENCE of them in a row say that the store is away."""
        self.renew()
        try:
            with mlflow_client.reaching(self.uri):
                yield
        except JepaError as e:
            there.doubt(key)
            report.lost[key or there.sweep] = e.what
            self._failures += isinstance(e, TrackingError)
            if self._failures >= PATIENCE:
                raise
        else:
            self._failures = 0

    def _plan(self, sweep: str) -> Mapping[str, Any]:
        path = self.root.sweep(sweep) / "plan.json"
        mark = path.stat().st_mtime_ns if path.exists() else None
        if sweep not in self._plans or self._plans[sweep][0] != mark:
            self._plans[sweep] = (mark, tables.plan_of(self.root, sweep))
        return self._plans[sweep][1]

    def _follow(self, sweep: str, entry: Mapping[str, Any]) -> Local:
        key = sweep, str(entry["name"])
        if key not in self._local:
            trial = self.root.trial(key[1])
            self._local[key] = Local(sweep, trial, entry, Tail(trial))
        return self._local[key]

    # ---- one run -----------------------------------------------------------------------------------------------

    def _trial(
        self, local: Local, there: Experiment, parent: Remote, plan: Mapping[str, Any], report: Report
    ) -> Remote:
        """Effects first: params, points and tags, then papers, the status last."""
        mark = signature(local.trial)
        remote = there.find(local.trial.name)
        if remote and (mark == local.seen or (local.seen is None and finished(local.trial, remote))):
            local.seen = mark
            return remote
        settled = remote.settled if remote else -1
        if settled < local.tail.forgotten:  # another run than the one we shipped to, or an older store
            local.tail, local.moved = Tail(local.trial), True
        local.moved = local.tail.read() or local.moved
        if remote and not local.moved and local.seen is not None and papers(local.seen) == papers(mark):
            local.seen = mark  # more rows, none of them settled
            return remote
        attempts = local.trial.attempts()
        local.config = local.config or tables.config_of(local.trial)
        history = local.tail.history()
        state = tables.state(local.trial, attempts)
        tags = run_tags.trial(local.entry, local.config, attempts, state, history)
        if remote is None:
            kept = {k: v for k, v in tags.items() if k != "jepa.state"}
            remote = self._create(local, there, parent, plan, kept)
            report.created += 1
        rows: list[Row] = []
        if ripe := local.moved and not local.tail.awaits(attempts):
            rows = [r for r in history.settled_rows if r.step > settled]
        settings = {} if "parameters" in remote.params else params(local.config)
        sent, requests = there.send(remote, settings, rows, tags)
        report.points += sent
        report.requests += requests
        if ripe:
            local.tail.forget(remote.settled)
            local.moved = False
        if state in OVER:
            self._papers(there, remote, local.trial, attempts)
        if remote.status != STATUS[state]:
            there.status(remote, STATUS[state], ended(attempts))
        local.seen = mark
        return remote

    def _create(
        self, local: Local, there: Experiment, parent: Remote, plan: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Remote:
        point = tables.in_order(local.entry.get("point") or {}, plan.get("axes") or ())
        key = local.trial.name
        known = {"jepa.kind": "trial", "jepa.trial": key, "mlflow.parentRunId": parent.run_id}
        return there.create(
            key,
            f"{tables.short(point) or key} s{local.entry.get('seed', 0)}",
            {**tags, **known, **chart_view.color(plan, local.entry)},
            int(plan.get("submitted") or 0),
        )

    def _papers(
        self, there: Experiment, remote: Remote, trial: TrialDir, attempts: Sequence[Mapping[str, Any]]
    ) -> None:
        """What a person wants beside the curves once it is over: the frozen config, its identity, every attempt."""
        files = [p for p in (trial.config, trial.identity) if p.exists()]
        told = json.dumps(attempts, indent=1, sort_keys=True)
        mark = digest(files, told)
        if remote.tags.get("jepa.files") != mark:
            for path in files:
                self.client.log_artifact(remote.run_id, str(path))
            self.client.log_text(remote.run_id, told, "attempts.json")
            there.send(remote, {}, (), {"jepa.files": mark})

    def _parent(
        self, there: Experiment, plan: Mapping[str, Any], remote: Remote, states: Mapping[str, int], spent: float
    ) -> None:
        sweep = there.sweep
        folder, charts = self.root.sweep(sweep), chart_view.link("", there.id)
        files = [p for n in ("sweep.yaml", "plan.json", *FIGURES) if (p := folder / n).exists()]
        stats = tuple((p.name, p.stat().st_mtime_ns) for p in files)
        if self._files.get(sweep, (None, ""))[0] != stats:  # 5 MB of page are not read again every second
            self._files[sweep] = stats, digest(files)
        mark = self._files[sweep][1]
        if remote.tags.get("jepa.files") != mark:
            for path in files:
                self.client.log_artifact(remote.run_id, str(path))
        tags = run_tags.parent(plan, states, spent, folder / "scaling.json", charts)
        there.send(remote, {}, (), {**tags, "jepa.files": mark})
        self._runs(there, plan, remote)
        self._page(there, remote, [str(a) for a in plan.get("axes") or ()])
        over = sum(states.values()) == len(plan.get("trials") or ()) > 0 and set(states) <= OVER
        if remote.status != (wanted := "FINISHED" if over else "RUNNING"):
            there.status(remote, wanted, None)

    def _runs(self, there: Experiment, plan: Mapping[str, Any], parent: Remote) -> None:
        """`runs.json`, trial -> run id: with it the Scaling page need not search a thousand runs for their names."""
        names = (str(t["name"]) for t in plan.get("trials") or ())
        ids = {n: there.runs[n].run_id for n in names if n in there.runs}
        told = json.dumps(ids, separators=(",", ":"))
        mark = digest((), told)
        if ids and parent.tags.get("jepa.runs") != mark:
            self.client.log_text(parent.run_id, told, "runs.json")
            there.send(parent, {}, (), {"jepa.runs": mark})

    def _page(self, there: Experiment, parent: Remote, axes: Sequence[str]) -> None:
        """The experiment's own page: its note, the chart view it opens with, and where its parent run is."""
        tags = {
            "mlflow.note.content": parent.tags["mlflow.note.content"],
            chart_view.TAG: chart_view.tag(axes),
            "jepa.parent": parent.run_id,
        }
        if self._notes.get(there.sweep) == tags:
            return
        for key, value in tags.items():
            self.client.set_experiment_tag(there.id, key, value)
        self._notes[there.sweep] = tags


def finished(trial: TrialDir, remote: Remote) -> bool:
    """Everything of a finished trial is in the store already: no spool needs to be opened."""
    if remote.tags.get("jepa.state") != "done" or remote.status != STATUS["done"]:
        return False
    done = read_json(trial.done)
    return done is not None and int(done.get("step", -1)) <= remote.settled


def params(config: TrialConfig | None) -> dict[str, str]:
    """The recipe, and the numbers MLflow's charts can put on an axis. The horizon is no param but a tag."""
    if config is None:
        return {}
    flat = {**dict(flatten(to_dict(config.recipe))), **run_tags.numbers(config.recipe)}
    return {k: v for k, v in flat.items() if k not in TAGS_NOT_PARAMS}


def flatten(values: Mapping[str, Any], dot: str = "") -> Iterator[tuple[str, str]]:
    """{'model': {'width': 64}} -> ('model.width', '64')."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{dot}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{dot}{key}", str(value)


def digest(files: Sequence[Path], more: str = "") -> str:
    """12 hex digits over names and contents."""
    total = hashlib.sha256(more.encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
