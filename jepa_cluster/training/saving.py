"""When to save, what to begin from, and how to leave.

In: the clock, the guard, the disk's answers. Out: checkpoints in time, and one of the orderly ends of an attempt.
All decisions that ranks must share come from wishes that went through a step's collective, or from outcomes that
rank 0 told everybody; none from a rank's own clock.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError, ExitCode, Fenced, JepaError
from jepa_cluster.ijepa import schedules
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import checkpoint, parallel
from jepa_cluster.training.health import Watch, say
from jepa_cluster.training.journal import Journal, close_record
from jepa_cluster.training.parallel import Ranks
from jepa_cluster.training.preemption import Guard, depart
from jepa_cluster.trial.layout import TrialDir

MARGIN = 15.0  # seconds before the kill at which an attempt leaves with its last commit
RETRY = 20.0  # seconds between attempts to save on a disk that fails
TRIES = 90  # of them before the attempt gives up: half an hour


class Saving:
    def __init__(self, config: TrialConfig, ranks: Ranks, journal: Journal, guard: Guard) -> None:
        self.config, self.ranks, self.journal, self.guard = config, ranks, journal, guard
        runtime, trial = config.runtime, journal.trial
        self.saver = checkpoint.Saver(trial, journal.attempt, ranks, runtime.keep_checkpoints, runtime.keeps)
        self.last_commit = 0
        self.failures, self.failure, self.fenced = 0, "", False
        self.every = runtime.checkpoint_minutes * 60
        self.next = time.monotonic() + self.every
        self.stalled = 0.0  # seconds that steps waited for saves

    def begin(self, model: IJepa, adam: Optimizer) -> tuple[int, dict[str, float] | None]:
        """Fill the model from the newest good checkpoint, else from the trunk's, else from the seed.

        -> (step, the row that awaits a probe)
        """
        self.model, self.adam = model, adam
        trial, journal = self.journal.trial, self.journal
        if self.ranks.place.first:
            checkpoint.sweep_up(trial, journal.attempt)
        manifest, asides = checkpoint.newest(trial, self.config.id, self.ranks)
        folder, trunk = trial.checkpoint(manifest.step) if manifest else None, None
        if manifest is None and self.config.runtime.fork_from:
            trunk = trial.root.trial(self.config.runtime.fork_from)
            manifest, folder = forked(trunk, self.config, self.ranks)
        if folder:
            checkpoint.load(folder, model, adam, self.ranks)
        else:
            parallel.initialise(model, self.config.recipe)
        journal.open(manifest, trunk if folder else None)
        self.last_commit = manifest.step if manifest else 0
        for aside in asides:
            journal.event("checkpoint_set_aside", self.last_commit, fault=aside)
        if journal.spool:
            self.saver.before_commit = journal.spool.sync
            self.saver.committed = journal.commit
        runtime = self.config.runtime
        grace = runtime.grace_seconds
        self.guard.at_deadline(grace - min(MARGIN, grace / 4), self.leave_with_last_commit)
        if manifest is None:
            return 0, {}
        return manifest.step, None if manifest.row is None else dict(manifest.row)

    def wishes(self, watch: Watch) -> dict[str, float]:
        """What this rank wants, to be summed over ranks; rank 0 speaks for the directory and for time."""
        self._hear()
        first = self.ranks.place.first
        wanted = {
            "signal": self.guard.raised,
            "stop": first and watch.stop_asked,
            "fenced": first and (watch.fenced or self.fenced),
            "checkpoint": first and not self.saver.busy and time.monotonic() > self.next,
            "give_up": first and self.failures >= TRIES,
        }
        return {name: float(wish) for name, wish in wanted.items()}

    def planned(self, step: int) -> set[str]:
        """What the runtime itself wishes at this step."""
        return {"stop"} if step == self.config.runtime.stop_after else set()

    def start(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step beside the training. row: its metrics, when they still await a probe."""
        made = checkpoint.describe(step, self.config.id, self.journal.attempt, self.ranks, self.journal.counters)
        with self.journal.clock("checkpoint"):
            self.saver.wait()
            self._hear()
            self.stalled = self.saver.start(replace(made, row=row), checkpoint.state(self.model, self.adam))
        self.next = time.monotonic() + self.every

    def surely(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step and wait until it is committed; on a disk that fails, try again until it is hopeless."""
        with self.journal.clock("checkpoint"):
            self.saver.wait()
            self._hear()
            while self.last_commit != step:  # step 0 needs none: it can be made from the seed
                self.start(step, row)
                self.saver.wait()
                self._hear()
                if self.fenced:
                    raise Fenced(self.failure, where=str(self.journal.trial.path))
                if self.failures >= TRIES:
                    raise self.hopeless()
                if self.failures:
                    time.sleep(min(RETRY, self.every))

    def leave(self, step: int, wishes: set[str], row: dict[str, float] | None = None) -> ExitCode:
        """Stop between two steps because somebody asked. Raises Fenced, CheckpointError."""
        if "fenced" in wishes:
            newer = self.journal.trial.newest_attempt()
            raise Fenced(
                f"attempt {newer} owns this trial, this is {self.journal.attempt}", where=str(self.journal.trial.path)
            )
        if "give_up" in wishes:
            raise self.hopeless()
        self.surely(step, row)
        code = ExitCode.PREEMPTED if "signal" in wishes else ExitCode.STOPPED
        return self.journal.close(code, step, error=self.guard.signal or "")

    def finish(self, step: int) -> ExitCode:
        self.surely(step)
        return self.journal.done(step)

    def leave_with_last_commit(self) -> None:
        """Called when the grace is nearly over and the attempt has not stopped: what is committed is what remains."""
        why = (
            f"{self.guard.signal}: left with the commit of step {self.last_commit}; {self.failure or 'no time to save'}"
        )
        say(f"preemption: {why}")
        self.journal.close(ExitCode.PREEMPTED, self.last_commit, error=why)
        depart(ExitCode.PREEMPTED, self.ranks.place.slurm, self.ranks.place.first)

    def hung(self, what: str) -> None:
        """Called by the watchdog, which saw this rank stand still: say so and go; another attempt may do better."""
        close_record(self.journal.trial, self.journal.attempt, ExitCode.HANG, self.journal.clock, None, "hang", what)
        depart(ExitCode.HANG, self.ranks.place.slurm, True)

    def hopeless(self) -> CheckpointError:
        return CheckpointError(
            f"no checkpoint could be saved in {self.failures} attempts: {self.failure}",
            where=str(self.journal.trial.checkpoints),
            now=f"make room, then `jepa retry`; step {self.last_commit} is safe",
        )

    def _hear(self) -> None:
        """Take in how the last save ended."""
        outcome = self.saver.outcome()
        if outcome is None:
            return
        if outcome.error is None:
            self.last_commit, self.failures, self.failure = max(self.last_commit, outcome.step), 0, ""
            return
        self.failures, self.failure, self.fenced = self.failures + 1, outcome.error, outcome.fenced
        self.next = time.monotonic() + min(RETRY, self.every)
        self.journal.event("checkpoint_failed", outcome.step, error=outcome.error)
        say(f"checkpoint: step {outcome.step} is not saved: {outcome.error}")


def forked(trunk: TrialDir, config: TrialConfig, ranks: Ranks) -> tuple[checkpoint.Manifest | None, Path | None]:
    """The trunk's newest milestone from before this branch's cool-down that verifies; None twice: there is none.

    A branch is the trial it would be if trained from step 0, so this saves work and changes no bit. The trunk may be
    at work: nothing of it is touched, and only what it keeps for ever is read.
    """
    for step in checkpoint.told(ranks, lambda: milestones(trunk, config)):
        folder = trunk.checkpoint(step)
        manifest = checkpoint.told(ranks, lambda folder=folder: checkpoint.read_manifest(folder))
        faults = [manifest] if isinstance(manifest, str) else checkpoint.verify(folder, manifest, ranks)
        if not faults and trunk.name.endswith(f"-{manifest.recipe}"):
            return manifest, folder
        if ranks.place.first:
            say(f"fork: step {step} of {trunk.name} cannot be used: {'; '.join(faults[:3]) or 'another recipe'}")
    return None, None


def milestones(trunk: TrialDir, config: TrialConfig) -> list[int]:
    """Steps to fork at, newest first; none when there is no such trial or it is not the same up to the cool-down."""
    try:
        other = trunk.read_config()
    except JepaError:
        return []
    if replace(other.recipe, optim=config.recipe.optim) != config.recipe:
        return []
    last = schedules.shared(other.recipe.optim, config.recipe.optim)
    return [s for s in reversed(trunk.committed()) if s <= last and other.runtime.keeps(s)]
