"""The baselines of the paper's ablation of masks, with the same random drop as `multiblock`.

`block`: one large block is predicted from all that is left. `rasterized`: one quadrant predicts
the three others. `random`: patches anywhere are predicted from the others.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.ijepa.masks.blocks import (
    CORNERS,
    Ints,
    block_indices,
    random_subset,
    target_cover,
)
from jepa_cluster.ijepa.masks.multiblock import Draw, FixedContextSampler, Multiblock
from jepa_cluster.ijepa.stateless_rng import RngKeys, uniform


class Block(Multiblock):
    """`block`: as `multiblock`, with the whole complement of the targets as the context."""

    def draw(
        self,
        mask: Mask,
        grid: int,
        key: RngKeys,
        keep: int,
    ) -> Draw:
        return super().draw(_with_whole_context(mask), grid, key, keep)


class Rasterized(FixedContextSampler):
    """`rasterized`: a random quadrant is the context, the three others are the targets."""

    target_count = 3

    def draw(
        self,
        mask: Mask,
        grid: int,
        key: RngKeys,
        keep: int,
    ) -> Draw:
        half = grid // 2
        top, left = np.array([0, 0, half, half]), np.array([0, half, 0, half])
        height = np.where(top == 0, half, grid - half)
        width = np.where(left == 0, half, grid - half)
        context = (uniform(key, CORNERS, 1)[:, 0] * 4).astype(np.int64)
        others = (context[:, None] + np.arange(1, 4)) % 4
        targets, target_len = block_indices(
            grid,
            top[others],
            left[others],
            height[others],
            width[others],
            (grid - half) ** 2,
        )
        return _complement(targets, target_len, grid)


class RandomPatches(FixedContextSampler):
    """`random`: one target of patches from anywhere, the mean of mask.target_scale of the grid."""

    target_count = 1

    def draw(
        self,
        mask: Mask,
        grid: int,
        key: RngKeys,
        keep: int,
    ) -> Draw:
        patches = grid * grid
        count = max(1, round(float(np.mean(mask.target_scale)) * grid * grid))
        everywhere = np.ones((len(key), patches), bool)
        target = random_subset(key, everywhere, everywhere, min(count, patches - 1), CORNERS)
        return _complement(target[:, None], None, grid)


@functools.lru_cache(maxsize=256)
def _with_whole_context(mask: Mask) -> Mask:
    return dataclasses.replace(mask, context_scale=(1.0, 1.0))


def _complement(
    targets: Ints,
    target_len: Ints | None,
    grid: int,
) -> Draw:
    """Let the context use every patch that is not in a target."""
    is_target = target_cover(targets, grid)
    return Draw(targets, target_len, is_target, ~is_target, (~is_target).sum(1))
