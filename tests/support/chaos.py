"""Random faults against a tiny trial, until it is done. test_chaos.py judges; `make chaos N=50` draws more of them."""

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
    "runtime.hang_seconds": 5.0,
}


@dataclass
class Tally:
    """What one trial went through. faults: (name, step at which it struck)."""

    seed: int
    faults: list[tuple[str, int]] = field(default_factory=list)
    attempts: int = 0

    def line(self) -> str:
        kinds = Counter(name for name, _ in self.faults)
        return f"seed {self.seed}: {len(self.faults)} faults in {self.attempts} attempts: " + ", ".join(
            f"{n}× {k}" for k, n in sorted(kinds.items())
        )


def table(tallies: list[Tally]) -> str:
    """A row a kind of fault; only trials that ended with the bits of the clean one are ever counted here."""
    kinds = Counter(name for t in tallies for name, _ in t.faults)
    rows = [
        f"| {name} | {kinds[name]} | {sum(any(n == name for n, _ in t.faults) for t in tallies)} |" for name in FAULTS
    ]
    total = f"| all, in {sum(t.attempts for t in tallies)} attempts | {sum(kinds.values())} | {len(tallies)} |"
    return "\n".join(["| fault | struck | bit-identical trials |", "|---|---:|---:|", *rows, total])


def torment(trial: TrialDir, launch: Callable[..., Ranks], seed: int, faults: int) -> Tally:
    """Run the trial to its end; the first attempts meet one fault each."""
    chance = random.Random(seed)
    tally = Tally(seed)
    names = deck(chance)
    while not trial.done.exists():
        tally.attempts += 1
        assert tally.attempts < 4 * faults + 10, f"no end in sight: {tally.line()}"
        ranks = launch(trial)
        if len(tally.faults) < faults:
            target = reached(trial) + chance.randrange(1, 7)
            if wait_for_step(trial, ranks, min(target, STEPS - 1)):
                name = next(names)
                name = FAULTS[name](trial, ranks, chance) or name
                tally.faults.append((name, reached(trial)))
        ranks.wait(180)
        assert not trial.failed.exists(), trial.failed.read_text()
    return tally


def deck(chance: random.Random) -> Iterator[str]:
    """Every kind of fault in random order, again and again."""
    while True:
        names = sorted(FAULTS)
        chance.shuffle(names)
        yield from names


def reached(trial: TrialDir) -> int:
    rows = read(trial).rows
    return rows[-1].step if rows else 0


def wait_for_step(trial: TrialDir, ranks: Ranks, step: int) -> bool:
    """Whether the attempt of these ranks began to train, and came to `step`, before it ended by itself."""
    while ranks.running:
        mine = [r["attempt"] for r in trial.attempts() if r.get("launch") == ranks.launch]
        if mine and trial.metrics(mine[0]).exists() and reached(trial) >= step:
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
    """-> what it came to where there was no second checkpoint, so that nothing could be damaged."""

    def fault(trial: TrialDir, ranks: Ranks, chance: random.Random) -> str | None:
        ranks.kill(signal.SIGKILL)
        ranks.wait()
        return None if damage(trial, chance, cut) else "kill -9 of all ranks"

    return fault


def full_disk(trial: TrialDir, ranks: Ranks, chance: random.Random) -> None:
    """For a while no file of any rank may grow beyond 16 KiB; in half of the cases the ranks are killed meanwhile."""
    for size in (16 << 10, resource.RLIM_INFINITY):
        for process in ranks.ranks:
            if process.poll() is None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if size == 16 << 10:
            time.sleep(chance.uniform(0.3, 1.5))
            if chance.random() < 0.5:
                ranks.kill(signal.SIGKILL)
                return


def hang(trial: TrialDir, ranks: Ranks, chance: random.Random) -> None:
    """One rank stops moving: the other's watchdog ends it; the frozen one is killed, as its node would be."""
    frozen = chance.randrange(2)
    ranks.kill(signal.SIGSTOP, (frozen,))
    end = time.monotonic() + 150
    while ranks.ranks[1 - frozen].poll() is None:
        assert time.monotonic() < end, "the watchdog did not see the hang"
        time.sleep(0.05)
    ranks.kill(signal.SIGKILL, (frozen,))


FAULTS: dict[str, Callable[[TrialDir, Ranks, random.Random], str | None]] = {
    "TERM": lambda trial, ranks, chance: ranks.kill(signal.SIGTERM),
    "USR2": lambda trial, ranks, chance: ranks.kill(signal.SIGUSR2),
    "TERM to one rank": lambda trial, ranks, chance: ranks.kill(signal.SIGTERM, (chance.randrange(2),)),
    "kill -9 of one rank": lambda trial, ranks, chance: ranks.kill(signal.SIGKILL, (chance.randrange(2),)),
    "kill -9 of all ranks": lambda trial, ranks, chance: ranks.kill(signal.SIGKILL),
    "bit flipped": kill_and(False),
    "file cut": kill_and(True),
    "full disk": full_disk,
    "hang": hang,
}
