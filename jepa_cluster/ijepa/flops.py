"""Parameters and FLOPs by arithmetic: 2 FLOPs per multiply-accumulate, matrix products only.

In: a recipe, and how many tokens the masks left. Out: the numbers that torch's counter gives.
No torch, so that plans and pages can use it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Recipe

PREDICTOR_MLP = (4.0, 2)  # ratio of the hidden width, linear maps
EXPANDED = 1024  # width of the expander of `objective.target=views`


class Flops(NamedTuple):
    """FLOPs of one training step per image: forward and backward of the encoder, and all."""

    encoder: float
    total: float


class Parameters(NamedTuple):
    """Trainable parameters. Positions and the target encoder are not trained and not counted."""

    encoder: int
    predictor: int


def parameters(recipe: Recipe) -> Parameters:
    """Count parameters from the numbers in conf; of timm's options, registers and SwiGLU."""
    model, predictor = recipe.model, recipe.predictor
    width, inner = model.width, predictor.width

    patch_embed = 3 * model.patch**2 * width + width
    registers = register_tokens(recipe) * width
    encoder_block = block_parameters(width, model.mlp_ratio, mlp_linears(recipe))
    encoder = patch_embed + registers + model.depth * encoder_block + 2 * width

    if recipe.objective.target == "views":
        # rows of two matrices, two biases, scale and bias of a norm
        per_unit = width + EXPANDED + 4
        return Parameters(encoder, EXPANDED * per_unit)
    embed = width * inner + inner
    mask_token = inner
    norm_and_proj = 2 * inner + (inner + 1) * recipe.target_width
    predictor_blocks = predictor.depth * block_parameters(inner, *PREDICTOR_MLP)
    return Parameters(encoder, embed + mask_token + predictor_blocks + norm_and_proj)


def block_parameters(
    width: int,
    mlp_ratio: float,
    linears: int,
) -> int:
    """Attention with biases, two norms, and an MLP of two linear maps or, gated, of three."""
    hidden = int(width * mlp_ratio)
    attention = 4 * width * width + 4 * width
    norms = 4 * width
    mlp = linears * width * hidden + (linears - 1) * hidden + width
    return attention + norms + mlp


def step_flops(
    recipe: Recipe,
    context: Any,
    targets: Any,
) -> Flops:
    """FLOPs of a step per image, the mean over a batch: the axis of every curve.

    context: tokens of the context encoder, [B] or one number.
    targets: tokens of each target, [B, M] or [M].
    Of the shortcuts, only the embedding of the context patches alone is assumed.
    """
    context = np.asarray(context, np.float64)
    targets = np.asarray(targets, np.float64)
    model, predictor = recipe.model, recipe.predictor

    forward = encoder_blocks_flops(recipe, context + register_tokens(recipe))
    encoder = 3 * forward + 2 * embed_flops(recipe, context)

    if recipe.objective.target == "views":  # two, each with its part of a covariance matrix
        products = 6 * EXPANDED * (model.width + 2 * EXPANDED)
        return Flops(2 * float(encoder.mean()), 2 * float(encoder.mean() + products))

    sequences = targets
    if predictor.mode == "joint":
        sequences = targets.sum(-1, keepdims=True)
    tokens = context[..., None] + sequences
    blocks = blocks_flops(tokens, predictor.depth, predictor.width, *PREDICTOR_MLP).sum(-1)
    embed = 2 * context * model.width * predictor.width
    proj = 2 * targets.sum(-1) * recipe.target_width * predictor.width

    total = encoder + 3 * (blocks + embed + proj)
    if recipe.objective.target != "pixels":
        total = total + encoder_flops(recipe)
    return Flops(float(encoder.mean()), float(total.mean()))


def encoder_flops(recipe: Recipe) -> float:
    """Forward FLOPs of the encoder over a whole image: a target, or an image that is probed."""
    patches = float(recipe.model.grid**2)
    blocks = encoder_blocks_flops(recipe, patches + register_tokens(recipe))
    return float(blocks + embed_flops(recipe, patches))


def encoder_blocks_flops(
    recipe: Recipe,
    tokens: Any,
) -> Any:
    """Forward FLOPs of the encoder's blocks over a sequence of `tokens`."""
    model = recipe.model
    return blocks_flops(tokens, model.depth, model.width, model.mlp_ratio, mlp_linears(recipe))


def blocks_flops(
    tokens: Any,
    depth: int,
    width: int,
    mlp_ratio: float,
    linears: int,
) -> Any:
    """Forward FLOPs of `depth` blocks over a sequence of `tokens`."""
    qkv_and_proj = 8 * tokens * width**2
    mlp = 2 * linears * tokens * width * int(width * mlp_ratio)
    attention = 4 * tokens**2 * width
    return depth * (qkv_and_proj + mlp + attention)


def embed_flops(
    recipe: Recipe,
    tokens: Any,
) -> Any:
    """Forward FLOPs of embedding patches. Backward costs once more: images need no gradient."""
    return 6 * tokens * recipe.model.patch**2 * recipe.model.width


def register_tokens(recipe: Recipe) -> int:
    return int(recipe.model.timm.get("reg_tokens", 0))


def mlp_linears(recipe: Recipe) -> int:
    """Return the number of linear maps in the MLP of the encoder."""
    gated = recipe.model.timm.get("mlp_layer") == "SwiGLU"
    return 3 if gated else 2
