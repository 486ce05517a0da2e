"""Does `optim.transfer=mup` keep updates, and the best learning rate, alike at all widths?

    python benchmarks/mup.py coordinates    # exponents of the outputs of layers in the width
    python benchmarks/mup.py rates FOLDER   # loss and k-NN error by width and learning rate

Widths are 32, 64 and 128, of which 32 is the base; heads are 16 wide. One process, one thread.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_world import Split, jepa, load_split
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jepa_cluster.config import Recipe, TrialConfig, config_from_dict
from jepa_cluster.data import pipeline
from jepa_cluster.ijepa import cpu_linear, masks
from jepa_cluster.ijepa.masks import Masks
from jepa_cluster.ijepa.objective import IJepa, init_weights, patchify, update_target
from jepa_cluster.ijepa.schedules import schedule_at
from jepa_cluster.ijepa.vit import Encoder
from jepa_cluster.sweep.compose import Composer, conf_dir, parse_override
from jepa_cluster.training import dist_env, distributed, linear_probes, sharded_adamw
from jepa_cluster.training.linear_probes import Features

WIDTHS = (32, 64, 128)
HEAD = 16
STEPS = (1, 2, 5)  # after which the change of an output is measured
IMAGES = 8  # of a batch of noise, which every step repeats
BASE = f"optim.base_width.encoder={WIDTHS[0]}"
MUP = ("optim.transfer=mup", BASE)
GROWING = ("predictor.width={width}", "predictor.heads={heads}")
MUP_GROWING = (*MUP, f"optim.base_width.predictor={WIDTHS[0]}", *GROWING)
CHECKED = {  # name -> overrides
    "none, predictor 32": (),
    "none, predictor grows": GROWING,
    "mup, predictor 32": MUP,
    "mup, predictor grows": MUP_GROWING,
}
CHECK_RATE = 5e-4
RATES = tuple(2**i * 1e-3 for i in range(6))
TRAIN_STEPS, SPLIT = 200, 2000  # of a run; images of train and of val


def config_of(width: int, *overrides: str) -> TrialConfig:
    """Return the demo's recipe with an encoder of this width."""
    words = ["model=vit_micro", "data=demo", "optim=demo", "predictor.depth=2"]
    words += [f"model.width={width}", f"model.heads={width // HEAD}", "runtime.workers=0"]
    words += [word.format(width=width, heads=width // HEAD) for word in overrides]
    parsed = [parse_override(word, "") for word in words]
    return config_from_dict(Composer(conf_dir(), {}).compose(parsed))


# ---- coordinate check


class LayerOutputs(TorchFunctionMode):
    """Collects what linear maps and attention return, and attention's logits, by name."""

    def __init__(self, model: IJepa) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.found: dict[str, Tensor] = {}
        self.attention = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            name = self.names[args[1].untyped_storage().data_ptr()].removesuffix(".weight")
            self.attention = name.replace("qkv", "logits")
            self.keep(name, out)
        if func is F.scaled_dot_product_attention:
            q, k, *_ = args
            self.keep(self.attention, q @ k.mT / q.shape[-1] ** 0.5)
        return out

    def keep(self, name: str, out: Tensor) -> None:
        """A layer that is called twice has a name for each call."""
        while name in self.found:
            name += "'"
        self.found[name] = out.detach()


def outputs(model: IJepa, images: Tensor, chosen: Masks) -> dict[str, Tensor]:
    patches = patchify(images, model.recipe.model.patch)
    with LayerOutputs(model) as layers, torch.no_grad():
        x = model.encoder(patches, chosen.context, chosen.context_len)
        model.predictor(x, chosen.context, chosen.targets, chosen.context_len, chosen.target_len)
    return layers.found


def masks_at(recipe: Recipe, index: Any) -> Masks:
    arrays = masks.sample(recipe.mask, recipe.model.grid, recipe.seed, 0 * index, index)
    return Masks(*(None if a is None else torch.from_numpy(a) for a in arrays))


def sizes(recipe: Recipe) -> dict[tuple[str, int], float]:
    """Return the RMS of each layer's output at step 0, and of its change after some steps."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = recipe.model.image
    images = torch.randn(IMAGES, 3, size, size, generator=generator)
    chosen = masks_at(recipe, np.arange(IMAGES))
    model = IJepa(recipe)
    init_weights(model, recipe)
    adam = sharded_adamw.build_optimizer(model, recipe.optim)
    adam.found_inf = torch.zeros(())
    first = outputs(model, images, chosen)
    found = {(name, 0): rms(value) for name, value in first.items()}
    for step in range(1, STEPS[-1] + 1):
        train_step(model, adam, images, chosen, step)
        if step in STEPS:
            for name, value in outputs(model, images, chosen).items():
                found[name, step] = rms(value - first[name])
    return found


def train_step(
    model: IJepa, adam: sharded_adamw.ShardedAdamW, images: Tensor, chosen: Masks, step: int
) -> float:
    schedule = schedule_at(model.recipe.optim, step)
    loss, _ = model(images, chosen)
    loss.backward()
    sharded_adamw.set_lr_and_decay(adam, schedule.lr, schedule.weight_decay)
    adam.step()
    adam.zero_grad()
    update_target(model, schedule.momentum)
    return loss.item()


def rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item()


def exponents(seeds: int, *overrides: str) -> dict[tuple[str, int], float]:
    """Return the exponent of each size in the width, by least squares over widths and seeds."""
    cpu_linear.enabled = False  # its products are not seen by LayerOutputs
    overrides = ("optim.warmup_steps=0", f"optim.lr={CHECK_RATE}", *overrides)
    logs: dict[tuple[str, int], list[float]] = {}
    for width in WIDTHS:
        for seed in range(seeds):
            recipe = config_of(width, f"seed={seed}", *overrides).recipe
            for key, value in sizes(recipe).items():
                logs.setdefault(key, []).append(math.log(value))
    x = np.repeat(np.log(WIDTHS), seeds)
    return {key: float(np.polyfit(x, values, 1)[0]) for key, values in logs.items()}


def print_coordinates(seeds: int) -> None:
    """Print the exponents at step 0 and of the changes; one column per check."""
    found = {name: exponents(seeds, *overrides) for name, overrides in CHECKED.items()}
    names = dict.fromkeys(name for name, _ in found["none, predictor 32"])
    moments = (0, *STEPS)
    print(f"| step {', '.join(map(str, moments))} | {' | '.join(found)} |")
    print(f"|---|{'---:|' * len(found)}")
    for name in names:
        cells = [
            " ".join(f"{each[name, step]:+.2f}" for step in moments) for each in found.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for step in moments:
        largest = [
            max(abs(v) for (_, s), v in each.items() if s == step) for each in found.values()
        ]
        print(f"| largest, step {step} | {' | '.join(f'{value:.2f}' for value in largest)} |")


# ---- the best learning rate


def train(config: TrialConfig, images: Tensor) -> tuple[IJepa, float]:
    """Return the trained model, and the mean loss of the last tenth of the steps."""
    recipe, losses = config.recipe, list[float]()
    model = IJepa(recipe)
    init_weights(model, recipe)
    adam = sharded_adamw.build_optimizer(model, recipe.optim)
    adam.found_inf = torch.zeros(())
    random = np.random.default_rng(recipe.seed)
    for step in range(1, TRAIN_STEPS + 1):
        index = random.integers(len(images), size=recipe.optim.batch)
        batch = pipeline.normalise(images[torch.from_numpy(index)], recipe.data)
        chosen = masks_at(recipe, index + step * len(images))
        losses.append(train_step(model, adam, batch, chosen, step))
    return model, statistics.mean(losses[-TRAIN_STEPS // 10 :])


def print_rates(folder: Path, target: str, seeds: int, arms: list[str]) -> None:
    """Print loss and k-NN error by width and learning rate; * marks the least of a row."""
    if not (folder / "data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        counts = ["--train", str(SPLIT), "--val", str(SPLIT)]
        jepa(folder, "shards", "synthetic", str(folder / "images"), *counts)
        jepa(folder, "shards", "build", str(folder / "images"), str(folder / "data"))
    settings = [f"runtime.data_root={folder / 'data'}", f"objective.target={target}"]
    settings += [f"optim.steps={TRAIN_STEPS}", f"optim.warmup_steps={TRAIN_STEPS // 10}"]
    config = config_of(WIDTHS[0], *settings)
    env = dist_env.from_environment(os.environ)
    distributed.init(env, config.recipe, replace(config.runtime, device="cpu", threads=1))
    splits = [load_split(config, split, SPLIT) for split in ("train", "val")]
    started = time.process_time()
    print(f"| {target} | {' | '.join(f'{rate:g}' for rate in RATES)} |")
    print(f"|---|{'---:|' * len(RATES)}")
    for arm in arms:
        for width in WIDTHS if arm == arms[0] else WIDTHS[1:]:  # they agree at the base
            row: list[tuple[float, float]] = []
            for rate in RATES:
                runs: list[tuple[float, float]] = []
                for seed in range(seeds):
                    lr = [f"optim.lr={rate}", f"optim.start_lr={rate / 50}", f"seed={seed}"]
                    lr += [f"optim.final_lr={rate / 500}"]
                    config = config_of(width, *CHECKED[arm], *settings, *lr)
                    model, loss = train(config, splits[0][0])
                    features = [
                        read_features(model.encoder, each, config.recipe) for each in splits
                    ]
                    runs.append((loss, linear_probes.knn_error(*features, "class")))
                row.append(tuple(map(statistics.mean, zip(*runs, strict=True))))
            for what, values in zip(("loss", "k-NN error"), zip(*row, strict=True), strict=True):
                cells = [f"{value:.4f}{'*' * (value == min(values))}" for value in values]
                print(f"| {arm}, width {width}, {what} | {' | '.join(cells)} |", flush=True)
    print(f"{time.process_time() - started:.0f} s of CPU time")


@torch.no_grad()
def read_features(encoder: Encoder, split: Split, recipe: Recipe) -> Features:
    images, labels = split
    parts = [encoder(pipeline.normalise(part, recipe.data)) for part in images.split(64)]
    x = {linear_probes.TARGET: torch.cat([part.mean(1).double() for part in parts])}
    empty = torch.zeros(0)
    return Features(x, labels, torch.arange(len(images)), empty, empty)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("coordinates", "rates"))
    p.add_argument("folder", nargs="?", type=Path, help="of rates: for the data set")
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--target", choices=("pixels", "frozen", "representation"), default="frozen")
    p.add_argument("--arms", default="none, predictor grows;mup, predictor grows")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.what == "coordinates":
        print_coordinates(args.seeds)
    else:
        print_rates(args.folder.absolute(), args.target, args.seeds, args.arms.split(";"))


if __name__ == "__main__":
    main()
