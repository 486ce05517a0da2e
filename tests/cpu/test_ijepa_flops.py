"""The arithmetic of `ijepa.flops` against torch's own counter, on the meta device."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.flops import NO_SHORTCUTS, parameters, step_flops
from jepa_cluster.ijepa.objective import IJepa

SPEC = importlib.util.spec_from_file_location("flops_recipes", Path(__file__).parents[1] / "pure" / "test_flops.py")
recipes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes)


def counted(recipe: Recipe, batch: int = 2) -> tuple[float, float]:
    """What torch counts for a whole step and one image, and what we do; the encoder alone is compared on the way."""
    index = np.arange(batch)
    drawn = masks.sample(recipe.mask, recipe.model.grid, 0, np.zeros_like(index), index)
    with torch.device("meta"):
        model = IJepa(recipe, NO_SHORTCUTS._replace(gather_before_embed=True))
        images = torch.empty(batch, 3, recipe.model.image, recipe.model.image)
        tensors = masks.Masks(*(None if f is None else torch.from_numpy(f).to("meta") for f in drawn))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as alone:
            model.encoder(images, tensors.context).sum().backward()
        with FlopCounterMode(display=False) as whole:
            model(images, tensors)[0].backward()
    padded = step_flops(recipe, tensors.context.shape[1], [tensors.targets.shape[2]] * tensors.targets.shape[1])
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) == parameters(recipe).encoder
    assert sum(p.numel() for p in model.predictor.parameters() if p.requires_grad) == parameters(recipe).predictor
    assert alone.get_total_flops() / batch == padded.encoder
    return whole.get_total_flops() / batch, padded.total


@pytest.mark.parametrize("size", ["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_gg"])
def test_every_size_costs_exactly_what_torch_counts(size):
    """Encoder alone and the whole step, to the last FLOP; parameters too. ViT-S whole, the others three blocks deep."""
    recipe = recipes.recipe(size)
    if size != "vit_s":
        model, predictor = (dataclasses.replace(part, depth=3) for part in (recipe.model, recipe.predictor))
        recipe = dataclasses.replace(recipe, model=model, predictor=predictor)
    theirs, ours = counted(recipe)
    assert theirs == ours


@pytest.mark.parametrize("predictor", ["per_target", "joint"])
@pytest.mark.parametrize("mode", ["multiblock", "reference", "packed", "rasterized", "block", "random"])
def test_every_mask_and_predictor_mode_costs_exactly_what_torch_counts(mode, predictor):
    """The same for ViT-Ti with each mask mode and both predictors, tokens as computed (padding included)."""
    base = recipes.recipe("vit_ti")
    count = {"rasterized": 3, "random": 1}.get(mode, 4)
    mask = dataclasses.replace(base.mask, mode=mode, targets=count, reference_batch=2)
    chosen = dataclasses.replace(base.predictor, mode=predictor, depth=2)
    model = dataclasses.replace(base.model, depth=2)
    theirs, ours = counted(dataclasses.replace(base, mask=mask, predictor=chosen, model=model))
    assert theirs == ours


@pytest.mark.parametrize("timm", [{"reg_tokens": 4}, {"mlp_layer": "SwiGLU"}])
@pytest.mark.parametrize(("patch", "image"), [(16, 448), (14, 224)])
def test_options_resolutions_and_patches_cost_exactly_what_torch_counts(timm, patch, image):
    """Registers, SwiGLU, patch 14 and 448 pixels."""
    base = recipes.recipe("vit_ti")
    model = dataclasses.replace(base.model, depth=2, timm=timm, patch=patch, image=image)
    theirs, ours = counted(dataclasses.replace(base, model=model))
    assert theirs == ours
