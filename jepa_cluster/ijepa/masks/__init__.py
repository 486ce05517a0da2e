"""Masks: a grid, a mask setting and the ids of samples become context and targets.

In: the mask section of a recipe, the side of the patch grid, and (seed, epoch, index) per sample.
Out: `Masks`, integer arrays of row-major patch indices. Numpy only, so that the login node can
check a plan; nothing is known here of images, models or processes.

A new mask mode is one file with a `Sampler`, and one entry in `SAMPLERS`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.ijepa.masks.baselines import Block, RandomPatches, Rasterized
from jepa_cluster.ijepa.masks.blocks import Ints, Masks, SampleIds, Sampler
from jepa_cluster.ijepa.masks.multiblock import Multiblock, Packed
from jepa_cluster.ijepa.masks.reference import Reference
from jepa_cluster.ijepa.masks.views import Views

__all__ = [
    "SAMPLERS",
    "Masks",
    "SampleIds",
    "check",
    "derive",
    "fractions",
    "lengths",
    "sample",
]

SAMPLERS: dict[str, type[Sampler]] = {  # by mask.mode
    "multiblock": Multiblock,
    "reference": Reference,
    "packed": Packed,
    "rasterized": Rasterized,
    "block": Block,
    "random": RandomPatches,
    "views": Views,
}


@functools.lru_cache(256)
def sampler_of(mask: Mask, grid: int) -> Sampler:
    """Return the sampler of mask.mode. Raises ConfigError, with the nearest name, if unknown."""
    if mask.mode not in SAMPLERS:
        raise ConfigError(
            f"mask.mode wants one of {', '.join(SAMPLERS)}, got {mask.mode!r}",
            hint=suggest(mask.mode, SAMPLERS),
        )
    return SAMPLERS[mask.mode](mask, grid)


def sample(
    mask: Mask,
    grid: int,
    seed: int,
    epoch: Ints,
    index: Ints,
    step: Ints | None = None,
    slot: Ints | None = None,
) -> Masks:
    """Return the masks of these samples. epoch, index, step, slot: int64 [B], see `SampleIds`.

    A sample's masks are a pure function of (seed, epoch, index): batches, workers, ranks and the
    order of calls change nothing. Only the reference sampler reads `step` and `slot`; it shares
    block sizes and truncation within a step. Raises ConfigError as `check` does.
    """
    return sampler_of(mask, grid).sample(SampleIds(seed, epoch, index, step, slot))


def check(mask: Mask, grid: int) -> int | None:
    """Return K, derived where it is null in the setting; null stays where K is not fixed.

    Raises ConfigError for an unknown mode, or settings that cannot be sampled as asked.
    """
    return sampler_of(mask, grid).check()


def derive(mask: Mask, grid: int) -> Mask:
    """Fill the derived settings. Raises ConfigError as `check` does, and for another value."""
    keep = check(mask, grid)
    patches = sampler_of(mask, grid).corrected_target_patches
    if mask.target_patches not in (None, patches):
        derived = patches or "null"
        what = f"mask.target_patches={mask.target_patches} is derived, and would be {derived}"
        raise ConfigError(what, hint="leave it out")
    return replace(mask, context_keep=keep, target_patches=patches)


def fractions(masks: Masks, grid: int) -> dict[str, float]:
    """Realised fractions of the grid, means over samples. masks: arrays, or CPU tensors.

    context_fraction, target_fraction (one block), union_fraction (of all targets).
    overlap_fraction: predicted patches that another target predicts too.
    discarded_fraction: context patches that were dropped or truncated.
    """
    context, targets = lengths(masks)
    patches = float(grid * grid)
    union = np.asarray(masks.slots).max((1, 2)) + 1.0
    discarded = np.asarray(masks.candidates) - context
    return {
        "context_fraction": float(context.mean() / patches),
        "target_fraction": float(targets.mean() / patches),
        "union_fraction": float(union.mean() / patches),
        "overlap_fraction": float(1 - (union / targets.sum(1)).mean()),
        "discarded_fraction": float(discarded.mean() / patches),
    }


def lengths(masks: Masks) -> tuple[Ints, Ints]:
    """Valid tokens of each sample: context [B] and targets [B, M]."""
    batch, count, width = masks.targets.shape
    return (
        _or_full(masks.context_len, (batch,), masks.context.shape[1]),
        _or_full(masks.target_len, (batch, count), width),
    )


def _or_full(
    lengths: Any,
    shape: tuple[int, ...],
    value: int,
) -> Ints:
    return np.full(shape, value) if lengths is None else np.asarray(lengths)
