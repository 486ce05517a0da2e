"""Masks without hidden knobs: what `multiblock` promises, on any grid, in any batch."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, norm

from jepa_cluster.config import Mask
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.masks import multiblock
from jepa_cluster.ijepa.stateless_rng import rng_keys

PAPER = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), aspect_distribution="log")


def draw(mask: Mask, grid: int, count: int, seed: int = 0, epoch: int = 0) -> masks.Masks:
    index = np.arange(count)
    return masks.sample(mask, grid, seed, np.full_like(index, epoch), index)


def rows(drawn: masks.Masks) -> list[tuple[set[int], list[set[int]]]]:
    """Context and targets of every sample as sets of patches, padding left out."""
    context, targets = masks.lengths(drawn)
    return [
        (set(c[:k].tolist()), [set(t[:n].tolist()) for t, n in zip(ts, ns, strict=True)])
        for c, k, ts, ns in zip(drawn.context, context, drawn.targets, targets, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    grid=st.integers(4, 20),
    targets=st.integers(1, 6),
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    aspect=st.floats(0.3, 1.0),
    context=st.floats(0.3, 1.0),
    mode=st.sampled_from(["multiblock", "packed", "block"]),
)
def test_no_target_ever_leaks_into_the_context(grid, targets, low, high, aspect, context, mode):
    """Whatever the settings and the grid: it ends, K patches are left, none of them is a target's."""
    scale = (min(low, high), max(low, high))
    mask = Mask(mode, targets, scale, (aspect, 1 / aspect), (context, 1.0), min_keep=1)
    try:
        masks.check(mask, grid)
    except ConfigError:
        return
    keep, drawn = masks.context_keep(mask, grid), draw(mask, grid, 32)
    for seen, goals in rows(drawn):
        assert len(seen) == keep or (mode == "packed" and len(seen) >= 1)
        assert not seen & set().union(*goals)
        assert all(goals) and max(set().union(*goals)) < grid * grid


@pytest.mark.parametrize("mode", ["multiblock", "packed", "rasterized", "block", "random", "reference"])
@pytest.mark.parametrize("grid", [4, 7, 14])
def test_union_and_slots_tell_where_each_target_patch_stands(mode, grid):
    """Gathering the union at the slots gives the targets, padding included, and the union has no other patch."""
    count = {"rasterized": 3, "random": 1}.get(mode, 4)
    scale = (0.3, 0.4) if mode == "reference" else (0.15, 0.2)
    drawn = draw(dataclasses.replace(PAPER, mode=mode, targets=count, target_scale=scale, min_keep=1), grid, 40)
    gathered = np.take_along_axis(drawn.union[:, None], drawn.slots, 2)
    assert (gathered == drawn.targets).all()
    for union, (_, goals) in zip(drawn.union, rows(drawn), strict=True):
        assert set(union.tolist()) == set().union(*goals)


def test_a_sample_has_the_same_masks_in_any_batch():
    """Permuted, split, alone: masks depend on (seed, epoch, index) and on nothing else."""
    index, epoch = np.random.default_rng(0).permutation(500)[:96], np.arange(96) % 3
    whole = masks.sample(PAPER, 14, 5, epoch, index)
    for part in (slice(0, 1), slice(1, 40), slice(40, 96)):
        piece = masks.sample(PAPER, 14, 5, epoch[part], index[part])
        for name in ("context", "targets", "candidates", "target_len"):
            assert (getattr(piece, name) == getattr(whole, name)[part]).all(), name
    for other in (masks.sample(PAPER, 14, 6, epoch, index), masks.sample(PAPER, 14, 5, epoch + 1, index)):
        assert (other.context != whole.context).any(1).mean() > 0.9


def test_the_numbers_of_a_recipe_never_change():
    """A frozen draw: if this fails, the same recipe trains to other numbers and IDENTITY_VERSION must rise."""
    found = hashlib.sha256(b"".join(np.ascontiguousarray(f, "<i8").tobytes() for f in draw(PAPER, 14, 64)[:5]))
    assert (masks.context_keep(PAPER, 14), found.hexdigest()[:16]) == (63, "95b7fc3ad05a8216")


def test_blocks_reach_the_last_row_and_column_and_every_place_is_equally_likely():
    """Chi-square of the corners of every target shape on three grids."""
    for grid in (14, 16, 28):
        mask = dataclasses.replace(PAPER, context_keep=1)
        drawn = draw(mask, grid, 12_000)
        corner, size = drawn.targets[:, 0, 0], drawn.target_len[:, 0]
        last = np.take_along_axis(drawn.targets[:, 0], size[:, None] - 1, 1)[:, 0]
        height, width = last // grid - corner // grid + 1, last % grid - corner % grid + 1
        assert (last // grid).max() == (last % grid).max() == grid - 1
        shapes, counts = np.unique(np.stack([height, width]), axis=1, return_counts=True)
        for h, w in shapes[:, counts > 1200].T:
            chosen = corner[(height == h) & (width == w)]
            places = np.bincount(
                (chosen // grid) * (grid - w + 1) + chosen % grid, minlength=(grid - h + 1) * (grid - w + 1)
            )
            assert chisquare(places).pvalue > 1e-4, (grid, h, w)


@pytest.mark.parametrize("law", ["uniform", "log"])
@pytest.mark.parametrize("scale", [(0.05, 0.1), (0.15, 0.2)])
def test_scale_and_aspect_are_drawn_independently(law, scale):
    """On a fine grid: scale uniform, aspect uniform or log-uniform, and no correlation of the two or between blocks."""
    mask = dataclasses.replace(PAPER, aspect_distribution=law, target_scale=scale)
    grid, count = 1000, 20_000
    height, width = multiblock.block_sizes(mask, grid, rng_keys(0, np.zeros(count, int), np.arange(count)))
    area, aspect = (height * width)[:, 1:] / grid**2, (height / width)[:, 1:]
    aspect = np.log(aspect) if law == "log" else aspect
    edges = np.log(mask.target_aspect) if law == "log" else mask.target_aspect
    for values, (low, high) in ((area, scale), (aspect, edges)):
        # the outermost bins lose what rounding to whole patches pushes out
        inner = np.histogram(values[:, 0], bins=20, range=(low, high))[0][1:-1]
        assert chisquare(inner).pvalue > 1e-4
    together = np.corrcoef(np.stack([area[:, 0], aspect[:, 0], area[:, 1], aspect[:, 1]]))
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_the_drop_to_k_forgets_where_a_patch_is():
    """Given what was free, each free patch is kept with probability K / free: z-scores patch by patch."""
    mask = dataclasses.replace(PAPER, mode="packed")
    free_of = draw(mask, 14, 6000)
    kept_of = draw(dataclasses.replace(PAPER, context_keep=30), 14, 6000)
    free, kept = np.zeros((6000, 196)), np.zeros((6000, 196))
    for i in range(6000):
        free[i, free_of.context[i, : free_of.context_len[i]]] = 1
        kept[i, kept_of.context[i]] = 1
    assert (free_of.context_len == kept_of.candidates).all()
    assert (kept <= free).all()
    chance = free * (30 / kept_of.candidates)[:, None]
    z = (kept - chance).sum(0) / np.sqrt((chance * (1 - chance)).sum(0))
    assert np.abs(z).max() < norm.isf(1e-4 / 196)


def test_context_patches_are_equally_likely_in_all_rows():
    """Nothing of the raster order is left: P(context) is symmetric under turning the image upside down."""
    context = draw(PAPER, 14, 8000).context
    row = np.bincount(context.reshape(-1) // 14, minlength=14) / (8000 * 14)
    assert np.abs(row - row[::-1]).max() < 0.012
    assert row.min() > 0.2


def test_a_setting_that_cannot_leave_k_patches_is_refused_with_the_numbers():
    """K too large for most draws, or no context at all: ConfigError says how many patches draws leave."""
    with pytest.raises(ConfigError, match=r"context_keep=120: only 5% of draws on the 14x14 grid"):
        masks.check(dataclasses.replace(PAPER, context_keep=120), 14)
    with pytest.raises(ConfigError, match=r"too little context on the 14x14 grid: .* of 196 patches"):
        masks.check(dataclasses.replace(PAPER, target_scale=(0.6, 0.9)), 14)
    with pytest.raises(ConfigError, match="reference sampler"):
        masks.check(dataclasses.replace(PAPER, mode="reference", min_keep=10), 4)
    with pytest.raises(ConfigError, match="3 target"):
        masks.check(dataclasses.replace(PAPER, mode="rasterized"), 14)
    with pytest.raises(ConfigError, match=r"wants one of multiblock, reference, .*, got 'multiblok'") as caught:
        draw(dataclasses.replace(PAPER, mode="multiblok"), 14, 1)
    assert "did you mean 'multiblock'?" in str(caught.value)
    masks.check(PAPER, 14)


def test_a_large_k_is_met_without_leaks_by_drawing_places_again():
    """K at the median: half of the first draws fail, block sizes stay as drawn, and every context has K patches."""
    usual, greedy = draw(PAPER, 14, 400), draw(dataclasses.replace(PAPER, context_keep=90), 14, 400)
    assert (greedy.target_len == usual.target_len).all()
    assert all(len(c) == 90 and not c & set().union(*t) for c, t in rows(greedy))


def test_fractions_are_what_counting_gives():
    """Realised fractions against sets of patches, for padded and unpadded masks."""
    for mode in ("multiblock", "packed", "reference"):
        drawn = draw(dataclasses.replace(PAPER, mode=mode), 14, 64)
        sets = rows(drawn)
        union = np.array([len(set().union(*t)) for _, t in sets])
        total = np.array([sum(map(len, t)) for _, t in sets])
        want = {
            "context_fraction": np.mean([len(c) for c, _ in sets]) / 196,
            "target_fraction": total.mean() / 4 / 196,
            "union_fraction": union.mean() / 196,
            "overlap_fraction": np.mean(1 - union / total),
            "discarded_fraction": np.mean(drawn.candidates - [len(c) for c, _ in sets]) / 196,
        }
        assert masks.fractions(drawn, 14) == pytest.approx(want)


def test_the_baselines_of_the_ablation_are_complements():
    """Quadrants, one block, random patches: context and targets share nothing, and together they are the image."""
    grid = 14
    for mode, count, scale in (("rasterized", 3, (0.15, 0.2)), ("block", 1, (0.6, 0.6)), ("random", 1, (0.6, 0.6))):
        mask = dataclasses.replace(PAPER, mode=mode, targets=count, target_scale=scale, target_aspect=(1, 1))
        drawn = draw(mask, grid, 200)
        for seen, goals in rows(drawn):
            assert not seen & set().union(*goals)
            assert len(seen) + len(set().union(*goals)) == grid * grid
        found = masks.fractions(drawn, grid)["context_fraction"]
        assert found == pytest.approx(0.25 if mode == "rasterized" else 0.4, abs=0.03)
