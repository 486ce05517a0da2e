"""Weights in and out: the reference code, timm, and transformers.

In: a file or folder of weights. Out: `Weights`, whose parts are state dicts with our names, and
files that the other libraries load strictly. A key that is missing, unknown or of the wrong shape
is an error: nothing is skipped. The target encoder is the one that evaluations use, and the default
everywhere.
"""

# pyright: standard

from __future__ import annotations

import json
import pickle
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa.weight_sizes import Sizes, State, infer_sizes

# Our name of a part -> the reference code's
REFERENCE_PARTS = {"encoder": "encoder", "predictor": "predictor", "target": "target_encoder"}

# In the names of tensors: what transformers writes -> what timm writes, replaced in this order
TRANSFORMERS_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "encoder.layer": "blocks",
    "attention.attention.query": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm.": "norm.",
}
TRANSFORMERS_QKV = ("query", "key", "value")

READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)


@dataclass(frozen=True)
class Weights:
    """Weights under our names.

    format: published (the reference code's), timm, transformers, or checkpoint (of a trial).
    parts: some of encoder, predictor, target. notes: what else the file says (epoch, library, ...).
    layers: `model.timm` of a trial, for which the other formats have no place.
    """

    format: str
    parts: dict[str, State]
    sizes: Sizes
    notes: dict[str, Any]
    layers: Mapping[str, Any] = field(default_factory=dict[str, Any])


# ---- reading


def read(path: Path) -> Weights:
    """Read weights of any known format.

    Raises CheckpointError for a file that is unreadable, of no known format, or incomplete.
    """
    notes: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / "model.safetensors"
        if (path / "config.json").exists():
            notes = json.loads((path / "config.json").read_text())
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        format_, parts = detect_format(content, str(file))
        if format_ == "published":
            notes = {k: v for k, v in content.items() if isinstance(v, (int, float, str))}
        sizes = infer_sizes(parts, notes)
    except READ_ERRORS as e:
        raise CheckpointError(
            f"cannot read weights: {type(e).__name__}: {e}",
            where=str(file),
            hint="check the path and the file",
        ) from e
    for name, part in parts.items():
        try:
            sizes.empty_part(name).load_state_dict(part, strict=True, assign=True)
        except RuntimeError as e:
            problems = textwrap.shorten(" ".join(str(e).splitlines()[1:]), 300)
            raise CheckpointError(f"{name} does not fit: {problems}", where=str(file)) from e
    return Weights(format_, parts, sizes, notes)


def detect_format(
    content: Any,
    where: str,
) -> tuple[str, dict[str, State]]:
    """Return the format of a loaded file, and its parts under our names.

    Raises CheckpointError for an unknown format.
    """
    state: State = content if isinstance(content, dict) else {}
    if isinstance(state.get("target_encoder", state.get("encoder")), dict):
        return "published", _from_reference(content)
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in state):
        return "transformers", {"target": from_transformers(state)}
    if "patch_embed.proj.weight" in state:
        head = ("head.", "fc_norm.")
        return "timm", {"target": {k: v for k, v in state.items() if not k.startswith(head)}}
    shown = ", ".join(sorted(map(str, state))[:5]) or type(content).__name__
    raise CheckpointError(
        f"no known format of weights: {shown} ...",
        where=where,
        hint="known: checkpoints of the reference code, timm, transformers",
    )


def _from_reference(content: dict[str, State]) -> dict[str, State]:
    parts: dict[str, State] = {}
    for ours, theirs in REFERENCE_PARTS.items():
        for key, value in content.get(theirs, {}).items():
            name = key.removeprefix("module.").removeprefix("predictor_")
            parts.setdefault(ours, {})[name] = value
    return parts


# ---- writing


def write(
    weights: Weights,
    format_: str,
    path: Path,
    part: str = "target",
) -> Path:
    """Write weights and return the path.

    timm, transformers: a folder with `part`. published: a file with all parts.
    Raises CheckpointError when the weights lack the part, or the heads that the format needs, and
    for layers that the format does not have.
    """
    if weights.layers:
        raise CheckpointError(
            f"{format_} has no place for model.timm={dict(weights.layers)}",
            hint="jepa_cluster.training.trial_weights.read_trial returns the tensors",
        )
    if format_ == "published":
        if weights.sizes.outputs not in (None, weights.sizes.width):
            what = "the predictor does not predict representations"
            raise CheckpointError(f"{format_} has no place for it: {what}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_to_reference(weights.parts), path)
        return path
    if part not in weights.parts:
        raise CheckpointError(
            f"there is no {part} in these weights", hint=f"they have {', '.join(weights.parts)}"
        )
    sizes, state = weights.sizes, weights.parts[part]
    if sizes.heads is None:
        raise CheckpointError(
            f"heads of a width of {sizes.width} are not known", hint="give --heads"
        )
    if format_ == "transformers":
        config, state = transformers_config(sizes), to_transformers(state)
    else:
        config = timm_config(sizes)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    state = {k: v.contiguous().clone() for k, v in state.items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


def _to_reference(parts: dict[str, State]) -> dict[str, State]:
    checkpoint: dict[str, State] = {}
    for part, tensors in parts.items():
        named: State = {}
        for key, value in tensors.items():
            named[f"module.{reference_name(part, key)}"] = value
        checkpoint[REFERENCE_PARTS[part]] = named
    return checkpoint


def reference_name(part: str, key: str) -> str:
    """Return the name that the reference code gives a tensor of a part."""
    if part == "predictor" and key != "mask_token":
        return f"predictor_{key}"
    return key


# ---- timm and transformers


def timm_config(sizes: Sizes) -> dict[str, Any]:
    """Return what `timm.create_model('local-dir:FOLDER')` needs to build a feature extractor."""
    image = sizes.grid * sizes.patch
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "model_args": {
            "img_size": image,
            "patch_size": sizes.patch,
            "embed_dim": sizes.width,
            "depth": sizes.depth,
            "num_heads": sizes.heads,
            "mlp_ratio": sizes.hidden / sizes.width,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, image, image],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bicubic",
            "classifier": "head",
        },
    }


def transformers_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.hidden,
        "image_size": sizes.grid * sizes.patch,
        "patch_size": sizes.patch,
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }


def to_transformers(state: State) -> State:
    """timm's names -> those of transformers 4, which 5 reads too. qkv is split in three."""
    out: State = {}
    for key, value in state.items():
        for theirs, ours in TRANSFORMERS_NAMES.items():
            key = key.replace(ours, theirs)
        if ".query." not in key:
            out[key] = value
            continue
        for name, third in zip(TRANSFORMERS_QKV, value.chunk(3), strict=True):
            out[key.replace("query", name)] = third
    return out


def from_transformers(state: State) -> State:
    """Names of transformers -> timm's. Raises KeyError when a query has no key or value."""
    out: State = {}
    for key, value in state.items():
        if key.startswith(("pooler.", "classifier.")):
            continue
        if ".attention.key." in key or ".attention.value." in key:
            continue
        if ".query." in key:
            value = torch.cat([state[key.replace("query", name)] for name in TRANSFORMERS_QKV])
        for theirs, ours in TRANSFORMERS_NAMES.items():
            key = key.replace(theirs, ours)
        out[key.removeprefix("ijepa.")] = value
    return out
