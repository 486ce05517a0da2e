"""A view-invariant baseline: VICReg (2105.04906) on the encoder, images and schedules of a trial.

Two random crops of an image, mirrored and with other colours at random, get features that agree;
variance and covariance terms keep them from a collapse. Probes are those of the trainer, before and
after. One process. The trial names model, data, optimiser and length.

    python benchmarks/vicreg.py FOLDER/root/trials/vit_mini-... --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from small_world import LABELS, Split, load_split
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Recipe, Runtime
from jepa_cluster.data import pipeline
from jepa_cluster.ijepa.objective import IJepa, init_weights, mean_std_max
from jepa_cluster.ijepa.schedules import schedule_at
from jepa_cluster.ijepa.vit import Encoder
from jepa_cluster.training import dist_env, distributed, linear_probes
from jepa_cluster.training.linear_probes import Features
from jepa_cluster.trial.directory import TrialDir

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # weights of the three terms, as published
EXPANDED = 1024  # width of the expander's layers
CROP = (0.5, 1.0)  # share of the image
COLOR = 0.8  # largest change of the contrast and of the mean of a channel
GREY = (
    0.2  # share of the views without colour: else the colour of the ground tells which image it is
)


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of each image [b, 3, S, S] in 0..1, resized, mirrored, coloured."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    side = uniform(*CROP).sqrt()
    mirror = (uniform(0, 1) < 0.5).float() * 2 - 1
    placement = torch.zeros(count, 2, 3)
    placement[:, 0, 0] = side * mirror
    placement[:, 1, 1] = side
    placement[:, 0, 2] = uniform(-1, 1) * (1 - side)
    placement[:, 1, 2] = uniform(-1, 1) * (1 - side)
    grid = F.affine_grid(placement, list(images.shape), align_corners=False)
    crops = F.grid_sample(images.float() / 255, grid, align_corners=False, padding_mode="border")
    contrast = uniform(0.6, 1.4)[:, None, None, None]
    brightness = uniform(-0.2, 0.2)[:, None, None, None]
    mixed = (crops - 0.5) * contrast + 0.5 + brightness
    mean = mixed.mean((2, 3), keepdim=True)
    gain, shift = uniform(1 - COLOR, 1 + COLOR, 3, 1, 1), uniform(-COLOR, COLOR, 3, 1, 1) / 2
    mixed = (mixed - mean) * gain + mean + shift
    grey = (uniform(0, 1, 1, 1, 1) < GREY).float()
    return (grey * mixed.mean(1, keepdim=True) + (1 - grey) * mixed).clamp(0, 1)


def loss_of(a: Tensor, b: Tensor) -> Tensor:
    """The three terms of VICReg for two batches of embeddings [b, E]."""
    loss = INVARIANCE * F.mse_loss(a, b)
    for x in (a, b):
        x = x - x.mean(0)
        deviation = (x.var(0) + 1e-4).sqrt()
        covariance = x.T @ x / (len(x) - 1)
        off_diagonal = covariance - torch.diag(covariance.diagonal())
        loss = loss + VARIANCE * F.relu(1 - deviation).mean() / 2
        loss = loss + COVARIANCE * off_diagonal.square().sum() / x.shape[1]
    return loss


def train(recipe: Recipe, images: Tensor, rate: float) -> tuple[Encoder, Encoder]:
    """Return the untrained and the trained encoder."""
    untrained, model = IJepa(recipe), IJepa(recipe)
    init_weights(untrained, recipe)
    init_weights(model, recipe)
    encoder = model.encoder
    torch.manual_seed(recipe.seed)
    expander = nn.Sequential(
        nn.Linear(recipe.model.width, EXPANDED),
        nn.BatchNorm1d(EXPANDED),
        nn.ReLU(),
        nn.Linear(EXPANDED, EXPANDED),
    )
    optim = replace(recipe.optim, lr=rate, start_lr=rate / 50, final_lr=rate / 500)
    parameters = [*encoder.parameters(), *expander.parameters()]
    solver = torch.optim.AdamW(parameters, lr=rate, weight_decay=optim.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(1, (optim.steps or 0) + 1):
        solver.param_groups[0]["lr"] = schedule_at(optim, step).lr
        batch = images[torch.randint(len(images), (optim.batch,), generator=generator)]
        a, b = (
            expander(encoder(normalised(views(batch, generator), recipe)).mean(1)) for _ in range(2)
        )
        solver.zero_grad()
        loss_of(a, b).backward()
        solver.step()
    return untrained.encoder.eval(), encoder.eval()


def normalised(pixels: Tensor, recipe: Recipe) -> Tensor:
    """Pixels in 0..1 as the trainer normalises them."""
    return pipeline.normalise(pixels * 255, recipe.data)


@torch.no_grad()
def read_features(encoder: Encoder, split: Split, recipe: Recipe) -> Features:
    images, labels = split
    parts = [encoder(pipeline.normalise(part, recipe.data)) for part in images.split(64)]
    x = {
        linear_probes.TARGET: torch.cat([part.mean(1).double() for part in parts]),
        linear_probes.SECOND_READOUT: torch.cat([mean_std_max(part).double() for part in parts]),
    }
    empty = torch.zeros(0)
    return Features(x, labels, torch.arange(len(images)), empty, empty)


def probes(encoder: Encoder, train_set: Split, test_set: Split, recipe: Recipe) -> dict[str, float]:
    fit, test = read_features(encoder, train_set, recipe), read_features(encoder, test_set, recipe)
    found = {"knn_error": linear_probes.knn_error(fit, test, "class")}
    for readout in fit.x:
        for name, value in linear_probes.ridge(fit, test, readout, LABELS).items():
            found[readout + name] = value
    return found | linear_probes.few_labels(fit, test, linear_probes.TARGET, "class")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("trial", type=Path, help="directory of a trial whose recipe is used")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--rates", default="2e-3,5e-3")
    args = p.parse_args()
    config = TrialDir(args.trial).read_config()
    config = replace(config, runtime=replace(config.runtime, workers=0))
    env = dist_env.from_environment(os.environ)
    distributed.init(env, config.recipe, Runtime("", device="cpu"), 1, lambda: None)
    torch.set_num_threads(1)
    train_set = load_split(config, "train", config.recipe.probe.images)
    test_set = load_split(config, "val", config.recipe.probe.test_images)
    for rate in map(float, args.rates.split(",")):
        for seed in map(int, args.seeds.split(",")):
            recipe = replace(config.recipe, seed=seed)
            started = time.process_time()
            untrained, trained = train(recipe, train_set[0], rate)
            seconds = time.process_time() - started
            before = probes(untrained, train_set, test_set, recipe)
            after = probes(trained, train_set, test_set, recipe)
            print(f"lr {rate:g} seed {seed}, {seconds:.0f} s", end="")
            for name, value in after.items():
                if name.endswith(("_error", "_r2")):
                    print(f", {name} {before[name]:.3f} -> {value:.3f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
