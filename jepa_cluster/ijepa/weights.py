"""Weights in and out: the published checkpoints, timm, transformers, and one file of our own.

In: a file or folder of weights. Out: `Weights`, whose parts are state dicts with our names, and files that the other
libraries load strictly. Sizes are inferred from the tensors. A key that is missing, unknown or of the wrong shape is
an error: nothing is ever skipped. The target encoder is the one that evaluations use, and the default everywhere.

Own file: safetensors with keys `encoder.*`, `predictor.*`, `target.*` and the sizes as metadata.
"""

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
from torch import Tensor

from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa.objective import IJepa

State = dict[str, Tensor]
PARTS = ("encoder", "predictor", "target")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # by width: tensors do not tell

PUBLISHED = {"encoder": "encoder", "predictor": "predictor", "target": "target_encoder"}
PREDICTOR = {  # published name of a predictor's part -> ours
    "predictor_embed.": "embed.",
    "predictor_pos_embed": "pos_embed",
    "predictor_blocks.": "blocks.",
    "predictor_norm.": "norm.",
    "predictor_proj.": "proj.",
    "mask_token": "mask_token",
}
BLOCK = {  # transformers' name inside a layer -> timm's inside a block
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
ENDS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


@dataclass(frozen=True)
class Sizes:
    """What the tensors say. heads: from the file where it says, else from the table of widths, else None."""

    width: int
    depth: int
    heads: int | None
    hidden: int  # of the MLP
    patch: int
    grid: int
    predictor_width: int | None = None
    predictor_depth: int | None = None


@dataclass(frozen=True)
class Weights:
    format: str  # published | timm | transformers | own
    parts: dict[str, State]  # some of encoder, predictor, target, with our names
    sizes: Sizes
    notes: dict[str, Any]  # what else the file says: epoch, library, ...


# ---- reading


def read(path: Path) -> Weights:
    """Whatever stands at path. CheckpointError when it is unreadable, of no known format, or not complete."""
    notes: dict[str, Any] = {}
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and (path / "config.json").exists():
        notes = json.loads((path / "config.json").read_text())
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
            with safetensors.safe_open(file, "pt") as opened:
                notes |= opened.metadata() or {}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"cannot read weights: {e}", where=str(file), hint="check the path and the file") from e
    format_, parts = recognise(found, str(file))
    if format_ == "published":
        notes = {k: v for k, v in found.items() if isinstance(v, (int, float, str))}
    sizes = infer(parts, notes, str(file))
    for name, part in parts.items():
        complete(name, part, sizes, str(file))
    return Weights(format_, parts, sizes, notes)


def recognise(found: Any, where: str) -> tuple[str, dict[str, State]]:
    """The format of a loaded file and its parts under our names."""
    if isinstance(found, dict) and any(v in found and isinstance(found[v], dict) for v in PUBLISHED.values()):
        parts = {ours: bare(found[theirs]) for ours, theirs in PUBLISHED.items() if theirs in found}
        if "predictor" in parts:
            parts["predictor"] = {rename(k, PREDICTOR, where): v for k, v in parts["predictor"].items()}
        return "published", parts
    keys = set(found) if isinstance(found, dict) else set()
    if any(k.startswith("target.") for k in keys):
        return "own", {p: under(found, p + ".") for p in PARTS if any(k.startswith(p + ".") for k in keys)}
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in keys):
        return "transformers", {"target": from_transformers(under(found, "ijepa.") or found, where)}
    if "patch_embed.proj.weight" in keys:
        return "timm", {"target": {k: v for k, v in found.items() if not k.startswith(("head.", "fc_norm."))}}
    raise CheckpointError(
        f"no known format of weights: {', '.join(sorted(map(str, keys))[:5]) or type(found).__name__} ...",
        where=where,
        hint="known: published I-JEPA checkpoints, timm, transformers, `jepa weights import` files",
    )


def bare(state: State) -> State:
    """Without the prefix that a data-parallel wrapper leaves."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def under(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def rename(key: str, names: dict[str, str], where: str) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise CheckpointError(f"unknown key '{key}'", where=where, hint="is this an I-JEPA checkpoint?")


def infer(parts: dict[str, State], notes: dict[str, Any], where: str) -> Sizes:
    """Sizes from the tensors of any encoder, and of the predictor where there is one."""
    encoder = parts.get("target") or parts.get("encoder")
    if not encoder or "patch_embed.proj.weight" not in encoder or "pos_embed" not in encoder:
        raise CheckpointError("no encoder with patch_embed and pos_embed in it", where=where)
    width, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    predictor = parts.get("predictor")
    known = notes.get("num_attention_heads") or notes.get("heads") or (notes.get("model_args") or {}).get("num_heads")
    return Sizes(
        width=width,
        depth=deepest(encoder),
        heads=int(known) if known else HEADS.get(width),
        hidden=encoder["blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        grid=round(encoder["pos_embed"].shape[1] ** 0.5),
        predictor_width=predictor["embed.weight"].shape[0] if predictor else None,
        predictor_depth=deepest(predictor) if predictor else None,
    )


def deepest(state: State) -> int:
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)


def complete(name: str, part: State, sizes: Sizes, where: str) -> None:
    """CheckpointError unless a part has exactly the keys and shapes that its sizes ask for."""
    want = shapes(name, sizes)
    missing, unknown = sorted(set(want) - set(part)), sorted(set(part) - set(want))
    wrong = [f"{k} {list(part[k].shape)}, not {list(want[k])}" for k in want if k in part and part[k].shape != want[k]]
    if missing or unknown or wrong:
        said = [
            f"{w}: {', '.join(v[:4])}" for w, v in (("missing", missing), ("unknown", unknown), ("shape", wrong)) if v
        ]
        raise CheckpointError(f"{name}: {'; '.join(said)}", where=where, hint="nothing was loaded")


def shapes(name: str, s: Sizes) -> dict[str, torch.Size]:
    """Key -> shape of a whole part."""
    small = name == "predictor"
    width, depth = (s.predictor_width or 0, s.predictor_depth or 0) if small else (s.width, s.depth)
    hidden = 4 * width if small else s.hidden
    maps = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    out: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, s.grid**2, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            out |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        for key, (rows, columns) in maps.items():
            out |= {f"blocks.{i}.{key}.weight": (rows, columns), f"blocks.{i}.{key}.bias": (rows,)}
    if small:
        out |= {"mask_token": (1, 1, width), "embed.weight": (width, s.width), "embed.bias": (width,)}
        out |= {"proj.weight": (s.width, width), "proj.bias": (s.width,)}
    else:
        out |= {"patch_embed.proj.weight": (width, 3, s.patch, s.patch), "patch_embed.proj.bias": (width,)}
    return {k: torch.Size(v) for k, v in out.items()}


def load(model: IJepa, weights: Weights) -> None:
    """Put every part that `weights` has into a model of the same sizes. CheckpointError when they do not fit.

    With a target encoder only, the context encoder becomes a copy of it.
    """
    parts = dict(weights.parts)
    parts.setdefault("encoder", parts.get("target", {}))
    parts.setdefault("target", parts["encoder"])
    for name, part in parts.items():
        try:
            model.get_submodule(name).load_state_dict(part, strict=True)
        except RuntimeError as e:
            raise CheckpointError(f"{name} does not fit the model: {str(e).splitlines()[1].strip()}") from e


# ---- writing


def write(weights: Weights, format_: str, path: Path, part: str = "target") -> Path:
    """Write `part` as a timm or transformers folder, or all parts as a published or own file -> what was written.

    CheckpointError when the weights have no such part, or the format needs heads and nobody knows them.
    """
    if format_ in ("timm", "transformers"):
        if part not in weights.parts:
            raise CheckpointError(f"there is no {part} in these weights", hint=f"they have {', '.join(weights.parts)}")
        if weights.sizes.heads is None:
            raise CheckpointError(f"heads of a width of {weights.sizes.width} are not known", hint="give --heads")
        state = weights.parts[part]
        config, named = timm_config(weights.sizes), state
        if format_ == "transformers":
            config, named = transformers_config(weights.sizes), to_transformers(state)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        save_file(contiguous(named), path / "model.safetensors", {"format": "pt"})
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if format_ == "own":
        flat = {f"{p}.{k}": v for p, s in weights.parts.items() for k, v in s.items()}
        save_file(
            contiguous(flat), path, {k: str(v) for k, v in dataclasses.asdict(weights.sizes).items() if v is not None}
        )
        return path
    out: dict[str, Any] = {PUBLISHED[p]: {f"module.{k}": v for k, v in s.items()} for p, s in weights.parts.items()}
    if "predictor" in weights.parts:
        back = {new: old for old, new in PREDICTOR.items()}
        named = {rename(k, back, ""): v for k, v in weights.parts["predictor"].items()}
        out["predictor"] = {f"module.{k}": v for k, v in named.items()}
    torch.save(out, path)
    return path


def of(model: IJepa, heads: int) -> Weights:
    """The weights of an unsharded model."""
    parts = {p: {k: v.detach().cpu() for k, v in model.get_submodule(p).state_dict().items()} for p in PARTS}
    return Weights("own", parts, dataclasses.replace(infer(parts, {}, "the model"), heads=heads), {})


def contiguous(state: State) -> State:
    return {k: v.contiguous().clone() for k, v in state.items()}


# ---- timm and transformers


def timm_config(s: Sizes) -> dict[str, Any]:
    """What `timm.create_model('local-dir:FOLDER')` needs to build and fill the encoder as a feature extractor."""
    arguments = {"img_size": s.grid * s.patch, "patch_size": s.patch, "embed_dim": s.width, "depth": s.depth}
    arguments |= {"num_heads": s.heads, "mlp_ratio": s.hidden / s.width, "class_token": False, "global_pool": "avg"}
    data = {"input_size": [3, s.grid * s.patch, s.grid * s.patch], "num_classes": 0, "first_conv": "patch_embed.proj"}
    data |= {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "classifier": "head",
    }
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": s.width,
        "global_pool": "avg",
        "model_args": arguments | {"fc_norm": False},
        "pretrained_cfg": data,
    }


def transformers_config(s: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": s.width,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.heads,
        "intermediate_size": s.hidden,
        "image_size": s.grid * s.patch,
        "patch_size": s.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def to_transformers(state: State) -> State:
    """timm's names -> those of transformers 4 (which 5 reads too); qkv is split in three."""
    out: State = {}
    back = {new: old for old, new in BLOCK.items()}
    for key, value in state.items():
        if key == "pos_embed":
            out["embeddings.position_embeddings"] = value
        elif not key.startswith("blocks."):
            stem, _, leaf = key.rpartition(".")
            out[f"{next(t for t, ours in ENDS.items() if ours == stem)}.{leaf}"] = value
        else:
            _, i, rest = key.split(".", 2)
            stem, _, leaf = rest.rpartition(".")
            if stem == "attn.qkv":
                for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"encoder.layer.{i}.attention.attention.{name}.{leaf}"] = third
            else:
                out[f"encoder.layer.{i}.{back[stem]}.{leaf}"] = value
    return out


def from_transformers(state: State, where: str) -> State:
    out: State = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if key == "embeddings.position_embeddings":
            out["pos_embed"] = value
        elif stem in ENDS:
            out[f"{ENDS[stem]}.{leaf}"] = value
        elif key.startswith("encoder.layer."):
            i, inner = stem.removeprefix("encoder.layer.").split(".", 1)
            if inner == "attention.attention.query":
                thirds = [state[key.replace(".query.", f".{name}.")] for name in ("query", "key", "value")]
                out[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(thirds)
            elif inner not in ("attention.attention.key", "attention.attention.value"):
                out[f"blocks.{i}.{rename(inner, BLOCK, where)}.{leaf}"] = value
        elif not key.startswith("pooler."):
            raise CheckpointError(f"unknown key '{key}'", where=where)
    return out
