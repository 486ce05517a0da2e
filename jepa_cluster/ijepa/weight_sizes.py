"""Sizes of an encoder and a predictor from their tensors, and empty modules of these sizes."""

# pyright: standard

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jepa_cluster import config
from jepa_cluster.ijepa.predictor import Predictor
from jepa_cluster.ijepa.vit import Encoder

State = dict[str, Tensor]

# Attention heads by width: tensors do not say
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True)
class Sizes:
    """Sizes that the tensors have.

    heads: from the file where it says, else from the table of widths, else None.
    hidden: width of the MLP. patch: pixels. grid: patches along one side.
    """

    width: int
    depth: int
    heads: int | None
    hidden: int
    patch: int
    grid: int
    predictor_width: int | None = None
    predictor_depth: int | None = None
    outputs: int | None = None  # of the predictor, per patch

    @classmethod
    def of(cls, recipe: config.Recipe) -> Sizes:
        """Return the sizes of a trial's model, whatever layers it has."""
        model, predictor = recipe.model, recipe.predictor
        return cls(
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            hidden=int(model.width * model.mlp_ratio),
            patch=model.patch,
            grid=model.grid,
            predictor_width=predictor.width,
            predictor_depth=predictor.depth,
            outputs=recipe.target_width,
        )

    def empty_part(self, name: str) -> nn.Module:
        """Build an encoder or a predictor of these sizes without values."""
        ratio = (self.hidden + 0.5) / self.width  # the model rounds the product down
        image = self.grid * self.patch
        model = config.Model(name, self.width, self.depth, 1, ratio, self.patch, image)
        with torch.device("meta"):
            if name != "predictor":
                return Encoder(model)
            width, depth = self.predictor_width or 0, self.predictor_depth or 0
            return Predictor(model, config.Predictor(width, depth, heads=1), self.outputs or 0)


def infer_sizes(
    parts: dict[str, State],
    notes: dict[str, Any],
) -> Sizes:
    """Read sizes from the tensors of any encoder, and of the predictor where there is one.

    Raises KeyError for a tensor that is missing.
    """
    encoder = parts.get("target") or parts["encoder"]
    width, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    timm_args = notes.get("model_args") or {}
    heads = notes.get("num_attention_heads") or notes.get("heads") or timm_args.get("num_heads")
    sizes = Sizes(
        width=width,
        depth=depth_of(encoder),
        heads=int(heads) if heads else HEADS.get(width),
        hidden=encoder["blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        grid=round(encoder["pos_embed"].shape[1] ** 0.5),
    )
    predictor = parts.get("predictor")
    if not predictor:
        return sizes
    return dataclasses.replace(
        sizes,
        predictor_width=predictor["embed.weight"].shape[0],
        predictor_depth=depth_of(predictor),
        outputs=predictor["proj.weight"].shape[0],
    )


def depth_of(state: State) -> int:
    """Return the number of blocks."""
    blocks = {int(k.split(".")[1]) for k in state if k.startswith("blocks.")}
    return 1 + max(blocks, default=-1)
