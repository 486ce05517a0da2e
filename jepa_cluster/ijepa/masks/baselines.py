"""The baselines of the paper's ablation of masks, with the same random drop as `multiblock`.

`block`: one large block is predicted from all that is left. `rasterized`: one quadrant predicts
the three others. `random`: patches anywhere are predicted from the others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.ijepa.masks.blocks import (
    CORNERS,
    Blocks,
    Ints,
    block_indices,
    random_subset,
    target_cover,
)
from jepa_cluster.ijepa.masks.multiblock import Draw, FixedContextSampler, Multiblock
from jepa_cluster.ijepa.stateless_rng import RngKeys, uniform


class Block(Multiblock):
    """`block`: as `multiblock`, with the whole complement of the targets as the context."""

    def __init__(self, mask: Mask, grid: int) -> None:
        super().__init__(dataclasses.replace(mask, context_scale=(1.0, 1.0)), grid)


class Rasterized(FixedContextSampler):
    """`rasterized`: a random quadrant is the context, the three others are the targets."""

    target_count = 3

    def draw(self, key: RngKeys, keep: int) -> Draw:
        grid, half = self.grid, self.grid // 2
        top, left = np.array([0, 0, half, half]), np.array([0, half, 0, half])
        height = np.where(top == 0, half, grid - half)
        width = np.where(left == 0, half, grid - half)
        context = (uniform(key, CORNERS, 1)[:, 0] * 4).astype(np.int64)
        others = (context[:, None] + np.arange(1, 4)) % 4
        blocks = Blocks(top[others], left[others], height[others], width[others])
        targets, target_len = block_indices(grid, blocks, (grid - half) ** 2)
        return _complement(targets, target_len, grid)


class RandomPatches(FixedContextSampler):
    """`random`: one target of patches from anywhere, the mean of mask.target_scale of the grid."""

    target_count = 1

    def draw(self, key: RngKeys, keep: int) -> Draw:
        patches = self.grid * self.grid
        count = max(1, round(float(np.mean(self.mask.target_scale)) * patches))
        everywhere = np.ones((len(key), patches), bool)
        target = random_subset(key, everywhere, everywhere, min(count, patches - 1), CORNERS)
        return _complement(target[:, None], None, self.grid)


def _complement(
    targets: Ints,
    target_len: Ints | None,
    grid: int,
) -> Draw:
    """Let the context use every patch that is not in a target."""
    is_target = target_cover(targets, grid)
    return Draw(targets, target_len, is_target, ~is_target, (~is_target).sum(1))
