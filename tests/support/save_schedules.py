"""Random schedules of saves by many ranks, with random faults, and the promises that must hold in each.

    PYTHONPATH=tests python -m support.save_schedules --schedules 5000
    PYTHONPATH=tests python -m support.save_schedules --first 123 --trace

A schedule is a trial: attempts one after another, or beside each other when a newer one claims the trial. In each, the
ranks find and load a checkpoint and save a few times, as AsyncSaver does. The last attempt runs its last saves without
faults. See `Trial` for the promises.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from support.simulated_attempt import KEEP, PATIENCE, Attempt
from support.simulated_disk import File, Folder, Tree
from support.simulated_ranks import ERRORS, FAULTS, Faults, Process, Scheduler, SimulatedStore

from jepa_cluster.training.save_protocol import SaveResult

WORLDS = (2, 4, 2, 16, 2, 4, 2, 2, 4, 2)  # ranks of a schedule, by the last digit of its seed
MOST_ATTEMPTS = 4
CALLS = (  # of rank 0 at which a fault is aimed
    *("superseded", "before_commit", "on_commit", "names", "make_folder", "exists", "rename", "sync_folder", "sizes"),
    *("create manifest", "write manifest", "sync manifest", "create shard", "write shard", "sync shard"),
    *("remove", "remove a file", "store.set", "store.delete_key", "store.multi_get"),
)


@dataclass
class Figures:
    """What happened in schedules."""

    faults: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    ranks: Counter[int] = field(default_factory=Counter[int])

    def add(self, other: Figures) -> None:
        self.faults += other.faults
        self.counts += other.counts
        self.ranks += other.ranks


class Trial:
    """One schedule. Records a violation unless, at any moment, of what is visible and of what a crash would leave:

    - a folder named step-N is whole, and of one save;
    - once k checkpoints were committed, min(k, KEEP) are there;
    - a new attempt finds the newest committed checkpoint, and can load it;
    - an attempt that was superseded before its save, or before it removes checkpoints, does neither;
    - no wait is longer than the patience since the last progress;
    - the first save after the faults have stopped and earlier saves have ended is committed, and leaves no key.
    """

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.ranks, self.seed = WORLDS[seed % len(WORLDS)], seed
        self.scheduler = Scheduler(seed, trace)
        self.choose = self.scheduler.random
        self.figures = Figures()
        self.faults = self._make_faults()
        self.tree = Tree()
        self.tree.audit = self._audit
        self.store = SimulatedStore(self.faults)
        self.newest, self.attempts = 0, list[Attempt]()
        self.committed: set[int] = set()
        self.expected = 0  # whole checkpoints that must be there

    def _make_faults(self) -> Faults:
        """Up to about ten faults in a schedule, some at one exact call of rank 0."""
        choose = self.choose
        kinds = choose.choice(
            (FAULTS, ERRORS, ("slow", "delay", "claim", "EIO"), ("slow", "error after the call", "EIO"))
        )
        rate = choose.choice((0.0, 1.0, 3.0, 6.0)) / (100 * self.ranks)
        faults = Faults(self.scheduler, PATIENCE, rate, kinds)
        for _ in range(choose.choice((0, 1, 1, 2))):
            call = choose.choice(CALLS)
            faults.aims[call, 0] = (choose.randint(1, 8), choose.choice(("claim", "crash", "delay", *FAULTS)))
        faults.crash, faults.claim = self._crash, self._claim
        return faults

    def run(self) -> list[str]:
        """-> violations."""
        self.driver = self.scheduler.spawn(Process("driver"), "driver", self._drive)
        self.scheduler.run()
        self.figures.ranks[self.ranks] += 1
        self.figures.faults += self.faults.struck
        self.figures.counts["attempts"] += len(self.attempts)
        return self.scheduler.violations

    def _drive(self) -> None:
        """Start attempts, until one has ended cleanly."""
        while True:
            number = max(self.newest, len(self.attempts) + 1)
            self.newest = number
            self.faults.active = self.faults.active and number < MOST_ATTEMPTS
            self._damage()
            attempt = Attempt(self, number)
            self.attempts.append(attempt)
            while attempt.running and self.newest == number:
                self.scheduler.sleep(0.25)
            if attempt.clean:
                return
            if len(self.attempts) > 2 * MOST_ATTEMPTS:
                self.scheduler.violation("no attempt ends cleanly")

    def _damage(self) -> None:
        """Sometimes, between two attempts: one byte of the newest checkpoint changes, if there is another one."""
        newest = max(self.committed, default=0)
        name = f"step-{newest:08d}"
        folder = self.tree.root.entries.get(name)
        alone = not any(attempt.running for attempt in self.attempts)
        possible = alone and self.faults.active and self.expected == KEEP and name == max(self.tree.root.entries)
        if possible and isinstance(folder, Folder) and self.choose.random() < 0.2:
            self.figures.counts["checkpoints damaged"] += 1
            file = folder.entries[self.choose.choice(sorted(folder.entries))]
            assert isinstance(file, File)
            file.data = file.synced = file.data[:-2] + b"?" + file.data[-1:]
            folder.version += 1
            self.tree.damaged.add(folder)
            self.committed.discard(newest)
            self.expected = min(self.expected, *self.tree.whole())

    def _claim(self) -> bool:
        """A newer attempt claims the trial, if the newest one has begun and there may be one more."""
        if len(self.attempts) >= MOST_ATTEMPTS - 1 or self.newest > len(self.attempts):
            return False
        self.newest += 1
        self.scheduler.wake(self.driver)
        return True

    def _crash(self) -> None:
        """All processes die, and the disk loses what was not synced."""
        for attempt in self.attempts:
            for rank in attempt.ranks:
                self.scheduler.kill(rank.process)
        self.tree.crash(self.choose)

    def _audit(self) -> None:
        faults = self.tree.committed_faults()
        if faults:
            self.scheduler.violation(faults[0])
        now, crashed = self.tree.whole()
        if min(now, crashed) < self.expected:
            self.scheduler.violation(f"{now} whole checkpoints, {crashed} after a crash, expected {self.expected}")

    def note_commit(self, step: int) -> None:
        if step not in self.committed:
            self.expected = min(KEEP, self.expected + 1)
        self.committed.add(step)
        self._audit()

    def note_result(self, result: SaveResult) -> None:
        self.figures.counts["saves failed" if result.error else "saves committed"] += 1
        if not result.error and result.step not in self.committed:
            self.scheduler.violation(f"{result} without a commit")

    def note_found(self, attempt: Attempt, newest: int, passed: list[str]) -> None:
        """newest: the newest step that was committed when the attempt began."""
        self.figures.counts["checkpoints set aside"] += len(passed)
        if attempt.step < newest and not attempt.superseded:
            self.scheduler.violation(f"found step {attempt.step} although {newest} is committed: {passed}")


def run(seed: int, trace: bool = False) -> tuple[list[str], Figures]:
    """One schedule -> what it violated, the last line with the command that replays it; and figures."""
    trial = Trial(seed, trace)
    violations = trial.run()
    if violations:
        violations.append(
            f"seed {seed}; replay: PYTHONPATH=tests python -m support.save_schedules --first {seed} --trace"
        )
    return violations, trial.figures


def run_many(first: int, count: int, report: Callable[[str], None]) -> Figures:
    """Schedules one after another, until one violates a promise. Raises AssertionError."""
    figures = Figures()
    for seed in range(first, first + count):
        violations, of_one = run(seed)
        figures.add(of_one)
        assert not violations, f"schedule {seed}, {WORLDS[seed % len(WORLDS)]} ranks\n" + "\n".join(violations)
        if (seed - first + 1) % 1000 == 0:
            report(f"{seed - first + 1} schedules")
    return figures


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    p.add_argument("--schedules", type=int, default=1)
    p.add_argument("--trace", action="store_true", help="print every call of the first schedule")
    a = p.parse_args()
    if a.trace:
        violations, _ = run(a.first, trace=True)
        print("\n".join(violations))
        return
    figures = run_many(a.first, a.schedules, print)
    for name, counter in (
        ("schedules by ranks", figures.ranks),
        ("faults", figures.faults),
        ("totals", figures.counts),
    ):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in sorted(counter.items())))


if __name__ == "__main__":
    main()
