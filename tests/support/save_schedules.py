"""Random schedules of saves by many ranks with random faults, and the promises to check in each.

    PYTHONPATH=tests python -m support.save_schedules --schedules 5000
    PYTHONPATH=tests python -m support.save_schedules --first 123 --trace

A schedule is a trial: attempts one after another, or beside each other when a newer one claims the
trial. In each attempt, the ranks find and load a checkpoint and save a few times, as AsyncSaver
does. The last attempt runs its last saves without faults. See `Trial` for the promises.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.simulated_attempt import KEEP, PATIENCE, Attempt
from support.simulated_disk import File, Folder, Tree
from support.simulated_ranks import ERRORS, FAULTS, Faults, Process, Scheduler, SimulatedStore

from jepa_cluster.training.save_protocol import SaveResult

WORLDS = (2, 4, 2, 16, 2, 4, 2, 2, 4, 2)  # ranks of a schedule, by the last digit of its seed
MOST_ATTEMPTS = 4
CALLS = (  # calls of rank 0 at which a fault is aimed
    "superseded",
    "before_commit",
    "on_commit",
    "names",
    "make_folder",
    "exists",
    "rename",
    "sync_folder",
    "sizes",
    "create manifest",
    "write manifest",
    "sync manifest",
    "create shard",
    "write shard",
    "sync shard",
    "remove",
    "remove a file",
    "store.set",
    "store.delete_key",
    "store.multi_get",
)
KINDS = (  # kinds of fault that strike in a schedule
    FAULTS,
    ERRORS,
    ("slow", "delay", "claim", "EIO"),
    ("slow", "error after the call", "EIO"),
)
REPLAY = "PYTHONPATH=tests python -m support.save_schedules --trace --first"


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
    """One schedule. Records a violation of any of these promises, at any moment.

    They hold for what is visible and for what a crash would leave:

    - a folder named step-N is whole, and of one save;
    - once k checkpoints were committed, min(k, KEEP) are there;
    - a new attempt finds the newest committed checkpoint, and can load it;
    - an attempt that was superseded before its save does not save;
    - an attempt that was superseded before it removes checkpoints removes none;
    - no wait is longer than the patience since the last progress;
    - the first save after the faults have stopped and earlier saves have ended is committed;
    - that save leaves no key.
    """

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.ranks = WORLDS[seed % len(WORLDS)]
        self.seed = seed
        self.scheduler = Scheduler(seed, trace)
        self.choose = self.scheduler.random
        self.figures = Figures()
        self.faults = self._make_faults()
        self.tree = Tree()
        self.tree.audit = self._audit
        self.store = SimulatedStore(self.faults)
        self.newest = 0
        self.attempts = list[Attempt]()
        self.committed: set[int] = set()
        self.expected = 0  # whole checkpoints that must be there

    def _make_faults(self) -> Faults:
        """Draw up to about ten faults, some of them at one exact call of rank 0."""
        choose = self.choose
        kinds = choose.choice(KINDS)
        per_100_calls = choose.choice((0.0, 1.0, 3.0, 6.0))
        rate = per_100_calls / (100 * self.ranks)
        faults = Faults(self.scheduler, PATIENCE, rate, kinds)
        for _ in range(choose.choice((0, 1, 1, 2))):
            call = choose.choice(CALLS)
            occurrence = choose.randint(1, 8)
            fault = choose.choice(("claim", "crash", "delay", *FAULTS))
            faults.aims[call, 0] = (occurrence, fault)
        faults.crash = self._crash
        faults.claim = self._claim
        return faults

    def run(self) -> list[str]:
        """Run the schedule and return its violations."""
        self.driver = self.scheduler.spawn(Process("driver"), "driver", self._drive)
        self.scheduler.run()
        self.figures.ranks[self.ranks] += 1
        self.figures.faults += self.faults.struck
        self.figures.counts["attempts"] += len(self.attempts)
        return self.scheduler.violations

    def _drive(self) -> None:
        """Start attempts until one has ended without a fault."""
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
        """Sometimes change one byte of the newest checkpoint, if there is another checkpoint."""
        newest = max(self.committed, default=0)
        name = f"step-{newest:08d}"
        folder = self.tree.root.entries.get(name)
        if any(attempt.running for attempt in self.attempts):
            return
        if not self.faults.active or self.expected != KEEP:
            return
        if name != max(self.tree.root.entries) or not isinstance(folder, Folder):
            return
        if self.choose.random() >= 0.2:
            return

        self.figures.counts["checkpoints damaged"] += 1
        damaged = self.choose.choice(sorted(folder.entries))
        file = folder.entries[damaged]
        assert isinstance(file, File)
        file.data = file.data[:-2] + b"?" + file.data[-1:]
        file.synced = file.data
        folder.version += 1
        self.tree.damaged.add(folder)
        self.committed.discard(newest)
        self.expected = min(self.expected, *self.tree.whole())

    def _claim(self) -> bool:
        """Claim the trial with a newer attempt, if the newest one has begun and one more may."""
        if len(self.attempts) >= MOST_ATTEMPTS - 1 or self.newest > len(self.attempts):
            return False
        self.newest += 1
        self.scheduler.wake(self.driver)
        return True

    def _crash(self) -> None:
        """Kill all processes; the disk loses what was not synced."""
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
            what = f"{now} whole checkpoints, {crashed} after a crash, expected {self.expected}"
            self.scheduler.violation(what)

    def note_commit(self, step: int) -> None:
        if step not in self.committed:
            self.expected = min(KEEP, self.expected + 1)
        self.committed.add(step)
        self._audit()

    def note_result(self, result: SaveResult) -> None:
        if result.error:
            self.figures.counts["saves failed"] += 1
            return
        self.figures.counts["saves committed"] += 1
        if result.step not in self.committed:
            self.scheduler.violation(f"{result} without a commit")

    def note_found(self, attempt: Attempt, newest: int, passed: list[str]) -> None:
        """Check the checkpoint that an attempt found.

        newest: the newest step that was committed when the attempt began.
        passed: why the attempt did not take newer checkpoints.
        """
        self.figures.counts["checkpoints set aside"] += len(passed)
        if attempt.step < newest and not attempt.superseded:
            what = f"found step {attempt.step} although {newest} is committed: {passed}"
            self.scheduler.violation(what)


def run(seed: int, trace: bool = False) -> tuple[list[str], Figures]:
    """Run one schedule and return its violations and figures.

    The last line of the violations is the command that replays the schedule.
    """
    trial = Trial(seed, trace)
    violations = trial.run()
    if violations:
        violations.append(f"seed {seed}; replay: {REPLAY} {seed}")
    return violations, trial.figures


def run_many(first: int, count: int, report: Callable[[str], None]) -> Figures:
    """Run schedules one after another. Raises AssertionError at the first violation."""
    figures = Figures()
    for done, seed in enumerate(range(first, first + count), 1):
        violations, of_one = run(seed)
        figures.add(of_one)
        ranks = WORLDS[seed % len(WORLDS)]
        lines = "\n".join(violations)
        assert not violations, f"schedule {seed}, {ranks} ranks\n{lines}"
        if done % 1000 == 0:
            report(f"{done} schedules")
    return figures


def print_counter(name: str, counter: Counter[Any]) -> None:
    parts = [f"{key} {value}" for key, value in sorted(counter.items())]
    print(f"{name}: {', '.join(parts)}")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--schedules", type=int, default=1, help="number of schedules")
    parser.add_argument("--trace", action="store_true", help="print the calls of one schedule")
    arguments = parser.parse_args()
    if arguments.trace:
        violations, _ = run(arguments.first, trace=True)
        print("\n".join(violations))
        return
    figures = run_many(arguments.first, arguments.schedules, print)
    print_counter("schedules by ranks", figures.ranks)
    print_counter("faults", figures.faults)
    print_counter("totals", figures.counts)


if __name__ == "__main__":
    main()
