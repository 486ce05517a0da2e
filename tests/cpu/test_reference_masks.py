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

SPEC = importlib.util.spec_from_file_location("plain_masks", Path(__file__).parents[2] / "benchmarks" / "masks.py")
peer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peer)

PAPER = Mask("reference", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), min_keep=10, reference_batch=16)
SETTINGS = {
    "paper": PAPER,
    "larger targets": dataclasses.replace(PAPER, target_scale=(0.2, 0.3)),
    "smaller context": dataclasses.replace(PAPER, context_scale=(0.4, 1.0)),
    "wide aspect, 2 targets": dataclasses.replace(PAPER, target_aspect=(0.3, 3.0), targets=2),
    "small targets": dataclasses.replace(PAPER, target_scale=(0.075, 0.2)),
}
every_setting = pytest.mark.parametrize("mask", SETTINGS.values(), ids=SETTINGS.keys())
every_grid = pytest.mark.parametrize("grid", [14, 16, 28])


def step_of(mask: Mask, grid: int, step: int) -> masks.Masks:
    slot = np.arange(mask.reference_batch)
    return masks.sample(mask, grid, 0, np.zeros_like(slot), slot, np.full_like(slot, step), slot)


@every_setting
@every_grid
def test_given_the_generator_stream_of_the_reference_block_sizes_are_exactly_its_own(mask, grid):
    """The two numbers a step draws from torch's generator lead to the same four heights and widths, for 300 steps."""
    for step in range(300):
        ahead, theirs = torch.Generator().manual_seed(step), torch.Generator().manual_seed(step)
        u = [torch.rand(1, generator=ahead).item() for _ in range(2)]
        target = peer.block(mask.target_scale, mask.target_aspect, grid, theirs)
        context = peer.block(mask.context_scale, (1.0, 1.0), grid, theirs)
        assert reference.step_shapes(mask, grid, *u) == (target, context)


@every_grid
def test_target_corners_are_uniform_and_never_reach_the_last_row_or_column(grid):
    """Chi-square over all corners, for one fixed block size; and the quirk itself."""
    mask = dataclasses.replace(PAPER, target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0), reference_batch=4000)
    first = step_of(mask, grid, 3).targets[:, :, 0].reshape(-1)
    side = reference.step_shapes(mask, grid, 0.5, 0.5)[0][0]
    counts = np.bincount((first // grid) * (grid - side) + first % grid, minlength=(grid - side) ** 2)
    assert len(counts) == (grid - side) ** 2
    assert chisquare(counts).pvalue > 1e-4


@every_setting
@every_grid
def test_p_context_row_by_row_is_that_of_the_plain_loop(mask, grid):
    """Row profiles of truncated contexts: two samples of steps, z-scores with the steps as units; and their sizes."""
    steps = 40
    torch.manual_seed(0)
    theirs, ours, lengths = [], [], ([], [])
    for step in range(steps):
        context = torch.stack(peer.plain(mask, grid, mask.reference_batch, step)[0]).numpy()
        theirs.append(np.bincount(context.reshape(-1) // grid, minlength=grid))
        lengths[0].append(context.shape[1])
        drawn = step_of(mask, grid, step).context
        ours.append(np.bincount(drawn.reshape(-1) // grid, minlength=grid))
        lengths[1].append(drawn.shape[1])
    a, b = np.array(theirs, float), np.array(ours, float)
    spread = np.sqrt((a.var(0) + b.var(0)) / steps) + 1e-9
    assert (np.abs(a.mean(0) - b.mean(0)) / spread).max() < 4.5
    cut = np.median(lengths[0] + lengths[1])
    table = [[sum(n <= cut for n in side), sum(n > cut for n in side)] for side in lengths]
    assert chi2_contingency(np.array(table) + 1).pvalue > 1e-4


def test_a_step_shares_sizes_and_truncation_and_repeats_after_reference_batch():
    """One K and one T per step. Position p + reference_batch has the masks of position p."""
    slot = np.arange(48)
    drawn = masks.sample(PAPER, 14, 0, np.zeros(48, int), slot + 1000, np.full(48, 7), slot)
    assert drawn.context_len is None and drawn.target_len is None
    for name in ("context", "targets", "candidates"):
        whole = getattr(drawn, name)
        assert (whole[:16] == whole[16:32]).all() and (whole[:16] == whole[32:]).all()
    assert drawn.context.shape[1] == drawn.candidates.min()


def test_shares_of_a_step_have_the_masks_of_the_whole_step():
    """Any rank's share of a step, at any world size, is cut to the same K; truncation does not see the share."""
    slot = np.arange(64)
    whole = masks.sample(PAPER, 14, 0, slot, slot, np.full(64, 9), slot)
    for world in (2, 8, 32):
        for rank in (0, world - 1):
            mine = slot[rank::world]
            part = masks.sample(PAPER, 14, 0, mine, mine, np.full_like(mine, 9), mine)
            assert (part.context == whole.context[rank::world]).all()
            assert (part.targets == whole.targets[rank::world]).all()


def test_samples_of_different_steps_in_one_batch_are_padded():
    """Mixed steps: every sample keeps the masks it has alone, with lengths that say what is real."""
    index = np.arange(40)
    mixed = masks.sample(PAPER, 14, 0, np.zeros(40, int), index, index // 16, index % 16)
    for i in (0, 20, 39):
        alone = masks.sample(
            PAPER, 14, 0, np.zeros(1, int), index[i : i + 1], index[i : i + 1] // 16, index[i : i + 1] % 16
        )
        assert (mixed.context[i, : mixed.context_len[i]] == alone.context[0]).all()
        assert (mixed.targets[i, :, : mixed.target_len[i, 0]] == alone.targets[0]).all()


def test_context_shrinks_with_the_per_gpu_batch_in_reference_and_not_in_clean():
    """The hidden knob, and its absence."""
    clean = dataclasses.replace(PAPER, mode="multiblock")
    shares = {1: [], 16: [], 128: []}
    for batch, found in shares.items():
        mask = dataclasses.replace(PAPER, reference_batch=batch)
        found.append(np.mean([masks.fractions(step_of(mask, 14, s), 14)["context_fraction"] for s in range(60)]))
        slot = np.arange(batch)
        found.append(masks.fractions(masks.sample(clean, 14, 0, slot, slot), 14)["context_fraction"])
    assert shares[1][0] > shares[16][0] + 0.05 > shares[128][0] + 0.07
    assert shares[1][0] == pytest.approx(0.42, abs=0.03) and shares[128][0] == pytest.approx(0.264, abs=0.015)
    assert len({v[1] for v in shares.values()}) == 1
