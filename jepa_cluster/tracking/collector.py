"""Ship the spools of a root to MLflow: settled steps only, each exactly once.

In: a root and an open client. Out: one experiment per sweep, one parent run with the question, the
plan and the figures, and exactly one child run per trial. What was shipped is a tag of the run
itself (`jepa.settled`), sent after the points it counts. A collector that is killed sends at most
what is already there, and MLflow's key (run, name, timestamp, step, value) makes that a no-op.
A failed request makes one run uncertain, and it is read again. When no request succeeds, everything
is read again. The collector never writes to a trial directory and knows no scheduler.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.errors import JepaError, TrackingError, plural
from jepa_cluster.records import PlannedTrial
from jepa_cluster.results import tables
from jepa_cluster.tracking import chart_view, mlflow_client, run_tags, spool_tail
from jepa_cluster.tracking.mlflow_runs import (
    EXPERIMENT,
    PARENT,
    DeletedError,
    Experiment,
    RunRecord,
    end_time,
)
from jepa_cluster.tracking.tracked import TrackedSweep, TrackedTrial
from jepa_cluster.trial import file_facts, usage
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.spool import Row
from jepa_cluster.trial.status import OVER, RULES

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_FAILURES_IN_A_ROW = 5  # requests, after which the store counts as unreachable
PARENT_FILES = ("sweep.yaml", "plan.json", "scaling.json", "scaling.html", "scaling.png")


@dataclass
class SyncReport:
    """What one round did.

    points: metric values sent. requests: requests that carried them. lost: trial -> what failed.
    renamed: sweep -> its experiment, where that has another name. skipped: sweep -> why.
    """

    uri: str
    sweeps: list[str] = field(default_factory=list[str])
    trials: int = 0
    created: int = 0
    points: int = 0
    requests: int = 0
    lost: dict[str, str] = field(default_factory=dict[str, str])
    states: dict[str, int] = field(default_factory=dict[str, int])
    renamed: dict[str, str] = field(default_factory=dict[str, str])
    skipped: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        states = run_tags.format_states(self.states) or "none"
        text = (
            f"{plural(len(self.sweeps), 'sweep')}, {plural(self.trials, 'trial')} "
            f"({states}): {self.created} runs made, {self.points} points sent to "
            f"{mlflow_client.redacted(self.uri)}"
        )
        for sweep, name in self.renamed.items():
            text += f"; {sweep} is the experiment '{name}' there"
        for reason in self.skipped.values():
            text += f"; {reason}"
        if self.lost:
            reason = next(iter(self.lost.values()))
            text += f"; {len(self.lost)} to be tried again: {reason}"
        return text

    def added_to(self, earlier: SyncReport) -> SyncReport:
        """Return this round's states with the counts of both rounds."""
        return replace(
            self,
            created=self.created + earlier.created,
            points=self.points + earlier.points,
            requests=self.requests + earlier.requests,
        )


class Collector:
    """Ships all sweeps of a root to MLflow. The caller holds the collector's lock.

    uri: where `client` sends its requests. renew: called between requests, so that the lock does
    not expire.
    """

    def __init__(
        self,
        root: Root,
        client: MlflowClient,
        uri: str,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = root
        self.client = client
        self.uri = uri
        self.renew = renew
        self._sweeps: dict[str, TrackedSweep] = {}  # by name
        self._submissions = file_facts.Submissions(root)
        self._submitted: set[str] = set()  # names of trials
        self._failures = 0  # rounds in a row in which no request succeeded

    def sync_once(self, sweeps: Sequence[str] | None = None) -> SyncReport:
        """Ship what is settled and not yet shipped.

        A run whose request failed is in the report's `lost` and tried again in the next round.
        Raises TrackingError when no request succeeds; the next round then reads everything again.
        """
        report = SyncReport(self.uri)
        self._submitted = self._submissions.trials()
        try:
            with mlflow_client.translate_errors(self.uri):
                for name in sweeps or self.root.sweeps():
                    try:
                        sweep = self._track(name)
                    except TrackingError:
                        raise
                    except DeletedError as e:
                        report.skipped[name] = e.what
                        continue
                    except JepaError as e:  # a torn plan
                        report.lost[name] = e.what
                        continue
                    self._sync_sweep(sweep, report)
        except JepaError:
            self._sweeps.clear()
            raise
        return report

    def _track(self, name: str) -> TrackedSweep:
        """Return a sweep with its current plan and its experiment."""
        mtime = usage.modified(self.root.sweep(name).plan)
        sweep = self._sweeps.get(name)
        if sweep is None:
            plan = tables.read_plan(self.root, name)
            experiment = Experiment(self.client, self.root, self.uri, name)
            sweep = self._sweeps[name] = TrackedSweep(name, plan, mtime, experiment)
        elif sweep.plan_mtime != mtime:
            sweep.plan = tables.read_plan(self.root, name)
            sweep.plan_mtime = mtime
        if sweep.experiment.stale:
            sweep.experiment = Experiment(self.client, self.root, self.uri, name)
        return sweep

    def _sync_sweep(self, sweep: TrackedSweep, report: SyncReport) -> None:
        experiment = sweep.experiment
        report.sweeps.append(sweep.name)
        if experiment.name != sweep.name:
            report.renamed[sweep.name] = experiment.name
        with self._isolate_failure(experiment, PARENT, report):
            if experiment.find(PARENT) is None:
                facts = run_tags.parent_tags(sweep.plan, Counter[str](), 0.0)
                tags = {"jepa.kind": "sweep", **facts}
                experiment.create(PARENT, sweep.name, tags, sweep.plan["submitted"])
                report.created += 1
        parent = experiment.runs.get(PARENT)
        if parent is None:
            return
        states = Counter[str]()
        gpu_hours = 0.0
        sweep.read_sizes(self.root)
        for entry in sweep.entries:
            key = entry["name"]
            with self._isolate_failure(experiment, key, report):
                run = self._sync_trial(sweep, self._track_trial(sweep, key, entry), report)
                states[run.tags.get("jepa.state", "queued")] += 1
                gpu_hours += run.number("jepa.gpu_hours", 0)
        report.states = dict(states + Counter(report.states))
        report.trials += states.total()
        with self._isolate_failure(experiment, PARENT, report):
            self._sync_parent(sweep, parent, states, gpu_hours)

    @contextmanager
    def _isolate_failure(
        self,
        experiment: Experiment,
        key: str,
        report: SyncReport,
    ) -> Generator[None]:
        """Record a failure for one run only, until MAX_FAILURES_IN_A_ROW of them are raised."""
        self.renew()
        try:
            with mlflow_client.translate_errors(self.uri):
                yield
        except JepaError as e:
            refused = isinstance(e, mlflow_client.RefusedError)
            experiment.mark_uncertain(key, refused)
            report.lost[key or experiment.sweep] = e.what
            self._failures += isinstance(e, TrackingError) and not refused
            if self._failures >= MAX_FAILURES_IN_A_ROW:
                raise
        else:
            self._failures = 0

    # ---- one trial

    def _track_trial(self, sweep: TrackedSweep, key: str, entry: PlannedTrial) -> TrackedTrial:
        trial = self.root.trial(key)
        return sweep.trials.setdefault(key, TrackedTrial(trial, entry, spool_tail.SpoolTail(trial)))

    def _sync_trial(
        self,
        sweep: TrackedSweep,
        tracked: TrackedTrial,
        report: SyncReport,
    ) -> RunRecord:
        files = spool_tail.signature(tracked.trial)
        parent = sweep.experiment.runs[PARENT].run_id
        identity = run_tags.identity_tags(sweep.plan["axes"], tracked.entry, parent)
        run = sweep.experiment.find(tracked.trial.name)
        identity |= self._color(sweep.color(tracked.entry), run)
        shown = run if run and identity.items() <= run.tags.items() else None
        if shown is None or not tracked.is_complete(files, shown):
            tracked.read_spools(run.settled if run else -1)
            if shown is None or not tracked.is_shipped(files, shown, self._submitted):
                tracked.files = None  # so that all of it is sent again after a failed request
                shown = self._ship(sweep, tracked, identity, run, report)
        tracked.files = files
        return shown

    def _ship(
        self,
        sweep: TrackedSweep,
        tracked: TrackedTrial,
        identity: Mapping[str, str],
        run: RunRecord | None,
        report: SyncReport,
    ) -> RunRecord:
        """Send params, points and tags, then files, and the status last."""
        experiment = sweep.experiment
        attempts = tracked.trial.attempts()
        tracked.config = tracked.config or tables.read_config(tracked.trial)
        history = tracked.tail.history()
        state = file_facts.state_by_files(
            tracked.trial, attempts, sweep.plan["retries"], self._submitted
        )
        progress = run_tags.progress_tags(
            config=tracked.config,
            attempts=attempts,
            state=state,
            gpu_hours=usage.process_seconds(tracked.trial, attempts) / 3600,
            history=history,
        )
        label = tracked.entry["label"]
        if run is None:
            first = identity  # the state is set together with the points
            run = experiment.create(tracked.trial.name, label, first, sweep.plan["submitted"])
            report.created += 1
        experiment.rename(run, label)
        rows: list[Row] = []
        settles = tracked.tail.unshipped and not tracked.tail.awaits_first_line(attempts)
        if settles:
            rows = [row for row in history.settled_rows if row.step > run.settled]
        params: dict[str, str] = {}
        if not run.has_params:
            params = run_tags.run_params(tracked.config)
        points, requests = experiment.send(run, {**identity, **progress}, rows, params)
        report.points += points
        report.requests += requests
        if settles:
            tracked.tail.forget(run.settled)
        status = RULES[state].mlflow
        if state in OVER:
            files = (tracked.trial.config, tracked.trial.identity)
            texts = {"attempts.json": json.dumps(attempts, indent=1, sort_keys=True)}
            self._upload(experiment, run, "jepa.files", files, texts)
        if status and run.status != status:
            experiment.set_status(run, status, end_time(attempts))
        return run

    def _color(self, color: str, run: RunRecord | None) -> dict[str, str]:
        """Return the tags that colour a run by its size, unless a user coloured it."""
        tags = {chart_view.COLOR: color, "jepa.color": color} if color else {}
        if run is None or tags.items() <= run.tags.items():
            return tags
        ours = run.tags.get("jepa.color")
        if run.tags.get(chart_view.COLOR) == ours:  # when it was read; a user may colour it later
            stored = self.client.get_run(run.run_id).data.tags.get(chart_view.COLOR)
            if stored == ours:
                return tags
            run.tags[chart_view.COLOR] = stored or ""
        return {}

    def _upload(
        self,
        experiment: Experiment,
        run: RunRecord,
        tag: str,
        files: Sequence[Path],
        texts: Mapping[str, str],
    ) -> None:
        """Upload files and texts as artifacts, unless the run has them. tag: of their digest."""
        existing = [path for path in files if path.exists()]
        content = f"{spool_tail.file_facts(existing)}{texts}"
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        if run.tags.get(tag) == digest:
            return
        for path in existing:
            self.client.log_artifact(run.run_id, str(path))
        for name, text in texts.items():
            self.client.log_text(run.run_id, text, name)
        experiment.send(run, {tag: digest})

    # ---- the parent run

    def _sync_parent(
        self,
        sweep: TrackedSweep,
        parent: RunRecord,
        states: Counter[str],
        gpu_hours: float,
    ) -> None:
        experiment = sweep.experiment
        folder = self.root.sweep(sweep.name).path
        files = [folder / name for name in PARENT_FILES]
        self._upload(experiment, parent, "jepa.files", files, {})
        experiment.send(parent, run_tags.parent_tags(sweep.plan, states, gpu_hours))
        note = run_tags.sweep_note(
            sweep.plan,
            states,
            gpu_hours,
            document=folder / "scaling.json",
            experiment=(experiment.id, experiment.name),
        )
        if sweep.note != note:
            self._write_notes(experiment, parent, note)
            sweep.note = note
        self._upload_run_ids(sweep, parent)
        self._tag_experiment(sweep, parent)
        over = states.total() == len(sweep.entries) > 0 and states.keys() <= set(OVER)
        status = "FINISHED" if over else "RUNNING"
        if parent.status != status:
            experiment.set_status(parent, status, None)

    def _upload_run_ids(self, sweep: TrackedSweep, parent: RunRecord) -> None:
        """Upload `runs.json`, trial -> run id, so that the page need not search all runs."""
        ids: dict[str, str] = {}
        for entry in sweep.plan["trials"]:
            run = sweep.experiment.runs.get(entry["name"])
            if run:
                ids[entry["name"]] = run.run_id
        if ids:
            texts = {"runs.json": json.dumps(ids, separators=(",", ":"))}
            self._upload(sweep.experiment, parent, "jepa.runs", (), texts)

    def _write_notes(self, experiment: Experiment, parent: RunRecord, ours: str) -> None:
        """Replace our part of the notes of the parent run and the experiment, as they are now."""
        key = run_tags.NOTE
        stored = self.client.get_run(parent.run_id).data.tags.get(key, "")
        parent.tags[key] = stored
        merged = run_tags.merge_note(stored, ours)
        if merged != stored:
            experiment.send(parent, {key: merged})
        stored = self.client.get_experiment(experiment.id).tags.get(key, "")
        stored = stored or experiment.notes.get(EXPERIMENT, "")
        merged = run_tags.merge_note(stored, ours)
        if merged != stored:
            self.client.set_experiment_tag(experiment.id, key, merged)

    def _tag_experiment(self, sweep: TrackedSweep, parent: RunRecord) -> None:
        """Set the experiment's owner, its chart view and the id of its parent run."""
        tags = {
            **run_tags.experiment_tags(self.root, sweep.name),
            chart_view.TAG: chart_view.view_tag(),
            "jepa.parent": parent.run_id,
        }
        for key, value in tags.items():
            if sweep.experiment.tags.get(key) != value:
                self.client.set_experiment_tag(sweep.experiment.id, key, value)
                sweep.experiment.tags[key] = value
