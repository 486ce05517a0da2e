"""Replace training/train.py: the same contract in a second instead of a minute, no torch.

Rank 0 logs one row per step; the others follow its checkpoints. `<root>/stub.json` holds the
seconds per step, the step at which all wait until `<root>/go` exists, what each seed does wrong,
and which node is broken: {"seconds": 0.1, "hold": 5, "1": "error", "broken": "n1"}; with "late",
errors wait for `go`. With "best_rate", rows have a probe error that rises on both sides of it.

It writes `<root>/twice` when two attempts train at once, and every attempt that trains into the
trial's `trained`.
"""

import fcntl
import json
import math
import os
import resource
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from jepa_cluster.errors import ExitCode, Fenced
from jepa_cluster.training import attempt_log
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.watchdog import Watchdog
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import Spool, now_ms


class Never(Exception):
    """Replaces the errors of torch.distributed."""


# classify_exception asks whether an exception is torch's. These modules save eight CPU seconds.
torch = types.ModuleType("torch")
dist = types.ModuleType("torch.distributed")
dist.DistNetworkError = dist.DistStoreError = dist.DistBackendError = Never
torch.distributed = dist
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
sys.modules |= {"torch": torch, "torch.distributed": dist}

HANG_SECONDS = 3.0  # as runtime.hang_seconds
GPU_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"


def train(exits: ForcedExit) -> ExitCode:
    run = StubAttempt(exits)
    if not exits.env.is_rank0:
        return run.follow()
    return run.lead()


@dataclass
class StubAttempt:
    """An attempt as its trial's `stub.json` orders it."""

    exits: ForcedExit

    def __post_init__(self) -> None:
        self.trial, self.number = self.exits.trial, self.exits.attempt
        self.handler, self.timer = self.exits.handler, self.exits.timer
        self.config = self.trial.read_config()
        self.orders = json.loads((self.trial.root.path / "stub.json").read_text())
        self.fault = self.orders.get(str(self.config.recipe.seed), "")
        self.verdict = self.trial.path / f"verdict-{self.number}"  # the exit code of rank 0
        self.stop = self.trial.path / f"stop-{self.number}"  # made by a rank that got a signal

    @property
    def released(self) -> bool:
        return (self.trial.root.path / "go").exists()

    @property
    def stopping(self) -> bool:
        return self.handler.stop_requested or self.stop.exists() or self.trial.stop.exists()

    def follow(self) -> ExitCode:
        """Run a rank other than rank 0: it passes its signal on and ends as rank 0 does."""
        while not self.verdict.exists():
            if self.handler.stop_requested:
                self.stop.touch()
                self.handler.note_contact()
            time.sleep(0.05)
        return ExitCode(int(self.verdict.read_text()))

    def lead(self) -> ExitCode:
        """Run rank 0."""
        steps = self.config.recipe.optim.steps or 0
        last = min(steps, self.config.runtime.stop_after or steps)
        with (self.trial.path / "alone").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                text = f"{self.trial.name} attempt {self.number}\n"
                (self.trial.root.path / "twice").write_text(text)
            with (self.trial.path / "trained").open("a") as log:
                log.write(f"{self.number}\n")
            while self.fault and "late" in self.orders and not self.released:
                time.sleep(0.1)
            self.fail()
            step = self.make_steps(last)
        self.handler.note_contact()
        code = ExitCode.PREEMPTED
        cause = ""
        if step == steps:
            code = ExitCode.DONE
            write_json(self.trial.done, {"step": step, "t": now_ms(), "metrics": {}})
        elif step == last:
            code = ExitCode.DONE
            cause = "stopped"
        elif self.trial.stop.exists():
            code = ExitCode.STOPPED
        self.close_record(code, step, cause, self.handler.signal or "")
        self.verdict.write_text(str(int(code)))
        return code

    def close_record(self, code: ExitCode, step: int | None, cause: str, error: str) -> None:
        attempt_log.close_record(
            self.trial, self.number, code, self.timer, step, cause, error=error
        )

    def fail(self) -> None:
        """Make the fault of this node, or of this seed."""
        if self.orders.get("broken") == os.environ.get("SLURMD_NODENAME"):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        if self.fault == "error":
            raise RuntimeError("a bug of the user's")
        if self.fault == "gpu_oom" and (self.config.runtime.micro_batch or 8) > 4:
            raise RuntimeError(GPU_FULL)
        if self.fault == "host_oom":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 2**26
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            bytearray(2**30)
        if self.fault == "hang" and self.number == 1:
            self.hang()

    def hang(self) -> None:
        """Wait as in a collective whose peer never comes; the watchdog is the trainer's own."""
        exits = self.exits
        Watchdog(
            self.trial, self.number, exits.env, self.timer, HANG_SECONDS, exits.on_hang
        ).start()
        with self.timer("train"):
            time.sleep(3600)

    def probe(self, step: int) -> dict[str, float]:
        if "best_rate" not in self.orders:
            return {}
        octaves = math.log2(self.config.recipe.optim.lr / self.orders["best_rate"])
        return {"probe/class_error": 0.4 + 0.02 * octaves**2 if step else 0.9}

    def make_steps(self, last: int) -> int:
        """Make and log steps until the last one or until `stopping`; then save a checkpoint.

        Returns the step of the checkpoint.
        """
        seconds = self.orders["seconds"]
        if self.fault == "slow":
            seconds *= 20
        hold = self.orders.get("hold", last)
        step = max(self.trial.committed(), default=0)
        spool = Spool(self.trial, self.number, step or -1)
        if step == 0 and "best_rate" in self.orders:
            spool.log(0, self.probe(0))
        write_json(self.trial.heartbeat, {"step": step, "t": now_ms()})
        while step < last and not self.stopping:
            if step >= hold and not self.released:
                time.sleep(0.1)
                continue
            with self.timer("train"):
                time.sleep(seconds)
            step += 1
            spool.log(step, {"loss": 1 / step, **self.probe(step)})
            self.timer.step = step
            if step in self.config.runtime.milestones:
                self.trial.checkpoint(step).mkdir(exist_ok=True)
                self.exits.hooks.on_commit()
        if self.trial.superseded(self.number):
            raise Fenced(f"a newer attempt than {self.number} owns this trial")
        spool.sync()
        self.trial.checkpoint(step).mkdir(exist_ok=True)
        spool.commit(step)
        return step
