"""The arithmetic of `ijepa.flops` against torch's own counter, on the meta device."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from support.without_shortcuts import WithoutShortcuts
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.flops import parameters, step_flops

RECIPES = Path(__file__).parents[1] / "pure" / "test_flops.py"
SPEC = importlib.util.spec_from_file_location("flops_recipes", RECIPES)
recipes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes)


def trainable_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def meta_masks(recipe: Recipe, batch: int) -> masks.Masks:
    """Return masks of a batch as tensors with shapes and no values."""
    index = np.arange(batch)
    epoch = np.zeros_like(index)
    drawn = masks.sample(recipe.mask, recipe.model.grid, 0, epoch, index)
    tensors = [None if array is None else torch.from_numpy(array).to("meta") for array in drawn]
    return masks.Masks(*tensors)


def assert_exact_costs(recipe: Recipe, batch: int = 2) -> None:
    """FLOPs of the encoder and of a step, and the parameters, are those that torch counts."""
    tensors = meta_masks(recipe, batch)
    with torch.device("meta"):
        model = WithoutShortcuts(recipe)
        model.embeds_all = False
        images = torch.empty(batch, 3, recipe.model.image, recipe.model.image)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as encoder_counter:
            model.encoder(images, tensors.context).sum().backward()
        with FlopCounterMode(display=False) as step_counter:
            loss, _ = model(images, tensors)
            loss.backward()
    context_size = tensors.context.shape[1]
    _, targets, target_size = tensors.targets.shape
    computed = step_flops(recipe, context_size, [target_size] * targets)
    assert encoder_counter.get_total_flops() / batch == computed.encoder
    assert step_counter.get_total_flops() / batch == computed.total
    assert trainable_parameters(model.encoder) == parameters(recipe).encoder
    assert trainable_parameters(model.predictor) == parameters(recipe).predictor


@pytest.mark.parametrize("size", ["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_gg"])
def test_every_size_costs_exactly_what_torch_counts(size):
    """ViT-S is counted whole, the other sizes with three blocks."""
    recipe = recipes.recipe(size)
    if size != "vit_s":
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, depth=3),
            predictor=dataclasses.replace(recipe.predictor, depth=3),
        )
    assert_exact_costs(recipe)


@pytest.mark.parametrize("predictor", ["per_target", "joint"])
@pytest.mark.parametrize(
    "mode", ["multiblock", "reference", "packed", "rasterized", "block", "random"]
)
def test_every_mask_and_predictor_mode_costs_exactly_what_torch_counts(mode, predictor):
    """ViT-Ti with each mask mode and both predictors, tokens as computed (padding included)."""
    base = recipes.recipe("vit_ti")
    targets = {"rasterized": 3, "random": 1}.get(mode, 4)
    recipe = dataclasses.replace(
        base,
        mask=dataclasses.replace(base.mask, mode=mode, targets=targets, reference_batch=2),
        predictor=dataclasses.replace(base.predictor, mode=predictor, depth=2),
        model=dataclasses.replace(base.model, depth=2),
    )
    assert_exact_costs(recipe)


@pytest.mark.parametrize("timm", [{"reg_tokens": 4}, {"mlp_layer": "SwiGLU"}])
@pytest.mark.parametrize(("patch", "image"), [(16, 448), (14, 224)])
def test_options_resolutions_and_patches_cost_exactly_what_torch_counts(timm, patch, image):
    """Registers, SwiGLU, patch 14 and 448 pixels."""
    base = recipes.recipe("vit_ti")
    model = dataclasses.replace(base.model, depth=2, timm=timm, patch=patch, image=image)
    assert_exact_costs(dataclasses.replace(base, model=model))
