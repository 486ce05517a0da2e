"""Multi-block masks with a fixed number K of context patches, or with all of them kept.

`multiblock` draws scale and aspect independently for every block, lets blocks reach the last row
and column, and drops context patches at random, without regard to where they are, until K are
left. A draw that leaves fewer than K keeps its block sizes and draws new corners. `packed` drops
nothing. A sample's masks are a pure function of (seed, epoch, index).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa.masks.blocks import (
    CORNERS,
    SIZES,
    Blocks,
    Bools,
    Floats,
    Ints,
    Masks,
    SampleIds,
    Sampler,
    assemble,
    block_indices,
    block_shape,
    padded_indices,
    possible_shapes,
    random_subset,
    rectangles,
)
from jepa_cluster.ijepa.stateless_rng import RngKeys, rng_keys, uniform

ATTEMPTS = 8  # draws of corners; in the last one all targets share a corner
CHECK_SAMPLES = 4096  # samples that a derived K and a check of settings rest on


class Draw(NamedTuple):
    """Targets of B samples, and where their context may be taken from.

    targets [B, M, T]; target_len [B, M], or None when nothing is padded.
    is_target, is_candidate [B, N]: patches of a target, patches that the context may use.
    candidates [B]: number of candidates.
    """

    targets: Ints
    target_len: Ints | None
    is_target: Bools
    is_candidate: Bools
    candidates: Ints


class ContextSizes(NamedTuple):
    """keep: the derived K. sizes: candidates of many draws. max_keep: the largest possible K."""

    keep: int
    sizes: Ints
    max_keep: int


class FixedContextSampler(Sampler):
    """A sampler that drops candidates of the context at random until K are left."""

    target_count: int | None = None  # the only value of mask.targets that it supports

    @abstractmethod
    def draw(self, key: RngKeys, keep: int) -> Draw:
        """Draw targets that leave, where possible, at least `keep` candidates for the context."""

    def max_keep(self, drawn: Draw) -> int:
        """Return the largest K that every sample can meet. drawn: a large sample of draws."""
        return int((~drawn.is_target).sum(1).min())

    @functools.cached_property
    def context_sizes(self) -> ContextSizes:
        """Derive K, the `keep_quantile` of the context sizes before any drop.

        Raises ConfigError when K is smaller than mask.min_keep.
        """
        mask, grid = self.mask, self.grid
        index = np.arange(CHECK_SAMPLES)
        drawn = self.draw(rng_keys(0, np.zeros_like(index), index), 0)
        sizes = drawn.candidates
        max_keep = self.max_keep(drawn)
        keep = min(max_keep, int(np.quantile(sizes, mask.keep_quantile, method="lower")))
        if keep < mask.min_keep:
            raise ConfigError(
                f"mask.target_scale={list(mask.target_scale)} leaves too little context on the "
                f"{grid}x{grid} grid: 5/50/95 % of draws leave {_quantiles(sizes)} of "
                f"{grid * grid} patches, at most {max_keep} can be promised, and "
                f"mask.min_keep={mask.min_keep}",
                where=f"mask.mode={mask.mode}, targets={mask.targets}, "
                f"context_scale={list(mask.context_scale)}",
                hint="lower mask.target_scale or mask.targets, raise mask.context_scale, "
                "or use a finer grid",
            )
        return ContextSizes(keep, sizes, max_keep)

    def sample(self, ids: SampleIds) -> Masks:
        key = rng_keys(ids.seed, ids.epoch, ids.index)
        keep = self.mask.context_keep or self.context_sizes.keep
        drawn = self.draw(key, keep)
        context = random_subset(key, drawn.is_candidate, ~drawn.is_target, keep)
        return assemble(
            context,
            drawn.targets,
            drawn.is_target,
            drawn.candidates,
            target_len=drawn.target_len,
        )

    def check(self) -> int | None:
        mask, grid = self.mask, self.grid
        wanted = self.target_count or mask.targets
        if mask.targets != wanted:
            raise ConfigError(
                f"mask.mode={mask.mode} has {wanted} target(s), not {mask.targets}",
                hint=f"set mask.targets={wanted}",
            )
        keep, sizes, max_keep = self.context_sizes
        if mask.context_keep is None:
            return keep
        fraction = float((sizes >= mask.context_keep).mean())
        if mask.context_keep > max_keep or fraction < 0.5:
            raise ConfigError(
                f"mask.context_keep={mask.context_keep}: only {fraction:.0%} of draws on the "
                f"{grid}x{grid} grid leave that many context patches (5/50/95 % of draws leave "
                f"{_quantiles(sizes)} of {grid * grid}; never more than {max_keep} can be "
                f"promised)",
                where="mask",
                hint=f"set mask.context_keep={keep} or less, or null to derive it",
            )
        return mask.context_keep

    def describe_context(self) -> str:
        if self.mask.context_keep is not None:
            return f"K = {self.mask.context_keep}, as set"
        quantile = f"{self.mask.keep_quantile:.0%} quantile"
        return f"K = {self.context_sizes.keep}, the {quantile} before the drop"


class Corners(NamedTuple):
    """Corners [B, 1 + M], the context's first, and the patches that the blocks cover [B, N].

    candidates [B]: number of candidates.
    """

    top: Ints
    left: Ints
    is_target: Bools
    is_candidate: Bools
    candidates: Ints


class Multiblock(FixedContextSampler):
    """`multiblock`: several target blocks, and a large context block without their patches."""

    @functools.cached_property
    def target_shapes(self) -> tuple[Ints, Ints]:
        """Heights and widths of the targets that the settings can draw.

        Earlier versions searched a net of settings. What they found stays, and so do T and K,
        unless a target can be larger.
        """
        scales = np.linspace(*self.mask.target_scale, 257)
        aspects = np.geomspace(*self.mask.target_aspect, 1025)
        net = np.meshgrid(scales, aspects)
        found = block_shape(*net, self.grid)
        exact = possible_shapes(self.mask.target_scale, self.mask.target_aspect, self.grid)
        if largest_area(exact) > largest_area(found):
            self.corrected_target_patches = largest_area(exact)
            return exact
        return found

    @functools.cached_property
    def max_target_area(self) -> int:
        """The area of the largest target that the settings can draw: the fixed T."""
        return largest_area(self.target_shapes)

    def draw(self, key: RngKeys, keep: int) -> Draw:
        height, width = block_sizes(self.mask, self.grid, key)
        corners = self.draw_corners(key, height, width, 0)
        for attempt in range(1, ATTEMPTS + 1):
            short = np.flatnonzero(corners.candidates < keep)
            if not short.size:
                break
            redrawn = self.draw_corners(key[short], height[short], width[short], attempt)
            for array, values in zip(corners, redrawn, strict=True):
                array[short] = values
        top, left, is_target, is_candidate, candidates = corners
        blocks = Blocks(
            top[:, 1:],
            left[:, 1:],
            height[:, 1:],
            width[:, 1:],
        )
        targets, target_len = block_indices(self.grid, blocks, self.max_target_area)
        return Draw(targets, target_len, is_target, is_candidate, candidates)

    def draw_corners(
        self,
        key: RngKeys,
        height: Ints,
        width: Ints,
        attempt: int,
    ) -> Corners:
        """Draw uniform corners, last row and column included, for blocks [B, 1 + M].

        In the last attempt all targets share a corner, and the context may use every other patch.
        """
        collapse_targets = attempt == ATTEMPTS
        count = height.shape[1]
        u = uniform(key, CORNERS + attempt * 2 * count, 2 * count).reshape(len(key), 2, count)
        top = (u[:, 0] * (self.grid - height + 1)).astype(np.int64)
        left = (u[:, 1] * (self.grid - width + 1)).astype(np.int64)
        if collapse_targets:
            top[:, 1:] = top[:, 1:].min(1, keepdims=True)
            left[:, 1:] = left[:, 1:].min(1, keepdims=True)
        inside = rectangles(self.grid, Blocks(top, left, height, width))
        is_target: Any = inside[:, 1:].any(1)
        is_candidate = ~is_target
        if not collapse_targets:
            is_candidate &= inside[:, 0]
        return Corners(top, left, is_target, is_candidate, is_candidate.sum(1))

    def max_keep(self, drawn: Draw) -> int:
        height, width = self.target_shapes
        patches = self.grid * self.grid
        if self.mask.targets == 1:
            return patches - self.max_target_area
        covered = 0  # by blocks of all shapes that share one corner
        for rows in range(1, self.grid + 1):
            covered += int(width[height >= rows].max(initial=0))
        return patches - covered


class Packed(Multiblock):
    """`packed`: as `multiblock`, but every candidate is kept, so contexts differ in length."""

    def sample(self, ids: SampleIds) -> Masks:
        drawn = self.draw(rng_keys(ids.seed, ids.epoch, ids.index), self.mask.min_keep)
        length = -(-int(drawn.candidates.max()) // 8) * 8
        context = padded_indices(drawn.is_candidate, drawn.candidates, length)
        return assemble(
            context,
            drawn.targets,
            drawn.is_target,
            drawn.candidates,
            context_len=drawn.candidates,
            target_len=drawn.target_len,
        )

    def check(self) -> int | None:
        _ = self.context_sizes  # raises when too little context is left
        return self.mask.context_keep

    def describe_context(self) -> str:
        return "all are kept"


def largest_area(shapes: tuple[Ints, Ints]) -> int:
    """Return the area of the largest block. shapes: heights and widths."""
    height, width = shapes
    return int((height * width).max())


def block_sizes(
    mask: Mask,
    grid: int,
    key: RngKeys,
) -> tuple[Ints, Ints]:
    """Draw heights and widths [B, 1 + M] in patches, the context's first.

    Scale and aspect are separate draws. The context block is square.
    """
    count = 1 + mask.targets
    u = uniform(key, SIZES, 2 * count).reshape(len(key), count, 2)
    scale = _between(u[..., 0], mask.target_scale)
    scale[:, 0] = _between(u[:, 0, 0], mask.context_scale)
    if mask.aspect_distribution == "log":
        low, high = np.log(mask.target_aspect)
        aspect = np.exp(_between(u[..., 1], (low, high)))
    else:
        aspect = _between(u[..., 1], mask.target_aspect)
    aspect[:, 0] = 1.0
    return block_shape(scale, aspect, grid)


def _quantiles(sizes: Ints) -> str:
    quantiles = np.quantile(sizes, (0.05, 0.5, 0.95), method="lower")
    return "/".join(str(int(q)) for q in quantiles)


def _between(u: Floats, interval: tuple[float, float]) -> Floats:
    """Map uniform numbers in [0, 1) to an interval."""
    low, high = interval
    return low + u * (high - low)
