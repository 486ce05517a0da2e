"""`objective.target=views`: the views, the loss, the expander, their cost and their export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ijepa import as_tensors, built, change, images
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_cluster.config import Recipe
from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa import masks, pixels, vicreg, weights
from jepa_cluster.ijepa.flops import EXPANDED, parameters, step_flops
from jepa_cluster.ijepa.masks.views import BITS, DRAWS
from jepa_cluster.ijepa.objective import update_target
from jepa_cluster.ijepa.weight_sizes import Sizes
from jepa_cluster.sweep.freeze import VIEWS

RECIPE = dataclasses.replace(change("objective", target="views"), mask=VIEWS)
HALF = 1 << (BITS - 1)
LARGEST = (1 << BITS) - 1
# The image as it is; gains and shifts of the channels follow
UNCHANGED = {
    "share": LARGEST,
    "mirror": 0,
    "left": HALF,
    "top": HALF,
    "contrast": HALF,
    "brightness": HALF,
    "grey": LARGEST,
}
CHANNELS = 6 * [HALF]


def drawn(
    epoch: int,
    index: list[int],
) -> masks.Masks:
    """Return the masks of samples of an epoch."""
    epochs = np.full(len(index), epoch)
    return masks.sample(
        RECIPE.mask,
        RECIPE.model.grid,
        0,
        epochs,
        np.array(index),
    )


def view_of(
    image: Tensor,
    **changes: int,
) -> Tensor:
    """Return the view of an image that these numbers make of it."""
    numbers = [*(UNCHANGED | changes).values(), *CHANNELS]
    return vicreg.make_views(image[None], torch.tensor([[numbers]]), RECIPE.data)[0]


def test_the_numbers_of_a_view_depend_on_seed_epoch_and_sample_alone():
    together = drawn(0, [4, 9]).views
    assert together.shape == (2, 2, DRAWS)
    assert np.array_equal(drawn(0, [9]).views[0], together[1])
    assert not (together[1] == drawn(1, [9]).views[0]).any()
    assert not (together[0, 0] == together[0, 1]).any()
    assert together.min() >= 0
    assert together.max() <= LARGEST


def test_a_view_is_the_image_with_what_was_drawn_changed():
    image = images(1)[0] / 4
    assert torch.allclose(view_of(image), image, atol=1e-4)
    assert torch.allclose(view_of(image, mirror=LARGEST), image.flip(-1), atol=1e-4)
    grey = view_of(image, grey=0)
    mean, std = pixels.grey_levels(RECIPE.data.mean, RECIPE.data.std, image.device)
    assert (grey * std + mean).std(0).max() < 1e-3
    assert view_of(image, contrast=0).std() < image.std()


def test_the_loss_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(
        2,
        12,
        EXPANDED,
        generator=generator,
        dtype=torch.float64,
    )
    _, found = vicreg.loss(a, b)
    assert found["invariance"] == pytest.approx(float((a - b).square().mean()))
    spread = covariance = 0.0
    for x in (a, b):
        deviation = (x.var(0) + 1e-4).sqrt()
        spread += float((1 - deviation).clamp(min=0).mean()) / 2
        matrix = torch.cov(x.T)
        matrix.fill_diagonal_(0)
        covariance += float(matrix.square().sum()) / EXPANDED
    assert found["variance"] == pytest.approx(spread)
    assert found["covariance"] == pytest.approx(covariance)


def test_equal_embeddings_are_a_collapse_that_target_std_shows():
    model = built(RECIPE)
    eight = list(range(8))
    chosen = as_tensors(drawn(0, eight))
    _, aux = model(images(), chosen)
    assert {"loss/invariance", "loss/variance", "loss/covariance"} < aux.keys()
    assert aux["target_std"] > 0.1
    with torch.no_grad():
        model.predictor.last.weight.zero_()
    _, collapsed = model(images(), chosen)
    assert collapsed["loss/variance"] == pytest.approx(0.99)
    assert collapsed["target_std"] < 1e-6


def test_the_target_follows_the_encoder_and_one_image_has_a_loss():
    model = built(RECIPE)
    before = model.target.norm.bias.clone()
    update_target(model, 0.5)
    assert not torch.equal(before, model.target.norm.bias)
    loss, _ = model(images(1), as_tensors(drawn(0, [0])))
    assert torch.isfinite(loss)


def trainable_parameters(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


@pytest.mark.parametrize("timm", [{}, {"reg_tokens": 4}])
def test_a_step_costs_exactly_what_torch_counts(
    timm: dict[str, int],
):
    model = dataclasses.replace(RECIPE.model, timm=timm)
    recipe = dataclasses.replace(RECIPE, model=model)
    model = built(recipe)
    chosen = as_tensors(drawn(0, list(range(8))))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = model(images(), chosen)
        loss.backward()
    computed = step_flops(recipe, *masks.lengths(drawn(0, [0])))
    assert counter.get_total_flops() / 8 == computed.total
    assert 0 < computed.encoder < computed.total
    numbers = parameters(recipe)
    assert trainable_parameters(model.encoder) == numbers.encoder
    assert trainable_parameters(model.predictor) == numbers.predictor


def weights_of(recipe: Recipe) -> weights.Weights:
    model = built(recipe)
    parts = {name: part.state_dict() for name, part in model.named_children()}
    return weights.Weights(
        "checkpoint",
        parts,
        Sizes.of(recipe),
        {},
    )


def test_encoders_are_exported_and_the_expander_is_refused(
    tmp_path: Path,
):
    """The reference code's format has a predictor."""
    found = weights_of(RECIPE)
    written = weights.write(found, "timm", tmp_path / "timm")
    again = weights.read(written)
    kernel = "patch_embed.proj.weight"
    assert torch.equal(again.parts["target"][kernel], found.parts["target"][kernel])
    with pytest.raises(CheckpointError, match="does not predict representations"):
        weights.write(found, "published", tmp_path / "x.pth.tar")
