"""Stands in for training/train.py: the same contract in a second instead of a minute. No torch.

One row a step; rank 0 leads, the others follow its checkpoints. `<root>/stub.json` says how slow, at which step
everybody waits until `<root>/go` is there, what each seed does wrong, and which node is broken:
{"seconds": 0.1, "hold": 5, "1": "error", "broken": "n1"}; with "late", not before `go`.
It notes in `<root>/twice` when two attempts train at once, and in the trial's `trained` every attempt that trains.
"""

import fcntl
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jepa_cluster.config import Runtime
from jepa_cluster.errors import ExitCode, Fenced
from jepa_cluster.training import attempt_log
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler, exit_rank
from jepa_cluster.training.watchdog import PhaseTimer, Watchdog
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import Spool, now_ms

# classify_exception asks torch whether an exception is its own: never here, which saves eight CPU seconds.
torch, dist = types.ModuleType("torch"), types.ModuleType("torch.distributed")
dist.DistNetworkError = dist.DistStoreError = dist.DistBackendError = type("Never", (Exception,), {})
torch.distributed, torch.cuda = dist, types.SimpleNamespace(is_available=lambda: False)
sys.modules |= {"torch": torch, "torch.distributed": dist}

HANG_SECONDS = 0.5  # as runtime.hang_seconds: six times as long for a phase of which nothing is known yet


def train(
    trial: TrialDir,
    attempt: int,
    place: DistEnv,
    guard: PreemptionHandler,
    clock: PhaseTimer,
    hooks: JobHooks,
) -> ExitCode:
    config = trial.read_config()
    orders = json.loads((trial.root.path / "stub.json").read_text())
    verdict, told = trial.path / f"verdict-{attempt}", trial.path / f"told-{attempt}"
    if not place.is_rank0:
        return follow(verdict, told, guard)
    with (trial.path / "alone").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            (trial.root.path / "twice").write_text(f"{trial.name} attempt {attempt}\n")
        with (trial.path / "trained").open("a") as log:
            log.write(f"{attempt}\n")
        fault = orders.get(str(config.recipe.seed), "")
        while fault and "late" in orders and not (trial.root.path / "go").exists():
            time.sleep(0.1)
        if orders.get("broken") == os.environ.get("SLURMD_NODENAME"):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        err(fault, trial, attempt, place, clock, config.runtime, hooks)
        steps = config.recipe.optim.steps or 0
        asked = lambda: guard.stop_requested or told.exists() or trial.stop.exists()  # noqa: E731
        seconds = orders["seconds"] * (20 if fault == "slow" else 1)
        last = min(steps, config.runtime.stop_after or steps)
        step = lead(trial, attempt, last, Pace(seconds, orders.get("hold", steps)), asked, clock, hooks.on_commit)
    code, cause = ExitCode.STOPPED if trial.stop.exists() else ExitCode.PREEMPTED, ""
    if step == steps:
        code = ExitCode.DONE
        write_json(trial.done, {"step": step, "t": now_ms(), "metrics": {}})
    elif step == last:
        code, cause = ExitCode.DONE, "stopped"
    attempt_log.close_record(trial, attempt, code, clock, step, cause, error=guard.signal or "")
    verdict.write_text(str(int(code)))
    return code


@dataclass
class Pace:
    """seconds a step takes; the step at which all wait for `go`."""

    seconds: float
    hold: int


def err(
    fault: str,
    trial: TrialDir,
    attempt: int,
    place: DistEnv,
    clock: PhaseTimer,
    runtime: Runtime,
    hooks: JobHooks,
) -> None:
    """What goes wrong with this seed."""
    if fault == "error":
        raise RuntimeError("a bug of the user's")
    if fault == "gpu_oom" and (runtime.micro_batch or 8) > 4:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB")
    if fault == "host_oom":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
        bytearray(2**30)
    if fault == "hang" and attempt == 1:  # a collective whose peer never comes; the watchdog is the trainer's own
        watch = Watchdog(trial, attempt, place, clock, HANG_SECONDS)

        def hung(what: str) -> None:
            attempt_log.close_record(trial, attempt, ExitCode.HANG, clock, None, "hang", what)
            hooks.requeue(True)
            exit_rank(ExitCode.HANG)

        watch.on_hang = hung
        watch.start()
        with clock("train"):
            time.sleep(3600)


def lead(
    trial: TrialDir,
    attempt: int,
    steps: int,
    pace: Pace,
    asked: Callable[[], bool],
    clock: PhaseTimer,
    on_commit: Callable[[], None],
) -> int:
    """Steps, each logged, until the last one or until somebody asks; then a checkpoint -> the step it is of."""
    step, go = max(trial.committed(), default=0), trial.root.path / "go"
    milestones = trial.read_config().runtime.milestones
    spool = Spool(trial, attempt, step or -1)
    write_json(trial.heartbeat, {"step": step, "t": now_ms()})
    while step < steps and not asked():
        if step >= pace.hold and not go.exists():
            time.sleep(0.1)
            continue
        with clock("train"):
            time.sleep(pace.seconds)
        step += 1
        spool.log(step, {"loss": 1 / step})
        clock.step = step
        if step in milestones:
            trial.checkpoint(step).mkdir(exist_ok=True)
            on_commit()
    if trial.superseded(attempt):
        raise Fenced(f"a newer attempt than {attempt} owns this trial")
    spool.sync()
    trial.checkpoint(step).mkdir(exist_ok=True)
    spool.commit(step)
    return step


def follow(verdict: Path, told: Path, guard: PreemptionHandler) -> ExitCode:
    """A rank that is not the first: passes its signal on and ends as rank 0 does."""
    while not verdict.exists():
        if guard.stop_requested:
            told.touch()
        time.sleep(0.05)
    return ExitCode(int(verdict.read_text()))
