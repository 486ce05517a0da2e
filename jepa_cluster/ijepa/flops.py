"""Parameters and FLOPs by arithmetic: 2 FLOPs a multiply-accumulate, matrix products only, as torch counts them.

In: a recipe and how many tokens the masks really left. Out: numbers. No torch, so that plans and pages can use it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Recipe


class Savings(NamedTuple):
    """Work that changes no output and may be left out; each can be switched off."""

    first_layer: bool = True  # predictor: norm and qkv of the first block once for all sequences of an image
    last_layer: bool = True  # predictor: last block for target rows only
    union: bool = True  # target encoder: last block for the union of the targets only
    gather: bool = True  # context encoder: patches chosen before they are embedded
    varlen: bool = True  # sequences of different length: flash attention by lengths, not by a key mask (CUDA, half)
    together: bool = True  # the target follows in one call for all parameters


NOTHING_SAVED = Savings(*(False for _ in Savings._fields))


class Flops(NamedTuple):
    """FLOPs of one training step for one image: forward and backward of `encoder` (context), and all of it."""

    encoder: float
    total: float


class Parameters(NamedTuple):
    """Trainable parameters; positions are fixed and not counted, the target encoder is no parameter."""

    encoder: int
    predictor: int


def parameters(recipe: Recipe) -> Parameters:
    """Counted from the numbers in conf; of timm's options, registers and SwiGLU are known."""
    m, p = recipe.model, recipe.predictor
    blocks = m.depth * block_parameters(m.width, m.mlp_ratio, maps(recipe))
    encoder = 3 * m.patch**2 * m.width + m.width + registers(recipe) * m.width + blocks + 2 * m.width
    ends = m.width * p.width + p.width + p.width + 2 * p.width + p.width * m.width + m.width
    return Parameters(encoder, ends + p.depth * block_parameters(p.width, 4.0, 2))


def block_parameters(width: int, ratio: float, maps: int) -> int:
    """Attention with biases, two norms, and an MLP of two linear maps or, gated, of three."""
    hidden = int(width * ratio)
    return 4 * width * width + 4 * width + 4 * width + maps * width * hidden + (maps - 1) * hidden + width


def step_flops(recipe: Recipe, context: Any, targets: Any) -> Flops:
    """FLOPs of a step for one image, the mean over a batch, without savings but `gather`: the axis of every curve.

    context: tokens the context encoder sees, [B] or one number. targets: tokens of each target, [B, M] or [M].
    """
    m, p = recipe.model, recipe.predictor
    context, targets = np.asarray(context, np.float64), np.asarray(targets, np.float64)
    extra = registers(recipe)
    target = features(recipe)
    encoder = 3 * stack(context + extra, m.depth, m.width, m.mlp_ratio, maps(recipe)) + 2 * embed(context, recipe)
    sequences = targets.sum(-1, keepdims=True) if p.mode == "joint" else targets
    blocks = stack(context[..., None] + sequences, p.depth, p.width, 4.0, 2).sum(-1)
    ends = 2 * (context + targets.sum(-1)) * m.width * p.width
    return Flops(float(encoder.mean()), float((target + encoder + 3 * (blocks + ends)).mean()))


def features(recipe: Recipe) -> float:
    """FLOPs of the whole encoder over one image, forward: a target, or an image that is probed."""
    m, patches = recipe.model, float(recipe.model.grid**2)
    return float(
        stack(patches + registers(recipe), m.depth, m.width, m.mlp_ratio, maps(recipe)) + embed(patches, recipe)
    )


def stack(tokens: Any, depth: int, width: int, ratio: float, maps: int) -> Any:
    """Forward FLOPs of `depth` blocks over a sequence of `tokens`."""
    return depth * (8 * tokens * width**2 + 2 * maps * tokens * width * int(width * ratio) + 4 * tokens**2 * width)


def embed(tokens: Any, recipe: Recipe) -> Any:
    """Forward FLOPs of embedding `tokens` patches; backward costs once more, since images need no gradient."""
    return 6 * tokens * recipe.model.patch**2 * recipe.model.width


def registers(recipe: Recipe) -> int:
    return int(recipe.model.timm.get("reg_tokens", 0))


def maps(recipe: Recipe) -> int:
    """Linear maps in the encoder's MLP."""
    return 3 if recipe.model.timm.get("mlp_layer") == "SwiGLU" else 2
