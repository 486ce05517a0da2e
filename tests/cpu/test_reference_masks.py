"""`reference` masks against a plain loop over images and blocks (benchmarks/masks.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from jepa_cluster.config import Mask
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.masks import reference

PLAIN_MASKS = Path(__file__).parents[2] / "benchmarks" / "masks.py"
SPEC = importlib.util.spec_from_file_location("plain_masks", PLAIN_MASKS)
plain_masks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain_masks)

PAPER = Mask(
    "reference",
    4,
    (0.15, 0.2),
    (0.75, 1.5),
    (0.85, 1.0),
    min_keep=10,
    reference_batch=16,
)
SETTINGS = {
    "paper": PAPER,
    "larger targets": dataclasses.replace(PAPER, target_scale=(0.2, 0.3)),
    "smaller context": dataclasses.replace(PAPER, context_scale=(0.4, 1.0)),
    "wide aspect, 2 targets": dataclasses.replace(PAPER, target_aspect=(0.3, 3.0), targets=2),
    "small targets": dataclasses.replace(PAPER, target_scale=(0.075, 0.2)),
}
every_setting = pytest.mark.parametrize("mask", SETTINGS.values(), ids=SETTINGS.keys())
every_grid = pytest.mark.parametrize("grid", [14, 16, 28])


def sample(mask: Mask, grid: int, **ids: np.ndarray) -> masks.Masks:
    """Return the masks of the samples with this epoch, index, step and slot."""
    return masks.sample(mask, grid, seed=0, **ids)


def step_of(mask: Mask, grid: int, step: int) -> masks.Masks:
    """Return the masks of one step of `reference_batch` images."""
    slot = np.arange(mask.reference_batch)
    epoch = np.zeros_like(slot)
    return sample(
        mask,
        grid,
        epoch=epoch,
        index=slot,
        step=np.full_like(slot, step),
        slot=slot,
    )


@every_setting
@every_grid
def test_block_sizes_are_those_of_the_reference_for_the_same_generator(mask, grid):
    """The two random numbers per step give the same heights and widths, for 300 steps."""
    for step in range(300):
        ours = torch.Generator().manual_seed(step)
        theirs = torch.Generator().manual_seed(step)
        first = torch.rand(1, generator=ours).item()
        second = torch.rand(1, generator=ours).item()
        target = plain_masks.block(mask.target_scale, mask.target_aspect, grid, theirs)
        context = plain_masks.block(mask.context_scale, (1.0, 1.0), grid, theirs)
        assert reference.step_shapes(mask, grid, first, second) == (target, context)


@every_grid
def test_target_corners_are_uniform_and_never_reach_the_last_row_or_column(grid):
    """Chi-square over all corners, for one fixed block size."""
    mask = dataclasses.replace(
        PAPER,
        target_scale=(0.18, 0.18),
        target_aspect=(1.0, 1.0),
        reference_batch=4000,
    )
    first = step_of(mask, grid, 3).targets[:, :, 0].reshape(-1)
    side = reference.step_shapes(mask, grid, 0.5, 0.5)[0][0]
    corners = grid - side
    number = (first // grid) * corners + first % grid
    counts = np.bincount(number, minlength=corners**2)
    assert len(counts) == corners**2
    assert chisquare(counts).pvalue > 1e-4


@every_setting
@every_grid
def test_p_context_row_by_row_is_that_of_the_plain_loop(mask, grid):
    """Row profiles and sizes of truncated contexts agree over two samples of steps."""
    steps = 40
    torch.manual_seed(0)
    their_profiles = []
    our_profiles = []
    their_sizes = []
    our_sizes = []
    for step in range(steps):
        contexts, *_ = plain_masks.plain(mask, grid, mask.reference_batch, step)
        theirs = torch.stack(contexts).numpy()
        their_profiles.append(np.bincount(theirs.reshape(-1) // grid, minlength=grid))
        their_sizes.append(theirs.shape[1])
        ours = step_of(mask, grid, step).context
        our_profiles.append(np.bincount(ours.reshape(-1) // grid, minlength=grid))
        our_sizes.append(ours.shape[1])
    a = np.array(their_profiles, float)
    b = np.array(our_profiles, float)
    spread = np.sqrt((a.var(0) + b.var(0)) / steps) + 1e-9
    z_scores = np.abs(a.mean(0) - b.mean(0)) / spread
    assert z_scores.max() < 4.5
    cut = np.median(their_sizes + our_sizes)
    table = []
    for sizes in (their_sizes, our_sizes):
        small = sum(size <= cut for size in sizes)
        table.append([small, steps - small])
    assert chi2_contingency(np.array(table) + 1).pvalue > 1e-4


def test_a_step_shares_sizes_and_repeats_after_reference_batch():
    """One K and one T per step. Position p + reference_batch has the masks of position p."""
    slot = np.arange(48)
    epoch = np.zeros(48, int)
    drawn = sample(
        PAPER,
        14,
        epoch=epoch,
        index=slot + 1000,
        step=np.full(48, 7),
        slot=slot,
    )
    assert drawn.context_len is None
    assert drawn.target_len is None
    for name in ("context", "targets", "candidates"):
        whole = getattr(drawn, name)
        assert (whole[:16] == whole[16:32]).all()
        assert (whole[:16] == whole[32:]).all()
    assert drawn.context.shape[1] == drawn.candidates.min()


def test_shares_of_a_step_have_the_masks_of_the_whole_step():
    """The share of any rank, at any world size, is truncated to the same K as the whole step."""
    slot = np.arange(64)
    whole = sample(
        PAPER,
        14,
        epoch=slot,
        index=slot,
        step=np.full(64, 9),
        slot=slot,
    )
    for world in (2, 8, 32):
        for rank in (0, world - 1):
            share = slot[rank::world]
            step = np.full_like(share, 9)
            part = sample(
                PAPER,
                14,
                epoch=share,
                index=share,
                step=step,
                slot=share,
            )
            assert (part.context == whole.context[rank::world]).all()
            assert (part.targets == whole.targets[rank::world]).all()


def test_samples_of_different_steps_in_one_batch_are_padded():
    """Mixed steps: every sample keeps the masks it has alone, with the lengths of what is real."""
    index = np.arange(40)
    epoch = np.zeros(40, int)
    step = index // 16
    slot = index % 16
    mixed = sample(
        PAPER,
        14,
        epoch=epoch,
        index=index,
        step=step,
        slot=slot,
    )
    for i in (0, 20, 39):
        one = slice(i, i + 1)
        alone = sample(
            PAPER,
            14,
            epoch=epoch[one],
            index=index[one],
            step=step[one],
            slot=slot[one],
        )
        context = mixed.context[i, : mixed.context_len[i]]
        targets = mixed.targets[i, :, : mixed.target_len[i, 0]]
        assert (context == alone.context[0]).all()
        assert (targets == alone.targets[0]).all()


def context_fraction(drawn: masks.Masks) -> float:
    return masks.fractions(drawn, 14)["context_fraction"]


def test_context_shrinks_with_the_per_gpu_batch_in_reference_mode_only():
    """Larger batches truncate more in `reference`; in `multiblock` the context stays."""
    multiblock_mask = dataclasses.replace(PAPER, mode="multiblock")
    in_reference = {}
    in_multiblock = set()
    for batch in (1, 16, 128):
        mask = dataclasses.replace(PAPER, reference_batch=batch)
        fractions = [context_fraction(step_of(mask, 14, step)) for step in range(60)]
        in_reference[batch] = np.mean(fractions)
        slot = np.arange(batch)
        in_multiblock.add(context_fraction(sample(multiblock_mask, 14, epoch=slot, index=slot)))
    assert in_reference[1] > in_reference[16] + 0.05 > in_reference[128] + 0.07
    assert in_reference[1] == pytest.approx(0.42, abs=0.03)
    assert in_reference[128] == pytest.approx(0.264, abs=0.015)
    assert len(in_multiblock) == 1


def test_every_shape_that_a_step_can_draw_is_known():
    """A net of 257 numbers missed the smallest block of some settings."""
    random = np.random.default_rng(0)
    missed_by_a_net = 0
    for _ in range(60):
        grid = int(random.integers(4, 38))
        low, high = np.sort(random.uniform(0.02, 1.0, 2))
        narrow, wide = np.sort(np.exp(random.uniform(-1.5, 1.5, 2)))
        scale, aspect = (float(low), float(high)), (float(narrow), float(wide))
        possible = reference.possible_shapes(grid, scale, aspect)

        def shape(u, grid=grid, scale=scale, aspect=aspect):
            return reference._block_shape(grid, float(u), scale, aspect)

        drawn = {shape(u) for u in random.random(3000)}
        assert drawn <= possible
        missed_by_a_net += possible != {shape(i / 256) for i in range(257)}
    assert missed_by_a_net >= 5
