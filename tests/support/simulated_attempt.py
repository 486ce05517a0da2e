"""One attempt of a simulated trial: its ranks load a checkpoint, then save as AsyncSaver does.

In: the trial, which has the disk, the store and the faults. Out: saves, and violations that are
recorded in the scheduler of the trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.simulated_disk import CHECKPOINTS, SimulatedDisk, content
from support.simulated_ranks import Clock, Process, Task, WatchedChannel

from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.save_protocol import CheckpointSearch, SaveProtocol, SaveResult

if TYPE_CHECKING:
    from support.save_schedules import Trial

KEEP = 2  # checkpoints
PATIENCE = 4.0  # virtual seconds
# Virtual seconds that a save which began with faults may take once the faults have stopped
LONGEST_SAVE = 20 * PATIENCE


class Rank:
    """One rank of one attempt: a main task that trains, and a task for each save."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        trial = attempt.trial
        self.trial = trial
        self.attempt = attempt
        self.rank = rank
        self.scheduler = trial.scheduler
        self.faults = trial.faults
        self.process = Process(f"attempt {attempt.number} rank {rank}")
        self.disk = SimulatedDisk(trial.tree, trial.faults, self.process, rank)
        self.channel = self._channel()
        self.save_channel = self._channel()
        self.save_channel.on_progress = self._count_progress
        self.protocol = SaveProtocol(
            CHECKPOINTS,
            attempt.number,
            trial.ranks,
            self.save_channel,
            self.disk,
            self._superseded,
        )
        self.protocol.before_commit = lambda: self._callback("before_commit")
        self.protocol.on_commit = self._on_commit
        self.protocol.steps_to_keep = lambda steps: set(steps[-KEEP:])
        self.number = 0
        self.progress = 0
        self.result: SaveResult | None = None
        self.saving: Task | None = None
        self.main = self.scheduler.spawn(self.process, self.process.name, self._run)

    def _channel(self) -> WatchedChannel:
        store = self.trial.store.of(self.process, self.rank)
        clock = Clock(self.scheduler)
        channel = WatchedChannel(
            store,
            self.rank,
            self.trial.ranks,
            self.attempt.number,
            PATIENCE,
            clock,
        )
        channel.progress_at = self.attempt.progress_at
        return channel

    def _count_progress(self) -> None:
        self.progress += 1

    def _callback(self, name: str) -> None:
        with self.faults.call(self.process, self.rank, name):
            pass

    def _superseded(self) -> bool:
        with self.faults.call(self.process, self.rank, "superseded"):
            return self.attempt.superseded

    def _on_commit(self, manifest: Manifest) -> None:
        self.trial.note_commit(manifest.step)
        self.disk.fenced = self.attempt.superseded
        self._callback("on_commit")

    @property
    def busy(self) -> bool:
        return self.saving is not None and not self.saving.ended

    def _run(self) -> None:
        try:
            self._begin()
            while (step := self.attempt.meet(self)) is not None:
                self._start(step)
            self.settle()
        except Exception as e:
            self.scheduler.trace(f"leaves: {e!r}")
            faulty = self.faults.active or self.attempt.had_faults
            if not self.attempt.started and not faulty:
                self.scheduler.violation(f"cannot begin without faults: {e!r}")
        finally:
            self.attempt.leave(self)
            self.scheduler.kill(self.process)

    def _begin(self) -> None:
        """Find a checkpoint and load this rank's part of it."""
        newest = max(self.trial.committed, default=0)
        if self.rank == 0:
            self.protocol.remove_stale()
        committed = self.protocol.committed
        search = CheckpointSearch(self.protocol, self.channel, committed, lambda manifest: "")
        manifest, passed = search.find("start")
        step = manifest.step if manifest else 0
        self.scheduler.trace(f"found step {step}, passed over {passed}")
        if self.rank == 0:
            self.attempt.step = step
            self.trial.note_found(self.attempt, newest, passed)
        self.channel.gather("load", lambda: self._load(manifest))
        self.attempt.started = True

    def _load(self, manifest: Manifest | None) -> None:
        if manifest is None:
            return
        folder = self.protocol.checkpoint(manifest.step)
        names = sorted(manifest.files)
        advance = lambda: self.channel.advance("load")  # noqa: E731
        for name in names[self.rank :: self.trial.ranks]:
            self._pause()
            try:
                found = self.disk.fingerprint(folder / name, advance)
            except FileNotFoundError:
                if not self.attempt.superseded:
                    self.scheduler.violation(f"{folder.name} was removed while it was loaded")
                raise
            if found != tuple(manifest.files[name]):
                self.scheduler.violation(f"{folder.name}/{name} changed while it was loaded")

    def _pause(self) -> None:
        seconds = self.scheduler.random.choice((0.0, 0.1, PATIENCE / 2))
        self.scheduler.sleep(seconds)

    def _start(self, step: int) -> None:
        """Wait until the save before has ended, then start one, as CheckpointPolicy.start does."""
        seconds = self.scheduler.random.choice((0.0, 0.0, 0.05, 0.5))
        self.scheduler.sleep(seconds)
        self.settle()
        self.number += 1
        number = self.number
        self.result = None
        manifest = Manifest(
            step=step,
            recipe="recipe",
            world=self.trial.ranks,
            attempt=self.attempt.number,
            counters={},
            row=None,
            files={},
            versions={},
            t=0,
        )
        name = f"{self.process.name} save {number}"
        self.saving = self.scheduler.spawn(self.process, name, lambda: self._save(number, manifest))

    def _save(self, number: int, manifest: Manifest) -> None:
        self.disk.fenced = self.attempt.superseded
        data = content(self.attempt.number, number, manifest.step, self.rank)
        middle = len(data) // 2
        chunks = [data[:middle], data[middle:]]
        self.result = self.protocol.save(number, manifest, chunks)
        self.scheduler.trace(f"save {number} of step {manifest.step}: error {self.result.error!r}")
        if self.rank == 0:
            self.trial.note_result(self.result)
        elif self.attempt.ranks[0].number > number:
            self.trial.figures.counts["late writers of an older save"] += 1

    def settle(self) -> None:
        """Wait until no save of this rank runs."""
        begin = self.scheduler.now
        while self.busy:
            self.scheduler.sleep(0.5)
            if self.scheduler.now - begin > LONGEST_SAVE:
                self.scheduler.violation(f"save {self.number} or one before it does not end")


class Attempt:
    """The ranks of one attempt, and what they agree on between two saves.

    plan: steps to add before each save.
    had_faults: whether faults were possible when the attempt began.
    final: what the ranks do after the last save of the plan, without faults.
    clean: whether the saves without faults were committed.
    """

    def __init__(self, trial: Trial, number: int) -> None:
        self.trial = trial
        self.number = number
        saves = trial.choose.randint(2, 5)
        self.plan = [trial.choose.choice((1, 1, 1, 0)) for _ in range(saves)]
        self.step = 0
        self.started = False
        self.had_faults = trial.faults.active
        self.final = ["settle", "save", "settle", "check", "save", "settle", "check"]
        self.progress_at: dict[str, float] = {}
        self.clean = False
        self._waiting: set[Rank] = set()
        self._action = ""
        self.ranks = [Rank(self, rank) for rank in range(trial.ranks)]
        self.running = set(self.ranks)

    @property
    def superseded(self) -> bool:
        return self.trial.newest > self.number

    def leave(self, rank: Rank) -> None:
        self.running.discard(rank)
        self._waiting.discard(rank)
        self._release()

    def meet(self, rank: Rank) -> int | None:
        """Wait for the other ranks, then return the step of the next save, or None to end.

        Before a final save each rank waits until its earlier saves have ended.
        """
        while True:
            self._waiting.add(rank)
            self._release()
            while rank in self._waiting:
                self.trial.scheduler.park()
            if self._action == "end":
                return None
            if self._action != "settle":
                return self.step
            rank.settle()

    def _release(self) -> None:
        if self.running and self._waiting >= self.running:
            self._action = self._decide()
            self.trial.scheduler.trace(f"all ranks: {self._action} {self.step}")
            for rank in self._waiting:
                self.trial.scheduler.wake(rank.main)
            self._waiting.clear()

    def _decide(self) -> str:
        if self.plan:
            self.step = max(1, self.step + self.plan.pop())
            return "save"
        if self.superseded or len(self.running) < self.trial.ranks:
            return "end"
        self.trial.faults.active = False
        if self.final and self.final[0] == "check":
            self.final.pop(0)
            self._check_final_save()
        action = self.final.pop(0) if self.final else "end"
        if action == "save":
            self.step += 1
        return action

    def _check_final_save(self) -> None:
        """Check that a save without faults is committed and that no save has left a key."""
        result = self.ranks[0].result
        if result is None or result.error:
            self.trial.scheduler.violation(f"a save without faults failed: {result}")
        prefix = f"attempt-{self.number}/save-"
        left = [key for key in self.trial.store.values if key.startswith(prefix)]
        if left:
            self.trial.scheduler.violation(f"keys of ended saves are left: {left}")
        self.clean = not self.final
