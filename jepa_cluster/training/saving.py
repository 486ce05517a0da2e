"""When to save, what to begin from, when to go back, and how to leave.

In: the clock, the guard, the watch's verdict, the disk's answers. Out: checkpoints in time, and one of the orderly
ends of an attempt.
All decisions that ranks must share come from wishes that went through a step's collective, or from outcomes that
rank 0 told everybody; none from a rank's own clock.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace

from torch.optim import Optimizer

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError, Diverged, ExitCode, Fenced, JepaError
from jepa_cluster.ijepa import schedules
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import checkpoint, parallel
from jepa_cluster.training.health import OTHERS, Watch, say
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
        self.stability = journal.stability
        kept = (runtime.keep_checkpoints, runtime.keeps, config.recipe.optim.watch.every)
        self.saver = checkpoint.Saver(trial, journal.attempt, ranks, *kept)
        self.last_commit, self.last_anchor = 0, 0
        self.failures, self.failure, self.fenced = 0, "", False
        self.every = runtime.checkpoint_minutes * 60
        self.next = time.monotonic() + self.every
        self.mark = self.anchor_mark = journal.clock.mark()  # time spent when the newest save, and anchor, began

    def begin(self, model: IJepa, adam: Optimizer) -> tuple[int, dict[str, float] | None]:
        """Fill the model from the newest good checkpoint, else from the trunk's, else from the seed.

        -> (step, the row that awaits a probe)
        """
        self.model, self.adam = model, adam
        trial, journal = self.journal.trial, self.journal
        if self.ranks.place.first:
            checkpoint.sweep_up(trial, journal.attempt)
        manifest, asides = checkpoint.newest(trial, self.config.id, self.ranks)
        trunk = None
        if manifest is None and self.config.runtime.fork_from:
            trunk = trial.root.trial(self.config.runtime.fork_from)
            manifest = forked(trunk, self.config, self.ranks)
            trunk = trunk if manifest else None
        self._fill(manifest, trunk or trial)
        journal.open(manifest, trunk)
        self._tell(asides)
        if journal.spool:
            self.saver.before_commit = journal.spool.sync
            self.saver.committed = journal.commit
        runtime = self.config.runtime
        grace = runtime.grace_seconds
        self.guard.at_deadline(grace - min(MARGIN, grace / 4), self.leave_with_last_commit)
        if manifest is None:
            return 0, {}
        return manifest.step, None if manifest.row is None else dict(manifest.row)

    def _fill(self, manifest: checkpoint.Manifest | None, origin: TrialDir) -> None:
        """The state of a checkpoint of `origin` that verified, or of the seed, and what the watch knew then."""
        if manifest:
            checkpoint.load(origin.checkpoint(manifest.step), self.model, self.adam, self.ranks)
        else:
            parallel.initialise(self.model, self.config.recipe)
            parallel.forget(self.adam)
        self.stability.restore(manifest.watch if manifest else {})
        self.last_commit = manifest.step if manifest else 0
        self.last_anchor = (manifest.anchor if manifest else None) or 0

    def _tell(self, asides: list[str]) -> None:
        for aside in asides:
            self.journal.event("checkpoint_set_aside", self.last_commit, fault=aside)

    def back(self) -> int:
        """The watch has spoken: back to the last anchor -> its step. The images since then are left out from now on.

        What an attempt that dies before its next commit would lose is relived by its successor, with the same
        verdict: all of it follows from the anchor. Raises Diverged, Fenced, CheckpointError.
        """
        journal, trial, fallen, why = self.journal, self.journal.trial, self.stability.fallen, self.stability.why
        self.saver.wait()
        self._hear()
        if checkpoint.told(self.ranks, lambda: trial.newest_attempt() > journal.attempt):
            raise self.superseded()
        if journal.counters["rollbacks"] >= self.config.recipe.optim.watch.rollbacks:
            raise Diverged(
                f"diverged at step {fallen}: {why}, after {journal.counters['rollbacks']:.0f} rollbacks",
                where=str(trial.path),
                now="another recipe: a lower optim.lr, a lower optim.clip",
            )
        with journal.clock("checkpoint"):
            settled = self.last_anchor
            manifest, asides = checkpoint.newest(trial, self.config.id, self.ranks, anchors=True)
            to = manifest.step if manifest else 0
            beyond = [s for s in trial.committed() if s > to]
            checkpoint.told(self.ranks, lambda: [checkpoint.discard(trial.checkpoint(s)) for s in beyond])
            journal.clock.lose(self.anchor_mark)
            journal.rollback(manifest, fallen, why, again=to >= settled)
            self._fill(manifest, trial)
            self._tell(asides)
        return to

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

    def milestone(self, step: int) -> bool:
        """Whether a checkpoint is due at this very step, whatever the time is."""
        return self.config.runtime.keeps(step) or self.stability.anchors(step)

    def planned(self, step: int) -> set[str]:
        """What the runtime itself wishes at this step."""
        return {"stop"} if step == self.config.runtime.stop_after else set()

    def start(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step beside the training. row: its metrics, when they still await a probe."""
        made = checkpoint.describe(step, self.config.id, self.journal.attempt, self.ranks, self.journal.counters)
        with self.journal.clock("checkpoint"):
            self.saver.wait()
            self._hear()
            if row is None and self._stands(step):
                self.last_anchor, self.anchor_mark = step, self.journal.clock.mark()
            if self.stability.on:
                made = replace(made, anchor=self.last_anchor, watch=self.stability.state())
            self.saver.start(replace(made, row=row), checkpoint.state(self.model, self.adam))
        self.mark = self.journal.clock.mark()
        self.next = time.monotonic() + self.every

    def _stands(self, step: int) -> bool:
        """Whether no verdict can take this step back: the watch found it good at an anchor, or it is the last."""
        return self.stability.good(step) or (step == self.config.recipe.optim.steps and not self.stability.fallen)

    def settle(self, step: int) -> None:
        """The row that a committed checkpoint was waiting for is whole now."""
        if not self.stability.on:
            self.journal.settle(step)
        elif self._stands(step):  # it was saved as something that may be taken back
            self.last_commit = min(self.last_commit, step - 1)
            self.start(step)

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
            raise self.superseded()
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
        last = max([self.last_commit, *self.journal.trial.committed()])  # the loop may not have heard of the newest yet
        why = f"{self.guard.signal}: left with the commit of step {last}; {self.failure or 'no time to save'}"
        say(f"preemption: {why}")
        self.journal.close(ExitCode.PREEMPTED, last, error=why)
        depart(ExitCode.PREEMPTED, self.ranks.place.slurm, self.ranks.place.first)

    def hung(self, what: str) -> None:
        """Called by the watchdog, which saw this rank stand still: say so and go; another attempt may do better."""
        recorder = threading.Thread(target=self._record_flight, daemon=True)  # it may hang too
        recorder.start()
        recorder.join(5 * OTHERS)
        time.sleep(OTHERS)
        close_record(self.journal.trial, self.journal.attempt, ExitCode.HANG, self.journal.clock, None, "hang", what)
        depart(ExitCode.HANG, self.ranks.place.slurm, True)

    def _record_flight(self) -> None:
        with contextlib.suppress(Exception):
            flight = parallel.flight_record()
            path = self.journal.trial.logs(self.journal.attempt) / f"rank{self.ranks.rank}.flight.json"
            path.write_text(json.dumps(flight, indent=1, default=str))
            for entry in [e for e in flight if not e.get("retired")][-5:]:
                say(f"watchdog: {entry['profiling_name']} of {entry['input_sizes']} began and did not end")

    def superseded(self) -> Fenced:
        trial, newer = self.journal.trial, self.journal.trial.newest_attempt()
        return Fenced(f"attempt {newer} owns this trial, this is {self.journal.attempt}", where=str(trial.path))

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
            self.journal.clock.kept = self.mark
            return
        self.failures, self.failure, self.fenced = self.failures + 1, outcome.error, outcome.fenced
        self.next = time.monotonic() + min(RETRY, self.every)
        self.journal.event("checkpoint_failed", outcome.step, error=outcome.error)
        say(f"checkpoint: step {outcome.step} is not saved: {outcome.error}")


def forked(trunk: TrialDir, config: TrialConfig, ranks: Ranks) -> checkpoint.Manifest | None:
    """The trunk's newest milestone from before this branch's cool-down that verifies; None when there is none.

    A branch is the trial it would be if trained from step 0, so this saves work and changes no bit. The trunk may be
    at work: nothing of it is touched, and only what it keeps for ever is read.
    """
    for step in checkpoint.told(ranks, lambda: milestones(trunk, config)):
        folder = trunk.checkpoint(step)
        manifest = checkpoint.told(ranks, lambda folder=folder: checkpoint.read_manifest(folder))
        faults = [manifest] if isinstance(manifest, str) else checkpoint.verify(folder, manifest, ranks)
        if not faults and trunk.name.endswith(f"-{manifest.recipe}"):
            return manifest
        if ranks.place.first:
            say(f"fork: step {step} of {trunk.name} cannot be used: {'; '.join(faults[:3]) or 'another recipe'}")
    return None


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
