"""What the collector remembers of a sweep and its trials between two rounds.

All of it can be read again from the store and the trial directories.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from jepa_cluster.config import TrialConfig
from jepa_cluster.records import PlannedTrial, SweepPlan
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Size
from jepa_cluster.tracking import chart_view
from jepa_cluster.tracking.mlflow_runs import Experiment, RunRecord
from jepa_cluster.tracking.spool_tail import Signature, SpoolTail
from jepa_cluster.trial import file_facts
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.status import RULES


@dataclass
class TrackedTrial:
    """One trial of a sweep as the collector follows it.

    files: signature of its files when it was last shipped; None when that failed.
    """

    trial: TrialDir
    entry: PlannedTrial
    tail: SpoolTail
    config: TrialConfig | None = None
    files: Signature | None = None

    def is_complete(self, files: Signature, run: RunRecord) -> bool:
        """Whether the trial is done and shipped, so that no spool must be opened."""
        if self.files not in (None, files):
            return False
        if run.tags.get("jepa.state") != "done" or run.status != RULES["done"].mlflow:
            return False
        done = read_json(self.trial.done)
        return done is not None and int(done.get("step", -1)) <= run.settled

    def is_shipped(self, files: Signature, run: RunRecord, submitted: Container[str]) -> bool:
        """Whether all that changed since the last round are unsettled rows."""
        if self.tail.unshipped or files != self.files:
            return False
        if run.tags.get("jepa.state") == "new":
            return self.trial.name not in submitted
        if run.tags.get("jepa.state") != "running":
            return True
        return file_facts.seconds_silent(self.trial) <= file_facts.HEARTBEAT_SECONDS

    def read_spools(self, settled: int) -> None:
        """Read new lines. settled: how far the run is shipped; from there on rows are needed."""
        if settled < self.tail.forgotten_through:  # another run, or an older store
            self.tail = SpoolTail(self.trial)
        self.tail.read()


@dataclass
class TrackedSweep:
    """One sweep as the collector follows it, with what it last sent about the sweep itself."""

    name: str
    plan: SweepPlan
    plan_mtime: float
    experiment: Experiment
    trials: dict[str, TrackedTrial] = field(default_factory=dict[str, TrackedTrial])
    note: str = ""
    _sizes: dict[str, Size] = field(default_factory=dict[str, Size])  # by model axes
    _sized: SweepPlan | None = None  # the plan whose sizes they are

    @property
    def entries(self) -> list[PlannedTrial]:
        """The planned trials, and those that were edited out while their jobs waited or worked."""
        return [*self.plan["trials"], *self.plan["dropped"]]

    def read_sizes(self, root: Root) -> None:
        """Read the model sizes of the plan, from one config per model."""
        if self.plan is self._sized:
            return
        by_model: dict[str, str] = {}
        for entry in self.plan["trials"]:
            by_model.setdefault(_model_axes(entry), entry["name"])
        self._sizes.clear()
        for axes, name in by_model.items():
            config = tables.read_config(root.trial(name))
            if config:
                self._sizes[axes] = tables.recipe_size(config.recipe)
        if len(self._sizes) == len(by_model):  # else a submit is writing them
            self._sized = self.plan

    def color(self, entry: PlannedTrial) -> str:
        """Return the colour of a trial by its size; '' if it is unknown or the only one."""
        own = self._sizes.get(_model_axes(entry))
        return chart_view.color(set(self._sizes.values()), own) if own else ""


def _model_axes(entry: PlannedTrial) -> str:
    return str([item for item in entry["point"].items() if item[0].startswith("model")])
