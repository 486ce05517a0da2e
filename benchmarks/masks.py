"""Time to make the masks of an image: ours, vectorised, against a loop over images and blocks.

    python benchmarks/masks.py                   # against the plain loop below
    python benchmarks/masks.py --reference PATH  # also the I-JEPA authors' collator, from PATH

`plain` is our own writing of the sampling that the paper describes and the reference configurations
use; the tests compare distributions with it. Figures are CPU microseconds an image, variants in
turn: the fastest round, the median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_cluster.config import Mask
from jepa_cluster.ijepa import masks


def plain(
    mask: Mask, grid: int, batch: int, step: int
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """One per-GPU batch of reference masks: contexts (B tensors of K) and targets (B lists of M
    tensors).
    """
    generator = torch.Generator().manual_seed(step)
    target = block(mask.target_scale, mask.target_aspect, grid, generator)
    context = block(mask.context_scale, (1.0, 1.0), grid, generator)
    contexts, targets = [], []
    for _ in range(batch):
        chosen, outside = [], []
        for _ in range(mask.targets):
            inside = rectangle(target, grid)
            chosen.append(torch.nonzero(inside.flatten()).squeeze(1))
            outside.append(1 - inside)
        targets.append(chosen)
        contexts.append(constrained(context, outside, grid, mask.min_keep))
    fewest = min(len(c) for c in contexts)
    return [c[:fewest] for c in contexts], targets


def block(scale, aspect, grid: int, generator: torch.Generator) -> tuple[int, int]:
    """Height and width from one uniform number, used for the scale and for the aspect ratio."""
    u = torch.rand(1, generator=generator).item()
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    while height >= grid:
        height -= 1
    while width >= grid:
        width -= 1
    return height, width


def rectangle(size: tuple[int, int], grid: int) -> torch.Tensor:
    """The block at a random corner; the last row and column are never reached."""
    top, left = (int(torch.randint(0, grid - s, (1,))) for s in size)
    inside = torch.zeros(grid, grid, dtype=torch.int32)
    inside[top : top + size[0], left : left + size[1]] = 1
    return inside


def constrained(
    size: tuple[int, int], outside: list[torch.Tensor], grid: int, least: int
) -> torch.Tensor:
    """A context block without targets; after every 20 failures one target less counts."""
    failures = 0
    while True:
        inside = rectangle(size, grid)
        for other in outside[: max(len(outside) - failures // 20, 0)]:
            inside = inside * other
        found = torch.nonzero(inside.flatten()).squeeze(1)
        if len(found) > least:
            return found
        failures += 1


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--rounds", type=int, default=25)
    p.add_argument("--reference", help="checkout of the authors' code")
    args = p.parse_args()
    torch.set_num_threads(1)
    for grid in (14, 16):
        shape = (4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0))
        settings = {
            mode: Mask(mode, *shape, reference_batch=args.batch, min_keep=10)
            for mode in ("reference", "multiblock", "packed")
        }
        turns = {f"ours, {mode}": ours(mask, grid, args.batch) for mode, mask in settings.items()}
        turns["plain loop"] = lambda step, g=grid, s=settings: plain(
            s["reference"], g, args.batch, step
        )
        if args.reference:
            turns["reference"] = reference(args.reference, settings["reference"], grid, args.batch)
        seconds = {name: [] for name in turns}
        for step in range(args.rounds):
            for name, turn in turns.items():
                began = time.process_time()
                turn(step)
                seconds[name].append(time.process_time() - began)
        base = seconds.get("reference", seconds["plain loop"])
        for name, found in seconds.items():
            shown = [
                f"{pick(found) / args.batch * 1e6:7.1f} us {pick(base) / pick(found):5.1f}x"
                for pick in (min, statistics.median)
            ]
            print(f"{grid}x{grid}  {name:15} {shown[0]}   median {shown[1]}")


def ours(mask: Mask, grid: int, batch: int):
    index = np.arange(batch)
    return lambda step: masks.sample(
        mask, grid, 0, np.zeros_like(index), index, np.full_like(index, step), index
    )


def reference(path: str, mask: Mask, grid: int, batch: int):
    call, images = collator(path, mask, grid), [torch.zeros(1)] * batch
    return lambda step: call(images)


def collator(path: str, mask: Mask, grid: int):
    """The authors' own, from a checkout at `path`; nothing of theirs is kept here."""
    if str(Path(path).resolve()) not in sys.path:
        sys.path.insert(0, str(Path(path).resolve()))
    from src.masks.multiblock import MaskCollator

    return MaskCollator(
        input_size=(grid, grid),
        patch_size=1,
        pred_mask_scale=mask.target_scale,
        enc_mask_scale=mask.context_scale,
        aspect_ratio=mask.target_aspect,
        nenc=1,
        npred=mask.targets,
        allow_overlap=False,
        min_keep=mask.min_keep,
    )


if __name__ == "__main__":
    main()
