"""What is predicted (`objective.target`), and how weights begin (`model.init`)."""

from __future__ import annotations

import pytest
import torch
from test_ijepa import built, change, drawn, images

from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.ijepa.vit import patchify


def test_fan_in_keeps_the_size_of_what_a_matrix_gets():
    """Matrices of blocks and predictor have a deviation of 1 / sqrt(inputs), all else 0.02."""
    model = IJepa(change("model", init="fan_in"))
    init_weights(model, model.recipe)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 1000:
            inputs = parameter.shape[1]
            assert parameter.std().item() == pytest.approx(inputs**-0.5, rel=0.1), name
    patch_embed = model.encoder.patch_embed.proj.weight
    assert patch_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_pixels_are_predicted_normalised_by_patch():
    """In the order of the targets, without a pass of the target encoder."""
    recipe = change("objective", target="pixels")
    model = built(recipe)
    model.target.forward = None
    chosen = drawn(recipe)
    patches = patchify(images(), recipe.model.patch)
    target, _ = model.encode_targets(patches, chosen)
    for image, places in enumerate(chosen.targets):
        want = patches[image][places]
        want = want - want.mean(-1, keepdim=True)
        want = want / (want.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        assert torch.allclose(target[image], want, atol=1e-5)
    loss, _ = model(images(), chosen)
    loss.backward()
    assert model.predictor.proj.weight.shape[0] == 3 * recipe.model.patch**2


def test_a_frozen_target_stays_as_it_was_initialised():
    model = built(change("objective", target="frozen"))
    before = [parameter.clone() for parameter in model.target.parameters()]
    update_target(model, 0.5)
    for old, new in zip(before, model.target.parameters(), strict=True):
        assert torch.equal(old, new)
