"""Read weights from a file, or from the newest checkpoint of a trial, and describe them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

import torch

from jepa_cluster.ijepa import weights
from jepa_cluster.ijepa.objective import IJepa
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
    """Read weights of a file, a folder or the newest checkpoint. Raises CheckpointError."""
    trial = TrialDir(path)
    if not trial.identity.exists():
        return weights.read(path)
    config = trial.read_config()
    step, tensors = checkpoint.load_latest(trial)
    model = IJepa(config.recipe)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"model.{name}"])
    found = weights.from_model(model, config.recipe.model.heads)
    return dataclasses.replace(found, notes={"step": step})


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
