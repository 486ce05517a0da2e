"""Which sample is where: pure arithmetic on (seed, epoch, position). No state, no files, no torch.

The stream is the endless concatenation of epochs. Each epoch holds every sample exactly once. A
global batch is `batch` consecutive positions of the stream, so it may span the end of an epoch:
nothing is dropped, padded or repeated, and there is no partial batch. Rank r of W takes
`positions[r::W]` of the global batch. Hence the state of a training is one integer, the samples
consumed, and it means the same at any world size and worker count.

There are two orders. `global` permutes all samples. `block` is for parallel filesystems, where
neighbours in a shard are cheap to read together. It permutes runs of `block` neighbours and
distributes them over `window / 4` lanes (rounded down to a power of two). It shuffles four runs of
a lane together and interleaves the lanes. When the world size divides the number of lanes, each run
is read by one rank. Locality never decides correctness: both orders are permutations.
"""

from __future__ import annotations

import functools

import numpy as np

DEPTH = 4  # runs of a lane that are shuffled together


def epoch_order(
    images: int,
    seed: int,
    epoch: int,
    block: int = 0,
    window: int = 0,
) -> np.ndarray:
    """Return a permutation, int32[images]: the sample at each position of an epoch.

    block: 0 or 1 for the global order. Only raw 64-bit draws of a counter-based generator are used,
    so every numpy gives the same permutation.
    """
    draw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw
    if block <= 1:
        return shuffled(draw(images))

    runs = -(-images // block)
    starts = shuffled(draw(runs)).astype(np.int64) * block
    sequence = (starts[:, None] + np.arange(block)).reshape(-1)
    sequence = sequence[sequence < images]

    lanes = lane_count(images, block, window)
    shortest, longer = divmod(images, lanes)  # the first `longer` lanes hold one sample more
    numbers = np.arange(lanes + 1)
    edges = numbers * shortest + np.minimum(numbers, longer)
    lane = np.repeat(numbers[:-1], np.diff(edges))
    within = np.arange(images) - edges[lane]

    together = DEPTH * block  # samples of a lane that are shuffled together
    groups_per_lane = -(-(shortest + 1) // together)
    group = lane * groups_per_lane + within // together
    order = np.empty(images, np.int32)
    order[within * lanes + lane] = sequence[shuffled(draw(images), group)]
    return order


def lane_count(images: int, block: int, window: int) -> int:
    """Return the largest power of two up to `window / DEPTH`, as most world sizes are.

    With more ranks than lanes, every run is read by several ranks.
    """
    runs = -(-images // block)
    lanes = max(1, min(window, runs) // DEPTH)
    return 1 << (lanes.bit_length() - 1)


def shuffled(draws: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Return int32[n]: 0 .. n-1 in the order of their uint64 draws.

    group: int64[n], ascending; numbers then stay inside their group. Sorts keys whose low bits are
    the number itself: there are no ties, and it is several times faster than an argsort.
    """
    number_bits = np.uint64(len(draws).bit_length())
    group_bits = np.uint64(0)
    if group is not None:
        group_bits = np.uint64(int(group[-1]).bit_length())
    keys = draws >> group_bits >> number_bits << number_bits
    keys |= np.arange(len(draws), dtype=np.uint64)
    if group is not None and group_bits:
        keys |= group.astype(np.uint64) << (np.uint64(64) - group_bits)
    keys.sort()
    number_mask = (np.uint64(1) << number_bits) - np.uint64(1)
    return (keys & number_mask).astype(np.int32)


class Stream:
    """The endless stream of a set of `images` samples. Keeps the order of two epochs in memory."""

    def __init__(self, images: int, seed: int, block: int = 0, window: int = 0) -> None:
        assert images > 0, "an empty set has no order"
        self.images = images

        def order(epoch: int) -> np.ndarray:
            return epoch_order(images, seed, epoch, block, window)

        self._order = functools.lru_cache(2)(order)

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map positions of the stream, int64[b], to (epoch, sample), int64[b] each."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.images)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = self._order(int(epoch))[places[inside]]
        return epochs, samples


def positions(consumed: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Return int64[batch / world]: what a rank takes of the batch after `consumed` samples."""
    return np.arange(consumed + rank, consumed + batch, world, dtype=np.int64)
