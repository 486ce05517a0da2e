"""An attempt's paper: rows into the spool, running totals for the checkpoint, and the record that says how it ended.

In: readings of steps, probe results, outcomes of saves. Out: metrics/NNNN.jsonl, attempts/NNNN.json, DONE.json,
FAILED.json. Every rank keeps one, since totals and wishes are the same everywhere; only rank 0's touches the disk.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ConfigError, ExitCode, Fenced, JepaError, TrialError
from jepa_cluster.ijepa import schedules
from jepa_cluster.training.checkpoint import Manifest
from jepa_cluster.training.health import Clock
from jepa_cluster.training.meter import MEANS, Reading
from jepa_cluster.training.place import Place
from jepa_cluster.training.probe import only_probes
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir, write_json

TIMINGS = ("images_per_s", "data_wait")  # all that may differ between an undisturbed and an interrupted trial
COUNTERS = ("images_seen", "flops_encoder", "flops_total", "skipped_steps", "corrupt_images")


class Journal:
    def __init__(self, trial: TrialDir, attempt: int, place: Place, config: TrialConfig, clock: Clock) -> None:
        self.trial, self.attempt, self.place, self.clock = trial, attempt, place, clock
        self.recipe, self.runtime = config.recipe, config.runtime
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.newest: dict[str, float] = {}  # the row of the newest reading
        self.spool: spool.Spool | None = None
        self._timed = (time.monotonic(), 0, 0.0)

    def open(self, manifest: Manifest | None, trunk: TrialDir | None = None) -> None:
        """Begin from a checkpoint, or from nothing. trunk: the trial whose checkpoint it is, when it is not our own."""
        start = manifest.step if manifest else 0
        self.clock.step = start
        if manifest:
            self.counters |= manifest.counters
        if self.place.first:
            self.trial.amend(self.attempt, {"start_step": start, **({"trunk": trunk.name} if trunk else {})})
            settled = manifest.settles if manifest else 0
            self.spool = spool.Spool(self.trial, self.attempt, 0 if trunk else settled)
            if trunk:
                self.spool.adopt([r for r in spool.read(trunk).rows if r.step <= settled], settled)
        self._timed = (time.monotonic(), start, self.clock.seconds["data"])

    # ---- metrics

    def take(self, readings: list[Reading]) -> set[str]:
        """Count the readings and log those that are due -> what the ranks wished in them."""
        wishes: set[str] = set()
        for reading in readings:
            self.clock.step = reading.step
            self.counters["images_seen"] += self.recipe.optim.batch
            for name in ("flops_encoder", "flops_total"):
                self.counters[name] += reading[name]
            self.counters["corrupt_images"] += reading["corrupt"]
            if not math.isfinite(reading["square_encoder"] + reading["square_predictor"]):
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
        return step == self.recipe.optim.steps or (every > 0 and step % every == 0)

    def row(self, reading: Reading) -> dict[str, float]:
        """The metrics of that very step: nothing here depends on where an interruption fell, but for the timings."""
        settings = schedules.at(self.recipe.optim, reading.step)
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
        then, step_then, waited = self._timed
        now, waiting = time.monotonic(), self.clock.seconds["data"]
        timings: dict[str, float] = {}
        if step > step_then:
            images = (step - step_then) * self.recipe.optim.batch
            timings = {"images_per_s": images / (now - then), "data_wait": (waiting - waited) / (now - then)}
        self._timed = (now, step, waiting)
        if self.spool:
            self.spool.log(step, {**row, **timings})

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
            self.spool.commit(manifest.settles)
            with contextlib.suppress(OSError, TrialError):
                self.trial.amend(self.attempt, {"end_step": manifest.step, "seconds": self.clock.report()})

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
            if self.spool:
                with contextlib.suppress(OSError):
                    self.spool.close()
            close_record(self.trial, self.attempt, code, self.clock, step, cause, error)
        return code


def close_record(
    trial: TrialDir,
    attempt: int,
    code: ExitCode,
    clock: Clock | None,
    step: int | None,
    cause: str = "",
    error: str = "",
) -> None:
    """Amend attempts/NNNN.json with its end. The first to say a cause is believed."""
    with contextlib.suppress(OSError, TrialError):
        record = next((r for r in trial.attempts() if r["attempt"] == attempt), {})
        if "cause" in record:
            return
        end: dict[str, Any] = {"ended": spool.now_ms(), "cause": cause or code.cause, "exit": int(code)}
        if clock:
            end["seconds"] = clock.report()
        if step is not None:
            end["end_step"] = step
        if error:
            end["error"] = error[:2000]
        trial.amend(attempt, end)


def blame(error: BaseException, trial: TrialDir, attempt: int, place: Place) -> tuple[ExitCode, str, str]:
    """An exception that ended this rank -> exit code, cause, text; FAILED.json when another try cannot cure it.

    An exception out of a collective means that another rank has gone: that one knows why, this one does not, and
    the trial may be tried again.
    """
    text = str(error) if isinstance(error, JepaError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Fenced):
        return ExitCode.FENCED, "fenced", text
    if is_loss_of_a_rank(error):
        return ExitCode.HANG, "lost", f"rank {place.rank} lost another rank: {text.splitlines()[0]}"
    code = ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.ERROR
    cause = code.cause
    with contextlib.suppress(OSError):
        write_json(trial.failed, {"cause": cause, "error": text[:2000], "attempt": attempt, "t": spool.now_ms()})
    return code, cause, text


def is_loss_of_a_rank(error: BaseException) -> bool:
    """gloo and NCCL report a vanished peer as a RuntimeError with words of their own."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)):
        return True
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "gloo/transport",
        "Timed out waiting",
    )
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)
