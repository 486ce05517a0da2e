"""Stands in for training/train.py: the same contract in a second instead of a minute. No torch.

One row a step; rank 0 leads, the others follow its checkpoints. `<root>/stub.json` says how slow, and what each seed
does wrong: {"seconds": 0.1, "1": "error", "2": "slow"}. It notes in `<root>/twice` when two attempts train at once.
"""

import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path

from jepa_cluster.errors import ExitCode, Fenced
from jepa_cluster.training import journal
from jepa_cluster.training.health import Clock
from jepa_cluster.training.place import Place
from jepa_cluster.training.preemption import Guard
from jepa_cluster.trial.layout import TrialDir, write_json
from jepa_cluster.trial.spool import Spool, now_ms


def train(trial: TrialDir, attempt: int, place: Place, guard: Guard, clock: Clock) -> ExitCode:
    config = trial.read_config()
    orders = json.loads((trial.root.path / "stub.json").read_text())
    fault = orders.get(str(config.recipe.seed))
    if fault == "error":
        raise RuntimeError("a bug of the user's")
    verdict, told = trial.path / f"verdict-{attempt}", trial.path / f"told-{attempt}"
    if not place.first:
        return follow(verdict, told, guard)
    with (trial.path / "alone").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            (trial.root.path / "twice").write_text(f"{trial.name} attempt {attempt}\n")
        steps = config.recipe.optim.steps or 0
        asked = lambda: guard.raised or told.exists() or trial.stop.exists()  # noqa: E731
        seconds = orders["seconds"] * (20 if fault == "slow" else 1)
        step = lead(trial, attempt, steps, seconds, asked, clock)
    code = ExitCode.STOPPED if trial.stop.exists() else ExitCode.PREEMPTED
    if step == steps:
        code = ExitCode.DONE
        write_json(trial.done, {"step": step, "t": now_ms(), "metrics": {}})
    journal.close_record(trial, attempt, code, clock, step, error=guard.signal or "")
    verdict.write_text(str(int(code)))
    return code


def lead(trial: TrialDir, attempt: int, steps: int, seconds: float, asked: Callable[[], bool], clock: Clock) -> int:
    """Steps, each logged, until the last one or until somebody asks; then a checkpoint -> the step it is of."""
    step = max(trial.committed(), default=0)
    spool = Spool(trial, attempt, step)
    write_json(trial.heartbeat, {"step": step, "t": now_ms()})
    while step < steps and not asked():
        time.sleep(seconds)
        step += 1
        spool.log(step, {"loss": 1 / step})
        clock.step = step
    if trial.newest_attempt() > attempt:
        raise Fenced(f"a newer attempt than {attempt} owns this trial")
    spool.sync()
    trial.checkpoint(step).mkdir(exist_ok=True)
    spool.commit(step)
    return step


def follow(verdict: Path, told: Path, guard: Guard) -> ExitCode:
    """A rank that is not the first: passes its signal on and ends as rank 0 does."""
    while not verdict.exists():
        if guard.raised:
            told.touch()
        time.sleep(0.05)
    return ExitCode(int(verdict.read_text()))
