"""Our masks and our step against the I-JEPA authors' own code, number by number.

    python benchmarks/parity.py --reference PATH

PATH is a checkout of their code; nothing of it is kept here.

1. Block sizes of `reference` masks from their generator's stream: equal or not.
2. Where the context falls, row by row, and how large it is: `reference` against their collator, in
   standard errors.
3. A checkpoint in their format, read by `ijepa.weights`; then eleven steps of both in fp32 with
   their collator's masks, their optimiser and schedules against ours: loss, gradients and weights
   of each tensor, relative.

Exits with 1 when a size differs, an error exceeds 5 standard errors, or a relative difference
exceeds 1e-5.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from masks import collator  # noqa: E402
from step import authors, follow, load  # noqa: E402

from jepa_cluster.config import Mask, Recipe  # noqa: E402
from jepa_cluster.ijepa import masks as m  # noqa: E402
from jepa_cluster.ijepa import schedules, weights  # noqa: E402
from jepa_cluster.ijepa.masks.blocks import assemble, target_cover  # noqa: E402
from jepa_cluster.ijepa.masks.reference import step_shapes  # noqa: E402
from jepa_cluster.ijepa.objective import IJepa, update_target  # noqa: E402

PAPER = Mask("reference", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), min_keep=10, reference_batch=16)
SETTINGS = {
    "paper": PAPER,
    "larger targets": dataclasses.replace(PAPER, target_scale=(0.2, 0.3)),
    "smaller context": dataclasses.replace(PAPER, context_scale=(0.4, 1.0)),
    "wide aspect, 2 targets": dataclasses.replace(PAPER, target_aspect=(0.3, 3.0), targets=2),
    "small targets": dataclasses.replace(PAPER, target_scale=(0.075, 0.2)),
}
GRIDS = (14, 16, 28)
STEPS, SEEDS = 11, 2000
NEAR = 1e-5


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--reference", required=True, help="checkout of the authors' code")
    p.add_argument("--size", default="vit_ti", help="model of conf/ (default vit_ti)")
    p.add_argument("--batch", type=int, default=4, help="images a step")
    p.add_argument(
        "--rounds", type=int, default=60, help="batches of masks behind a comparison of places"
    )
    args = p.parse_args()
    good = [sizes(args.reference), places(args.reference, args.rounds), steps(args)]
    print("PASSED" if all(good) else "FAILED")
    sys.exit(not all(good))


def sizes(path: str) -> bool:
    """Their generator, seeded with the number of the step, draws twice a step: once for targets,
    once for contexts.
    """
    wrong = 0
    for mask in SETTINGS.values():
        for grid in GRIDS:
            theirs = collator(path, mask, grid)
            for step in range(SEEDS):
                ahead, stream = (torch.Generator().manual_seed(step) for _ in range(2))
                u = [torch.rand(1, generator=ahead).item() for _ in range(2)]
                target = theirs._sample_block_size(stream, mask.target_scale, mask.target_aspect)
                context = theirs._sample_block_size(stream, mask.context_scale, (1.0, 1.0))
                wrong += step_shapes(mask, grid, *u) != (target, context)
    print(f"block sizes: {wrong} of {len(SETTINGS) * len(GRIDS) * SEEDS} steps differ")
    return not wrong


def places(path: str, rounds: int) -> bool:
    """P(context) by row and the truncated size: difference of means over their standard error, with
    steps as units.
    """
    worst = 0.0
    torch.manual_seed(0)
    for name, mask in SETTINGS.items():
        for grid in GRIDS:
            theirs, slot = collator(path, mask, grid), np.arange(mask.reference_batch)
            found: list[list[np.ndarray]] = [[], []]
            for step in range(rounds):
                drawn = m.sample(
                    mask, grid, 0, np.zeros_like(slot), slot, np.full_like(slot, step), slot
                )
                asked = theirs([torch.zeros(1)] * mask.reference_batch)[1][0].numpy()
                for side, context in zip(found, (drawn.context, asked), strict=True):
                    side.append(
                        np.bincount(context.reshape(-1) // grid, minlength=grid)
                        / context.shape[0]
                        / grid
                    )
            ours, want = (np.array(side) for side in found)
            ours, want = (np.column_stack([side, side.sum(1) / grid]) for side in (ours, want))
            error = np.sqrt((ours.var(0) + want.var(0)) / rounds) + 1e-9
            z = float((np.abs(ours.mean(0) - want.mean(0)) / error).max())
            worst = max(worst, z)
            print(
                f"context, {name}, {grid}x{grid}: {ours.mean(0)[-1]:.4f} "
                f"against {want.mean(0)[-1]:.4f} of the grid; "
                f"rows at most {z:.1f} standard errors apart"
            )
    return worst < 5


def steps(args: argparse.Namespace) -> bool:
    """Eleven steps of both from one checkpoint in their format."""
    recipe = load(args.size, args.batch)
    optim = dataclasses.replace(
        recipe.optim, steps=20, warmup_steps=4, epochs=None, warmup_epochs=None
    )
    theirs, distance = authors(args.reference, recipe)
    adam, rate, decay = their_optimiser(theirs, optim)
    ours = imported(theirs, recipe)
    mine = [p for p in ours.parameters() if p.requires_grad]
    groups = [{"params": [p for p in mine if p.dim() > 1], "decay": 1.0}]
    groups += [{"params": [p for p in mine if p.dim() <= 1], "decay": 0.0}]
    fused = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    draw, worst = (
        collator(args.reference, recipe.mask, recipe.model.grid),
        {"loss": 0.0, "gradient": 0.0, "weight": 0.0},
    )
    for step in range(1, STEPS + 1):
        images = torch.randn(args.batch, 3, recipe.model.image, recipe.model.image)
        _, seen, asked = draw(list(images))
        rate.step(), decay.step()
        want = distance(images, seen, asked)
        want.backward()
        loss, _ = ours(images, ours_of(seen, asked, recipe.model.grid))
        loss.backward()
        now = schedules.schedule_at(optim, step)
        assert abs(now.lr / adam.param_groups[0]["lr"] - 1) < 1e-12, (step, now)
        assert abs(now.weight_decay / adam.param_groups[0]["weight_decay"] - 1) < 1e-12, (step, now)
        apart = {
            "loss": abs(loss.item() / want.item() - 1),
            "gradient": furthest(ours, theirs, recipe, grad=True),
        }
        for group in fused.param_groups:
            group["lr"], group["weight_decay"] = now.lr, now.weight_decay * group["decay"]
        for each in (adam, fused):
            each.step()
            each.zero_grad()
        momentum = optim.momentum + (step - 1) * (optim.final_momentum - optim.momentum) / (
            optim.steps or 0
        )
        follow(theirs, momentum)
        update_target(ours, now.momentum)
        apart["weight"] = furthest(ours, theirs, recipe)
        worst = {k: max(v, apart[k]) for k, v in worst.items()}
        print(
            f"step {step:2}: loss {want.item():.6f}; relative "
            + ", ".join(f"{k} {v:.1e}" for k, v in apart.items())
        )
    print(
        f"{STEPS} steps, {args.size}, fp32: at most "
        + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    )
    return max(worst.values()) <= NEAR


def their_optimiser(theirs: torch.nn.Module, optim):
    from src.helper import init_opt

    logging.disable(logging.WARNING)
    adam, _, rate, decay = init_opt(
        encoder=theirs.encoder,
        predictor=theirs.predictor,
        iterations_per_epoch=optim.steps,
        start_lr=optim.start_lr,
        ref_lr=optim.lr,
        final_lr=optim.final_lr,
        warmup=optim.warmup_steps / optim.steps,
        num_epochs=1,
        wd=optim.weight_decay,
        final_wd=optim.final_weight_decay,
        use_bfloat16=False,
        ipe_scale=1.0,
    )
    return adam, rate, decay


def imported(theirs: torch.nn.Module, recipe: Recipe) -> IJepa:
    """Their modules, with noise in every weight, saved as their training saves them; then read into
    ours.
    """
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "pos_embed" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    saved = {
        name: {f"module.{k}": v for k, v in part.state_dict().items()}
        for name, part in (
            ("encoder", theirs.encoder),
            ("predictor", theirs.predictor),
            ("target_encoder", theirs.target),
        )
    }
    ours = IJepa(recipe)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jepa-latest.pth.tar"
        torch.save(
            {**saved, "epoch": 1, "loss": 0.0, "batch_size": 1, "world_size": 1, "lr": 1e-3}, file
        )
        for name, part in weights.read(file).parts.items():
            ours.get_submodule(name).load_state_dict(part)
    return ours


def ours_of(seen: list[torch.Tensor], asked: list[torch.Tensor], grid: int) -> m.Masks:
    """Masks of their collator as ours."""
    context, targets = seen[0].numpy(), torch.stack(asked, 1).numpy()
    drawn = assemble(
        context, targets, target_cover(targets, grid), np.full(len(context), context.shape[1])
    )
    return m.Masks(*(None if f is None else torch.from_numpy(f) for f in drawn))


def furthest(ours: IJepa, theirs: torch.nn.Module, recipe: Recipe, grad: bool = False) -> float:
    """Norm of the difference of a parameter (or gradient) over its own norm, the largest of all
    tensors.

    The biases of keys are left out: the softmax does not see them, their gradient is rounding
    alone, and AdamW makes steps of it.
    """
    worst = 0.0
    for part in weights.REFERENCE_PARTS:
        for name, parameter in ours.get_submodule(part).named_parameters():
            named = weights.reference_name(part, name)
            a, b = parameter, theirs.get_submodule(part).get_parameter(named)
            if grad and a.grad is None:
                continue
            a, b = (a.grad, b.grad) if grad else (a.detach(), b.detach())
            if name.endswith("qkv.bias"):
                (a, b) = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (a, b))
            worst = max(worst, ((a - b).norm() / b.norm()).item())
    return worst


if __name__ == "__main__":
    main()
