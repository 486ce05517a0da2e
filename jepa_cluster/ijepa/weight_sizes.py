"""Sizes of an encoder and a predictor from their tensors, and the shapes they ask for."""

# pyright: standard

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jepa_cluster.errors import CheckpointError

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

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


def infer_sizes(
    parts: dict[str, State],
    notes: dict[str, Any],
    where: str,
) -> Sizes:
    """Read sizes from the tensors of any encoder, and of the predictor where there is one."""
    encoder = parts.get("target") or parts.get("encoder")
    if not encoder or "patch_embed.proj.weight" not in encoder or "pos_embed" not in encoder:
        raise CheckpointError("no encoder with patch_embed and pos_embed in it", where=where)
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
    )


def depth_of(state: State) -> int:
    """Return the number of blocks."""
    blocks = {int(k.split(".")[1]) for k in state if k.startswith("blocks.")}
    return 1 + max(blocks, default=-1)


def require_complete(
    name: str,
    part: State,
    sizes: Sizes,
    where: str,
) -> None:
    """Raise CheckpointError unless a part has exactly the keys and shapes of its sizes."""
    want = part_shapes(name, sizes)
    problems = {"missing": sorted(set(want) - set(part)), "unknown": sorted(set(part) - set(want))}
    problems["shape"] = []
    for key in want:
        if key in part and part[key].shape != want[key]:
            problems["shape"].append(f"{key} {list(part[key].shape)}, not {list(want[key])}")
    found = [f"{problem}: {', '.join(keys[:4])}" for problem, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{name}: {'; '.join(found)}", where=where, hint="nothing was loaded")


def part_shapes(name: str, sizes: Sizes) -> dict[str, torch.Size]:
    """Return the shape of each key of a whole part."""
    patches = sizes.grid**2
    if name == "predictor":
        width, depth = sizes.predictor_width or 0, sizes.predictor_depth or 0
        shapes = block_shapes(width, depth, 4 * width)
        shapes |= _linear("embed", width, sizes.width) | _linear("proj", sizes.width, width)
        shapes["mask_token"] = (1, 1, width)
    else:
        width, patch = sizes.width, sizes.patch
        shapes = block_shapes(width, sizes.depth, sizes.hidden)
        shapes["patch_embed.proj.weight"] = (width, 3, patch, patch)
        shapes["patch_embed.proj.bias"] = (width,)
    shapes |= _norm("norm", width)
    shapes["pos_embed"] = (1, patches, width)
    return {k: torch.Size(v) for k, v in shapes.items()}


def block_shapes(
    width: int,
    depth: int,
    hidden: int,
) -> Shapes:
    """Return the shape of each key of `depth` transformer blocks."""
    shapes: Shapes = {}
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", hidden, width)
        shapes |= _linear(f"{block}.mlp.fc2", width, hidden)
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(
    name: str,
    rows: int,
    columns: int,
) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
