"""The smallest real data set and trial: the fixtures `tiny_data` and `tiny_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import shards
from jepa_cluster.data.sources import scan
from jepa_cluster.sweep.freeze import freeze

CLASSES = 8
PIXELS = 48
COLOURS = ([1, 0.5, 0.2], [0.2, 0.5, 1])


def build(folder: Path) -> Path:
    """Make noisy stripes whose direction and colour are the class, and pack them into shards."""
    random = np.random.default_rng(0)
    for split, each in (("train", 25), ("val", 8)):
        for label in range(CLASSES):
            tree = folder / "images" / split / f"class{label}"
            tree.mkdir(parents=True)
            for n in range(each):
                image = Image.fromarray(stripes(label, random))
                image.save(tree / f"{n}.jpeg", quality=90)
        shards.build(scan(folder / "images" / split), folder / "data" / split, workers=1)
    return folder / "data"


def stripes(label: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw an image of a class: (PIXELS, PIXELS, 3) bytes."""
    line = np.arange(PIXELS)
    angle = np.pi * label / CLASSES
    colour = random.uniform(0.6, 1.0, 3) * COLOURS[label % 2]
    distance = np.cos(angle) * line[:, None] + np.sin(angle) * line
    wave = np.sin(distance * 0.6 + random.uniform(0, 6))
    noise = random.uniform(0, 40, (PIXELS, PIXELS, 3))
    pixels = (wave[..., None] + 1) * 100 * colour + noise
    return pixels.clip(0, 255).astype(np.uint8)


def config(data_root: Path, **overrides: Any) -> TrialConfig:
    """A frozen trial; overrides by dotted name: config(root, **{"optim.steps": 9, "seed": 3})."""
    plain: dict[str, Any] = {
        "model": {
            "name": "tiny",
            "width": 32,
            "depth": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
            "patch": 8,
            "image": 48,
        },
        "predictor": {"width": 16, "depth": 2, "heads": 2},
        "mask": {
            "mode": "multiblock",
            "targets": 2,
            "target_scale": [0.15, 0.2],
            "target_aspect": [0.75, 1.5],
            "context_scale": [0.85, 1.0],
        },
        "data": {"name": "tiny"},
        "optim": {
            "batch": 16,
            "steps": 12,
            "epochs": None,
            "warmup_steps": 4,
            "warmup_epochs": None,
            "start_lr": 1e-4,
            "lr": 1e-3,
            "final_lr": 1e-6,
            "weight_decay": 0.04,
            "final_weight_decay": 0.4,
            "decay_shape": "cosine",
            "momentum": 0.99,
            "final_momentum": 1.0,
            "precision": "fp32",
        },
        "probe": {"images": 100, "test_images": 64},
        "seed": 0,
        "runtime": {
            "data_root": str(data_root),
            "procs_per_node": 2,
            "device": "cpu",
            "workers": 0,
            "threads": 1,
            "log_every": 1,
            "grace_seconds": 20.0,
        },
    }
    for key, value in overrides.items():
        *sections, name = key.split(".")
        values = plain
        for section in sections:
            values = values[section]
        values[name] = value
    return freeze(plain)
