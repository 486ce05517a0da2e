"""Small real image trees and the configs that read them."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from support.fake_trials import PLAIN

from jepa_cluster.config import TrialConfig, config_from_dict
from jepa_cluster.data import manifest, shards
from jepa_cluster.data.manifest import Manifest
from jepa_cluster.data.sources import scan


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """Smooth colours, a function of the seed."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def tree(folder: Path, images: int = 40, classes: int = 4, first: int = 0) -> Path:
    """Make <folder>/class<k>/image<n>.JPEG and labels.jsonl with a count and a distance."""
    lines: list[str] = []
    for n in range(images):
        path = folder / f"class{n % classes}" / f"image{n:04d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(first + n), quality=85))
        label = {
            "file": f"{path.parent.name}/{path.name}",
            "count": n % 7,
            "distance": n / images,
        }
        lines.append(json.dumps(label))
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def packed(
    root: Path, images: int = 40, shard_bytes: int = 20_000, split: str = "train", first: int = 0
) -> Manifest:
    """A built split of a fresh tree, in several shards."""
    source = tree(root / f"images-{split}", images, first=first)
    options = shards.Options(shard_bytes=shard_bytes)
    return shards.build(scan(source), root / split, options, workers=1)


def config(root: Path, batch: int = 16, seed: int = 0, **runtime: Any) -> TrialConfig:
    """A config that reads root/train at 32 pixels."""
    made = manifest.read(root / "train")
    values = yaml.safe_load(PLAIN)
    values["model"].update(image=32, patch=4)
    values["data"].update(digest=made.digest, images=made.images)
    values["optim"]["batch"] = batch
    values["seed"] = seed
    values["runtime"] = {
        "data_root": str(root),
        "workers": 0,
        "device": "cpu",
        **runtime,
    }
    return config_from_dict(values)


def with_data(config: TrialConfig, **changes: Any) -> TrialConfig:
    """The config with other settings of its data."""
    data = dataclasses.replace(config.recipe.data, **changes)
    recipe = dataclasses.replace(config.recipe, data=data)
    return dataclasses.replace(config, recipe=recipe)
