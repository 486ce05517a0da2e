"""Decide when to save, what to begin from, and how to end an attempt.

In: time, the preemption handler, the detector's verdict, results of saves. Out: checkpoints in
time, and one of the orderly ends of an attempt.
Decisions that ranks share come from flags that were summed over all ranks, or from an answer of
rank 0 that every rank reads; none from a rank's own clock. Only rank 0 knows whether a save is
committed.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError, Diverged, ExitCode
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import checkpoint, distributed
from jepa_cluster.training.attempt_log import AttemptLog
from jepa_cluster.training.channel import CheckpointGone
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.distributed import World
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.save_protocol import LEFTOVERS
from jepa_cluster.training.sharded_adamw import ShardedAdamW, reset_optimizer
from jepa_cluster.training.start_checkpoint import Start, find_start
from jepa_cluster.training.watchdog import Watchdog, print_stderr
from jepa_cluster.trial.spool import now_ms

RETRY_SECONDS = 20.0  # between attempts to save on a disk that fails
MAX_FAILED_SAVES = 90  # in a row before the attempt gives up: half an hour
# Intervals, and at least seconds, after which the newest checkpoint is too old.
OVERDUE_INTERVALS = 3
OVERDUE_SECONDS = 60.0
# Seconds between two looks whether a rank is saving: a tenth of the wait so far, within limits.
SHORTEST_PAUSE = 0.005
LONGEST_PAUSE = 1.0


@dataclass(eq=False)
class CheckpointPolicy:
    """Checkpoints of one attempt.

    last_commit, committed_at: step of the newest commit and its time (Unix ms), on rank 0; until
    the first one, where and when the attempt began. last_error: of the newest save, if it failed.
    """

    config: TrialConfig
    world: World
    log: AttemptLog
    watchdog: Watchdog
    exits: ForcedExit
    last_commit: int = 0
    committed_at: int = 0
    save_began: float = 0.0  # by time.monotonic(): of the save that runs, or of the last one
    failed_saves: int = 0  # in a row
    last_error: str = ""
    fenced: bool = False
    overdue: bool = False

    def __post_init__(self) -> None:
        self.detector = self.log.detector
        self.handler = self.exits.handler
        self.saver = checkpoint.AsyncSaver(self.log.trial, self.log.attempt, self.world)
        self.protocol = self.saver.protocol
        self.interval = self.config.runtime.checkpoint_minutes * 60
        self.next_save_at = time.monotonic() + self.interval

    # ---- begin

    def restore(self, model: IJepa, optimizer: ShardedAdamW) -> tuple[int, dict[str, float] | None]:
        """Fill the model from the newest valid checkpoint, else the trunk's, else from the seed.

        Returns the step, and the row whose probe has not run yet.
        """
        self.model, self.optimizer = model, optimizer
        log = self.log
        self.protocol.steps_to_keep = self._steps_to_keep
        self.world.channel.from_rank0(LEFTOVERS, self.protocol.remove_stale)
        start = self._restore_newest()
        manifest = start.manifest
        log.open(manifest, start.trunk)
        for fault in start.faults:
            log.event("checkpoint_set_aside", self.last_commit, fault=fault)
            if self.world.env.is_rank0:
                print_stderr(f"checkpoint: {fault}; set aside")
        self.saver.on_failure = lambda result: log.save_failed(result.step, result.error)
        if log.spool:
            self.protocol.before_commit = log.spool.sync
            self.protocol.on_commit = self._after_commit
        self.exits.save_error = lambda: self.last_error
        self.watchdog.facts = self.heartbeat_facts
        self.watchdog.save_progress = lambda: self.saver.last_progress
        if manifest is None:
            return 0, {}
        return manifest.step, None if manifest.row is None else dict(manifest.row)

    def _restore_newest(self) -> Start:
        """Find a checkpoint and load it.

        Repeated while an attempt that this one fences off commits a newer checkpoint meanwhile;
        then every rank sees CheckpointGone.
        """
        faults: list[str] = []
        for turn in itertools.count():
            topic = f"start-{turn}"
            start = find_start(topic, self.config, self.world, self.log.trial, self.protocol)
            faults += start.faults
            with contextlib.suppress(CheckpointGone):
                self._load_or_init(start, f"{topic}/load")
                return start._replace(faults=faults)
        raise AssertionError("unreachable")

    def _steps_to_keep(self, steps: list[int]) -> set[int]:
        """Of the committed steps: the newest few and the milestones."""
        runtime = self.config.runtime
        return {*steps[-runtime.keep_checkpoints :], *filter(runtime.keeps, steps)}

    def _load_or_init(self, start: Start, topic: str) -> None:
        """Fill model, optimizer and detector from a verified checkpoint, or from the seed."""
        manifest = start.manifest
        if manifest:
            folder = (start.trunk or self.log.trial).checkpoint(manifest.step)
            checkpoint.load(folder, self.model, self.optimizer, self.world, topic)
            self.detector.restore(manifest.detector)
            self.last_commit = manifest.step
        else:
            distributed.init_from_seed(self.model, self.config.recipe)
            reset_optimizer(self.optimizer)
            self.detector.restore({})
            self.last_commit = 0
        self.committed_at = now_ms()

    def _after_commit(self, manifest: Manifest) -> None:
        """Rank 0, in the thread of the save."""
        self.log.commit(manifest, time.monotonic() - self.save_began)
        if self.config.runtime.milestones:
            self.exits.hooks.on_commit()

    # ---- flags

    def control_flags(self) -> dict[str, bool]:
        """Return this rank's flags, to be summed over ranks. Only rank 0 knows files and time."""
        self._poll_save()
        self._report_overdue()
        due = not self.saver.busy and time.monotonic() > self.next_save_at
        return {
            "signal": self.handler.stop_requested,
            "stop": self.watchdog.stop_requested,
            "fenced": self.watchdog.fenced or self.fenced,
            "checkpoint": due and self.world.env.is_rank0,
            "give_up": self.failed_saves >= MAX_FAILED_SAVES,
        }

    def runtime_flags(self, step: int) -> set[str]:
        """Return {"stop_after"} from the step on at which the runtime asks to stop."""
        last = self.config.runtime.stop_after
        return {"stop_after"} if 0 < last <= step else set()

    @property
    def late_seconds(self) -> float:
        """Age at which the newest checkpoint is too old."""
        return max(OVERDUE_INTERVALS * self.interval, OVERDUE_SECONDS)

    def _report_overdue(self) -> None:
        """One event when the newest checkpoint is too old and no failed save explains it."""
        age = now_ms() - self.committed_at
        if self.overdue or self.failed_saves or age <= 1000 * self.late_seconds:
            return
        self.overdue = True
        minutes = round(age / 60_000, 1)
        self.log.event("checkpoint_overdue", self.last_commit, minutes=minutes)

    # ---- save

    def start_unless_suspicious(self, step: int) -> None:
        """Save this step. A suspicious step is not saved, but the next one that is not."""
        if self.detector.suspicious_steps:
            self.next_save_at = 0.0
        else:
            self.start(step)

    def start(self, step: int, row: dict[str, float] | None = None) -> None:
        """Start to save this step in the background. row: its metrics, if its probe is pending."""
        log = self.log
        manifest = checkpoint.new_manifest(
            step, self.config.id, log.attempt, self.world, log.counters
        )
        with log.timer("checkpoint"):
            self._wait_for_saves()
            manifest = replace(manifest, row=row, detector=self.detector.state())
            self.save_began = time.monotonic()
            self.saver.start(manifest, checkpoint.state(self.model, self.optimizer))
        log.timer.mark_save(step)
        self.next_save_at = time.monotonic() + self.interval

    def _wait_for_saves(self, step: int = -1) -> set[str]:
        """Every rank: wait until no rank is saving; return what rank 0 knows then, on every rank.

        The ranks wait together, so no watchdog takes a slow save of one rank for a hang of another.
        A save without progress is ended by the watchdog of its own rank.
        committed: whether rank 0 has committed `step`.
        """
        begun = time.monotonic()
        while True:
            saving = self.saver.busy
            self._poll_save()
            own_flags = {
                "saving": saving,
                "committed": self.world.env.is_rank0 and self.last_commit == step,
                "fenced": self.fenced,
                "give_up": self.failed_saves >= MAX_FAILED_SAVES,
            }
            flags = distributed.sum_flags(own_flags)
            self.handler.note_contact()
            if "saving" not in flags:
                return flags
            pause = max(SHORTEST_PAUSE, (time.monotonic() - begun) / 10)
            time.sleep(min(pause, LONGEST_PAUSE))

    def save_and_wait(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step and wait for the commit. Retries up to MAX_FAILED_SAVES times."""
        with self.log.timer("checkpoint"):
            while not self._is_committed(step):
                self.start(step, row)
                if not self._is_committed(step):
                    self._sleep(min(RETRY_SECONDS, self.interval))

    def _is_committed(self, step: int) -> bool:
        """Wait until no rank is saving; return on every rank whether rank 0 has committed `step`.

        Step 0 needs no checkpoint: it can be made from the seed. Raises Fenced, CheckpointError.
        """
        flags = self._wait_for_saves(step)
        if "committed" in flags:
            return True
        self._raise_if_hopeless(flags)
        return False

    def _raise_if_hopeless(self, flags: set[str]) -> None:
        """Every rank: raise Fenced or CheckpointError when nothing can be saved any more."""
        if "fenced" in flags:
            raise self.protocol.fenced_error()
        if "give_up" not in flags:
            return
        # Only rank 0 knows the error.
        why = (
            f"no checkpoint could be saved in {self.failed_saves} attempts: {self.last_error};"
            f" step {self.last_commit} is safe"
        )
        raise CheckpointError(
            self.world.channel.from_rank0("give up", lambda: why),
            where=str(self.log.trial.checkpoints),
            hint="make room, then `jepa retry`",
        )

    def _sleep(self, seconds: float) -> None:
        """Sleep in short naps, so that the watchdog sees that this rank is alive."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self.log.timer.touch()

    def _poll_save(self) -> None:
        """Rank 0: take the result of a save that has ended. Only rank 0 knows of the commit."""
        result = self.saver.take_result()
        if result is None or not self.world.env.is_rank0:
            return
        if result.warning:
            print_stderr(f"checkpoint: step {result.step} is committed, but: {result.warning}")
        if not result.error:
            self.last_commit = max(self.last_commit, result.step)
            self.committed_at = now_ms()
            self.failed_saves, self.last_error, self.overdue = 0, "", False
            self.log.timer.mark_committed(result.step)
            return
        if not self.failed_saves:  # one event for all failures in a row
            self.log.event("checkpoint_failed", result.step, error=result.error)
        self.failed_saves += 1
        self.last_error, self.fenced = result.error, result.fenced
        self.next_save_at = time.monotonic() + min(RETRY_SECONDS, self.interval)
        print_stderr(f"checkpoint: step {result.step} is not saved: {result.error}")

    def heartbeat_facts(self) -> dict[str, Any]:
        """Rank 0's heartbeat: the newest checkpoint, and why there is no newer one."""
        facts = {
            "step": self.last_commit,
            "t": self.committed_at,
            "late_seconds": self.late_seconds,
            "error": self.last_error,
        }
        return {"checkpoint": facts}

    # ---- end

    def stop(
        self,
        step: int,
        flags: set[str],
        row: dict[str, float] | None = None,
    ) -> ExitCode:
        """Save and end between two steps, for the reasons in `flags`.

        Raises Fenced, CheckpointError.
        """
        self._raise_if_hopeless(flags)
        self.save_and_wait(step, row)
        if "signal" in flags:
            return self.log.close(ExitCode.PREEMPTED, step, error=self.handler.signal or "")
        # At stop_after: done, because other jobs may depend on this one (afterok).
        code = ExitCode.STOPPED if "stop" in flags else ExitCode.DONE
        return self.log.close(code, step, cause="stopped")

    def finish(self, step: int) -> ExitCode:
        """Save the last step and write DONE.json; a full disk delays it."""
        self.save_and_wait(step)
        for _ in range(MAX_FAILED_SAVES):
            try:
                return self.log.mark_done(step)
            except OSError as e:
                print_stderr(f"cannot write {self.log.trial.done.name}: {e.strerror}")
                self._sleep(min(RETRY_SECONDS, self.interval))
        return self.log.mark_done(step)

    def raise_if_diverged(self) -> None:
        """Every rank, after the same step: raise Diverged when the detector has a verdict.

        The text is the same on every rank; only rank 0 knows the committed checkpoints.
        """
        if not self.detector.diverged_at:
            return
        trial = self.log.trial

        def newest_before() -> int:
            earlier = [s for s in trial.committed() if s < self.detector.suspicious_since]
            return max(earlier, default=0)

        with self.log.timer("checkpoint"):
            self._wait_for_saves()
            step = self.world.channel.from_rank0("diverged", newest_before)
        newest = "no checkpoint from before"
        if step:
            newest = f"newest checkpoint from before: step {step}"
        raise Diverged(
            f"{self.detector.evidence}; {newest}",
            where=str(trial.path),
            hint="lower optim.lr or set optim.clip",
        )
