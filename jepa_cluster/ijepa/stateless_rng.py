"""Random numbers without state: number n of a sample is a hash of (seed, epoch, index, n).

Vectorised over samples; 64-bit integers only, so the numbers are the same on every little-endian
machine. The mixing function is SplitMix64 (Steele, Lea and Flood, 2014), which passes BigCrush
when it is driven by a counter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RngKeys = NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd


def rng_keys(seed: int, *parts: Any) -> RngKeys:
    """Return one well-mixed 64-bit key per row of the int64 arrays `parts` [B]."""
    key = splitmix64(np.full(np.shape(parts[0]), seed % (1 << 64), np.uint64))
    for part in parts:
        words = np.asarray(part, np.int64).astype(np.uint64)
        key = splitmix64(key ^ splitmix64(words))
    return key


def random_bits(
    key: RngKeys,
    start: int,
    count: int,
) -> RngKeys:
    """Return numbers start .. start + count of the stream of each key [B, count]."""
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64) * STEP
    return splitmix64(key[:, None] + counter)


def uniform(
    key: RngKeys,
    start: int,
    count: int,
) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) of 53 bits [B, count]."""
    bits = random_bits(key, start, count) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def random_ranks(
    key: RngKeys,
    start: int,
    count: int,
) -> NDArray[np.uint32]:
    """Return distinct random numbers below 2^30 for the items of each key [B, count].

    Sorting by them is a random order. The low bits are the item's own number, so no two are equal;
    above them are at least 18 random bits for up to 4096 items.
    """
    own_bits = max(1, (count - 1).bit_length())
    halves = random_bits(key, start, (count + 1) // 2).view(np.uint32)[:, :count]
    high = (halves >> np.uint32(2 + own_bits)) << np.uint32(own_bits)
    return high | np.arange(count, dtype=np.uint32)


def splitmix64(z: RngKeys) -> RngKeys:
    """Apply SplitMix64's finaliser: every input bit reaches every output bit."""
    z = z + STEP
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
