"""The numbers of a step: summed over all ranks in one collective, read without making the device wait.

In: what each rank measured in a step, its wishes (stop, checkpoint) included. Out: `Reading`s of whole steps, the
same on every rank, which is what makes all ranks decide alike. On a GPU a reading comes one step late, so that the
host runs ahead; `flush` waits for the newest.
"""

from __future__ import annotations

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
WISHES = ("signal", "stop", "fenced", "checkpoint", "give_up")  # a rank's wish is everybody's
NAMES = (*MEANS, *SUMS, *WISHES)


@dataclass(frozen=True)
class Reading:
    """Step's numbers over the whole global batch."""

    step: int
    values: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    @property
    def wishes(self) -> set[str]:
        return {w for w in WISHES if self.values[w] > 0}


class Meter:
    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.late = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()

    def reduce(self, step: int, numbers: dict[str, float], loss: Tensor, spread: Tensor, squares: Tensor) -> Tensor:
        """Sum the step's numbers over ranks -> the vector on the device, in the order of NAMES, means not yet divided.

        loss, spread: this rank's [], squares [2]: its part of the squared gradient norms; the rest in `numbers`.
        """
        vector = torch.tensor([numbers.get(n, 0.0) for n in NAMES], dtype=torch.float64)
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

    def poll(self) -> list[Reading]:
        """Readings not yet taken, but for the newest on a GPU. The same steps on every rank."""
        return self._take(self.late)

    def flush(self) -> list[Reading]:
        return self._take(0)

    def _take(self, leave: int) -> list[Reading]:
        out: list[Reading] = []
        while len(self._waiting) > leave:
            step, copy, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            numbers: Sequence[float] = copy.tolist()
            values = dict(zip(NAMES, numbers, strict=True))
            for name in MEANS:
                values[name] /= self.world
            out.append(Reading(step, values))
        return out


def square_norm(vector: Tensor) -> Tensor:
    """The squared norm of the whole gradient, on the device, from a reduced vector."""
    return vector[NAMES.index("square_encoder")] + vector[NAMES.index("square_predictor")]
