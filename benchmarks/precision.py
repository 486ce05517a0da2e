"""How far `optim.precision` moves features, loss and gradients from fp32; one process, any device.

Peer: `autocast`, torch.autocast over fp32 weights, as the published code trains. `bf16` is what
FSDP2 does with a MixedPrecisionPolicy: weights, positions and residual stream in bf16. All three
have the same weights, images and masks. Weights are those of the initialisation, or of a checkpoint
of a trial (--trial).

    python benchmarks/precision.py --sizes vit_ti,vit_s --seeds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path

import objective as bench
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_cluster.config import Recipe, Runtime, TrialConfig
from jepa_cluster.data import pipeline
from jepa_cluster.ijepa.objective import IJepa, features
from jepa_cluster.training import checkpoint, dist_env, distributed
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.directory import TrialDir

PRECISIONS = ("fp32", "autocast", "bf16")


def measured(
    recipe: Recipe, world: distributed.World, args: argparse.Namespace, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return precision -> (features, loss, gradient of the encoder) of a batch."""
    torch.manual_seed(seed)
    size = recipe.model.image
    images = torch.randn(args.batch, 3, size, size, device=world.device)
    if args.trial:
        images = training_images(args, seed).to(world.device)
    masks = bench.draw(recipe, recipe.mask.mode, args.batch, world.device)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for precision in PRECISIONS:
        chosen = replace(recipe, optim=replace(recipe.optim, precision=precision), seed=seed)
        runtime = Runtime("", device=world.device.type)
        model = distributed.build_model(chosen, runtime, world)
        distributed.init_from_seed(model, chosen)
        if args.trial:
            load_weights(model, args.trial)
        loss, _ = model(images, masks)
        loss.backward()
        gradients = [whole(p.grad).flatten() for p in model.encoder.parameters() if p.requires_grad]
        with (
            torch.no_grad(),
            torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "autocast"),
        ):
            x = features(model.target, images).float()
        found[precision] = x, loss.detach().float(), torch.cat(gradients)
    return found


def training_images(args: argparse.Namespace, seed: int) -> Tensor:
    """Return a batch of the trial's training images."""
    config = TrialDir(args.trial).read_config()
    optim = replace(config.recipe.optim, batch=args.batch)
    runtime = replace(config.runtime, micro_batch=None)
    config = TrialConfig(replace(config.recipe, optim=optim), runtime)
    batch = next(pipeline.stream(config, 0, 1, seed * args.batch))
    return pipeline.normalise(batch.images, config.recipe.data)


@torch.no_grad()
def load_weights(model: IJepa, trial: Path) -> None:
    """Fill the model from the newest checkpoint of a trial."""
    found = TrialDir(trial)
    reader = checkpoint.CheckpointReader(found.checkpoint(found.committed()[-1]))
    for name, target in distributed.named_tensors(model).items():
        local = target.to_local() if isinstance(target, DTensor) else target
        local.copy_(reader.rows(f"model.{name}"))
    reader.close()


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--sizes", default="vit_ti,vit_s")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--trial", type=Path, help="directory of a trial with a checkpoint")
    args = p.parse_args()
    env: DistEnv = dist_env.from_environment(os.environ)
    recipes = {size: bench.load(size, args.batch) for size in args.sizes.split(",")}
    if args.trial:
        recipe = TrialDir(args.trial).read_config().recipe
        recipes = {recipe.model.name: recipe}
    world = None
    for size, recipe in recipes.items():
        runtime = Runtime("", device=args.device)
        world = world or distributed.init(env, recipe, runtime, 1, lambda: None)
        runs = [measured(recipe, world, args, seed) for seed in range(args.seeds)]
        for precision in PRECISIONS[1:]:
            errors: list[list[float]] = []
            for run in runs:
                pairs = zip(run[precision], run["fp32"], strict=True)
                errors.append([distance(a, b) for a, b in pairs])
            x, loss, gradient = map(statistics.median, zip(*errors, strict=True))
            print(f"{size} {precision}: features {x:.2e}, loss {loss:.2e}, gradient {gradient:.2e}")


if __name__ == "__main__":
    main()
