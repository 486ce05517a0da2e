"""Random faults against a tiny trial, until it is done.

test_chaos.py compares the result; `make chaos N=50` draws more faults.
"""

from __future__ import annotations

import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from support.attempts import Ranks

from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.spool import read

STEPS = 24
OVERRIDES = {
    "optim.steps": STEPS,
    "runtime.checkpoint_minutes": 0.01,
    "runtime.keep_checkpoints": 3,
    "runtime.probe_every": 10,
    "runtime.hang_seconds": 15.0,
}


@dataclass
class Tally:
    """The faults of one trial: (name, step at which it struck)."""

    seed: int
    faults: list[tuple[str, int]] = field(default_factory=list)
    attempts: int = 0

    def line(self) -> str:
        struck = Counter(name for name, _ in self.faults)
        numbers = ", ".join(f"{number}× {name}" for name, number in sorted(struck.items()))
        return f"seed {self.seed}: {struck.total()} faults in {self.attempts} attempts: {numbers}"


def table(tallies: list[Tally]) -> str:
    """Return a Markdown table with a row per kind of fault.

    Every trial that is counted here ended with the bits of the clean one.
    """
    struck: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    attempts = 0
    for tally in tallies:
        names = [name for name, _ in tally.faults]
        struck.update(names)
        trials.update(set(names))
        attempts += tally.attempts
    rows = ["| fault | struck | bit-identical trials |", "|---|---:|---:|"]
    rows += [f"| {name} | {struck[name]} | {trials[name]} |" for name in FAULTS]
    rows.append(f"| all, in {attempts} attempts | {struck.total()} | {len(tallies)} |")
    return "\n".join(rows)


def run_with_faults(trial: TrialDir, launch: Callable[..., Ranks], seed: int, faults: int) -> Tally:
    """Run the trial to its end; the first attempts meet one fault each."""
    chance = random.Random(seed)
    tally = Tally(seed)
    names = shuffled_faults(chance)
    while not trial.done.exists():
        tally.attempts += 1
        assert tally.attempts < 4 * faults + 10, f"too many attempts: {tally.line()}"
        ranks = launch(trial)
        if len(tally.faults) < faults:
            target = reached(trial) + chance.randrange(1, 7)
            if wait_for_step(trial, ranks, min(target, STEPS - 1)):
                name = next(names)
                instead = FAULTS[name](trial, ranks, chance)
                tally.faults.append((instead or name, reached(trial)))
        ranks.wait(180)
        assert not trial.failed.exists(), trial.failed.read_text()
    return tally


def shuffled_faults(chance: random.Random) -> Iterator[str]:
    """Every kind of fault in random order, again and again."""
    while True:
        names = sorted(FAULTS)
        chance.shuffle(names)
        yield from names


def reached(trial: TrialDir) -> int:
    """Step of the newest row."""
    rows = read(trial).rows
    if not rows:
        return 0
    return rows[-1].step


def wait_for_step(trial: TrialDir, ranks: Ranks, step: int) -> bool:
    """Whether these ranks began to train and reached `step` before they ended."""
    while ranks.running:
        for record in trial.attempts():
            if record.get("launch") != ranks.launch:
                continue
            if trial.metrics(record["attempt"]).exists() and reached(trial) >= step:
                return True
        time.sleep(0.01)
    return False


def damage(trial: TrialDir, chance: random.Random, cut: bool) -> bool:
    """Flip a bit of the newest checkpoint, or cut a file short; only where an older one is left."""
    if len(trial.committed()) < 2:
        return False
    files = sorted(p for p in trial.checkpoint(trial.committed()[-1]).iterdir() if p.stat().st_size)
    victim = chance.choice(files)
    data = bytearray(victim.read_bytes())
    if cut:
        data = data[: chance.randrange(len(data))]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    victim.write_bytes(data)
    return True


def kill_and(cut: bool) -> Callable[[TrialDir, Ranks, random.Random], str | None]:
    """Return a fault that kills all ranks and damages a checkpoint.

    The fault returns another name when there was no second checkpoint, so that nothing was damaged.
    """

    def fault(trial: TrialDir, ranks: Ranks, chance: random.Random) -> str | None:
        ranks.kill(signal.SIGKILL)
        ranks.wait()
        if damage(trial, chance, cut):
            return None
        return "kill -9 of all ranks"

    return fault


def full_disk(trial: TrialDir, ranks: Ranks, chance: random.Random) -> None:
    """For a while no file of any rank may grow beyond 16 KiB.

    In half of the cases the ranks are killed meanwhile.
    """
    limit_files(ranks, 16 << 10)
    time.sleep(chance.uniform(0.3, 1.5))
    if chance.random() < 0.5:
        ranks.kill(signal.SIGKILL)
    else:
        limit_files(ranks, resource.RLIM_INFINITY)


def limit_files(ranks: Ranks, size: int) -> None:
    """Limit the files of the ranks that still run to `size` bytes."""
    limits = (size, resource.RLIM_INFINITY)
    for process in ranks.ranks:
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


def hang(trial: TrialDir, ranks: Ranks, chance: random.Random) -> None:
    """One rank is stopped: the other's watchdog ends, then the stopped rank is killed."""
    frozen = chance.randrange(2)
    ranks.kill(signal.SIGSTOP, (frozen,))
    end = time.monotonic() + 150
    while ranks.ranks[1 - frozen].poll() is None:
        assert time.monotonic() < end, "the watchdog did not end the rank"
        time.sleep(0.05)
    ranks.kill(signal.SIGKILL, (frozen,))


FAULTS: dict[str, Callable[[TrialDir, Ranks, random.Random], str | None]] = {
    "TERM": lambda trial, ranks, chance: ranks.kill(signal.SIGTERM),
    "USR2": lambda trial, ranks, chance: ranks.kill(signal.SIGUSR2),
    "TERM to one rank": lambda trial, ranks, chance: ranks.kill(
        signal.SIGTERM, (chance.randrange(2),)
    ),
    "kill -9 of one rank": lambda trial, ranks, chance: ranks.kill(
        signal.SIGKILL, (chance.randrange(2),)
    ),
    "kill -9 of all ranks": lambda trial, ranks, chance: ranks.kill(signal.SIGKILL),
    "bit flipped": kill_and(False),
    "file cut": kill_and(True),
    "full disk": full_disk,
    "hang": hang,
}
