"""What the collector remembers of a sweep and its trials between two rounds.

All of it can be read again from the store and the trial directories.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jepa_cluster.config import TrialConfig
from jepa_cluster.records import PlannedTrial, SweepPlan
from jepa_cluster.tracking.mlflow_runs import Experiment, RunRecord
from jepa_cluster.tracking.spool_tail import Signature, SpoolTail, without_metrics
from jepa_cluster.trial import file_facts
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.status import RULES


@dataclass
class TrackedTrial:
    """One trial of a sweep as the collector follows it.

    files: signature of its files when it was last shipped. unshipped: settled rows may be waiting.
    """

    trial: TrialDir
    entry: PlannedTrial
    tail: SpoolTail
    config: TrialConfig | None = None
    files: Signature | None = None
    unshipped: bool = True

    def is_shipped(self, files: Signature, run: RunRecord) -> bool:
        """Whether nothing changed since the last round, without opening a spool."""
        if self.files is None:
            return is_complete(self.trial, run)
        if run.tags.get("jepa.state") == "running":  # its heartbeat may have stopped
            silent = file_facts.seconds_silent(self.trial) > file_facts.HEARTBEAT_SECONDS
            return files == self.files and not silent
        return files == self.files

    def read_spools(self, settled: int) -> None:
        """Read new lines. settled: how far the run is shipped; from there on rows are needed."""
        if settled < self.tail.forgotten_through:  # another run, or an older store
            self.tail = SpoolTail(self.trial)
            self.unshipped = True
        if self.tail.read():
            self.unshipped = True

    def has_only_unsettled_rows(self, files: Signature) -> bool:
        """Whether all that changed since the last round are rows that are not settled."""
        if self.unshipped or self.files in (None, files):
            return False
        return without_metrics(files) == without_metrics(self.files)


@dataclass
class TrackedSweep:
    """One sweep as the collector follows it, with what it last sent about the sweep itself."""

    name: str
    plan: SweepPlan
    plan_mtime: int | None
    experiment: Experiment
    trials: dict[str, TrackedTrial] = field(default_factory=dict[str, TrackedTrial])
    file_stats: list[tuple[str, int]] | None = None
    file_digest: str = ""
    experiment_tags: dict[str, str] = field(default_factory=dict[str, str])
    note: str = ""

    @property
    def entries(self) -> list[PlannedTrial]:
        """The planned trials, and those that were edited out while their jobs waited or worked."""
        return [*self.plan["trials"], *self.plan["dropped"]]

    @property
    def submitted(self) -> int:
        return int(self.plan.get("submitted") or 0)


def is_complete(trial: TrialDir, run: RunRecord) -> bool:
    """Whether a finished trial is in the store completely, so that no spool must be opened."""
    if run.tags.get("jepa.state") != "done" or run.status != RULES["done"].mlflow:
        return False
    done = read_json(trial.done)
    return done is not None and int(done.get("step", -1)) <= run.settled
