"""The published mask sampler, quirks included, as a pure function of the step.

What it keeps: block sizes drawn once a step for all samples, scale and aspect from one uniform number, corners that
never reach the last row or column, constraints given up one by one after 20 failed tries, and a context cut in
raster order to the shortest of a per-GPU batch. What it mends: it always ends, and nothing hangs on the number of
ranks. The published training seeds every rank alike, so all per-GPU batches of a step carry the same masks; here
sample `slot` of a step has the masks of place slot % official_batch of that one batch, at any world size.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import masks as m
from jepa_cluster.ijepa.keyed import keys, uniform

TRIES = 20  # failed draws before one more target is allowed to overlap the context


def sample(mask: Mask, grid: int, seed: int, epoch: Any, index: Any, step: Any = None, slot: Any = None) -> m.Masks:
    """See masks.sample. Without step and slot, each run of official_batch indices of an epoch plays one step."""
    check(mask, grid)
    group = keys(seed, epoch, index // mask.official_batch) if step is None else keys(seed, np.asarray(step, np.int64))
    place = np.asarray(index if slot is None else slot, np.int64) % mask.official_batch
    distinct, member = np.unique(group, return_inverse=True)
    steps = [batch(mask, grid, key, place[member == i]) for i, key in enumerate(distinct)]
    if len(steps) == 1:
        context, targets, taken, available = steps[0]
        return m.assemble(context, targets, taken, available, None, None)
    wide = max(s[0].shape[1] for s in steps), max(s[1].shape[2] for s in steps)
    count = len(place)
    context, taken = np.empty((count, wide[0]), np.int64), np.empty((count, grid * grid), bool)
    targets, available = np.empty((count, mask.targets, wide[1]), np.int64), np.empty(count, np.int64)
    context_len, target_len = np.empty(count, np.int64), np.empty((count, mask.targets), np.int64)
    for i, (c, t, k, a) in enumerate(steps):
        rows = member == i
        context[rows] = np.pad(c, ((0, 0), (0, wide[0] - c.shape[1])), mode="edge")
        targets[rows] = np.pad(t, ((0, 0), (0, 0), (0, wide[1] - t.shape[2])), mode="edge")
        taken[rows], available[rows], context_len[rows], target_len[rows] = k, a, c.shape[1], t.shape[2]
    return m.assemble(context, targets, taken, available, context_len, target_len)


def batch(mask: Mask, grid: int, group: Any, place: Any) -> tuple[Any, Any, Any, Any]:
    """One step's batch: context [P, K], targets [P, M, T], taken [P, N], available [P] for the wanted places [P]."""
    u = uniform(np.array([group], np.uint64), 0, 2)[0]
    (th, tw), (ch, cw) = sizes(mask, grid, float(u[0]), float(u[1]))
    every = np.arange(mask.official_batch)
    key = keys(int(group), every)
    size = len(every), mask.targets
    v = uniform(key, m.PLACES, 2 * mask.targets).reshape(*size, 2)
    top, left = (v[..., 0] * (grid - th)).astype(np.int64), (v[..., 1] * (grid - tw)).astype(np.int64)
    height, width = np.full(size, th), np.full(size, tw)
    inside = m.rectangles(grid, top, left, height, width)
    taken = inside.any(1)
    free = contexts(mask, grid, key, ch, cw, inside, taken)
    available = free.sum(1)
    targets, _ = m.patches(grid, top, left, height, width)
    context = m.listed(free, available, int(available.min()))  # cut in raster order
    return context[place], targets[place], taken[place], available[place]


def contexts(mask: Mask, grid: int, key: Any, height: int, width: int, targets: Any, taken: Any) -> Any:
    """A context block for each sample, without targets [B, M, N]; relaxed where too little is left."""
    free = np.zeros((len(key), grid * grid), bool)
    left = np.arange(len(key))
    for turn in range(TRIES * mask.targets + 1):
        u = uniform(key[left], m.DROP + 2 * turn, 2)
        corner = (u * (grid - height, grid - width)).astype(np.int64)
        block = m.rectangles(grid, corner[:, :1], corner[:, 1:], np.array(height), np.array(width))[:, 0]
        given_up = turn // TRIES
        found = block & ~(targets[left, : mask.targets - given_up].any(1) if given_up else taken[left])
        good = found.sum(1) > mask.min_keep
        free[left[good]] = found[good]
        left = left[~good]
        if not left.size:
            break
    return free


def sizes(mask: Mask, grid: int, u_target: float, u_context: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two uniform numbers -> (height, width) of the step's targets and of its context."""

    def one(u: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        return min(round((area * ratio) ** 0.5), grid - 1), min(round((area / ratio) ** 0.5), grid - 1)

    return one(u_target, mask.target_scale, mask.target_aspect), one(u_context, mask.context_scale, (1.0, 1.0))


@functools.lru_cache(maxsize=256)
def check(mask: Mask, grid: int) -> None:
    """ConfigError when the published sampler would never end: a block that can be no larger than min_keep."""
    net = [sizes(mask, grid, i / 256, i / 256) for i in range(257)]
    for name, which in (("target", 0), ("context", 1)):
        height, width = min((s[which] for s in net), key=lambda s: s[0] * s[1])
        if height * width <= mask.min_keep:
            raise ConfigError(
                f"mask.{name}_scale draws blocks as small as {height}x{width} on the {grid}x{grid} grid, and the "
                f"published sampler wants more than mask.min_keep={mask.min_keep} patches",
                where="mask.mode=official",
                hint=f"raise mask.{name}_scale, lower mask.min_keep, use a finer grid, or mask.mode=clean",
            )
