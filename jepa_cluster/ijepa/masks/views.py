"""`views`: no mask, but the random numbers that make two views of each image.

`sweep.freeze` sets this mode for `objective.target=views`.
"""

from __future__ import annotations

import numpy as np

from jepa_cluster.ijepa.masks.blocks import CORNERS, Masks, SampleIds, Sampler
from jepa_cluster.ijepa.stateless_rng import random_bits, rng_keys

VIEWS = 2
DRAWS = 13  # random numbers per view
BITS = 24  # of each, which float32 holds exactly


class Views(Sampler):
    """The context is the whole grid, and so is each target."""

    def sample(self, ids: SampleIds) -> Masks:
        key = rng_keys(ids.seed, ids.epoch, ids.index)
        batch, patches = len(key), self.grid**2
        whole = np.tile(np.arange(patches), (batch, 1))
        targets = np.tile(np.arange(patches), (batch, VIEWS, 1))
        bits = random_bits(key, CORNERS, VIEWS * DRAWS) >> np.uint64(64 - BITS)
        draws = bits.astype(np.int64).reshape(batch, VIEWS, DRAWS)
        candidates = np.full(batch, patches)
        return Masks(whole, targets, whole, targets, candidates, views=draws)

    def check(self) -> int | None:
        return None

    def describe_context(self) -> str:
        return "all patches"
