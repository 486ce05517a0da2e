"""What every mask sampler promises, on any grid and in any batch."""

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
from jepa_cluster.ijepa.masks import blocks, multiblock
from jepa_cluster.ijepa.masks.multiblock import Multiblock
from jepa_cluster.ijepa.stateless_rng import rng_keys

PAPER = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), aspect_distribution="log")


def draw(mask: Mask, grid: int, count: int, seed: int = 0, epoch: int = 0) -> masks.Masks:
    index = np.arange(count)
    return masks.sample(mask, grid, seed, np.full_like(index, epoch), index)


@dataclasses.dataclass
class Sample:
    """Context and targets of one sample as sets of patches, without padding."""

    context: set[int]
    targets: list[set[int]]

    @property
    def target_union(self) -> set[int]:
        return set().union(*self.targets)


def samples_of(drawn: masks.Masks) -> list[Sample]:
    context_lengths, target_lengths = masks.lengths(drawn)
    samples: list[Sample] = []
    for i, context in enumerate(drawn.context):
        targets: list[set[int]] = []
        for target, length in zip(drawn.targets[i], target_lengths[i], strict=True):
            targets.append(set(target[:length].tolist()))
        kept = context[: context_lengths[i]]
        samples.append(Sample(set(kept.tolist()), targets))
    return samples


@settings(max_examples=60)
@given(
    grid=st.integers(4, 20),
    targets=st.integers(1, 6),
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    aspect=st.floats(0.3, 1.0),
    context=st.floats(0.3, 1.0),
    mode=st.sampled_from(["multiblock", "packed", "block"]),
)
def test_no_target_patch_is_in_the_context(grid, targets, low, high, aspect, context, mode):
    """For any settings and grid, K patches are left and none of them is a target's."""
    scale = (min(low, high), max(low, high))
    mask = Mask(mode, targets, scale, (aspect, 1 / aspect), (context, 1.0), min_keep=1)
    try:
        keep = masks.check(mask, grid)
    except ConfigError:
        return
    drawn = draw(mask, grid, 32)
    for sample in samples_of(drawn):
        if mode == "packed":
            assert len(sample.context) >= 1
        else:
            assert len(sample.context) == keep
        assert not sample.context & sample.target_union
        assert all(sample.targets)
        assert max(sample.target_union) < grid * grid


@pytest.mark.parametrize(
    ("mode", "targets", "scale"),
    [
        ("multiblock", 4, (0.15, 0.2)),
        ("packed", 4, (0.15, 0.2)),
        ("rasterized", 3, (0.15, 0.2)),
        ("block", 4, (0.15, 0.2)),
        ("random", 1, (0.15, 0.2)),
        ("reference", 4, (0.3, 0.4)),
    ],
)
@pytest.mark.parametrize("grid", [4, 7, 14])
def test_the_union_at_the_slots_gives_the_targets(mode, targets, scale, grid):
    """This includes padding, and the union has no other patch."""
    mask = dataclasses.replace(
        PAPER,
        mode=mode,
        targets=targets,
        target_scale=scale,
        min_keep=1,
    )
    drawn = draw(mask, grid, 40)
    gathered = np.take_along_axis(drawn.union[:, None], drawn.slots, 2)
    assert (gathered == drawn.targets).all()
    for union, sample in zip(drawn.union, samples_of(drawn), strict=True):
        assert set(union.tolist()) == sample.target_union


def test_a_sample_has_the_same_masks_in_any_batch():
    """Masks depend on (seed, epoch, index) and on nothing else."""
    index = np.random.default_rng(0).permutation(500)[:96]
    epoch = np.arange(96) % 3
    whole = masks.sample(PAPER, 14, 5, epoch, index)
    for part in (slice(0, 1), slice(1, 40), slice(40, 96)):
        piece = masks.sample(PAPER, 14, 5, epoch[part], index[part])
        for name in ("context", "targets", "candidates", "target_len"):
            expected = getattr(whole, name)[part]
            assert (getattr(piece, name) == expected).all(), name
    other_seed = masks.sample(PAPER, 14, 6, epoch, index)
    other_epoch = masks.sample(PAPER, 14, 5, epoch + 1, index)
    for other in (other_seed, other_epoch):
        differs = (other.context != whole.context).any(1)
        assert differs.mean() > 0.9


def test_the_masks_of_a_recipe_never_change():
    """If they do, the same recipe trains to other numbers and IDENTITY_VERSION must rise."""
    digest = hashlib.sha256()
    for array in draw(PAPER, 14, 64)[:5]:
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    assert masks.check(PAPER, 14) == 63
    assert digest.hexdigest()[:16] == "95b7fc3ad05a8216"


@pytest.mark.parametrize("grid", [14, 16, 28])
def test_every_position_of_a_block_is_equally_likely(grid: int):
    """Chi-square of the corners of every target shape. Blocks reach the last row and column."""
    mask = dataclasses.replace(PAPER, context_keep=1)
    drawn = draw(mask, grid, 12_000)
    blocks = drawn.targets[:, 0]
    length = drawn.target_len[:, :1]
    corner = blocks[:, 0]
    last = np.take_along_axis(blocks, length - 1, 1)[:, 0]

    top, left = np.divmod(corner, grid)
    bottom, right = np.divmod(last, grid)
    assert bottom.max() == grid - 1
    assert right.max() == grid - 1

    height = bottom - top + 1
    width = right - left + 1
    shapes, counts = np.unique(np.stack([height, width]), axis=1, return_counts=True)
    for h, w in shapes[:, counts > 1200].T:
        chosen = (height == h) & (width == w)
        rows = grid - h + 1
        columns = grid - w + 1
        position = top[chosen] * columns + left[chosen]
        frequencies = np.bincount(position, minlength=rows * columns)
        assert chisquare(frequencies).pvalue > 1e-4, (h, w)


@pytest.mark.parametrize("law", ["uniform", "log"])
@pytest.mark.parametrize("scale", [(0.05, 0.1), (0.15, 0.2)])
def test_scale_and_aspect_are_drawn_independently(law, scale):
    """Scale is uniform, aspect uniform or log-uniform; neither they nor two blocks correlate."""
    mask = dataclasses.replace(PAPER, aspect_distribution=law, target_scale=scale)
    grid = 1000  # so fine that rounding to whole patches hardly matters
    count = 20_000
    keys = rng_keys(0, np.zeros(count, int), np.arange(count))
    height, width = multiblock.block_sizes(mask, grid, keys)
    area = (height * width)[:, 1:] / grid**2
    aspect = (height / width)[:, 1:]
    edges = mask.target_aspect
    if law == "log":
        aspect = np.log(aspect)
        edges = np.log(edges)

    for values, limits in ((area, scale), (aspect, edges)):
        counts, _ = np.histogram(values[:, 0], bins=20, range=tuple(limits))
        inner = counts[1:-1]  # the outermost bins lose what rounding pushes out
        assert chisquare(inner).pvalue > 1e-4
    columns = [area[:, 0], aspect[:, 0], area[:, 1], aspect[:, 1]]
    correlation = np.corrcoef(np.stack(columns))
    assert np.abs(correlation - np.eye(4)).max() < 0.03


def test_the_drop_to_k_patches_is_independent_of_position():
    """Each candidate is kept with probability K / candidates: z-scores patch by patch."""
    keep = 30
    count = 6000
    all_candidates = draw(dataclasses.replace(PAPER, mode="packed"), 14, count)
    dropped = draw(dataclasses.replace(PAPER, context_keep=keep), 14, count)
    candidate = np.zeros((count, 196))
    kept = np.zeros((count, 196))
    for i in range(count):
        length = all_candidates.context_len[i]
        candidate[i, all_candidates.context[i, :length]] = 1
        kept[i, dropped.context[i]] = 1
    assert (all_candidates.context_len == dropped.candidates).all()
    assert (kept <= candidate).all()

    chance = candidate * (keep / dropped.candidates)[:, None]
    variance = chance * (1 - chance)
    z = (kept - chance).sum(0) / np.sqrt(variance.sum(0))
    assert np.abs(z).max() < norm.isf(1e-4 / 196)


def test_context_patches_are_equally_likely_in_all_rows():
    """P(context) stays the same when the image is flipped: raster order has no effect."""
    context = draw(PAPER, 14, 8000).context
    rows = context.reshape(-1) // 14
    frequency = np.bincount(rows, minlength=14) / (8000 * 14)
    assert np.abs(frequency - frequency[::-1]).max() < 0.012
    assert frequency.min() > 0.2


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"context_keep": 120}, 14, r"context_keep=120: only 5% of draws on the 14x14 grid"),
        ({"target_scale": (0.6, 0.9)}, 14, r"too little context on the 14x14 grid: .* of 196"),
        ({"mode": "reference", "min_keep": 10}, 4, "reference sampler"),
        ({"mode": "rasterized"}, 14, "3 target"),
    ],
)
def test_a_mask_that_cannot_leave_k_patches_is_refused(changes, grid, message):
    """The message says how many patches the draws leave."""
    with pytest.raises(ConfigError, match=message):
        masks.check(dataclasses.replace(PAPER, **changes), grid)


def test_an_unknown_mode_is_refused_with_the_nearest_name():
    unknown = dataclasses.replace(PAPER, mode="multiblok")
    message = r"wants one of multiblock, reference, .*, got 'multiblok'"
    with pytest.raises(ConfigError, match=message) as caught:
        draw(unknown, 14, 1)
    assert "did you mean 'multiblock'?" in str(caught.value)


def test_the_mask_of_the_paper_is_accepted():
    masks.check(PAPER, 14)


def test_a_large_k_is_met_by_drawing_positions_again():
    """K is the median, so half of the first draws fail. Block sizes stay as drawn."""
    usual = draw(PAPER, 14, 400)
    large = draw(dataclasses.replace(PAPER, context_keep=90), 14, 400)
    assert (large.target_len == usual.target_len).all()
    for sample in samples_of(large):
        assert len(sample.context) == 90
        assert not sample.context & sample.target_union


@pytest.mark.parametrize("mode", ["multiblock", "packed", "reference"])
def test_fractions_are_those_counted_from_sets_of_patches(mode: str):
    drawn = draw(dataclasses.replace(PAPER, mode=mode), 14, 64)
    samples = samples_of(drawn)
    context = np.array([len(sample.context) for sample in samples])
    union = np.array([len(sample.target_union) for sample in samples])
    total = np.array([sum(map(len, sample.targets)) for sample in samples])
    expected = {
        "context_fraction": np.mean(context) / 196,
        "target_fraction": np.mean(total) / 4 / 196,
        "union_fraction": np.mean(union) / 196,
        "overlap_fraction": np.mean(1 - union / total),
        "discarded_fraction": np.mean(drawn.candidates - context) / 196,
    }
    assert masks.fractions(drawn, 14) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "targets", "scale", "context_fraction"),
    [
        ("rasterized", 3, (0.15, 0.2), 0.25),
        ("block", 1, (0.6, 0.6), 0.4),
        ("random", 1, (0.6, 0.6), 0.4),
    ],
)
def test_context_and_targets_of_a_baseline_are_complements(mode, targets, scale, context_fraction):
    """They share no patch, and together they are the image."""
    mask = dataclasses.replace(
        PAPER,
        mode=mode,
        targets=targets,
        target_scale=scale,
        target_aspect=(1.0, 1.0),
    )
    drawn = draw(mask, 14, 200)
    for sample in samples_of(drawn):
        assert not sample.context & sample.target_union
        assert len(sample.context) + len(sample.target_union) == 196
    found = masks.fractions(drawn, 14)["context_fraction"]
    assert found == pytest.approx(context_fraction, abs=0.03)


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_draw_is_larger_than_the_bound_of_its_settings(count: int):
    """Random settings on grids of 4 to 37 patches; 64 draws of 4 targets of each."""
    random = np.random.default_rng(0)
    index = np.arange(64)
    reached = 0
    for number in range(count):
        low, high = np.sort(random.uniform(0.02, 0.6, 2))
        exponents = random.uniform(-1.7, 1.7, 2)
        narrow, wide = np.sort(np.exp(exponents))
        grid = int(random.integers(4, 38))
        law = "uniform"
        if number % 2:
            law = "log"
        mask = Mask("multiblock", 4, (low, high), (narrow, wide), (0.85, 1.0), law)
        height, width = multiblock.block_sizes(mask, grid, rng_keys(number, 0 * index, index))
        largest = (height[:, 1:] * width[:, 1:]).max()
        bound = Multiblock(mask, grid).max_target_area
        assert largest <= bound, mask
        reached += int(largest == bound)
    assert reached > 0.4 * count, "the bound is no larger than it must be"


@pytest.mark.parametrize(
    ("grid", "scale", "aspect", "shape"),
    [
        (12, (0.02, 0.6), (1 / 3, 3.0), (8, 12)),  # 7.5 x 11.5 is 86.25 of 86.4 patches
        (28, (0.15, 0.2), (1 / 3, 3.0), None),
        (5, (0.25, 0.25), (1.0, 1.0), (2, 2)),  # 2.5 x 2.5 is rounded to even numbers
        (5, (0.02, 0.25), (1.0, 1.0), (2, 2)),  # and is not reached from below
    ],
)
def test_the_shapes_of_targets_are_those_that_can_be_drawn(grid, scale, aspect, shape):
    """A shape that the settings reach at one corner alone is among them."""
    height, width = blocks.possible_shapes(scale, aspect, grid)
    found = set(zip(height.tolist(), width.tolist(), strict=True))
    if shape:
        largest = max(height * width)
        assert shape in found
        assert largest == shape[0] * shape[1]
    is_point = scale[0] == scale[1]
    scales = np.linspace(*scale, 400, endpoint=is_point)
    aspects = np.geomspace(*aspect, 400)
    net = np.meshgrid(scales, aspects)
    heights, widths = blocks.block_shape(*net, grid)
    drawn = zip(heights.ravel().tolist(), widths.ravel().tolist(), strict=True)
    assert set(drawn) <= found


def test_a_target_that_was_once_cut_is_predicted_as_a_whole():
    mask = Mask("packed", 4, (0.2, 0.25), (0.2, 5.0), (0.85, 1.0), "log")
    one = masks.sample(mask, 26, 0, np.array([1]), np.array([17095]))
    longest = one.targets.shape[2] if one.target_len is None else one.target_len.max()
    assert longest <= one.targets.shape[2]
    assert one.slots.max() + 1 == len(set(one.targets.ravel().tolist()))


def test_only_settings_whose_targets_were_cut_get_another_identity():
    """The presets of conf/ and of the paper keep theirs."""
    assert masks.derive(PAPER, 14).target_patches is None
    cut = Mask("multiblock", 4, (0.29, 0.31), (0.92, 3.5), (0.85, 1.0), min_keep=1)
    assert masks.derive(cut, 14).target_patches == 70
    with pytest.raises(ConfigError, match=r"mask.target_patches=7 is derived, and would be null"):
        masks.derive(dataclasses.replace(PAPER, target_patches=7), 14)
