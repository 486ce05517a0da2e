"""The range of each number among the settings, and which settings have no effect beside others.

In: a section of a config. Out: nothing, or a ConfigError that names setting, value and range. What
else depends on several settings is checked in config.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from jepa_cluster.errors import ConfigError, suggest

Range = tuple[float, float]
INF = math.inf
UNLIMITED = 1 << 30  # larger bounds guard against nonsense, and no error names them
HINTS = {"optim.clip": "optim.clip=null does not clip"}
# What a number of a setting, or each number of a list, must be: above and up to, or from and up to
ABOVE: Mapping[str, Range] = {
    "model.mlp_ratio": (0, 64),
    "data.std": (0, 10),
    "optim.epochs": (0, INF),
    "optim.lr": (0, 1),
    "optim.momentum": (0, 1),
    "optim.final_momentum": (0, 1),
    "optim.eps": (0, 1),
    "optim.clip": (0, INF),
    "optim.divergence.spike": (0, INF),
    "runtime.checkpoint_minutes": (0, INF),
    "runtime.grace_seconds": (0, INF),
    "runtime.hang_seconds": (0, INF),
    "runtime.peak_tflops": (0, INF),
}
FROM: Mapping[str, Range] = {
    "mask.targets": (1, 16),
    "mask.reference_batch": (1, 1 << 20),
    "mask.min_keep": (1, 1 << 20),
    "data.mean": (-10, 10),
    "data.shuffle_block": (1, 1 << 62),
    "data.shuffle_window": (1, 1 << 62),
    "data.max_corrupt": (0, 1),
    "optim.batch": (1, 1 << 31),
    "optim.steps": (1, 1 << 53),
    "optim.warmup_steps": (0, 1 << 53),
    "optim.warmup_epochs": (0, INF),
    "optim.start_lr": (0, 1),
    "optim.final_lr": (0, 1),
    "optim.weight_decay": (0, INF),
    "optim.final_weight_decay": (0, INF),
    "optim.cooldown_steps": (0, 1 << 53),
    "optim.schedule_stretch": (1, 100),
    "optim.betas": (0, 1 - 1e-9),
    "optim.base_width.encoder": (1, 1 << 31),
    "optim.base_width.encoder_head": (1, 1 << 31),
    "optim.base_width.predictor": (1, 1 << 31),
    "optim.base_width.predictor_head": (1, 1 << 31),
    "optim.divergence.target_std": (0, INF),
    "optim.divergence.rankme": (0, INF),
    "optim.divergence.patience": (1, 1 << 31),
    "probe.images": (0, 1 << 31),
    "probe.test_images": (0, 1 << 31),
    "runtime.workers": (0, 1024),
    "runtime.threads": (1, 4096),
    "runtime.fsdp_shard_size": (1, 1 << 20),
    "runtime.log_every": (1, 1 << 53),
    "runtime.probe_every": (0, 1 << 53),
    "runtime.keep_checkpoints": (2, 1 << 31),
    "runtime.milestone_every": (0, 1 << 53),
    "runtime.milestones": (1, 1 << 53),
    "runtime.stop_after": (0, 1 << 53),
}
# setting -> another one, and the values of that with which it has an effect
BLOCKS = ("multiblock", "packed", "reference", "block")
FIXED_CONTEXT = ("multiblock", "block", "rasterized", "random")
OBSERVED = ("optim.divergence.enabled", (True,))
MUP = ("optim.transfer", ("mup",))
MOVING_TARGET = ("objective.target", ("representation", "pixels", "views"))  # else: for probes
EFFECTIVE_WITH: Mapping[str, tuple[str, Sequence[object]]] = {
    "mask.target_scale": ("mask.mode", (*BLOCKS, "random")),
    "mask.target_aspect": ("mask.mode", BLOCKS),
    "mask.context_scale": ("mask.mode", ("multiblock", "packed", "reference")),
    "mask.aspect_distribution": ("mask.mode", ("multiblock", "packed", "block")),
    "mask.keep_quantile": ("mask.mode", FIXED_CONTEXT),
    "mask.context_keep": ("mask.mode", FIXED_CONTEXT),
    "mask.reference_batch": ("mask.mode", ("reference",)),
    "data.shuffle_block": ("data.order", ("block",)),
    "data.shuffle_window": ("data.order", ("block",)),
    "optim.epochs": ("optim.steps", (None,)),
    "optim.warmup_epochs": ("optim.warmup_steps", (None,)),
    "optim.momentum": MOVING_TARGET,
    "optim.final_momentum": MOVING_TARGET,
    "optim.cooldown_steps": ("optim.schedule", ("wsd",)),
    "optim.base_width.encoder": MUP,
    "optim.base_width.encoder_head": MUP,
    "optim.base_width.predictor": MUP,
    "optim.base_width.predictor_head": MUP,
    "optim.divergence.spike": OBSERVED,
    "optim.divergence.target_std": OBSERVED,
    "optim.divergence.rankme": OBSERVED,
    "optim.divergence.patience": OBSERVED,
}
SWITCH = (True, False)
NORMS = ("layernorm", "rmsnorm")
# Of timm's VisionTransformer: what neither draws random numbers nor is set by other settings, and
# its values; those of init_values are numbers above 0, at most 1
TIMM_OPTIONS: Mapping[str, Sequence[object]] = {
    "qkv_bias": SWITCH,
    "qk_norm": SWITCH,
    "scale_attn_norm": SWITCH,
    "scale_mlp_norm": SWITCH,
    "proj_bias": SWITCH,
    "pre_norm": SWITCH,
    "final_norm": SWITCH,
    "init_values": (),
    "reg_tokens": range(65),
    "norm_layer": NORMS,
    "embed_norm_layer": NORMS,
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "mish"),
    "mlp_layer": ("SwiGLU",),
    "attn_layer": ("diff",),
}


def check_timm_names(options: Iterable[str]) -> None:
    """Raise ConfigError for an option of `model.timm` that is not supported."""
    for name in options:
        key = f"model.timm.{name}"
        if "drop" in name:
            what = f"{key} would draw from a generator that is not saved"
            raise ConfigError(what, hint="a resumed trial would differ; leave it out")
        if name not in TIMM_OPTIONS:
            what = f"{key} is no option of timm's VisionTransformer that we support"
            raise ConfigError(what, hint=suggest(name, TIMM_OPTIONS))


def check_timm_values(options: Mapping[str, object]) -> None:
    """Raise ConfigError for a value of `model.timm` that is not supported.

    Only new trials are checked: frozen ones have run with theirs.
    """
    for name, value in options.items():
        key = f"model.timm.{name}"
        allowed = TIMM_OPTIONS[name]
        wanted = ", ".join(map(str, allowed))
        valid = any(value == each and type(value) is type(each) for each in allowed)
        if name == "init_values":
            valid = type(value) in (int, float) and 0 < cast("float", value) <= 1
            wanted = "a number above 0 and at most 1"
        if isinstance(allowed, range):
            wanted = f"{allowed[0]} to {allowed[-1]}"
        if not valid:
            raise ConfigError(f"{key}={value} is not supported", hint=f"values that are: {wanted}")


def check_ranges(section: object, key: str) -> None:
    """Raise ConfigError for a number of the section `key` that is outside its range."""
    for item in fields(section):  # pyright: ignore[reportArgumentType]
        name = f"{key}.{item.name}"
        value = getattr(section, item.name)
        if is_dataclass(value):
            check_ranges(value, name)
        above = ABOVE.get(name)
        least = FROM.get(name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in cast("tuple[float | None, ...]", numbers):
            if number is None:
                continue
            if above and not above[0] < number <= above[1]:
                raise _error(name, number, f"above {above[0]:g}", above[1])
            if least and not least[0] <= number <= least[1]:
                raise _error(name, number, f"{least[0]:g} or more", least[1])


def _error(name: str, number: float, wanted: str, most: float) -> ConfigError:
    if most < UNLIMITED:
        wanted += f" and at most {most:.12g}"
    return ConfigError(f"{name}={number} is not {wanted}", hint=HINTS.get(name, ""))


def no_effect(name: str, config: Mapping[str, Any]) -> ConfigError | None:
    """Return an error when a setting has no effect in a config, which is nested by section."""
    is_unused = name.startswith(("mask", "predictor", "objective.loss"))
    if is_unused and config.get("objective", {}).get("target") == "views":
        return ConfigError(
            f"{name} has no effect with objective.target=views",
            hint="leave it out; points that differ in it: list",
        )
    if name not in EFFECTIVE_WITH:
        return None
    other, values = EFFECTIVE_WITH[name]
    found: Any = config
    for part in other.split("."):
        found = found.get(part, {})
    if found in values or (found == {} and (other, values) == MOVING_TARGET):
        return None
    wanted = " or ".join(json.dumps(value).strip('"') for value in values)
    what = f"{name} has no effect with {other}={found or 'false'}"
    return ConfigError(what, hint=f"leave it out, or set {other}={wanted}")
