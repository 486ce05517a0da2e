"""Rectangles of patches as index arrays, and what every mask sampler takes and returns.

In: corners and sizes of blocks on a grid of patches. Out: padded arrays of row-major patch indices.
Arrays are numpy, with a first dimension of B samples; N is the number of patches of the grid.
Nothing is known here of distributions: the samplers draw, this file lists.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepa_cluster.config import Mask
from jepa_cluster.ijepa.stateless_rng import RngKeys, random_ranks

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

# Where in a sample's random stream its block sizes, corners and random subset begin
SIZES, CORNERS, SUBSET = 0, 1 << 10, 1 << 20
ROUNDING = 1e-12  # of a logarithm


class Masks(NamedTuple):
    """What a batch of B samples sees and predicts: int64 arrays, or tensors of the same shapes.

    context [B, K]: context patches in raster order.
    targets [B, M, T]: the patches of each target in raster order.
    union [B, U]: patches of any target. U is the largest union of the batch, rounded up to 16.
    slots [B, M, T]: position of each target patch in `union`, so targets == union[slots].
    candidates [B]: context patches before the drop or the truncation.
    context_len [B], target_len [B, M]: number of valid entries; None when nothing is padded.
    views [B, V, n]: random numbers of 24 bits that make V views of each image; else None.
    Entries behind the valid ones repeat a valid index and have no meaning.
    """

    context: Any
    targets: Any
    union: Any
    slots: Any
    candidates: Any
    context_len: Any = None
    target_len: Any = None
    views: Any = None

    def apply(self, function: Callable[[Any], Any]) -> Masks:
        """Return the masks with a function applied to every array that is there."""
        return Masks(*(part if part is None else function(part) for part in self))


@dataclass(frozen=True)
class SampleIds:
    """Which samples to draw masks for. Arrays are int64 [B].

    epoch, index: the sample; index counts through the whole data set.
    step, slot: the optimiser step and the position in its global batch, or None.
    """

    seed: int
    epoch: Ints
    index: Ints
    step: Ints | None = None
    slot: Ints | None = None


class Sampler(ABC):
    """A mask mode with its settings, on a grid of grid x grid patches. Has no other state.

    corrected_target_patches: of the largest target, where earlier versions cut it; else None. It is
    known after `check`.
    """

    corrected_target_patches: int | None = None

    def __init__(self, mask: Mask, grid: int) -> None:
        self.mask, self.grid = mask, grid

    @abstractmethod
    def sample(self, ids: SampleIds) -> Masks:
        """Return the masks of these samples, a pure function of settings and ids."""

    @abstractmethod
    def check(self) -> int | None:
        """Return K, the fixed number of context patches; where it is not fixed, the setting.

        Raises ConfigError, with the numbers, for settings that cannot be sampled as asked.
        """

    @abstractmethod
    def describe_context(self) -> str:
        """Say in a few words how many context patches a sample keeps."""


class Blocks(NamedTuple):
    """Rectangles of patches: top left corners and sizes, [B, M] each."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints


def rectangles(grid: int, blocks: Blocks) -> Bools:
    """Return which patches each block covers [B, M, N]."""
    row_bands, column_bands = _bands(grid)
    return row_bands[blocks.top, blocks.height] & column_bands[blocks.left, blocks.width]


def block_indices(
    grid: int,
    blocks: Blocks,
    length: int | None = None,
) -> tuple[Ints, Ints | None]:
    """Return the patches of each block in raster order [B, M, length], and block areas.

    length: the largest area when None. The areas [B, M] are None when every block has that length.
    Entries behind the end of a block repeat its first patch.
    """
    top, left, height, width = blocks
    areas = height * width
    length = length or int(areas.max())
    assert areas.max(initial=0) <= length, "a block is larger than its settings allow"
    index = _blocks_at_origin(grid, length)[height, width] + (top * grid + left)[..., None]
    padded = int(areas.min()) < length
    return index, areas if padded else None


def block_shape(
    scale: Floats,
    aspect: Floats,
    grid: int,
) -> tuple[Ints, Ints]:
    """Height and width in patches from a fraction of the grid and height / width."""
    area = scale * (grid * grid)
    height = np.clip(np.rint(np.sqrt(area * aspect)), 1, grid).astype(np.int64)
    width = np.clip(np.rint(np.sqrt(area / aspect)), 1, grid).astype(np.int64)
    return height, width


def possible_shapes(
    scale: tuple[float, float],
    aspect: tuple[float, float],
    grid: int,
) -> tuple[Ints, Ints]:
    """Return the heights and widths of all blocks that `block_shape` can return.

    Over the logarithms of height and width before they are rounded, the settings are a rectangle
    at 45 degrees: log area is the sum, log aspect the difference. What is rounded to one shape is a
    rectangle along the axes. Two rectangles meet if their shadows meet on all four directions.
    """
    area = np.log(np.array(scale) * grid * grid)
    ratio = np.log(np.array(aspect))
    sides = np.arange(1, grid + 1)
    low = np.log(sides - 0.5)
    high = np.log(sides + 0.5)
    low[0] = -np.inf  # block_shape clips
    high[-1] = np.inf
    height_low = low[:, None]
    height_high = high[:, None]

    def meets(low: Floats, high: Floats, least: float, most: float) -> Bools:
        return (low + ROUNDING < most) & (high - ROUNDING > least)

    tallest = (area[1] + ratio[1]) / 2
    lowest = (area[0] + ratio[0]) / 2
    widest = (area[1] - ratio[0]) / 2
    narrowest = (area[0] - ratio[1]) / 2
    possible = meets(height_low, height_high, lowest, tallest)
    possible = possible & meets(low, high, narrowest, widest)
    possible &= meets(height_low + low, height_high + high, area[0], area[1])
    possible &= meets(height_low - high, height_high - low, ratio[0], ratio[1])
    # Where the settings are a point, it may lie between two shapes.
    aspects = np.array([*aspect, *np.exp(ratio)])  # a draw by logarithm rounds once more
    height, width = block_shape(np.full(4, scale[0]), aspects, grid)
    possible[height - 1, width - 1] = True
    heights, widths = np.nonzero(possible)
    return sides[heights], sides[widths]


def target_cover(targets: Ints, grid: int) -> Bools:
    """Targets [B, M, T] -> which patches belong to a target [B, N]."""
    is_target = np.zeros((len(targets), grid * grid), bool)
    np.put_along_axis(is_target, targets.reshape(len(targets), -1), True, 1)
    return is_target


def random_subset(
    key: RngKeys,
    preferred: Bools,
    allowed: Bools,
    count: int,
    start: int = SUBSET,
) -> Ints:
    """Return `count` patches of `preferred` [B, N] in raster order [B, count].

    Every subset is equally likely. A row of `preferred` with fewer than `count` patches is filled
    up from `allowed` [B, N]. start: where in the random stream the draw begins.
    """
    batch, patches = preferred.shape
    rank = random_ranks(key, start, patches)
    rank |= (~preferred).astype(np.uint32) << np.uint32(30)
    rank |= (~allowed).astype(np.uint32) << np.uint32(31)
    last = np.sort(rank, 1)[:, count - 1 : count]
    row_starts = np.arange(0, batch * patches, patches)[:, None]
    return np.flatnonzero(rank <= last).reshape(batch, count) - row_starts


def padded_indices(
    chosen: Bools,
    counts: Ints,
    length: int,
    flat: Ints | None = None,
) -> Ints:
    """Return the first `length` true columns of [B, N], in raster order [B, length].

    Shorter rows repeat their last index. counts: true columns per row [B].
    flat: np.flatnonzero(chosen), where the caller has it already.
    """
    if flat is None:
        flat = np.flatnonzero(chosen)
    begin = np.cumsum(counts) - counts
    nth = np.minimum(np.arange(length), counts[:, None] - 1)
    indices = flat.take(begin[:, None] + nth)
    indices -= np.arange(0, chosen.size, chosen.shape[1])[:, None]
    return indices


def assemble(
    context: Ints,
    targets: Ints,
    is_target: Bools,
    candidates: Ints,
    context_len: Ints | None = None,
    target_len: Ints | None = None,
) -> Masks:
    """Build `Masks`: add the union of the targets, and the slot of each target patch in it."""
    patches = is_target.shape[1]
    union_len = is_target.sum(1)
    flat = np.flatnonzero(is_target)
    length = min(patches, -(-int(union_len.max()) // 16) * 16)
    union = padded_indices(is_target, union_len, length, flat)

    rank_in_batch = np.empty(is_target.size, np.int64)
    rank_in_batch[flat] = np.arange(flat.size)
    row_starts = np.arange(0, is_target.size, patches)[:, None, None]
    slots = rank_in_batch.take(targets + row_starts)
    slots -= (np.cumsum(union_len) - union_len)[:, None, None]
    return Masks(context, targets, union, slots, candidates, context_len, target_len)


@functools.lru_cache(maxsize=16)
def _bands(grid: int) -> tuple[Bools, Bools]:
    """[start, length] -> the patches of that band of rows, and of that band of columns."""
    start = np.arange(grid)[:, None, None]
    end = start + np.arange(grid + 1)[:, None]
    row, column = np.divmod(np.arange(grid * grid), grid)
    return (row >= start) & (row < end), (column >= start) & (column < end)


@functools.lru_cache(maxsize=64)
def _blocks_at_origin(grid: int, length: int) -> Ints:
    """[height, width] -> the first `length` patches of that block at the origin, then zeros."""
    size = np.arange(grid + 1)
    row, column = np.divmod(np.arange(length), np.maximum(size, 1)[:, None])
    inside = np.arange(length) < (size[:, None] * size)[..., None]
    return np.where(inside, row * grid + column, 0)
