"""Mean and deviation of the pixels of a data set, in grey levels, on a device."""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(8)
def grey_levels(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Return both in grey levels, [3, 1, 1]. Cached, because every copy to a GPU waits for it."""
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (mean, std))
