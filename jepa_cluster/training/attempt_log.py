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
from jepa_cluster.training.dist_env import Place
from jepa_cluster.training.divergence import DivergenceDetector
from jepa_cluster.training.probe import only_probes
from jepa_cluster.training.step_metrics import MEANS, Reading
from jepa_cluster.training.watchdog import Clock, goodput, say
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir, write_json

if TYPE_CHECKING:
    from jepa_cluster.training.distributed import Ranks

TIMINGS = (  # all that may differ between an undisturbed and an interrupted trial
    "images_per_s", "images_per_s_rank", "mfu", "data_wait", "checkpoint_stall", "memory_gb", "lost_steps",
)  # fmt: skip
COUNTERS = ("images_seen", "flops_encoder", "flops_total", "skipped_steps", "corrupt_images")
SAID = ("loss", "images_per_s", "probe/class_top1", "probe/rankme")  # in the rank's log, at probes and checkpoints
BEATS = 100  # newest pulses of a rank that count


class Journal:
    def __init__(self, trial: TrialDir, attempt: int, ranks: Ranks, config: TrialConfig, clock: Clock) -> None:
        self.trial, self.attempt, self.ranks, self.place, self.clock = trial, attempt, ranks, ranks.place, clock
        self.recipe, self.runtime = config.recipe, config.runtime
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.detector = DivergenceDetector(self.recipe.optim.divergence)
        self.newest: dict[str, float] = {}  # the row of the newest reading
        self.spool: spool.Spool | None = None
        self.peak = step_metrics.peak_flops(ranks.device, self.runtime.peak_tflops) * ranks.world
        self.pace = Pace(ranks.hosts)
        self.lost_steps = 0
        self.failed_saves: dict[str, Any] = {}
        self._timed = self._time(0)

    def open(self, manifest: Manifest | None, trunk: TrialDir | None = None) -> None:
        """Begin from a checkpoint, or from nothing. trunk: the trial whose checkpoint it is, when it is not our own."""
        start = manifest.step if manifest else 0
        self.clock.step = start
        if manifest:
            self.counters |= manifest.counters
        if self.place.first:
            say(f"world {self.place.world}, {self.ranks.device}: from step {start} to {self.recipe.optim.steps}")
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
        self._timed = self._time(start)

    def _time(self, step: int) -> tuple[float, int, float, float, float]:
        """Now, the step, seconds waited for data and stood still for saves, FLOPs."""
        seconds = self.clock.mark()
        stalls = [seconds.get(phase, 0.0) for phase in ("data", "checkpoint")]
        return time.monotonic(), step, stalls[0], stalls[1], self.counters["flops_total"]

    # ---- metrics

    def take(self, readings: list[Reading]) -> set[str]:
        """Count the readings and log those that are due -> what the ranks wished in them."""
        wishes: set[str] = set()
        for reading in readings:
            self.clock.step = reading.step
            self.pace.take(reading)
            self.counters["images_seen"] += self.recipe.optim.batch
            for name in ("flops_encoder", "flops_total"):
                self.counters[name] += reading[name]
            self.counters["corrupt_images"] += reading["corrupt"]
            norm = math.sqrt(reading["square_encoder"] + reading["square_predictor"])
            self.detector.observe(reading.step, norm, reading["target_std"])
            if not math.isfinite(norm):
                self.counters["skipped_steps"] += 1
                self.event("non_finite_step", reading.step, loss=str(reading["loss"]))
            wishes |= reading.wishes
            self.newest = self.row(reading)
            if reading.step % self.runtime.log_every == 0 and not self.probing(reading.step):
                self.log(reading.step, self.newest)
        return wishes

    def probing(self, step: int) -> bool:
        """Whether this step's row waits for a probe."""
        every = self.runtime.probe_every
        last = step == self.recipe.optim.steps
        return last or (every > 0 and step % every == 0)

    def row(self, reading: Reading) -> dict[str, float]:
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
        then, step_then, waited, stalled, flops = self._timed
        timed = self._time(step)
        timings: dict[str, float] = {}
        if step > step_then:
            took, speed = timed[0] - then, (step - step_then) * self.recipe.optim.batch / (timed[0] - then)
            timings = {
                "images_per_s": speed,
                "images_per_s_rank": speed / self.place.world,
                "data_wait": (timed[2] - waited) / took,
                "checkpoint_stall": (timed[3] - stalled) / took,
                "memory_gb": step_metrics.peak_memory(self.ranks.device),
                "lost_steps": self.lost_steps,
            }
            if self.peak:
                timings["mfu"] = (timed[4] - flops) / took / self.peak
        self._timed = timed
        if self.spool:
            self.spool.log(step, {**row, **timings})
            if "probe/rankme" in row:
                self.tell(f"step {step}", row | timings)

    def tell(self, what: str, row: Mapping[str, float]) -> None:
        """A line for whoever reads rank 0's log."""
        say(f"{what}: {', '.join(f'{name} {row[name]:.4g}' for name in SAID if name in row)}".removesuffix(": "))

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
            self.tell(f"step {self.clock.step}, with the checkpoint of step {manifest.step}", self.newest)
            self.spool.commit(manifest.settled_through)
            with contextlib.suppress(OSError, TrialError):
                seconds = self.clock.report()
                facts = {"end_step": manifest.step, "seconds": seconds, "goodput": goodput(seconds)}
                if self.failed_saves:  # what a full disk did not take before
                    facts["failed_saves"] = self.failed_saves
                self.trial.amend(self.attempt, {**facts, **self.pace.report()})

    def save_failed(self, step: int, error: str) -> None:
        """Rank 0: the attempt's record gets the number of saves that failed, and the step and error of the last one."""
        self.failed_saves = {"count": self.failed_saves.get("count", 0) + 1, "step": step, "error": error[:500]}
        with contextlib.suppress(OSError, TrialError):
            self.trial.amend(self.attempt, {"failed_saves": self.failed_saves})

    # ---- ends

    def done(self, step: int) -> ExitCode:
        """The trial is finished: its marker, with what the last probe said."""
        if self.place.first:
            rows = spool.read(self.trial).rows
            metrics = only_probes(dict(rows[-1].values)) if rows else {}
            write_json(self.trial.done, {"step": step, "t": spool.now_ms(), "metrics": metrics})
        return self.close(ExitCode.DONE, step)

    def close(self, code: ExitCode, step: int, cause: str = "", error: str = "") -> ExitCode:
        """Rank 0: write how the attempt ended, unless the rank whose fault it was has already done so."""
        if self.place.first:
            say(f"{cause or code.cause} at step {step}")
            if self.spool:
                with contextlib.suppress(OSError):
                    self.spool.close()
            close_record(self.trial, self.attempt, code, self.clock, step, cause, error, self.pace)
        return code


class Pace:
    """How long each rank waited for data, and its pulse: what a step's time does not show, since all wait for all."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.waits = [0.0] * len(hosts)
        self.pulses = [deque[float](maxlen=BEATS) for _ in hosts]

    def take(self, reading: Reading) -> None:
        for rank, (wait, pulse) in enumerate(zip(reading.waits, reading.pulses, strict=True)):
            self.waits[rank] += wait
            if pulse > 0:
                self.pulses[rank].append(pulse)

    def report(self) -> dict[str, Any]:
        """{"pace": by rank its host, its usual pulse over the median rank's, seconds waited for data}; {} too early."""
        if not all(self.pulses):
            return {}
        usual = [statistics.median(tuple(pulses)) for pulses in self.pulses]
        middle = statistics.median_low(usual)
        slow, data = [round(u / middle, 3) for u in usual], [round(w, 3) for w in self.waits]
        return {"pace": {"hosts": list(self.hosts), "slow": slow, "data": data}}


def close_record(
    trial: TrialDir,
    attempt: int,
    code: ExitCode,
    clock: Clock | None,
    step: int | None,
    cause: str = "",
    error: str = "",
    pace: Pace | None = None,
) -> None:
    """Amend attempts/NNNN.json with its end. The first to say a cause is believed."""
    with contextlib.suppress(OSError, TrialError):
        record = next((r for r in trial.attempts() if r["attempt"] == attempt), {})
        if "cause" in record:
            return
        end: dict[str, Any] = {"ended": spool.now_ms(), "cause": cause or code.cause, "exit": int(code)}
        if clock:
            for newest in trial.committed()[-1:]:
                clock.committed(newest)  # only rank 0 has been told
            end["seconds"] = clock.report(ended=True)
            end["goodput"] = goodput(end["seconds"])
        if pace:
            end |= pace.report()
        if step is not None:
            end["end_step"] = step
        if error:
            end["error"] = error[:2000]
            end |= {"node": node} if (node := os.environ.get("SLURMD_NODENAME")) else {}
        trial.amend(attempt, end)


def blame(error: BaseException, trial: TrialDir, attempt: int, place: Place) -> tuple[ExitCode, str, str]:
    """An exception that ended this rank -> exit code, cause, text; FAILED.json when another try cannot cure it.

    An exception out of a collective means that another rank has gone: that one knows why, this one does not, and
    the trial may be tried again.
    """
    text = str(error) if isinstance(error, JepaError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Fenced):
        return ExitCode.FENCED, "fenced", text
    if is_filesystem_fault(error):
        return ExitCode.HANG, "infrastructure", text
    if is_loss_of_a_rank(error):
        return ExitCode.HANG, "lost", f"rank {place.rank} lost another rank: {text.splitlines()[0]}"
    with contextlib.suppress(OSError):
        if trial.superseded(attempt):  # whatever went wrong here, the younger attempt decides about the trial
            return ExitCode.FENCED, "fenced", text
    code = ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.ERROR
    cause = "diverged" if isinstance(error, Diverged) else code.cause
    with contextlib.suppress(OSError):
        write_json(trial.failed, {"cause": cause, "error": text[:2000], "attempt": attempt, "t": spool.now_ms()})
    return code, cause, text


def is_loss_of_a_rank(error: BaseException) -> bool:
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
