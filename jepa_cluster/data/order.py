"""Which sample is where: pure arithmetic on (seed, epoch, position). No state, no files, no torch.

The stream is the endless concatenation of epochs; each epoch holds every sample exactly once. A global batch is
`batch` consecutive positions of the stream, so it may span an epoch's end: nothing is dropped, padded or repeated,
and there is no partial batch. Rank r of W takes `positions[r::W]` of the global batch. Hence the state of a
training is one integer, the samples consumed, and it means the same at any world size and worker count.

Two orders. `global` permutes all samples. `block` is for parallel filesystems, where neighbours in a shard are
cheap to read together: runs of `block` neighbours are permuted, dealt into `window / 4` lanes (rounded down to a
power of two), shuffled over four runs inside a lane, and the lanes interleaved. When the world size divides the
number of lanes each run is read by one rank. Locality never decides correctness: both orders are permutations.

A set may hold shares: samples of which an epoch shows only some, the next ones each time (a fractional weight).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEPTH = 4  # runs of a lane that are shuffled together
TURN = np.uint64(1 << 48)  # where the keys of shares begin: no epoch comes so far


class Share(NamedTuple):
    """Samples first .. first + images - 1 of a set, of which an epoch shows `taken`: 1 <= taken <= images."""

    first: int
    images: int
    taken: int


def share_order(share: Share, number: int, seed: int, epoch: int) -> np.ndarray:
    """int32[taken], ascending: the samples of a set's share `number` that an epoch shows. None comes twice in it.

    The share is shuffled into a ring and each epoch takes the next `taken` of it, so at any time no sample was shown
    more than once oftener than another. Where an epoch ends with the ring, the next one begins with a new ring.
    """
    cycle, turn = divmod(epoch, share.images // math.gcd(share.images, share.taken))
    key = np.array([seed, cycle], np.uint64) + np.array([0, number + 1], np.uint64) * TURN
    ring = shuffled(np.random.Philox(key=key).random_raw(share.images))
    place = (turn * share.taken + np.arange(share.taken)) % share.images
    return np.sort(ring[place]) + np.int32(share.first)


def epoch_images(rows: int, shares: Sequence[Share]) -> int:
    """Samples an epoch of a set of `rows`: all, but for what the shares leave to other epochs."""
    return rows - sum(s.images - s.taken for s in shares)


def epoch_samples(rows: int, shares: Sequence[Share], seed: int, epoch: int) -> np.ndarray:
    """int32[images an epoch], ascending: the samples that it shows of a set of `rows`."""
    shown, at = list[np.ndarray](), 0
    for number, share in enumerate(shares):
        shown += [np.arange(at, share.first, dtype=np.int32), share_order(share, number, seed, epoch)]
        at = share.first + share.images
    return np.concatenate([*shown, np.arange(at, rows, dtype=np.int32)])


def epoch_order(images: int, seed: int, epoch: int, block: int = 0, window: int = 0) -> np.ndarray:
    """int32[images], a permutation: the sample at each position of an epoch. block 0 is the global order.

    Only raw 64-bit draws of a counter-based generator are used, so every numpy gives the same permutation.
    """
    draw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw
    if block <= 1:
        return shuffled(draw(images))
    runs = -(-images // block)
    lanes = 1 << (max(1, min(window, runs) // DEPTH).bit_length() - 1)  # a power of two, as world sizes mostly are
    starts = shuffled(draw(runs)).astype(np.int64) * block
    sequence = (starts[:, None] + np.arange(block)[None]).reshape(-1)
    sequence = sequence[sequence < images]
    long, extra = images // lanes, images % lanes  # the first `extra` lanes hold one sample more
    edge = np.arange(lanes + 1) * long + np.minimum(np.arange(lanes + 1), extra)
    lane = np.repeat(np.arange(lanes), np.diff(edge))
    within = np.arange(images) - edge[lane]
    span = DEPTH * block  # samples of a lane that are shuffled together
    group = lane * -(-(long + 1) // span) + within // span
    mixed = sequence[shuffled(draw(images), group)]
    order = np.empty(images, np.int32)
    order[within * lanes + lane] = mixed
    return order


def shuffled(draws: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """int32[n]: 0 .. n-1 in the order of their uint64 draws, inside groups when given (int64[n], ascending).

    A sort of keys that end in the number itself: no ties, and several times faster than an argsort.
    """
    low = np.uint64(len(draws).bit_length())
    high = np.uint64(0 if group is None else int(group[-1]).bit_length())
    keys = draws >> high >> low << low | np.arange(len(draws), dtype=np.uint64)
    if group is not None and high:
        keys |= group.astype(np.uint64) << (np.uint64(64) - high)
    keys.sort()
    return (keys & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int32)


class Stream:
    """The endless stream of a set of `rows` samples: positions -> (epoch, sample). Keeps the order of two epochs.

    images: samples an epoch; rows, but for what its shares leave to other epochs.
    """

    def __init__(self, rows: int, seed: int, block: int = 0, window: int = 0, shares: Sequence[Share] = ()) -> None:
        self.images = images = epoch_images(rows, shares)
        assert images > 0, "an empty set has no order"

        def samples(epoch: int) -> np.ndarray:
            order = epoch_order(images, seed, epoch, block, window)
            return epoch_samples(rows, shares, seed, epoch)[order] if shares else order

        self._epoch = functools.lru_cache(2)(samples)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[b] positions of the stream -> (epoch int64[b], sample int64[b])."""
        epoch, place = np.divmod(np.asarray(positions, np.int64), self.images)
        index = np.empty_like(place)
        for e in np.unique(epoch):
            mine = epoch == e
            index[mine] = self._epoch(int(e))[place[mine]]
        return epoch, index


def positions(consumed: int, batch: int, rank: int, world: int) -> np.ndarray:
    """int64[batch / world]: what rank takes of the global batch that begins after `consumed` samples."""
    return np.arange(consumed + rank, consumed + batch, world, dtype=np.int64)
