"""When to save, what to begin from, and how to leave.

In: the clock, the guard, the detector's verdict, the disk's answers. Out: checkpoints in time, and one of the orderly
ends of an attempt.
All decisions that ranks must share come from flags that were summed over all ranks, or from an answer of rank 0 that
every rank reads; none from a rank's own clock. Only rank 0 knows whether a save is committed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError, Diverged, ExitCode, Fenced, JepaError
from jepa_cluster.ijepa import schedules
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import checkpoint, distributed
from jepa_cluster.training.attempt_log import AttemptLog, close_record
from jepa_cluster.training.channel import CheckpointGone
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.distributed import World
from jepa_cluster.training.preemption import PreemptionHandler, exit_rank
from jepa_cluster.training.watchdog import OTHER_RANKS_SECONDS, PhaseTimer, Watchdog, print_stderr
from jepa_cluster.trial.layout import TrialDir, names_in
from jepa_cluster.trial.spool import now_ms

EXIT_MARGIN = 15.0  # seconds before the kill at which an attempt leaves with its last commit
RETRY_SECONDS = 20.0  # seconds between attempts to save on a disk that fails
MAX_FAILED_SAVES = 90  # of them before the attempt gives up: half an hour
OVERDUE_INTERVALS, OVERDUE_SECONDS = (
    3,
    60.0,
)  # intervals, and at least seconds, after which the newest checkpoint is too old
SHORTEST_PAUSE, LONGEST_PAUSE = (
    0.005,
    1.0,
)  # seconds between two looks whether a rank is saving: a tenth of the wait


class CheckpointPolicy:
    def __init__(self, config: TrialConfig, world: World, log: AttemptLog, handler: PreemptionHandler) -> None:
        self.on_commit: Callable[[], None] = lambda: None  # rank 0: a trial with milestones has a new checkpoint
        self.config, self.world, self.log, self.handler = config, world, log, handler
        self.detector = log.detector
        self.saver = checkpoint.AsyncSaver(log.trial, log.attempt, world)
        self.protocol = self.saver.protocol
        self.last_commit = 0
        self.failed_saves, self.last_error, self.fenced, self.overdue = 0, "", False, False
        self.interval = config.runtime.checkpoint_minutes * 60
        self.next_save_at = time.monotonic() + self.interval
        self.committed_at = now_ms()  # of the newest commit, Unix ms; until then when this attempt began

    def restore(self, model: IJepa, adam: Optimizer) -> tuple[int, dict[str, float] | None]:
        """Fill the model from the newest good checkpoint, else from the trunk's, else from the seed.

        -> (step, the row that awaits a probe)
        """
        self.model, self.adam = model, adam
        trial, log = self.log.trial, self.log
        self.protocol.steps_to_keep = self._steps_to_keep
        self.world.channel.from_rank0("leftovers", lambda: self.protocol.remove_stale(log.attempt))
        asides: list[str] = []
        for turn in itertools.count():
            manifest, trunk, found = self._find_checkpoint(f"start-{turn}")
            asides += found
            try:
                self._load_or_init(manifest, trunk or trial, f"start-{turn}/load")
                break
            except CheckpointGone:  # on every rank: an attempt that we fence off has just committed a newer one
                continue
        log.open(manifest, trunk)
        self._report_quarantined(asides)
        self.saver.on_failure = lambda result: log.save_failed(result.step, result.error)
        if log.spool:
            self.protocol.before_commit = log.spool.sync
            self.protocol.on_commit = self._after_commit
        runtime = self.config.runtime
        grace = runtime.grace_seconds
        self.handler.set_deadline(grace - min(EXIT_MARGIN, grace / 4), self.exit_with_last_commit)
        if manifest is None:
            return 0, {}
        return manifest.step, None if manifest.row is None else dict(manifest.row)

    def _after_commit(self, manifest: Manifest) -> None:
        self.log.commit(manifest)
        if self.config.runtime.milestones:
            self.on_commit()

    def _find_checkpoint(self, topic: str) -> tuple[Manifest | None, TrialDir | None, list[str]]:
        """The checkpoint to begin from, the trunk if it is the trunk's, and what was set aside."""
        trial = self.log.trial
        manifest, asides = self.protocol.find_valid(topic, trial.committed, self._same_recipe)
        if manifest is None:
            damaged = self.world.channel.from_rank0(f"{topic}/damaged", lambda: quarantined(trial))
            if damaged:  # by this attempt or an earlier one
                raise no_valid_checkpoint_error(trial, asides or damaged)
        if manifest is None and self.config.runtime.fork_from:
            trunk = trial.root.trial(self.config.runtime.fork_from)
            manifest = self._find_fork(f"{topic}/fork", trunk)
            return manifest, trunk if manifest else None, asides
        return manifest, None, asides

    def _same_recipe(self, manifest: Manifest) -> str:
        if manifest.recipe != self.config.id:
            raise CheckpointError(
                f"checkpoint of recipe {manifest.recipe}, this trial is {self.config.id}",
                where=str(self.log.trial.checkpoint(manifest.step)),
                hint="it was copied here by hand; move it away",
            )
        return ""

    def _steps_to_keep(self, steps: list[int]) -> set[int]:
        """Of the committed steps: the newest few and the milestones."""
        runtime = self.config.runtime
        return {*steps[-runtime.keep_checkpoints :], *filter(runtime.keeps, steps)}

    def _find_fork(self, topic: str, trunk: TrialDir) -> Manifest | None:
        """The trunk's newest milestone from before this branch's cool-down that verifies; None when there is none.

        A branch is the trial it would be if trained from step 0, so this saves work and changes no bit. The trunk may
        be running: nothing of it is touched, and only the milestones are read, which it never removes.
        """

        def accept(manifest: Manifest) -> str:
            return "" if trunk.name.endswith(f"-{manifest.recipe}") else "another recipe"

        candidates = lambda: list(reversed(fork_steps(trunk, self.config)))  # noqa: E731
        manifest, passed = self.protocol.find_valid(topic, candidates, accept, trunk.checkpoints)
        for fault in passed if self.world.env.is_rank0 else []:
            print_stderr(f"fork: a checkpoint of {trunk.name} cannot be used: {fault}")
        return manifest

    def _load_or_init(self, manifest: Manifest | None, origin: TrialDir, topic: str) -> None:
        """Restore model, optimiser and detector from a verified checkpoint of `origin`, or make them from the seed."""
        if manifest:
            checkpoint.load(origin.checkpoint(manifest.step), self.model, self.adam, self.world, topic)
        else:
            distributed.init_from_seed(self.model, self.config.recipe)
            distributed.reset_optimizer(self.adam)
        self.detector.restore(manifest.detector if manifest else {})
        self.last_commit = manifest.step if manifest else 0
        self.committed_at = now_ms()

    def _report_quarantined(self, asides: list[str]) -> None:
        for aside in asides:
            self.log.event("checkpoint_set_aside", self.last_commit, fault=aside)
            if self.world.env.is_rank0:
                print_stderr(f"checkpoint: {aside}; set aside")

    def control_flags(self, watch: Watchdog) -> dict[str, float]:
        """What this rank wants, to be summed over ranks; rank 0 speaks for the directory and for time."""
        self._poll_save()
        self._report_overdue()
        first = self.world.env.is_rank0
        wanted = {
            "signal": self.handler.stop_requested,
            "stop": first and watch.stop_requested,
            "fenced": first and (watch.fenced or self.fenced),
            "checkpoint": first and not self.saver.busy and time.monotonic() > self.next_save_at,
            "give_up": first and self.failed_saves >= MAX_FAILED_SAVES,
        }
        return {name: float(wish) for name, wish in wanted.items()}

    def _report_overdue(self) -> None:
        """Rank 0: one event when the newest checkpoint is too old and no failed save has said why."""
        age = now_ms() - self.committed_at
        if not (self.overdue or self.failed_saves) and age > 1000 * max(
            OVERDUE_INTERVALS * self.interval, OVERDUE_SECONDS
        ):
            self.overdue = True
            self.log.event("checkpoint_overdue", self.last_commit, minutes=round(age / 60_000, 1))

    def runtime_flags(self, step: int) -> set[str]:
        """{"stop_after"} from the step on at which the runtime asks to stop, else an empty set."""
        last = self.config.runtime.stop_after
        return {"stop_after"} if 0 < last <= step else set()

    def start_unless_suspicious(self, step: int) -> None:
        """Save this step; when the detector suspects it, save the next step that it does not suspect instead."""
        if self.detector.suspicious_steps:
            self.next_save_at = 0.0
        else:
            self.start(step)

    def start(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step beside the training. row: its metrics, when they still await a probe."""
        log = self.log
        made = checkpoint.new_manifest(step, self.config.id, log.attempt, self.world, log.counters)
        with log.timer("checkpoint"):
            self._wait_for_saves()
            made = replace(made, row=row, detector=self.detector.state())
            self.saver.start(made, checkpoint.state(self.model, self.adam))
        log.timer.mark_save(step)
        self.next_save_at = time.monotonic() + self.interval

    def _wait_for_saves(self, step: int = -1) -> dict[str, bool]:
        """Every rank: wait until no rank is saving. Returns what rank 0 knows then, the same on every rank.

        The ranks wait together, so that no watchdog takes a slow save of one rank for a hang of another. A save that
        stands still is ended by the watchdog of its own rank.
        step: `committed` tells whether rank 0 has committed this step.
        """
        begun = time.monotonic()
        while True:
            saving = self.saver.busy
            self._poll_save()
            flags = {
                "saving": saving,
                "committed": self.world.env.is_rank0 and self.last_commit == step,
                "fenced": self.fenced,
                "give_up": self.failed_saves >= MAX_FAILED_SAVES,
            }
            flags = distributed.sum_flags(self.world, flags)
            self.log.timer.touch()
            if not flags["saving"]:
                return flags
            time.sleep(min(max(SHORTEST_PAUSE, (time.monotonic() - begun) / 10), LONGEST_PAUSE))

    def save_and_wait(self, step: int, row: dict[str, float] | None = None) -> None:
        """Save this step and wait until it is committed; on a disk that fails, try again until it is hopeless."""
        with self.log.timer("checkpoint"):
            while not self._is_committed(step):
                self.start(step, row)
                if not self._is_committed(step):
                    self._sleep(min(RETRY_SECONDS, self.interval))

    def _is_committed(self, step: int) -> bool:
        """Wait until no rank is saving, then whether rank 0 has committed this step. The same answer on every rank.

        Step 0 needs no checkpoint: it can be made from the seed. Raises Fenced, CheckpointError.
        """
        flags = self._wait_for_saves(step)
        if flags["committed"]:
            return True
        if flags["fenced"]:
            raise self.fenced_error()
        if flags["give_up"]:
            raise self.give_up_error()
        return False

    def _sleep(self, seconds: float) -> None:
        """Sleep before the next try. In short naps, so that the watchdog sees that this rank is alive."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self.log.timer.touch()

    def stop(self, step: int, wishes: set[str], row: dict[str, float] | None = None) -> ExitCode:
        """Save and stop between two steps, for the reasons in `wishes`. Raises Fenced, CheckpointError."""
        if "fenced" in wishes:
            raise self.fenced_error()
        if "give_up" in wishes:
            raise self.give_up_error()
        self.save_and_wait(step, row)
        if "signal" in wishes:
            return self.log.close(ExitCode.PREEMPTED, step, error=self.handler.signal or "")
        code = ExitCode.STOPPED if "stop" in wishes else ExitCode.DONE  # stop_after: jobs may depend on it (afterok)
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
        """Every rank, after the same step: end the attempt with the detector's evidence when there is a verdict.

        Raises Diverged with the same text on every rank. Rank 0 alone knows the committed checkpoints.
        """
        if not self.detector.diverged_at:
            return
        trial, since = self.log.trial, self.detector.suspicious_since
        with self.log.timer("checkpoint"):
            self._wait_for_saves()
            earlier = self.world.channel.from_rank0(
                "diverged",
                lambda: max((step for step in trial.committed() if step < since), default=0),
            )
        newest = f"newest checkpoint from before: step {earlier}" if earlier else "no checkpoint from before"
        raise Diverged(
            f"{self.detector.evidence}; {newest}",
            where=str(trial.path),
            hint="lower optim.lr or set optim.clip; `jepa retry` trains on from the newest checkpoint",
        )

    def exit_with_last_commit(self) -> None:
        """Called when the grace is nearly over and the attempt has not stopped: what is committed is what remains."""
        last = self.last_commit
        with contextlib.suppress(OSError):  # the loop may not have taken in the newest commit yet
            last = max([last, *self.log.trial.committed()])
        why = f"{self.handler.signal}: left with the commit of step {last}; {self.last_error or 'no time to save'}"
        print_stderr(f"preemption: {why}")
        self.log.close(ExitCode.PREEMPTED, last, error=why)
        env = self.world.env
        claim = self.log.trial.requeue_claim(env.launch)
        exit_rank(ExitCode.PREEMPTED, env.slurm, env.is_rank0, claim)

    def facts(self) -> dict[str, Any]:
        """For rank 0's heartbeat: the newest checkpoint, and why there is no newer one."""
        late = max(OVERDUE_INTERVALS * self.interval, OVERDUE_SECONDS)
        facts = {
            "step": self.last_commit,
            "t": self.committed_at,
            "late_seconds": late,
            "error": self.last_error,
        }
        return {"checkpoint": facts}

    def fenced_error(self) -> Fenced:
        trial, newer = self.log.trial, self.log.trial.newest_attempt()
        return Fenced(f"attempt {newer} owns this trial, this is {self.log.attempt}", where=str(trial.path))

    def give_up_error(self) -> CheckpointError:
        """Raised on every rank with the words of rank 0, which alone knows why."""
        why = (
            f"no checkpoint could be saved in {self.failed_saves} attempts: {self.last_error};"
            f" step {self.last_commit} is safe"
        )
        return CheckpointError(
            self.world.channel.from_rank0("give up", lambda: why),
            where=str(self.log.trial.checkpoints),
            hint="make room, then `jepa retry`",
        )

    def _poll_save(self) -> None:
        """Take in how the last save ended. Rank 0 alone knows whether it is committed."""
        result = self.saver.take_result()
        if result is None or not self.world.env.is_rank0:
            return
        if result.warning:
            print_stderr(f"checkpoint: step {result.step} is committed, but: {result.warning}")
        if not result.error:
            self.last_commit, self.failed_saves, self.last_error = (
                max(self.last_commit, result.step),
                0,
                "",
            )
            self.committed_at, self.overdue = now_ms(), False
            self.log.timer.mark_committed(result.step)
            return
        if not self.failed_saves:  # one event for all failures in a row
            self.log.event("checkpoint_failed", result.step, error=result.error)
        self.failed_saves, self.last_error, self.fenced = (
            self.failed_saves + 1,
            result.error,
            result.fenced,
        )
        self.next_save_at = time.monotonic() + min(RETRY_SECONDS, self.interval)
        print_stderr(f"checkpoint: step {result.step} is not saved: {result.error}")


def on_hang(trial: TrialDir, attempt: int, env: DistEnv, timer: PhaseTimer, what: str) -> None:
    """Called by the watchdog when this rank makes no progress: record it and end, so that another attempt may run.

    The filesystem may be what hangs. So the record is written in a thread, and where that does not end, this rank only
    waits to be killed, or, if it is rank 0, asks Slurm for a requeue without a claim file.
    """
    again: list[bool] = []

    def record() -> None:
        _write_flight_record(trial, attempt, env)
        close_record(trial, attempt, ExitCode.HANG, timer, None, "hang", what)
        with contextlib.suppress(OSError):
            again.append(not trial.is_stuck())

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    thread.join(5 * OTHER_RANKS_SECONDS)
    time.sleep(OTHER_RANKS_SECONDS)
    claim = None if thread.is_alive() else trial.requeue_claim(env.launch)
    exit_rank(ExitCode.HANG, env.slurm and all(again), env.is_rank0, claim)


def _write_flight_record(trial: TrialDir, attempt: int, env: DistEnv) -> None:
    with contextlib.suppress(Exception):
        flight = distributed.flight_record()
        path = trial.logs(attempt) / f"rank{env.rank}.flight.json"
        path.write_text(json.dumps(flight, indent=1, default=str))
        for entry in [e for e in flight if not e.get("retired")][-5:]:
            print_stderr(f"watchdog: {entry['profiling_name']} of {entry['input_sizes']} began and did not end")


def quarantined(trial: TrialDir) -> list[str]:
    """Names of checkpoints that did not verify."""
    return sorted(name for name in names_in(trial.checkpoints) if name.startswith("bad-step-"))


def no_valid_checkpoint_error(trial: TrialDir, asides: list[str]) -> CheckpointError:
    return CheckpointError(
        f"none of the {len(asides)} checkpoints verifies: {' | '.join(asides)}",
        where=str(trial.checkpoints),
        hint="restore one, or move checkpoints/ away to begin again from step 0",
    )


def fork_steps(trunk: TrialDir, config: TrialConfig) -> list[int]:
    """Steps to fork at, newest first; none when there is no such trial or it is not the same up to the cool-down."""
    try:
        other = trunk.read_config()
    except JepaError:
        return []
    if replace(other.recipe, optim=config.recipe.optim) != config.recipe:
        return []
    last = schedules.shared_prefix_steps(other.recipe.optim, config.recipe.optim)
    return [s for s in reversed(trunk.committed()) if s <= last and other.runtime.keeps(s)]
