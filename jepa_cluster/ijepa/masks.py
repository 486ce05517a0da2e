"""Masks: a grid, a recipe and a sample's key become context and targets.

In: the mask section of a recipe, the side of the patch grid, and for each sample its key (seed, epoch, index).
Out: integer arrays with a first dimension of B, row-major patch indices. A sample's masks are a pure function of
its key: batches, workers, ranks and the order of calls do not matter. Numpy only, so that a plan can be checked
on the login node; nothing is known here of images, models or processes.

`clean` draws scale and aspect independently for every block, lets blocks reach the last row and column, and drops
context patches at random, without regard to their place, until K are left. A draw that leaves fewer than K keeps
its block sizes and draws new places. `packed` is the same without the drop. `rasterized`, `block` and `random` are
the baselines of the paper's ablation with the same drop. `official` lives in `ijepa.official`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa.keyed import keys, shuffle, uniform

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

ROUNDS = 8  # draws of places before the places are forced
TRIALS = 4096  # draws that a derived K and a plan-time check rest on
SIZES, PLACES, DROP = 0, 1 << 10, 1 << 20  # where in a sample's stream its sizes, places and drop order begin


class Masks(NamedTuple):
    """What a batch of B samples sees and predicts; every array is int64. Lengths are None when nothing is padded.

    context [B, K]: context patches in raster order. targets [B, M, T]: each target's patches in raster order.
    union [B, U]: patches of any target; U is the batch's largest union, rounded up to a multiple of 16.
    slots [B, M, T]: where in `union` each target patch stands, so targets == union[slots].
    available [B]: context patches before the drop or truncation.
    context_len [B], target_len [B, M]: real entries; the entries behind them repeat a real index and mean nothing.
    """

    context: Any
    targets: Any
    union: Any
    slots: Any
    available: Any
    context_len: Any = None
    target_len: Any = None


def sample(
    mask: Mask, grid: int, seed: int, epoch: Ints, index: Ints, step: Ints | None = None, slot: Ints | None = None
) -> Masks:
    """Masks of the samples with these keys. epoch, index: int64 [B], index counts through the whole data set.

    `step` and `slot` (the optimiser step and the place in its global batch, int64 [B]) are read by `official` only,
    where a whole step shares its block sizes and its truncation; see `ijepa.official`. ConfigError: see `check`.
    """
    epoch, index = np.asarray(epoch, np.int64), np.asarray(index, np.int64)
    if mask.mode == "official":
        from jepa_cluster.ijepa import official

        return official.sample(mask, grid, seed, epoch, index, step, slot)
    keep = mask.min_keep if mask.mode == "packed" else mask.context_keep or derive_keep(mask, grid)
    key = keys(seed, epoch, index)
    targets, lengths, taken, free, available = draw(mask, grid, key, keep)
    if mask.mode == "packed":
        context, context_len = listed(free, available, -(-int(available.max()) // 8) * 8), available
    else:
        context, context_len = drop(key, free, ~taken, keep), None
    return assemble(context, targets, taken, available, context_len, lengths)


def derive_keep(mask: Mask, grid: int) -> int:
    """K: the `keep_quantile` quantile of the context size before any drop. ConfigError with the numbers."""
    return _derive(mask, grid)[0]


def check(mask: Mask, grid: int) -> None:
    """Refuse settings that cannot be sampled as asked: ConfigError with the numbers. For every mode, without torch."""
    if mask.mode == "official":
        from jepa_cluster.ijepa import official

        official.check(mask, grid)
        return
    wanted = {"rasterized": 3, "random": 1}.get(mask.mode, mask.targets)
    if mask.targets != wanted:
        raise ConfigError(
            f"mask.mode={mask.mode} has {wanted} target(s), not {mask.targets}", hint=f"set mask.targets={wanted}"
        )
    keep, sizes, most = _derive(mask, grid)
    if mask.mode == "packed" or mask.context_keep is None:
        return
    share = float((sizes >= mask.context_keep).mean())
    if mask.context_keep > most or share < 0.5:
        raise ConfigError(
            f"mask.context_keep={mask.context_keep}: only {share:.0%} of draws on the {grid}x{grid} grid leave that "
            f"many context patches (5/50/95 % of draws leave {_quantiles(sizes)} of {grid * grid}; never "
            f"more than {most} can be promised)",
            where="mask",
            hint=f"set mask.context_keep={keep} or less, or null to derive it",
        )


def fractions(masks: Masks, grid: int) -> dict[str, float]:
    """What the batch realised, as shares of the grid, means over samples (arrays, or tensors in host memory).

    context, target (one block), union (of all targets), overlap (share of predicted patches that another target
    predicts too), discarded (context patches dropped or truncated away). Keys end in `_fraction`.
    """
    context, targets = lengths(masks)
    patches = float(grid * grid)
    joined = np.asarray(masks.slots).max((1, 2)) + 1.0
    return {
        "context_fraction": float(context.mean() / patches),
        "target_fraction": float(targets.mean() / patches),
        "union_fraction": float(joined.mean() / patches),
        "overlap_fraction": float(1 - (joined / targets.sum(1)).mean()),
        "discarded_fraction": float((np.asarray(masks.available) - context).mean() / patches),
    }


def lengths(masks: Masks) -> tuple[Ints, Ints]:
    """Real tokens of each sample: context [B] and targets [B, M]."""
    batch, count, width = masks.targets.shape
    context = np.full(batch, masks.context.shape[1]) if masks.context_len is None else np.asarray(masks.context_len)
    targets = np.full((batch, count), width) if masks.target_len is None else np.asarray(masks.target_len)
    return context, targets


# ---- one draw of sizes, then places until the context is large enough


def draw(mask: Mask, grid: int, key: Any, keep: int) -> tuple[Ints, Ints | None, Bools, Bools, Ints]:
    """-> targets [B, M, T], their lengths [B, M] or None, taken [B, N], free for context [B, N], how many [B]."""
    if mask.mode == "rasterized":
        targets, lengths_ = quadrants(grid, key)
        taken = covered(targets, grid)
        return targets, lengths_, taken, ~taken, (~taken).sum(1)
    if mask.mode == "random":
        count = max(1, round(float(np.mean(mask.target_scale)) * grid * grid))
        everywhere = np.ones((len(key), grid * grid), bool)
        targets = drop(key, everywhere, everywhere, min(count, grid * grid - 1), PLACES)[:, None]
        taken = covered(targets, grid)
        return targets, None, taken, ~taken, (~taken).sum(1)
    height, width = block_sizes(mask, grid, key)
    top, left, taken, free = places(mask, grid, key, height, width, 0)
    available = free.sum(1)
    for turn in range(1, ROUNDS + 1):
        short = np.flatnonzero(available < keep)
        if not short.size:
            break
        redrawn = places(mask, grid, key[short], height[short], width[short], turn, nested=turn == ROUNDS)
        top[short], left[short], taken[short], free[short] = redrawn
        available[short] = redrawn[3].sum(1)
    targets, lengths_ = patches(grid, top[:, 1:], left[:, 1:], height[:, 1:], width[:, 1:], widest(mask, grid))
    return targets, lengths_, taken, free, available


def block_sizes(mask: Mask, grid: int, key: Any) -> tuple[Ints, Ints]:
    """Heights and widths [B, 1 + M] in patches, the context's first: scale and aspect are separate draws."""
    u = uniform(key, SIZES, 2 * (1 + mask.targets)).reshape(len(key), 1 + mask.targets, 2)
    scale = np.concatenate([_between(u[:, :1, 0], mask.context_scale), _between(u[:, 1:, 0], mask.target_scale)], 1)
    aspect = np.ones_like(scale)
    if mask.aspect_law == "log":
        low, high = np.log(mask.target_aspect)
        aspect[:, 1:] = np.exp(low + u[:, 1:, 1] * (high - low))
    else:
        aspect[:, 1:] = _between(u[:, 1:, 1], mask.target_aspect)
    if mask.mode == "block":
        scale[:, 0] = 1.0  # the context is the whole complement
    return shape(scale, aspect, grid)


def shape(scale: Floats, aspect: Floats, grid: int) -> tuple[Ints, Ints]:
    """Block height and width in patches from a share of the grid and height / width."""
    area = scale * (grid * grid)
    height = np.clip(np.rint(np.sqrt(area * aspect)), 1, grid).astype(np.int64)
    width = np.clip(np.rint(np.sqrt(area / aspect)), 1, grid).astype(np.int64)
    return height, width


def places(
    mask: Mask, grid: int, key: Any, height: Ints, width: Ints, turn: int, nested: bool = False
) -> tuple[Ints, Ints, Bools, Bools]:
    """Uniform top-left corners, last row and column included -> top, left [B, 1 + M], taken and free [B, N].

    `nested` is the last resort: all targets share a corner, and the context may use every patch they leave.
    """
    count = height.shape[1]
    u = uniform(key, PLACES + turn * 2 * count, 2 * count).reshape(len(key), 2, count)
    top = (u[:, 0] * (grid - height + 1)).astype(np.int64)
    left = (u[:, 1] * (grid - width + 1)).astype(np.int64)
    if nested:
        top[:, 1:], left[:, 1:] = top[:, 1:].min(1, keepdims=True), left[:, 1:].min(1, keepdims=True)
    inside = rectangles(grid, top, left, height, width)
    taken = inside[:, 1:].any(1)
    return top, left, taken, ~taken if nested else inside[:, 0] & ~taken


def rectangles(grid: int, top: Ints, left: Ints, height: Ints, width: Ints) -> Bools:
    """Corners and sizes [B, M] -> which patches each block covers [B, M, N]."""
    tall, wide = _spans(grid)
    return tall[top, height] & wide[left, width]


def patches(
    grid: int, top: Ints, left: Ints, height: Ints, width: Ints, room: int | None = None
) -> tuple[Ints, Ints | None]:
    """Corners and sizes [B, M] -> patch indices [B, M, room] in raster order and their number [B, M] (None: all real).

    Entries past a block's end repeat its first patch.
    """
    areas = height * width
    room = int(areas.max()) if room is None else room
    index = _rasters(grid, room)[height, width] + (top * grid + left)[..., None]
    return index, None if int(areas.min()) == room else areas


def quadrants(grid: int, key: Any) -> tuple[Ints, Ints | None]:
    """The paper's rasterized baseline: one random quadrant is the context, the three others are the targets."""
    half = grid // 2
    top, left = np.array([0, 0, half, half]), np.array([0, half, 0, half])
    chosen = (uniform(key, PLACES, 1)[:, 0] * 4).astype(np.int64)
    others = (chosen[:, None] + np.arange(1, 4)) % 4
    height, width = np.where(top == 0, half, grid - half), np.where(left == 0, half, grid - half)
    return patches(grid, top[others], left[others], height[others], width[others], int((grid - half) ** 2))


def drop(key: Any, free: Bools, complement: Bools, keep: int, start: int = DROP) -> Ints:
    """`keep` patches of `free` [B, N], every subset equally likely, in raster order [B, keep].

    A row of `free` with fewer than `keep` is filled up from the complement of the targets, never from a target.
    """
    batch, count = free.shape
    rank = shuffle(key, start, count)
    rank |= (~free).astype(np.uint32) << np.uint32(30)
    rank |= (~complement).astype(np.uint32) << np.uint32(31)
    last = np.sort(rank, 1)[:, keep - 1 : keep]
    return np.flatnonzero(rank <= last).reshape(batch, keep) - np.arange(0, batch * count, count)[:, None]


# ---- assembling


def assemble(
    context: Ints, targets: Ints, taken: Bools, available: Ints, context_len: Ints | None, target_len: Ints | None
) -> Masks:
    """The parts of a batch -> Masks, with the union of the targets and each target patch's slot in it."""
    patches_ = taken.shape[1]
    joined, place, rank = taken.sum(1), np.flatnonzero(taken), np.empty(taken.size, np.int64)
    room = min(patches_, -(-int(joined.max()) // 16) * 16)
    rank[place] = np.arange(place.size)  # among all of the batch
    slots = rank.take(targets + np.arange(0, taken.size, patches_)[:, None, None])
    slots -= (np.cumsum(joined) - joined)[:, None, None]
    return Masks(context, targets, listed(taken, joined, room, place), slots, available, context_len, target_len)


def listed(chosen: Bools, counts: Ints, room: int, place: Ints | None = None) -> Ints:
    """The first `room` true columns of [B, N] in raster order [B, room]; rows of fewer repeat their last.

    counts: how many there are [B]. place: np.flatnonzero(chosen), when it is known.
    """
    begin = np.cumsum(counts) - counts
    wanted = begin[:, None] + np.minimum(np.arange(room), counts[:, None] - 1)
    found = (np.flatnonzero(chosen) if place is None else place).take(wanted)
    found -= np.arange(0, chosen.size, chosen.shape[1])[:, None]
    return found


def covered(targets: Ints, grid: int) -> Bools:
    taken = np.zeros((len(targets), grid * grid), bool)
    np.put_along_axis(taken, targets.reshape(len(targets), -1), True, 1)
    return taken


@functools.lru_cache(maxsize=16)
def _spans(grid: int) -> tuple[Bools, Bools]:
    """[start, length] -> the patches of such a band of rows, and of such a band of columns."""
    start, length = np.arange(grid)[:, None, None], np.arange(grid + 1)[:, None]
    row, column = np.divmod(np.arange(grid * grid), grid)
    return tuple((line >= start) & (line < start + length) for line in (row, column))


@functools.lru_cache(maxsize=64)
def _rasters(grid: int, room: int) -> Ints:
    """[height, width] -> the first `room` patches of such a block at the origin, then zeros."""
    size = np.arange(grid + 1)
    row, column = np.divmod(np.arange(room), np.maximum(size, 1)[:, None])
    inside = np.arange(room) < (size[:, None] * size)[..., None]
    return np.where(inside, row * grid + column, 0)


@functools.lru_cache(maxsize=256)
def widest(mask: Mask, grid: int) -> int:
    """The largest target block these settings can draw, in patches: the fixed T of a batch."""
    return int(np.multiply(*_extremes(mask, grid)).max())


@functools.lru_cache(maxsize=256)
def _extremes(mask: Mask, grid: int) -> tuple[Ints, Ints]:
    """Heights and widths that a fine net over the allowed scales and aspects reaches."""
    scale, aspect = np.meshgrid(np.linspace(*mask.target_scale, 257), np.geomspace(*mask.target_aspect, 1025))
    return shape(scale, aspect, grid)


@functools.lru_cache(maxsize=256)
def _derive(mask: Mask, grid: int) -> tuple[int, Ints, int]:
    """-> K, the context sizes of TRIALS draws, the largest K that can always be met."""
    every = np.arange(TRIALS)
    taken, _, sizes = draw(mask, grid, keys(0, np.zeros_like(every), every), 0)[2:]
    if mask.mode in ("clean", "packed", "block"):
        height, width = _extremes(mask, grid)
        reach = [int(width[height >= h].max(initial=0)) for h in range(1, grid + 1)]  # all shapes at one corner
        most = grid * grid - (int((height * width).max()) if mask.targets == 1 else sum(reach))
    else:
        most = int((~taken).sum(1).min())
    keep = min(most, int(np.quantile(sizes, mask.keep_quantile, method="lower")))
    if keep < mask.min_keep:
        raise ConfigError(
            f"these masks leave too little context on the {grid}x{grid} grid: 5/50/95 % of draws leave "
            f"{_quantiles(sizes)} of {grid * grid} patches, at most {most} can be promised, and "
            f"mask.min_keep={mask.min_keep}",
            where=f"mask.mode={mask.mode}, targets={mask.targets}, target_scale={list(mask.target_scale)}, "
            f"context_scale={list(mask.context_scale)}",
            hint="lower mask.target_scale or mask.targets, raise mask.context_scale, or use a finer grid",
        )
    return keep, sizes, most


def _quantiles(sizes: Ints) -> str:
    return "/".join(str(int(q)) for q in np.quantile(sizes, (0.05, 0.5, 0.95), method="lower"))


def _between(u: Floats, interval: tuple[float, float]) -> Floats:
    return interval[0] + u * (interval[1] - interval[0])
