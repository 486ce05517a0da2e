"""Write what an attempt leaves behind: metric rows, checkpoint counters and the attempt record.

In: metrics of steps, probe results, outcomes of saves. Out: metrics/NNNN.jsonl, attempts/NNNN.json,
DONE.json, FAILED.json. Every rank keeps an `AttemptLog`, because counters and the divergence
detector are the same everywhere; only rank 0 writes files.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import (
    ConfigError,
    Diverged,
    ExitCode,
    Fenced,
    JepaError,
    NodeFault,
    RankLost,
    TrialError,
    is_filesystem_fault,
)
from jepa_cluster.training import step_metrics
from jepa_cluster.training.attempt_record import close_record
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.divergence import DivergenceDetector
from jepa_cluster.training.step_metrics import StepMetrics
from jepa_cluster.training.watchdog import PhaseTimer, goodput, print_stderr
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json

if TYPE_CHECKING:
    from jepa_cluster.training.distributed import World

# All that may differ between an undisturbed and an interrupted trial.
WALL_CLOCK_METRICS = (
    "images_per_s",
    "images_per_s_rank",
    "mfu",
    "data_wait",
    "checkpoint_stall",
    "memory_gb",
    "lost_steps",
)
COUNTERS = ("images_seen", "flops_encoder", "flops_total", "skipped_steps", "corrupt_images")
# Printed to rank 0's log at probes and checkpoints.
LOG_LINE_KEYS = ("loss", "images_per_s", "probe/class_top1", "probe/rankme")
PROBE_WINDOW = 100  # newest straggler probes of a rank that count

# How gloo and NCCL name a vanished rank in a RuntimeError.
RANK_LOSS_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "Timed out waiting",
)


@dataclass(eq=False)
class AttemptLog:
    """Metric rows, counters and the record of one attempt.

    counters: running totals over the trial. latest_row: metrics of the newest step.
    """

    trial: TrialDir
    attempt: int
    world: World
    config: TrialConfig
    timer: PhaseTimer

    def __post_init__(self) -> None:
        self.recipe, self.runtime = self.config.recipe, self.config.runtime
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.detector = DivergenceDetector(self.recipe.optim.divergence)
        self.latest_row: dict[str, float] = {}
        self.initial: dict[str, float] = {}  # rank 0: the errors of the untrained encoder
        self.spool: spool.Spool | None = None
        rank_peak = step_metrics.peak_flops(self.world.device, self.runtime.peak_tflops)
        self.peak_flops = rank_peak * self.world.size
        self.timings = RankTimings(self.world.hosts)
        self.lost_steps = 0
        self.failed_saves: dict[str, Any] = {}
        self.longest_save = 0.0  # seconds from its start to its commit
        self._totals = self._totals_at(0)  # at the newest row

    def open(self, manifest: Manifest | None, trunk: TrialDir | None = None) -> None:
        """Begin from a checkpoint, or from nothing. trunk: the trial whose checkpoint it is."""
        start = manifest.step if manifest else 0
        self.timer.step = start
        if manifest:
            self.counters |= manifest.counters
        if self.world.env.is_rank0:
            self._open_spool(start, manifest.settled_through if manifest else -1, trunk)
        self._totals = self._totals_at(start)

    def _open_spool(self, start: int, settled: int, trunk: TrialDir | None) -> None:
        """Rank 0: record where the attempt begins and how many logged steps are trained again."""
        steps = self.recipe.optim.steps
        world = self.world
        print_stderr(f"world {world.size}, {world.device}: from step {start} to {steps}")
        lost = 0
        rows = spool.read(self.trial).rows
        for row in rows[-1:]:
            lost = max(0, row.step - start)
        self.lost_steps = lost
        for record in self.trial.attempts():
            if record["attempt"] < self.attempt:
                self.lost_steps += int(record.get("lost_steps", 0))
        with contextlib.suppress(OSError):  # a full disk
            self.trial.add_to_attempt(self.attempt, {"lost_steps": lost, "start_step": start})
        self.spool = spool.Spool(self.trial, self.attempt, -1 if trunk else settled)
        if trunk:
            self.trial.add_to_attempt(self.attempt, {"trunk": trunk.name})
            rows = [row for row in spool.read(trunk).rows if row.step <= settled]
            self.spool.adopt(rows, settled)
        for row in rows[:1]:
            if row.step == 0:
                self.initial = probe_errors(row.values)

    def _totals_at(self, step: int) -> defaultdict[str, float]:
        """Return step, time, FLOPs and seconds by phase."""
        totals = self.timer.snapshot()
        totals["step"] = step
        totals["time"] = time.monotonic()
        totals["flops"] = self.counters["flops_total"]
        return totals

    # ---- metrics

    def consume(self, metrics: StepMetrics, row: Mapping[str, float]) -> None:
        """Add a step to the counters, let the detector judge it, log its row if due.

        row: what to log of it; the counters are added here.
        """
        step = metrics.step
        self.timer.step = step
        self.timings.consume(metrics)
        self.counters["images_seen"] += self.recipe.optim.batch
        for name, value in metrics.sums.items():
            self.counters[name] += value
        norm = row["grad_norm"]
        self.detector.observe(step, norm, row["target_std"])
        if not math.isfinite(norm):
            self.counters["skipped_steps"] += 1
            self.event("non_finite_step", step, loss=str(row["loss"]))
        self.latest_row = {**row, **self.counters}
        if step % self.runtime.log_every == 0 and not self.probe_due(step):
            self.log_metrics(step, self.latest_row)

    def probe_due(self, step: int) -> bool:
        """Whether this step's row waits for a probe."""
        every = self.runtime.probe_every
        is_last = step == self.recipe.optim.steps
        return is_last or (every > 0 and step % every == 0)

    def log_metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row, with this attempt's speed since its row before."""
        before, self._totals = self._totals, self._totals_at(step)
        if step > before["step"]:
            seconds = self._totals["time"] - before["time"]

            def per_second(name: str) -> float:
                return (self._totals[name] - before[name]) / seconds

            speed = per_second("step") * self.recipe.optim.batch
            row = {
                **row,
                "images_per_s": speed,
                "images_per_s_rank": speed / self.world.size,
                "data_wait": per_second("data"),
                "checkpoint_stall": per_second("checkpoint"),
                "memory_gb": step_metrics.peak_memory(self.world.device),
                "lost_steps": self.lost_steps,
            }
            if self.peak_flops:
                row["mfu"] = per_second("flops") / self.peak_flops
        if self.spool:
            errors = probe_errors(row)
            gains: dict[str, float] = {}
            if step == 0:
                self.initial = errors
            else:
                for name in sorted(errors.keys() & self.initial):
                    gains[f"gain/{name}"] = self.initial[name] - errors[name]
            self.spool.log(step, {**row, **gains})
            if "probe/rankme" in row:
                self.log_line(f"step {step}", row)

    def log_line(self, what: str, row: Mapping[str, float]) -> None:
        """Print a few metrics to rank 0's log."""
        shown = [f"{name} {row[name]:.4g}" for name in LOG_LINE_KEYS if name in row]
        print_stderr(f"{what}: {', '.join(shown)}".removesuffix(": "))

    def event(self, name: str, step: int, **facts: Any) -> None:
        if self.spool:
            self.spool.event(name, step, **facts)

    def settle(self, step: int) -> None:
        """The row for which a committed checkpoint waited is written. Step 0 has no checkpoint."""
        if self.spool and step > 0:
            self.spool.commit(step)

    def commit(self, manifest: Manifest, save_seconds: float) -> None:
        """A checkpoint is committed: settle its rows and record how the time was spent so far."""
        if not self.spool:
            return
        what = f"step {self.timer.step}, with the checkpoint of step {manifest.step}"
        self.log_line(what, self.latest_row)
        self.spool.commit(manifest.settled_through)
        with contextlib.suppress(OSError, TrialError):
            seconds = self.timer.report()
            self.longest_save = max(self.longest_save, round(save_seconds, 1))
            facts = {
                "end_step": manifest.step,
                "seconds": seconds,
                "goodput": goodput(seconds),
                "save_seconds": self.longest_save,
            }
            if self.failed_saves:  # could not be recorded on a full disk before
                facts["failed_saves"] = self.failed_saves
            self.trial.add_to_attempt(self.attempt, {**facts, **self.timings.report()})

    def save_failed(self, step: int, error: str) -> None:
        """Rank 0: record the number of failed saves, with step and error of the last one."""
        count = self.failed_saves.get("count", 0) + 1
        self.failed_saves = {"count": count, "step": step, "error": error[:500]}
        with contextlib.suppress(OSError, TrialError):
            self.trial.add_to_attempt(self.attempt, {"failed_saves": self.failed_saves})

    # ---- ends

    def mark_done(self, step: int) -> ExitCode:
        """Write DONE.json with the metrics of the last probe."""
        if self.world.env.is_rank0:
            metrics: dict[str, float] = {}
            for row in spool.read(self.trial).rows[-1:]:
                metrics = {k: v for k, v in row.values.items() if k.startswith(("probe/", "val/"))}
            write_json(self.trial.done, {"step": step, "t": spool.now_ms(), "metrics": metrics})
        return self.close(ExitCode.DONE, step)

    def close(
        self,
        code: ExitCode,
        step: int,
        cause: str = "",
        error: str = "",
    ) -> ExitCode:
        """Rank 0: write how the attempt ended, unless the rank that failed has done so."""
        if self.world.env.is_rank0:
            print_stderr(f"{cause or code.cause} at step {step}")
            if self.spool:
                with contextlib.suppress(OSError):
                    self.spool.close()
            pace = self.timings.report()
            close_record(self.trial, self.attempt, code, self.timer, step, cause, error, pace)
        return code


def probe_errors(row: Mapping[str, float]) -> dict[str, float]:
    """Return the errors that a probe measured. `gain/` is their fall since step 0."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith("probe/") and name.endswith("_error")
    }


class RankTimings:
    """Seconds that each rank waited for data, and its straggler probes.

    The time of a step shows neither, because each rank waits for all others.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.data_seconds = [0.0] * len(hosts)
        self.probe_seconds = [deque[float](maxlen=PROBE_WINDOW) for _ in hosts]

    def consume(self, metrics: StepMetrics) -> None:
        for rank in range(len(self.hosts)):
            self.data_seconds[rank] += metrics.data_seconds[rank]
            if metrics.probe_seconds[rank] > 0:
                self.probe_seconds[rank].append(metrics.probe_seconds[rank])

    def report(self) -> dict[str, Any]:
        """Return {"pace": ...}, or {} before every rank has a straggler probe.

        By rank: its host, its median probe over that of the median rank, seconds waited for data.
        """
        if not all(self.probe_seconds):
            return {}
        medians = [statistics.median(tuple(seconds)) for seconds in self.probe_seconds]
        middle = statistics.median_low(medians)
        slow = [round(median / middle, 3) for median in medians]
        data = [round(seconds, 3) for seconds in self.data_seconds]
        return {"pace": {"hosts": list(self.hosts), "slow": slow, "data": data}}


def classify_exception(
    error: BaseException,
    trial: TrialDir,
    attempt: int,
    env: DistEnv,
) -> tuple[ExitCode, str, str]:
    """Return exit code, cause and text of an exception that ended this rank.

    Writes FAILED.json when another attempt cannot cure it. An exception out of a collective means
    that another rank is gone, and that rank knows why: the trial may be tried again.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, JepaError):
        text = str(error)
    if isinstance(error, Fenced):
        return ExitCode.FENCED, "fenced", text
    if is_filesystem_fault(error):
        return ExitCode.HANG, "infrastructure", text
    if is_rank_loss(error):
        return ExitCode.HANG, "lost", f"rank {env.rank} lost another rank: {text.splitlines()[0]}"
    with contextlib.suppress(OSError):
        if trial.superseded(attempt):  # the newer attempt decides about the trial
            return ExitCode.FENCED, "fenced", text
    code = ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.ERROR
    named = {Diverged: "diverged", NodeFault: "node"}
    cause = named.get(type(error), code.cause)
    with contextlib.suppress(OSError):
        trial.write_failed(cause, text[:2000], attempt)
    return code, cause, text


def is_rank_loss(error: BaseException) -> bool:
    """Whether gloo, NCCL or the store reports that another rank has vanished."""
    import torch.distributed as dist

    store_errors = (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)
    if isinstance(error, (RankLost, *store_errors)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in RANK_LOSS_MESSAGES)
