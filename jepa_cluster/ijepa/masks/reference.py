"""The reference sampler, quirks included, as a pure function of the step.

What it keeps: block sizes drawn once per step for all samples; scale and aspect from one uniform
number; corners that never reach the last row or column; constraints given up one by one after 20
failed attempts; a context cut in raster order to the shortest of a per-GPU batch.

What differs: it always ends, and the number of ranks changes nothing. The reference training seeds
every rank alike, so all per-GPU batches of a step carry the same masks. Here sample `slot` of a
step has the masks of position slot % reference_batch of that one batch, at any world size.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa.masks.blocks import (
    CORNERS,
    SUBSET,
    Blocks,
    Bools,
    Ints,
    Masks,
    SampleIds,
    Sampler,
    assemble,
    block_indices,
    padded_indices,
    rectangles,
)
from jepa_cluster.ijepa.stateless_rng import RngKeys, rng_keys, uniform

ATTEMPTS = 20  # failed draws before one more target may overlap the context
BlockShape = tuple[int, int]  # height, width in patches


class StepDraw(NamedTuple):
    """The masks of P samples of one step: the first arguments of `assemble`."""

    context: Ints  # [P, K]
    targets: Ints  # [P, M, T]
    is_target: Bools  # [P, N]
    candidates: Ints  # [P]


class Reference(Sampler):
    """`reference`: masks that are shared and truncated per step."""

    def sample(self, ids: SampleIds) -> Masks:
        """Without step and slot, each run of reference_batch indices of an epoch plays one step."""
        batch = self.mask.reference_batch
        slot = ids.slot
        if slot is None:
            slot = ids.index
        if ids.step is None:
            step_keys = rng_keys(ids.seed, ids.epoch, ids.index // batch)
        else:
            step_keys = rng_keys(ids.seed, ids.step)
        distinct, step_of = np.unique(step_keys, return_inverse=True)
        steps: list[StepDraw] = []
        for i, key in enumerate(distinct):
            steps.append(self.draw_step(key, slot[step_of == i] % batch))
        if len(steps) == 1:
            return assemble(*steps[0])
        return _join_steps(steps, step_of)

    def draw_step(self, step_key: np.uint64, positions: Ints) -> StepDraw:
        """Draw the batch of one step, and return the samples at these positions [P] of it."""
        mask, grid = self.mask, self.grid
        u_target, u_context = uniform(np.array([step_key], np.uint64), 0, 2)[0]
        (height, width), context_shape = step_shapes(mask, grid, float(u_target), float(u_context))
        key = rng_keys(int(step_key), np.arange(mask.reference_batch))
        shape = (mask.reference_batch, mask.targets)
        u = uniform(key, CORNERS, 2 * mask.targets).reshape(*shape, 2)
        top = (u[..., 0] * (grid - height)).astype(np.int64)
        left = (u[..., 1] * (grid - width)).astype(np.int64)
        blocks = Blocks(
            top,
            left,
            np.full(shape, height),
            np.full(shape, width),
        )

        inside = rectangles(grid, blocks)
        is_target: Any = inside.any(1)
        is_candidate = self.draw_contexts(key, context_shape, inside, is_target)
        candidates = is_candidate.sum(1)
        targets, _ = block_indices(grid, blocks)
        context = padded_indices(is_candidate, candidates, int(candidates.min()))
        return StepDraw(
            context[positions], targets[positions], is_target[positions], candidates[positions]
        )

    def draw_contexts(
        self,
        key: RngKeys,
        shape: BlockShape,
        inside: Bools,
        is_target: Bools,
    ) -> Bools:
        """Draw a context block per sample and remove the targets [B, N].

        inside [B, M, N], is_target [B, N]: the patches of each target, and of any.
        A sample whose context is too small draws again, and after every ATTEMPTS failures one
        target less is removed.
        """
        count = self.mask.targets
        height, width = np.array(shape)[:, None]
        is_candidate = np.zeros_like(is_target)
        pending = np.arange(len(key))
        for attempt in range(ATTEMPTS * count + 1):
            u = uniform(key[pending], SUBSET + 2 * attempt, 2)
            corner = (u * (self.grid - np.array(shape))).astype(np.int64)
            blocks = Blocks(corner[:, :1], corner[:, 1:], height, width)
            if attempt and attempt % ATTEMPTS == 0:
                is_target = np.any(inside[:, : count - attempt // ATTEMPTS], 1)
            context = rectangles(self.grid, blocks)[:, 0] & ~is_target[pending]
            large_enough = context.sum(1) > self.mask.min_keep
            is_candidate[pending[large_enough]] = context[large_enough]
            pending = pending[~large_enough]
            if not pending.size:
                break
        return is_candidate

    def check(self) -> int | None:
        """Raise ConfigError for a block that can be no larger than min_keep: no draw succeeds."""
        mask, grid = self.mask, self.grid
        shapes = {
            "target": possible_shapes(grid, mask.target_scale, mask.target_aspect),
            "context": possible_shapes(grid, mask.context_scale, (1.0, 1.0)),
        }
        for name, possible in shapes.items():
            height, width = min(possible, key=math.prod)
            if height * width <= mask.min_keep:
                raise ConfigError(
                    f"mask.{name}_scale draws blocks as small as {height}x{width} on the "
                    f"{grid}x{grid} grid, and the reference sampler needs more than "
                    f"mask.min_keep={mask.min_keep} patches",
                    where=f"mask.mode={mask.mode}",
                    hint=f"raise mask.{name}_scale, lower mask.min_keep, use a finer grid, "
                    "or mask.mode=multiblock",
                )
        return mask.context_keep

    def describe_context(self) -> str:
        return f"cut to the shortest of each {self.mask.reference_batch}"


def step_shapes(
    mask: Mask,
    grid: int,
    u_target: float,
    u_context: float,
) -> tuple[BlockShape, BlockShape]:
    """Two uniform numbers -> the shape of the targets of a step, and of its contexts."""
    target = _block_shape(grid, u_target, mask.target_scale, mask.target_aspect)
    context = _block_shape(grid, u_context, mask.context_scale, (1.0, 1.0))
    return target, context


def _block_shape(
    grid: int,
    u: float,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> BlockShape:
    """One uniform number sets both scale and aspect."""
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return min(height, grid - 1), min(width, grid - 1)


def possible_shapes(
    grid: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> set[BlockShape]:
    """Return every shape that `_block_shape` can have.

    It is constant between the numbers u at which the area or a side jumps.
    """
    patches = grid * grid
    jumps = {0.0, 1.0}
    for area in range(int(patches * scale[0]), int(patches * scale[1]) + 1):
        jumps.add(_position(area / patches, scale))
        for side in range(grid if area else 0):
            square = (side + 0.5) ** 2
            jumps.add(_position(square / area, aspect))
            jumps.add(_position(area / square, aspect))
    points = sorted(u for u in jumps if 0 <= u <= 1)
    shapes: set[BlockShape] = set()
    for low, high in itertools.pairwise(points):
        for u in (low, (low + high) / 2, high):
            shapes.add(_block_shape(grid, u, scale, aspect))
    return shapes


def _position(value: float, bounds: tuple[float, float]) -> float:
    """Return where a value lies between two bounds, as 0 to 1."""
    low, high = bounds
    return (value - low) / (high - low) if high > low else 0.0


def _join_steps(steps: list[StepDraw], step_of: Ints) -> Masks:
    """Join the samples of several steps, padded to the longest. step_of [B]: index in `steps`."""
    order = np.argsort(step_of, kind="stable").argsort()
    contexts, targets, is_target, candidates = zip(*steps, strict=True)
    context_len = np.array([context.shape[1] for context in contexts])
    target_len = np.array([target.shape[2] for target in targets])
    return assemble(
        _join(contexts)[order],
        _join(targets)[order],
        np.concatenate(is_target)[order],
        np.concatenate(candidates)[order],
        context_len[step_of],
        np.repeat(target_len[step_of, None], targets[0].shape[1], 1),
    )


def _join(arrays: tuple[Ints, ...]) -> Ints:
    """Concatenate arrays; each repeats its last entry up to the largest last dimension."""
    length = max(array.shape[-1] for array in arrays)
    padded: list[Ints] = []
    for array in arrays:
        padding = [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])]
        padded.append(np.pad(array, padding, mode="edge"))
    return np.concatenate(padded)
