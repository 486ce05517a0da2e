"""The numbers of a step: summed over all ranks in one collective, read without making the device wait.

In: what each rank measured in a step, its wishes (stop, checkpoint) included. Out: `Reading`s of whole steps, the
same on every rank, which is what makes all ranks decide alike. On a GPU a reading comes one step late, so that the
host runs ahead; `flush` waits for the newest.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEANS = (  # over images
    "loss",
    "target_std",
    "context_fraction",
    "target_fraction",
    "union_fraction",
    "overlap_fraction",
    "discarded_fraction",
)
SUMS = ("square_encoder", "square_predictor", "flops_encoder", "flops_total", "corrupt")
CONTROL_FLAGS = (
    "signal",
    "stop",
    "fenced",
    "checkpoint",
    "give_up",
)  # a rank's wish is everybody's
NAMES = (*MEANS, *SUMS, *CONTROL_FLAGS)
STRAGGLER_PROBE_EVERY = 10  # steps between two pulses of a rank
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40": 181.0,
}  # dense bf16 TFLOP/s


@dataclass(frozen=True)
class StepMetrics:
    """Step's numbers over the whole global batch. waits, pulses: seconds by rank; a pulse is 0 where none was taken."""

    step: int
    values: dict[str, float]
    data_seconds: Sequence[float] = ()
    probe_seconds: Sequence[float] = ()

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    @property
    def flags(self) -> set[str]:
        return {w for w in CONTROL_FLAGS if self.values[w] > 0}


class MetricReducer:
    def __init__(self, device: torch.device, world: int, rank: int = 0) -> None:
        self.device, self.world, self.rank = device, world, rank
        self.straggler_probe = StragglerProbe(device)
        self.late = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()

    def all_reduce(self, step: int, numbers: dict[str, float], loss: Tensor, spread: Tensor, squares: Tensor) -> Tensor:
        """Sum the step's numbers over ranks -> the vector on the device, in the order of NAMES, means not yet divided.

        loss, spread: this rank's [], squares [2]: its part of the squared gradient norms; the rest in `numbers`. Behind
        the names every rank has two places of its own: how long it waited for data, and its pulse.
        """
        own = [0.0] * 2 * self.world
        own[2 * self.rank] = numbers.get("data_seconds", 0.0)
        own[2 * self.rank + 1] = self.straggler_probe.measure() if step % STRAGGLER_PROBE_EVERY == 0 else 0.0
        vector = torch.tensor([*(numbers.get(n, 0.0) for n in NAMES), *own], dtype=torch.float64)
        vector = vector.to(self.device, non_blocking=True)
        vector[0], vector[1] = loss, spread
        vector[len(MEANS) : len(MEANS) + 2] = squares
        dist.all_reduce(vector)
        copy, event = vector, None
        if self.device.type == "cuda":
            copy = torch.empty_like(vector, device="cpu", pin_memory=True).copy_(vector, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, copy, event))
        return vector

    def ready(self) -> list[StepMetrics]:
        """Readings not yet taken, but for the newest on a GPU. The same steps on every rank."""
        return self._take(self.late)

    def drain(self) -> list[StepMetrics]:
        return self._take(0)

    def _take(self, leave: int) -> list[StepMetrics]:
        out: list[StepMetrics] = []
        while len(self._waiting) > leave:
            step, copy, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            numbers: list[float] = copy.tolist()
            values, own = dict(zip(NAMES, numbers, strict=False)), numbers[len(NAMES) :]
            for name in MEANS:
                values[name] /= self.world
            out.append(StepMetrics(step, values, own[::2], own[1::2]))
        return out


class StragglerProbe:
    """A small, fixed piece of work, timed. Steps take all ranks equally long, since they wait for the slowest; this
    does not wait for anybody, and so tells which one is slow."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.work = torch.ones(*(2 * (2048 if cuda else 256,)), device=device, dtype=torch.bfloat16 if cuda else None)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        self.begun = False

    def measure(self) -> float:
        """Seconds; on a GPU those of the pulse before, which is over by now, so that nobody waits."""
        if not self.events:
            begun = time.perf_counter()
            for _ in range(16):  # long enough that a scheduler's mercy with whoever has just slept does not hide it
                self.work @ self.work
            return time.perf_counter() - begun
        before, self.begun = self.begun and self.events[1].query(), True
        seconds = self.events[0].elapsed_time(self.events[1]) / 1000 if before else 0.0
        self.events[0].record()
        for _ in range(4):
            self.work @ self.work
        self.events[1].record()
        return seconds


def peak_memory(device: torch.device) -> float:
    """GB at most in use so far: of the GPU by torch, without one of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops(device: torch.device, tflops: float | None) -> float:
    """FLOP/s that a rank could reach: as configured, else by the GPU's name; 0 when nobody knows."""
    if tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)
    return (tflops or 0.0) * 1e12


def square_norm(vector: Tensor) -> Tensor:
    """The squared norm of the whole gradient, on the device, from a reduced vector."""
    return vector[NAMES.index("square_encoder")] + vector[NAMES.index("square_predictor")]
