"""An attempt's paper: rows into the spool, running totals for the checkpoint, and the record that says how it ended.

In: readings of steps, probe results, outcomes of saves. Out: metrics/NNNN.jsonl, attempts/NNNN.json, DONE.json,
FAILED.json. Every rank keeps one, since totals and wishes are the same everywhere; only rank 0's touches the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import (
    ConfigError,
    Diverged,
    ExitCode,
    Fenced,
    JepaError,
    RankLost,
    TrialError,
    is_filesystem_fault,
)
from jepa_cluster.ijepa import schedules
from jepa_cluster.training import step_metrics
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.divergence import DivergenceDetector
from jepa_cluster.training.probe import only_probes
from jepa_cluster.training.step_metrics import MEANS, StepMetrics
from jepa_cluster.training.watchdog import PhaseTimer, goodput, print_stderr
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir, write_json

if TYPE_CHECKING:
    from jepa_cluster.training.distributed import World

WALL_CLOCK_METRICS = (  # all that may differ between an undisturbed and an interrupted trial
    "images_per_s", "images_per_s_rank", "mfu", "data_wait", "checkpoint_stall", "memory_gb", "lost_steps",
)  # fmt: skip
COUNTERS = ("images_seen", "flops_encoder", "flops_total", "skipped_steps", "corrupt_images")
LOG_LINE_KEYS = (
    "loss",
    "images_per_s",
    "probe/class_top1",
    "probe/rankme",
)  # in the rank's log, at probes and checkpoints
PROBE_WINDOW = 100  # newest pulses of a rank that count


class AttemptLog:
    def __init__(self, trial: TrialDir, attempt: int, world: World, config: TrialConfig, timer: PhaseTimer) -> None:
        self.trial, self.attempt, self.world, self.env, self.timer = (
            trial,
            attempt,
            world,
            world.env,
            timer,
        )
        self.recipe, self.runtime = config.recipe, config.runtime
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.detector = DivergenceDetector(self.recipe.optim.divergence)
        self.latest_row: dict[str, float] = {}  # the row of the newest reading
        self.spool: spool.Spool | None = None
        self.peak_flops = step_metrics.peak_flops(world.device, self.runtime.peak_tflops) * world.size
        self.timings = RankTimings(world.hosts)
        self.lost_steps = 0
        self.failed_saves: dict[str, Any] = {}
        self._last_snapshot = self._snapshot(0)

    def open(self, manifest: Manifest | None, trunk: TrialDir | None = None) -> None:
        """Begin from a checkpoint, or from nothing. trunk: the trial whose checkpoint it is, when it is not our own."""
        start = manifest.step if manifest else 0
        self.timer.step = start
        if manifest:
            self.counters |= manifest.counters
        if self.env.is_rank0:
            print_stderr(
                f"world {self.env.world_size}, {self.world.device}: from step {start} to {self.recipe.optim.steps}"
            )
            reached = max([r.step for r in spool.read(self.trial).rows[-1:]], default=0)
            before = sum(int(r.get("lost_steps", 0)) for r in self.trial.attempts() if r["attempt"] < self.attempt)
            lost = max(0, reached - start)  # steps that must be trained again
            with contextlib.suppress(OSError):  # a full disk
                self.trial.amend(self.attempt, {"lost_steps": lost, "start_step": start})
            self.lost_steps = lost + before
            settled = manifest.settled_through if manifest else -1
            self.spool = spool.Spool(self.trial, self.attempt, -1 if trunk else settled)
            if trunk:
                self.trial.amend(self.attempt, {"trunk": trunk.name})
                self.spool.adopt([r for r in spool.read(trunk).rows if r.step <= settled], settled)
        self._last_snapshot = self._snapshot(start)

    def _snapshot(self, step: int) -> tuple[float, int, float, float, float]:
        """Now, the step, seconds waited for data and stood still for saves, FLOPs."""
        seconds = self.timer.snapshot()
        stalls = [seconds.get(phase, 0.0) for phase in ("data", "checkpoint")]
        return time.monotonic(), step, stalls[0], stalls[1], self.counters["flops_total"]

    # ---- metrics

    def consume(self, readings: list[StepMetrics]) -> set[str]:
        """Count the readings and log those that are due -> what the ranks wished in them."""
        wishes: set[str] = set()
        for reading in readings:
            self.timer.step = reading.step
            self.timings.consume(reading)
            self.counters["images_seen"] += self.recipe.optim.batch
            for name in ("flops_encoder", "flops_total"):
                self.counters[name] += reading[name]
            self.counters["corrupt_images"] += reading["corrupt"]
            norm = math.sqrt(reading["square_encoder"] + reading["square_predictor"])
            self.detector.observe(reading.step, norm, reading["target_std"])
            if not math.isfinite(norm):
                self.counters["skipped_steps"] += 1
                self.event("non_finite_step", reading.step, loss=str(reading["loss"]))
            wishes |= reading.flags
            self.latest_row = self.row(reading)
            if reading.step % self.runtime.log_every == 0 and not self.probe_due(reading.step):
                self.log(reading.step, self.latest_row)
        return wishes

    def probe_due(self, step: int) -> bool:
        """Whether this step's row waits for a probe."""
        every = self.runtime.probe_every
        last = step == self.recipe.optim.steps
        return last or (every > 0 and step % every == 0)

    def row(self, reading: StepMetrics) -> dict[str, float]:
        """The metrics of that very step: nothing here depends on where an interruption fell, but for the timings."""
        settings = schedules.schedule_at(self.recipe.optim, reading.step)
        encoder, predictor = reading["square_encoder"], reading["square_predictor"]
        return {
            **{name: reading[name] for name in MEANS},
            "grad_norm": math.sqrt(encoder + predictor),
            "grad_norm_encoder": math.sqrt(encoder),
            "grad_norm_predictor": math.sqrt(predictor),
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            **self.counters,
        }

    def log(self, step: int, row: dict[str, float]) -> None:
        """Write a row, with this attempt's speed since its last one."""
        then, step_then, waited, stalled, flops = self._last_snapshot
        timed = self._snapshot(step)
        timings: dict[str, float] = {}
        if step > step_then:
            took, speed = (
                timed[0] - then,
                (step - step_then) * self.recipe.optim.batch / (timed[0] - then),
            )
            timings = {
                "images_per_s": speed,
                "images_per_s_rank": speed / self.env.world_size,
                "data_wait": (timed[2] - waited) / took,
                "checkpoint_stall": (timed[3] - stalled) / took,
                "memory_gb": step_metrics.peak_memory(self.world.device),
                "lost_steps": self.lost_steps,
            }
            if self.peak_flops:
                timings["mfu"] = (timed[4] - flops) / took / self.peak_flops
        self._last_snapshot = timed
        if self.spool:
            self.spool.log(step, {**row, **timings})
            if "probe/rankme" in row:
                self.log_line(f"step {step}", row | timings)

    def log_line(self, what: str, row: Mapping[str, float]) -> None:
        """A line for whoever reads rank 0's log."""
        print_stderr(
            f"{what}: {', '.join(f'{name} {row[name]:.4g}' for name in LOG_LINE_KEYS if name in row)}".removesuffix(
                ": "
            )
        )

    def event(self, name: str, step: int, **facts: Any) -> None:
        if self.spool:
            self.spool.event(name, step, **facts)

    def settle(self, step: int) -> None:
        """The row that a committed checkpoint was waiting for is written. Step 0 has no checkpoint to settle it."""
        if self.spool and step > 0:
            self.spool.commit(step)

    def commit(self, manifest: Manifest) -> None:
        """A checkpoint is in its place: its rows are settled, and the record says how the time was spent so far."""
        if self.spool:
            self.log_line(
                f"step {self.timer.step}, with the checkpoint of step {manifest.step}",
                self.latest_row,
            )
            self.spool.commit(manifest.settled_through)
            with contextlib.suppress(OSError, TrialError):
                seconds = self.timer.report()
                facts = {"end_step": manifest.step, "seconds": seconds, "goodput": goodput(seconds)}
                if self.failed_saves:  # what a full disk did not take before
                    facts["failed_saves"] = self.failed_saves
                self.trial.amend(self.attempt, {**facts, **self.timings.report()})

    def save_failed(self, step: int, error: str) -> None:
        """Rank 0: the attempt's record gets the number of saves that failed, and the step and error of the last one."""
        self.failed_saves = {
            "count": self.failed_saves.get("count", 0) + 1,
            "step": step,
            "error": error[:500],
        }
        with contextlib.suppress(OSError, TrialError):
            self.trial.amend(self.attempt, {"failed_saves": self.failed_saves})

    # ---- ends

    def mark_done(self, step: int) -> ExitCode:
        """The trial is finished: its marker, with what the last probe said."""
        if self.env.is_rank0:
            rows = spool.read(self.trial).rows
            metrics = only_probes(dict(rows[-1].values)) if rows else {}
            write_json(self.trial.done, {"step": step, "t": spool.now_ms(), "metrics": metrics})
        return self.close(ExitCode.DONE, step)

    def close(self, code: ExitCode, step: int, cause: str = "", error: str = "") -> ExitCode:
        """Rank 0: write how the attempt ended, unless the rank whose fault it was has already done so."""
        if self.env.is_rank0:
            print_stderr(f"{cause or code.cause} at step {step}")
            if self.spool:
                with contextlib.suppress(OSError):
                    self.spool.close()
            close_record(self.trial, self.attempt, code, self.timer, step, cause, error, self.timings)
        return code


class RankTimings:
    """How long each rank waited for data, and its pulse: what a step's time does not show, since all wait for all."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.data_seconds = [0.0] * len(hosts)
        self.probe_seconds = [deque[float](maxlen=PROBE_WINDOW) for _ in hosts]

    def consume(self, reading: StepMetrics) -> None:
        for rank, (wait, pulse) in enumerate(zip(reading.data_seconds, reading.probe_seconds, strict=True)):
            self.data_seconds[rank] += wait
            if pulse > 0:
                self.probe_seconds[rank].append(pulse)

    def report(self) -> dict[str, Any]:
        """{"pace": by rank its host, its usual pulse over the median rank's, seconds waited for data}; {} too early."""
        if not all(self.probe_seconds):
            return {}
        usual = [statistics.median(tuple(pulses)) for pulses in self.probe_seconds]
        middle = statistics.median_low(usual)
        slow, data = [round(u / middle, 3) for u in usual], [round(w, 3) for w in self.data_seconds]
        return {"pace": {"hosts": list(self.hosts), "slow": slow, "data": data}}


def close_record(
    trial: TrialDir,
    attempt: int,
    code: ExitCode,
    timer: PhaseTimer | None,
    step: int | None,
    cause: str = "",
    error: str = "",
    pace: RankTimings | None = None,
) -> None:
    """Amend attempts/NNNN.json with its end. The first to say a cause is believed."""
    with contextlib.suppress(OSError, TrialError):
        record = next((r for r in trial.attempts() if r["attempt"] == attempt), {})
        if "cause" in record:
            return
        end: dict[str, Any] = {
            "ended": spool.now_ms(),
            "cause": cause or code.cause,
            "exit": int(code),
        }
        if timer:
            for newest in trial.committed()[-1:]:
                timer.mark_committed(newest)  # only rank 0 has been told
            end["seconds"] = timer.report(ended=True)
            end["goodput"] = goodput(end["seconds"])
        if pace:
            end |= pace.report()
        if step is not None:
            end["end_step"] = step
        if error:
            end["error"] = error[:2000]
            end |= {"node": node} if (node := os.environ.get("SLURMD_NODENAME")) else {}
        trial.amend(attempt, end)


def classify_exception(error: BaseException, trial: TrialDir, attempt: int, env: DistEnv) -> tuple[ExitCode, str, str]:
    """An exception that ended this rank -> exit code, cause, text; FAILED.json when another try cannot cure it.

    An exception out of a collective means that another rank has gone: that one knows why, this one does not, and
    the trial may be tried again.
    """
    text = str(error) if isinstance(error, JepaError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Fenced):
        return ExitCode.FENCED, "fenced", text
    if is_filesystem_fault(error):
        return ExitCode.HANG, "infrastructure", text
    if is_rank_loss(error):
        return ExitCode.HANG, "lost", f"rank {env.rank} lost another rank: {text.splitlines()[0]}"
    with contextlib.suppress(OSError):
        if trial.superseded(attempt):  # whatever went wrong here, the younger attempt decides about the trial
            return ExitCode.FENCED, "fenced", text
    code = ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.ERROR
    cause = "diverged" if isinstance(error, Diverged) else code.cause
    with contextlib.suppress(OSError):
        write_json(
            trial.failed,
            {"cause": cause, "error": text[:2000], "attempt": attempt, "t": spool.now_ms()},
        )
    return code, cause, text


def is_rank_loss(error: BaseException) -> bool:
    """gloo and NCCL report a vanished peer as a RuntimeError with words of their own."""
    import torch.distributed as dist

    if isinstance(error, (RankLost, dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)):
        return True
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "gloo/transport",
        "Timed out waiting",
    )
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)
