"""Weights in and out: the reference code, timm, transformers, and our own file.

In: a file or folder of weights. Out: `Weights`, whose parts are state dicts with our names, and
files that the other libraries load strictly. A key that is missing, unknown or of the wrong shape
is an error: nothing is skipped. The target encoder is the one that evaluations use, and the default
everywhere.

Own file: safetensors with keys `encoder.*`, `predictor.*`, `target.*` and the sizes as metadata.
"""

# pyright: standard

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.ijepa.weight_sizes import Sizes, State, infer_sizes, require_complete

PARTS = ("encoder", "predictor", "target")

# Our name of a part -> the reference code's
REFERENCE_PARTS = {"encoder": "encoder", "predictor": "predictor", "target": "target_encoder"}

# The reference code's name of a part of the predictor -> ours
REFERENCE_PREDICTOR = {
    "predictor_embed.": "embed.",
    "predictor_pos_embed": "pos_embed",
    "predictor_blocks.": "blocks.",
    "predictor_norm.": "norm.",
    "predictor_proj.": "proj.",
    "mask_token": "mask_token",
}

# transformers' name inside a layer -> timm's inside a block
TRANSFORMERS_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}

# transformers' name outside the layers -> timm's
TRANSFORMERS_ENDS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
TRANSFORMERS_QKV = ("query", "key", "value")

READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)


@dataclass(frozen=True)
class Weights:
    """Weights under our names.

    format: published (the reference code's), timm, transformers or own.
    parts: some of encoder, predictor, target. notes: what else the file says (epoch, library, ...).
    """

    format: str
    parts: dict[str, State]
    sizes: Sizes
    notes: dict[str, Any]


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
        content = _load(file, notes)
    except READ_ERRORS as e:
        raise CheckpointError(
            f"cannot read weights: {e}", where=str(file), hint="check the path and the file"
        ) from e
    format_, parts = detect_format(content, str(file))
    if format_ == "published":
        notes = {k: v for k, v in content.items() if isinstance(v, (int, float, str))}
    sizes = infer_sizes(parts, notes, str(file))
    for name, part in parts.items():
        require_complete(name, part, sizes, str(file))
    return Weights(format_, parts, sizes, notes)


def _load(file: Path, notes: dict[str, Any]) -> Any:
    """Load a file; metadata of a safetensors file is added to notes."""
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    with safetensors.safe_open(file, "pt") as opened:
        notes |= opened.metadata() or {}
    return load_file(file)


def detect_format(content: Any, where: str) -> tuple[str, dict[str, State]]:
    """Return the format of a loaded file, and its parts under our names.

    Raises CheckpointError for an unknown format.
    """
    keys = set(content) if isinstance(content, dict) else set[Any]()
    reference_parts = [p for p in PARTS if isinstance(_get(content, REFERENCE_PARTS[p]), dict)]
    if reference_parts:
        return "published", _from_reference(content, where)
    if _has_prefix(keys, "target."):
        own_parts = [p for p in PARTS if _has_prefix(keys, f"{p}.")]
        return "own", {p: subset(content, f"{p}.") for p in own_parts}
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in keys):
        state = subset(content, "ijepa.") or content
        return "transformers", {"target": from_transformers(state, where)}
    if "patch_embed.proj.weight" in keys:
        head = ("head.", "fc_norm.")
        return "timm", {"target": {k: v for k, v in content.items() if not k.startswith(head)}}
    shown = ", ".join(sorted(map(str, keys))[:5]) or type(content).__name__
    raise CheckpointError(
        f"no known format of weights: {shown} ...",
        where=where,
        hint="known: checkpoints of the reference code, timm, transformers, "
        "`jepa weights import` files",
    )


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _has_prefix(keys: set[Any], prefix: str) -> bool:
    return any(k.startswith(prefix) for k in keys)


def _from_reference(content: dict[str, State], where: str) -> dict[str, State]:
    parts: dict[str, State] = {}
    for ours, theirs in REFERENCE_PARTS.items():
        if theirs in content:
            parts[ours] = strip_module_prefix(content[theirs])
    if "predictor" in parts:
        parts["predictor"] = _rename_all(parts["predictor"], REFERENCE_PREDICTOR, where)
    return parts


def strip_module_prefix(state: State) -> State:
    """Remove the prefix that a data-parallel wrapper leaves."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def subset(state: State, prefix: str) -> State:
    """Return the entries whose keys begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def rename(
    key: str,
    names: dict[str, str],
    where: str,
) -> str:
    """Replace the first prefix of `names` that fits. Raises CheckpointError when none does."""
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise CheckpointError(f"unknown key '{key}'", where=where, hint="is this an I-JEPA checkpoint?")


def _rename_all(
    state: State,
    names: dict[str, str],
    where: str,
) -> State:
    return {rename(k, names, where): v for k, v in state.items()}


def load(model: IJepa, weights: Weights) -> None:
    """Copy every part that `weights` has into a model of the same sizes.

    With a target encoder only, the context encoder becomes a copy of it.
    Raises CheckpointError when the sizes differ.
    """
    parts = dict(weights.parts)
    parts.setdefault("encoder", parts.get("target", {}))
    parts.setdefault("target", parts["encoder"])
    for name, part in parts.items():
        try:
            model.get_submodule(name).load_state_dict(part, strict=True)
        except RuntimeError as e:
            reason = str(e).splitlines()[1].strip()
            raise CheckpointError(f"{name} does not fit the model: {reason}") from e


# ---- writing


def write(
    weights: Weights,
    format_: str,
    path: Path,
    part: str = "target",
) -> Path:
    """Write weights and return the path.

    timm, transformers: a folder with `part`. published, own: a file with all parts.
    Raises CheckpointError when the weights lack the part, or the heads that the format needs.
    """
    if format_ in ("timm", "transformers"):
        return _write_folder(weights, format_, path, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format_ == "own":
        state: State = {}
        for name, part_state in weights.parts.items():
            state |= _with_prefix(part_state, f"{name}.")
        sizes = dataclasses.asdict(weights.sizes)
        metadata = {k: str(v) for k, v in sizes.items() if v is not None}
        save_file(contiguous(state), path, metadata)
        return path
    checkpoint: dict[str, State] = {}
    for name, part_state in weights.parts.items():
        if name == "predictor":
            part_state = _rename_all(part_state, _inverse(REFERENCE_PREDICTOR), "")
        checkpoint[REFERENCE_PARTS[name]] = _with_prefix(part_state, "module.")
    torch.save(checkpoint, path)
    return path


def _write_folder(
    weights: Weights,
    format_: str,
    path: Path,
    part: str,
) -> Path:
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
    save_file(contiguous(state), path / "model.safetensors", {"format": "pt"})
    return path


def from_model(model: IJepa, heads: int) -> Weights:
    """Return the weights of an unsharded model."""
    parts: dict[str, State] = {}
    for name in PARTS:
        state = model.get_submodule(name).state_dict()
        parts[name] = {k: v.detach().cpu() for k, v in state.items()}
    sizes = infer_sizes(parts, {"heads": heads}, "the model")
    return Weights("own", parts, sizes, {})


def contiguous(state: State) -> State:
    return {k: v.contiguous().clone() for k, v in state.items()}


def _with_prefix(state: State, prefix: str) -> State:
    return {prefix + k: v for k, v in state.items()}


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


# ---- timm and transformers


def timm_config(sizes: Sizes) -> dict[str, Any]:
    """Return what `timm.create_model('local-dir:FOLDER')` needs to build a feature extractor."""
    image = sizes.grid * sizes.patch
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": sizes.width,
        "global_pool": "avg",
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
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def to_transformers(state: State) -> State:
    """timm's names -> those of transformers 4, which 5 reads too. qkv is split in three."""
    out: State = {}
    block_names, end_names = _inverse(TRANSFORMERS_BLOCK), _inverse(TRANSFORMERS_ENDS)
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if key == "pos_embed":
            out["embeddings.position_embeddings"] = value
        elif module in end_names:
            out[f"{end_names[module]}.{leaf}"] = value
        else:
            _, i, inner = module.split(".", 2)
            layer = f"encoder.layer.{i}"
            if inner == "attn.qkv":
                for name, third in zip(TRANSFORMERS_QKV, value.chunk(3), strict=True):
                    out[f"{layer}.attention.attention.{name}.{leaf}"] = third
            else:
                out[f"{layer}.{block_names[inner]}.{leaf}"] = value
    return out


def from_transformers(state: State, where: str) -> State:
    """Names of transformers -> timm's. Raises CheckpointError for an unknown key."""
    out: State = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if key == "embeddings.position_embeddings":
            out["pos_embed"] = value
        elif module in TRANSFORMERS_ENDS:
            out[f"{TRANSFORMERS_ENDS[module]}.{leaf}"] = value
        elif key.startswith("encoder.layer."):
            i, inner = module.removeprefix("encoder.layer.").split(".", 1)
            if inner == "attention.attention.query":
                thirds = [state[key.replace(".query.", f".{n}.")] for n in TRANSFORMERS_QKV]
                out[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(thirds)
            elif inner not in ("attention.attention.key", "attention.attention.value"):
                out[f"blocks.{i}.{rename(inner, TRANSFORMERS_BLOCK, where)}.{leaf}"] = value
        elif not key.startswith("pooler."):
            raise CheckpointError(f"unknown key '{key}'", where=where)
    return out
