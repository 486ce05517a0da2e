"""Read weights from a file, or from the newest checkpoint of a trial, and describe them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

from jepa_cluster.ijepa import mup, weights
from jepa_cluster.ijepa.weight_sizes import Sizes, State
from jepa_cluster.ijepa.weights import Weights
from jepa_cluster.training import checkpoint
from jepa_cluster.trial.directory import TrialDir

SHOWN_NOTES = ("epoch", "step", "model_type", "architecture")


class Part(TypedDict):
    numbers: int
    tensors: int
    kinds: list[str]


class Description(TypedDict):
    """Format, sizes and parts of weights as a document."""

    format: str
    sizes: dict[str, int]
    parts: dict[str, Part]
    notes: dict[str, Any]


def read(path: Path) -> Weights:
    """Read weights of a file, a folder or the newest checkpoint. Raises CheckpointError.

    `optim.transfer=mup` scales queries; here the weights do, as other libraries need it.
    """
    trial = TrialDir(path)
    if not trial.identity.exists():
        return weights.read(path)
    step, parts = read_trial(trial)
    recipe = trial.read_config().recipe
    for name, part in parts.items():
        for key, tensor in part.items():
            if ".attn.qkv." in key:
                tensor[: len(tensor) // 3] *= mup.query_scale(recipe, name)
    return Weights("checkpoint", parts, Sizes.of(recipe), {"step": step}, recipe.model.timm)


def read_trial(trial: TrialDir) -> tuple[int, dict[str, State]]:
    """Step and parts of the newest checkpoint of a trial. Raises CheckpointError."""
    step, tensors = checkpoint.load_latest(trial)
    parts: dict[str, State] = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            _, part, key = name.split(".", 2)
            parts.setdefault(part, {})[key] = tensor
    return step, parts


def describe(weights: Weights) -> Description:
    parts: dict[str, Part] = {}
    for name, part in weights.parts.items():
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.values()})
        numbers = sum(tensor.numel() for tensor in part.values())
        parts[name] = {"numbers": numbers, "tensors": len(part), "kinds": kinds}
    return {
        "format": weights.format,
        "sizes": dataclasses.asdict(weights.sizes),
        "parts": parts,
        "notes": {key: weights.notes[key] for key in SHOWN_NOTES if key in weights.notes},
    }
