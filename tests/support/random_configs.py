"""Random overrides from the whole space of settings, for trials of seconds.

In: a generator, and the data sets. Out: overrides as a sweep file's `base` has them, and whether
one of them is impossible. Width, depth, batch and ranks are small. `NOT_DRAWN` says why a setting
is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jepa_cluster.config_ranges import EFFECTIVE_WITH

NOT_DRAWN = {
    "model.name": "an identifier; test_config.py has its rule",
    "data.name": "a name for people",
    "data.digest": "derived",
    "data.images": "derived",
    "data.val_digest": "derived",
    "mask.context_keep": "derived where K is fixed, so most values are refused",
    "mask.target_patches": "derived",
    "optim.steps": "always 3",
    "optim.epochs": "replaced by steps",
    "optim.warmup_epochs": "replaced by warmup_steps",
    "optim.momentum_steps": "derived",
    "seed": "belongs to `seeds` of a sweep file",
    "runtime.data_root": "one of the data sets",
    "runtime.nodes": "belongs to `resources` of a sweep file",
    "runtime.procs_per_node": "always 2, by `resources`",
    "runtime.device": "a machine without a GPU",
    "runtime.compile": "minutes per trial; test_ijepa.py compiles",
    "runtime.fork_from": "derived",
    "runtime.lr_source": "derived",
    "runtime.stop_after": "stops the first attempt",
    "runtime.hang_seconds": "test_hang.py",
}
Draw = Callable[[random.Random], Any]


def choice(*values: Any) -> Draw:
    return lambda chance: chance.choice(values)


def uniform(low: float, high: float) -> Draw:
    return lambda chance: round(chance.uniform(low, high), 4)


def log_uniform(low: float, high: float) -> Draw:
    return lambda chance: float(f"{math.exp(chance.uniform(math.log(low), math.log(high))):.3g}")


def interval(low: float, high: float) -> Draw:
    return lambda chance: sorted(round(chance.uniform(low, high), 3) for _ in range(2))


def numbers(low: float, high: float, count: int) -> Draw:
    return lambda chance: [round(chance.uniform(low, high), 3) for _ in range(count)]


PRESETS: Mapping[str, Draw] = {
    "mask": choice("multiblock", "reference", "packed", "rasterized", "block", "random"),
    "objective": choice("paper", "reference"),
    "optim": choice("demo", "paper", "reference", "robust", "wsd"),
}
TIMM: Mapping[str, Draw] = {
    "qkv_bias": choice(True, False),
    "qk_norm": choice(True, False),
    "scale_attn_norm": choice(True, False),
    "scale_mlp_norm": choice(True, False),
    "proj_bias": choice(True, False),
    "init_values": log_uniform(1e-6, 1),
    "reg_tokens": choice(0, 1, 4),
    "pre_norm": choice(True, False),
    "final_norm": choice(True, False),
    "mlp_layer": choice("SwiGLU"),
    "act_layer": choice("gelu", "relu", "silu", "mish"),
    "norm_layer": choice("layernorm", "rmsnorm"),
    "embed_norm_layer": choice("layernorm", "rmsnorm"),
    "attn_layer": choice("diff"),
}
DRAWN: Mapping[str, Draw] = {
    "model.width": choice(16, 24, 32, 48, 64),
    "model.depth": choice(1, 2, 3),
    "model.heads": choice(1, 2, 4),
    "model.mlp_ratio": choice(0.5, 1.0, 2.5, 4.0),
    "model.patch": choice(4, 6, 8, 12),
    "model.image": choice(24, 32, 48, 64),
    "model.init": choice("reference", "depth_rescaled", "fan_in"),
    "model.timm": lambda chance: {
        name: TIMM[name](chance) for name in chance.sample(sorted(TIMM), chance.randint(0, 2))
    },
    "predictor.width": choice(16, 24, 32),
    "predictor.depth": choice(1, 2),
    "predictor.heads": choice(1, 2, 4),
    "predictor.mode": choice("per_target", "joint"),
    "mask.mode": choice("multiblock", "reference", "packed", "rasterized", "block", "random"),
    "mask.targets": choice(1, 2, 4, 7, 16),
    "mask.target_scale": interval(0.02, 0.6),
    "mask.target_aspect": interval(0.2, 5.0),
    "mask.context_scale": interval(0.3, 1.0),
    "mask.aspect_distribution": choice("uniform", "log"),
    "mask.keep_quantile": uniform(0.001, 0.999),
    "mask.reference_batch": choice(1, 2, 16, 128),
    "mask.min_keep": choice(1, 2, 4, 10),
    "data.order": choice("global", "block"),
    "data.shuffle_block": choice(1, 3, 64, 10_000),
    "data.shuffle_window": choice(1, 4, 1024),
    "data.crop_scale": interval(0.05, 1.0),
    "data.crop_aspect": interval(0.2, 4.0),
    "data.flip": choice(True, False),
    "data.mean": numbers(-1.0, 1.0, 3),
    "data.std": numbers(0.01, 2.0, 3),
    "data.max_corrupt": uniform(0.0, 1.0),
    "objective.loss": choice("smooth_l1", "l2"),
    "objective.target": choice("representation", "frozen", "pixels", "views"),
    "optim.batch": choice(2, 4, 8, 14, 32),
    "optim.warmup_steps": choice(0, 1, 2),
    "optim.start_lr": log_uniform(1e-8, 0.01),
    "optim.lr": log_uniform(1e-8, 1.0),
    "optim.final_lr": log_uniform(1e-8, 0.01),
    "optim.weight_decay": uniform(0.0, 2.0),
    "optim.final_weight_decay": uniform(0.0, 2.0),
    "optim.decay_shape": choice("cosine", "linear"),
    "optim.momentum": uniform(0.5, 1.0),
    "optim.final_momentum": uniform(0.5, 1.0),
    "optim.schedule": choice("cosine", "wsd"),
    "optim.cooldown_steps": choice(0, 1, 2, 3),
    "optim.schedule_stretch": uniform(1.0, 3.0),
    "optim.betas": numbers(0.0, 0.9999, 2),
    "optim.eps": log_uniform(1e-12, 0.1),
    "optim.clip": log_uniform(1e-3, 100),
    "optim.transfer": choice("none", "mup"),
    "optim.base_width.encoder": choice(8, 16, 32),
    "optim.base_width.encoder_head": choice(4, 8, 16),
    "optim.base_width.predictor": choice(8, 16, 32),
    "optim.base_width.predictor_head": choice(4, 8, 16),
    "optim.precision": choice("bf16", "autocast", "fp32"),
    "optim.divergence.enabled": choice(True, False),
    "optim.divergence.spike": log_uniform(1.5, 100),
    "optim.divergence.target_std": uniform(0.0, 0.1),
    "optim.divergence.rankme": uniform(0.0, 2.0),
    "optim.divergence.patience": choice(1, 3),
    "probe.images": choice(0, 1, 7, 50, 100_000),
    "probe.test_images": choice(0, 1, 7, 50, 100_000),
    "probe.labels": choice([], ["class"], ["count"], ["class", "distance"]),
    "runtime.micro_batch": choice(None, 1, 2, 4),
    "runtime.workers": choice(0, 1),
    "runtime.threads": choice(None, 1, 2),
    "runtime.activation_checkpointing": choice(True, False),
    "runtime.fsdp_shard_size": choice(None, 1, 2),
    "runtime.log_every": choice(1, 2, 7),
    "runtime.probe_every": choice(0, 1, 2),
    "runtime.checkpoint_minutes": log_uniform(0.001, 100),
    "runtime.keep_checkpoints": choice(2, 5),
    "runtime.milestone_every": choice(0, 1, 2),
    "runtime.milestones": choice([], [1], [2, 3]),
    "runtime.grace_seconds": uniform(10, 60),
    "runtime.peak_tflops": log_uniform(0.1, 1000),
    "runtime.staging_dir": choice(None, "/dev/shm"),
}
# values that must be refused, whatever the other settings are
IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "model.width": (0, -8, 34),
    "model.depth": (0, -1),
    "model.heads": (0, -2),
    "model.mlp_ratio": (0, -1, 65, math.nan),
    "model.patch": (0, -8),
    "model.image": (0, 8),
    "model.timm": (
        {"drop_path_rate": 0.1},
        {"qkv_bais": True},
        {"mlp_layer": "Nonsense"},
        {"reg_tokens": -1},
        {"init_values": 0},
        {"norm_layer": "nonsense"},
        {"act_layer": 3},
        {"qk_norm": "yes"},
    ),
    "predictor.width": (0, 6),
    "predictor.depth": (0,),
    "mask.mode": ("multiblok",),
    "mask.targets": (0, 17),
    "mask.target_scale": ([0, 0.2], [0.3, 0.2], [0.5, 1.5]),
    "mask.target_aspect": ([-1, 2], [1, 101]),
    "mask.keep_quantile": (0, 1, math.nan),
    "mask.min_keep": (0, 100_000),
    "data.shuffle_block": (0, 7),
    "data.crop_scale": ([0.5, 0.2],),
    "data.std": ([0, 1, 1],),
    "data.max_corrupt": (-0.1, 1.1),
    "optim.batch": (0, 3),
    "optim.lr": (0, -1, math.inf, math.nan),
    "optim.weight_decay": (-1, math.nan),
    "optim.momentum": (0, 1.01),
    "optim.warmup_steps": (-1, 3),
    "optim.schedule_stretch": (0.5, 0),
    "optim.betas": ([1, 1],),
    "optim.eps": (0,),
    "optim.clip": (0,),
    "optim.transfer": ("mup", "muP"),  # without a base width
    "optim.divergence.patience": (0,),
    "probe.labels": (["colour"],),
    "probe.images": (-1,),
    "runtime.micro_batch": (0, 100),
    "runtime.workers": (-1,),
    "runtime.threads": (0,),
    "runtime.log_every": (0,),
    "runtime.keep_checkpoints": (0, 1),
    "runtime.checkpoint_minutes": (0,),
    "runtime.grace_seconds": (0,),
}


class RandomConfig(NamedTuple):
    """impossible: the setting that must be refused; '' when all may be possible."""

    overrides: list[str]
    impossible: str


def draw(seed: int, data_roots: list[str]) -> RandomConfig:
    """Draw a config: some presets and settings, the others as the demo has them."""
    chance = random.Random(seed)
    values: dict[str, Any] = {"model": "vit_nano", "data": "demo", "optim": "demo"}
    values |= {"probe": "demo", "runtime": "demo"}
    for name, preset in PRESETS.items():
        if chance.random() < 0.4:
            values[name] = preset(chance)
    values["runtime.data_root"] = chance.choice(data_roots)
    values |= {"optim.steps": 3, "optim.warmup_steps": 1, "optim.batch": 8, "probe.labels": []}
    if chance.random() < 0.2:  # alone, so that no other setting is refused first
        impossible = chance.choice(sorted(IMPOSSIBLE))
        values[impossible] = chance.choice(IMPOSSIBLE[impossible])
        return RandomConfig(_overrides(values), impossible)
    share = chance.choice((0.05, 0.15, 0.3))
    for name, setting in DRAWN.items():
        # most of those that need another one need a lucky draw of that
        if chance.random() < (share if name not in EFFECTIVE_WITH else share / 5):
            values[name] = setting(chance)
    return RandomConfig(_overrides(values), "")


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={text(value)}" for name, value in values.items()]


def text(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
