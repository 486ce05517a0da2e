"""Random numbers without state: the n-th number of a sample's stream is a hash of (seed, epoch, index, n).

Vectorised over samples, 64-bit integers only, so the numbers are the same on every
little-endian machine. The mixing function
is SplitMix64 (Steele, Lea and Flood, 2014), which passes BigCrush when driven by a counter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RngKeys = np.ndarray[Any, np.dtype[np.uint64]]

STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd


def keys(seed: int, *parts: Any) -> RngKeys:
    """One well-mixed 64-bit key for each row of the int64 arrays `parts` [B]."""
    key = mix(np.full(np.shape(parts[0]), seed % (1 << 64), np.uint64))
    for part in parts:
        key = mix(key ^ mix(np.asarray(part, np.int64).astype(np.uint64)))
    return key


def words(key: RngKeys, start: int, count: int) -> RngKeys:
    """Numbers start .. start + count of each key's stream [B, count]."""
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64) * STEP
    return mix(key[:, None] + counter)


def uniform(key: RngKeys, start: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform in [0, 1), 53 bits [B, count]."""
    return (words(key, start, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffle(key: RngKeys, start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Distinct random numbers below 2^30 for the items of each key [B, count]: sorting by them is a random order.

    The low bits are the item's own number, so that no two are equal; above them stand at least 18 random bits for
    up to 4096 items.
    """
    own = max(1, (count - 1).bit_length())
    halves = words(key, start, (count + 1) // 2).view(np.uint32)[:, :count]
    return ((halves >> np.uint32(2 + own)) << np.uint32(own)) | np.arange(count, dtype=np.uint32)


def mix(z: RngKeys) -> RngKeys:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    z = z + STEP
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
