"""Loss, gradients, optimizer steps and target encoder against the equations of the paper."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_ijepa import OPTIM, RECIPE, as_tensors, built, change, drawn, images
from torch import Tensor

from jepa_cluster.ijepa import masks, schedules
from jepa_cluster.ijepa.objective import IJepa, update_target
from jepa_cluster.ijepa.vit import patchify

GRID = 8
Weights = dict[str, Tensor]


# ---- the equations, written with plain tensors


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normed = centred / (variance + 1e-6).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(
    x: Tensor,
    weights: Weights,
    name: str,
    heads: int,
) -> Tensor:
    width = x.shape[1]
    head_width = width // heads
    q, k, v = affine(x, weights, f"{name}.qkv").split(width, -1)
    out = []
    for start, stop in pairwise(range(0, width + 1, head_width)):
        part = slice(start, stop)
        scores = q[:, part] @ k[:, part].T / math.sqrt(head_width)
        out.append(scores.softmax(-1) @ v[:, part])
    return affine(torch.cat(out, -1), weights, f"{name}.proj")


def block(
    x: Tensor,
    weights: Weights,
    name: str,
    heads: int,
) -> Tensor:
    normed = layer_norm(x, weights, f"{name}.norm1")
    x = x + attention(normed, weights, f"{name}.attn", heads)
    normed = layer_norm(x, weights, f"{name}.norm2")
    hidden = affine(normed, weights, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + affine(hidden, weights, f"{name}.mlp.fc2")


def transformer(x: Tensor, weights: Weights) -> Tensor:
    for i in range(3):
        x = block(x, weights, f"blocks.{i}", heads=3)
    return layer_norm(x, weights, "norm")


def encode(image: Tensor, weights: Weights, patches: list[int]) -> Tensor:
    tokens = []
    for patch in patches:
        row, column = divmod(patch, GRID)
        rows = slice(row * 8, row * 8 + 8)
        columns = slice(column * 8, column * 8 + 8)
        pixels = image[:, rows, columns].reshape(-1)
        projection = weights["patch_embed.proj.weight"].reshape(48, -1)
        token = projection @ pixels + weights["patch_embed.proj.bias"]
        tokens.append(token + weights["pos_embed"][0, patch])
    return transformer(torch.stack(tokens), weights)


def predict(context: Tensor, target: list[int], weights: Weights) -> Tensor:
    """Return the prediction of one target; `context` is already embedded for the predictor."""
    queries = weights["mask_token"][0] + weights["pos_embed"][0, target]
    tokens = transformer(torch.cat([context, queries]), weights)
    return affine(tokens[len(context) :], weights, "proj")


def image_loss(
    image: Tensor,
    context: list[int],
    targets: list[list[int]],
    weights: dict[str, Weights],
) -> Tensor:
    """Predict each target, compare with the normalised representations, average over entries."""
    with torch.no_grad():
        full = encode(image, weights["target"], list(range(GRID * GRID)))
        variance = full.var(-1, keepdim=True, unbiased=False)
        full = (full - full.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    predictor = weights["predictor"]
    encoded = encode(image, weights["encoder"], context)
    embedded = affine(encoded, predictor, "embed") + predictor["pos_embed"][0, context]
    losses = []
    for target in targets:
        gap = (predict(embedded, target, predictor) - full[target]).abs()
        smooth_l1 = torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5)
        losses.append(smooth_l1.flatten())
    return torch.cat(losses).mean()


class PlainAdamW:
    """AdamW from its definition, over named tensors."""

    def __init__(self, parameters: Weights) -> None:
        self.parameters = parameters
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def update(
        self,
        step: int,
        slopes: Weights,
        now: schedules.Schedule,
    ) -> None:
        for name, p in self.parameters.items():
            slope = slopes[name]
            first = self.first[name].mul_(0.9).add_(0.1 * slope)
            second = self.second[name].mul_(0.999).add_(0.001 * slope**2)
            if p.dim() > 1:
                p.mul_(1 - now.lr * now.weight_decay)
            mean = first / (1 - 0.9**step)
            root = (second / (1 - 0.999**step)).sqrt()
            p -= now.lr * mean / (root + 1e-8)


def plain_weights(model: IJepa) -> dict[str, Weights]:
    """Return copies of all parameters, by part of the model and name."""
    copies = {}
    for part in ("encoder", "predictor", "target"):
        copies[part] = {}
        for name, p in getattr(model, part).named_parameters():
            copies[part][name] = p.detach().clone().requires_grad_(p.requires_grad)
    return copies


def trained_weights(weights: dict[str, Weights]) -> Weights:
    """Return the tensors that take a gradient, by their name in the model."""
    trained = {}
    for part in ("encoder", "predictor"):
        for name, p in weights[part].items():
            if p.requires_grad:
                trained[f"{part}.{name}"] = p
    return trained


def torch_adamw(model: IJepa) -> torch.optim.AdamW:
    """Return torch's AdamW in two groups; biases and norms have no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "decay": 1},
        {"params": vectors, "decay": 0},
    ]
    return torch.optim.AdamW(groups, fused=True)


def without_padding(arrays: masks.Masks) -> list[list[list[int]]]:
    """Return image -> target -> patch numbers."""
    found = []
    for targets, lengths in zip(arrays.targets, arrays.target_len, strict=True):
        pairs = zip(targets, lengths, strict=True)
        found.append([target[:length].tolist() for target, length in pairs])
    return found


def plain_loss(pixels: Tensor, arrays: masks.Masks, weights: dict[str, Weights]) -> Tensor:
    losses = []
    contexts = arrays.context.tolist()
    for image, context, targets in zip(pixels, contexts, without_padding(arrays), strict=True):
        losses.append(image_loss(image, context, targets, weights))
    return torch.stack(losses).mean()


def test_loss_gradients_and_ten_steps_are_those_of_the_paper():
    """Forward, backward, AdamW and target update agree to 1e-5 relative over eleven steps."""
    model = built(RECIPE)
    adam = torch_adamw(model)
    weights = plain_weights(model)
    trained = trained_weights(weights)
    plain_adam = PlainAdamW(trained)
    for step in range(1, 12):
        index = np.arange(2) + 2 * step
        arrays = masks.sample(
            RECIPE.mask,
            GRID,
            0,
            np.zeros_like(index),
            index,
        )
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(
            2,
            3,
            64,
            64,
            generator=generator,
        )

        want = plain_loss(pixels, arrays, weights)
        slopes = torch.autograd.grad(want, list(trained.values()))
        loss, _ = model(pixels, as_tensors(arrays))
        adam.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        for name, slope in zip(trained, slopes, strict=True):
            difference = (model.get_parameter(name).grad - slope).abs().max()
            assert difference <= 1e-5 * slope.abs().max() + 1e-9, (step, name)

        now = schedules.schedule_at(OPTIM, step)
        for group in adam.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = now.weight_decay * group["decay"]
        adam.step()
        update_target(model, now.momentum)
        with torch.no_grad():
            plain_adam.update(step, dict(zip(trained, slopes, strict=True)), now)
            for name, slow in weights["target"].items():
                fast = weights["encoder"][name]
                slow.copy_(now.momentum * slow + (1 - now.momentum) * fast)


def test_the_l2_loss_is_the_mean_square():
    """objective.loss=l2 against its definition on the same predictions."""
    recipe = change("objective", loss="l2")
    model = built(recipe)
    drawn_masks = drawn(change("mask", mode="rasterized", targets=3))
    with torch.no_grad():
        target, _ = model.encode_targets(patchify(images(), 8), drawn_masks)
        context = model.encoder(images(), drawn_masks.context)
        prediction = model.predictor(context, drawn_masks.context, drawn_masks.targets)
        want = (prediction - target).square().mean().item()
        loss, _ = model(images(), drawn_masks)
    assert loss.item() == pytest.approx(want, rel=1e-6)
