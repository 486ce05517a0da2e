"""Metrics of a step: summed over all ranks in one collective, read without making the device wait.

In: what each rank measured in a step, and its control flags (stop, checkpoint, ...). Out:
`StepMetrics`, the same on every rank, so all ranks decide alike. On a GPU they come one step late,
so the host runs ahead, unless the newest step is asked for. This module knows no metric by name but
the squared gradient norms.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

CONTROL_FLAGS = ("signal", "stop", "fenced", "checkpoint", "give_up")
STRAGGLER_PROBE_EVERY = 10  # steps
# dense bf16 TFLOP/s, by a word of the GPU's name
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40": 181.0}


@dataclass
class LocalMetrics:
    """Numbers of one step on this rank, added up over its micro-batches.

    means: averaged over micro-batches and ranks. moments: `channel_moments`, summed over both and
    reported as a standard deviation. sums: summed over both. A value is a float, or a tensor on the
    device, [] but for the moments. data_seconds: time this rank waited for data.
    """

    means: dict[str, Tensor | float] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    data_seconds: float = 0.0

    def add(
        self,
        means: Mapping[str, Tensor | float],
        sums: Mapping[str, Tensor | float],
        micro_batches: int,
    ) -> None:
        """Add one of `micro_batches` micro-batches of equal size. Tensors are detached.

        means: scalars, and moments.
        """
        for name, value in means.items():
            if isinstance(value, Tensor):
                value = value.detach()
                if value.ndim:
                    self.moments[name] = self.moments.get(name, 0.0) + value
                    continue
            self.means[name] = self.means.get(name, 0.0) + value / micro_batches
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step over the global batch, the same on every rank.

    flags: control flags that any rank raised. data_seconds, probe_seconds: by rank; the latter are
    0 in steps without a straggler probe.
    """

    step: int
    means: Mapping[str, float]
    sums: Mapping[str, float]
    flags: set[str]
    squared_norms: tuple[float, float]  # of the gradients of encoder and predictor
    data_seconds: Sequence[float]
    probe_seconds: Sequence[float]

    def grad_norms(self) -> dict[str, float]:
        """Return the norm of the whole gradient before clipping, and those of its two parts."""
        encoder, predictor = self.squared_norms
        return {
            "grad_norm": math.sqrt(encoder + predictor),
            "grad_norm_encoder": math.sqrt(encoder),
            "grad_norm_predictor": math.sqrt(predictor),
        }


class MetricReducer:
    """Sums the metrics of each step over all ranks.

    The first step fixes the names and their order (sorted). Every rank must measure the same names.
    """

    def __init__(self, device: torch.device, world_size: int, rank: int = 0) -> None:
        self.device = device
        self.world_size = world_size
        self.rank = rank
        self.straggler_probe = StragglerProbe(device)
        self._names: tuple[list[str], ...] | None = None  # of means, sums, moments
        self._widths: list[int] = []  # of the moments
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def all_reduce(
        self,
        step: int,
        local: LocalMetrics,
        flags: Mapping[str, bool],
        squared_norms: Tensor,
    ) -> Tensor:
        """Sum a step over all ranks; return the squared norm of the whole gradient, float64 [].

        squared_norms [2]: this rank's part of those of encoder and predictor. The result stays on
        the device. Raises ValueError when the names differ from those of the first step.
        """
        mean_names, sum_names, moment_names = self._fix_names(step, local)
        values = [local.means[name] for name in mean_names]
        values += [local.sums[name] for name in sum_names]
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        numbers += [float(flags.get(name, False)) for name in CONTROL_FLAGS]
        norms = slice(len(numbers), len(numbers) + 2)
        numbers += [0.0, 0.0, *self._rank_seconds(step, local)]

        vector = torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                vector[position] = value
        vector[norms] = squared_norms
        moments = [local.moments[name] for name in moment_names]
        self._widths = [len(each) for each in moments]
        vector = torch.cat([vector, *moments])
        # Sums the vector over all ranks.
        dist.all_reduce(vector)
        self._copy_to_host(step, vector)
        encoder, predictor = vector[norms]
        return encoder + predictor

    def take(self, drain: bool) -> list[StepMetrics]:
        """Return steps not yet taken, on a GPU without the newest unless `drain`.

        The same steps on every rank.
        """
        leave = 0 if drain or self.device.type != "cuda" else 1
        taken: list[StepMetrics] = []
        while len(self._pending) > leave:
            step, vector, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            taken.append(self._unpack(step, vector))
        return taken

    def _fix_names(self, step: int, local: LocalMetrics) -> tuple[list[str], ...]:
        """Return the sorted names of means, sums, moments: they must be those of the first step."""
        names = sorted(local.means), sorted(local.sums), sorted(local.moments)
        first = self._names = self._names or names
        if names != first:
            changed = set().union(*first) ^ set().union(*names)
            raise ValueError(
                f"metrics of step {step} differ from those of the first step: {sorted(changed)}"
            )
        return names

    def _rank_seconds(self, step: int, local: LocalMetrics) -> list[float]:
        """Two places per rank, of which this rank fills its own: data, straggler probe."""
        seconds = [0.0] * (2 * self.world_size)
        seconds[2 * self.rank] = local.data_seconds
        if step % STRAGGLER_PROBE_EVERY == 0:
            seconds[2 * self.rank + 1] = self.straggler_probe.measure()
        return seconds

    def _copy_to_host(self, step: int, vector: Tensor) -> None:
        """On a GPU: copy in the background, with an event that tells when the copy is done."""
        if self.device.type != "cuda":
            self._pending.append((step, vector, None))
            return
        host = torch.empty_like(vector, device="cpu", pin_memory=True)
        host.copy_(vector, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def _unpack(self, step: int, vector: Tensor) -> StepMetrics:
        """vector: in the order of `all_reduce`, summed over ranks."""
        assert self._names
        mean_names, sum_names, moment_names = self._names
        numbers, *moments = vector.split([len(vector) - sum(self._widths), *self._widths])
        rest = iter(numbers.tolist())
        means = {name: next(rest) / self.world_size for name in mean_names}
        for name, each in zip(moment_names, moments, strict=True):
            means[name] = standard_deviation(each)
        sums = {name: next(rest) for name in sum_names}
        flags = {name for name in CONTROL_FLAGS if next(rest) > 0}
        squared_norms = next(rest), next(rest)
        seconds = list(rest)
        return StepMetrics(step, means, sums, flags, squared_norms, seconds[::2], seconds[1::2])


def standard_deviation(moments: Tensor) -> float:
    """Return the standard deviation over rows, its mean over channels, of `channel_moments`."""
    count = moments[0]
    sums, squares = moments[1:].chunk(2)
    variance = (squares - sums.square() / count) / (count - 1).clamp(min=1)
    return float(variance.clamp(min=0).sqrt().mean())


class StragglerProbe:
    """A small, fixed piece of work, timed: it finds the slow rank.

    Steps take equally long on all ranks, because each waits for the slowest. The probe waits for no
    other rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.events: list[torch.cuda.Event] = []
        self.begun = False
        if device.type == "cuda":
            self.matrix = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        else:
            self.matrix = torch.ones(256, 256, device=device)

    def measure(self) -> float:
        """Return seconds. On a GPU: those of the measurement before, which is over by now."""
        if not self.events:
            begun = time.perf_counter()
            # Long enough that the OS scheduler's wake-up boost does not dominate.
            for _ in range(16):
                torch.matmul(self.matrix, self.matrix)
            return time.perf_counter() - begun
        seconds = 0.0
        start, end = self.events
        if self.begun and end.query():
            seconds = start.elapsed_time(end) / 1000
        self.begun = True
        start.record()
        for _ in range(4):
            torch.matmul(self.matrix, self.matrix)
        end.record()
        return seconds


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB: of the GPU by torch, without a GPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops(device: torch.device, tflops: float | None) -> float:
    """Return the peak FLOP/s of a rank: as configured, else by the GPU's name, 0 if unknown."""
    if tflops is None and device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        tflops = next((peak for word, peak in PEAK_TFLOPS.items() if word in gpu), None)
    return (tflops or 0.0) * 1e12
