"""The figures of docs/masks.md.

    python benchmarks/mask_figures.py

Needs numpy and matplotlib; takes seconds.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from jepa_cluster.config import Mask  # noqa: E402
from jepa_cluster.ijepa import mask_preview, masks  # noqa: E402

IMAGES = REPO / "docs" / "img"
CLEAN = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), aspect_distribution="log")
REFERENCE_MASKS = dataclasses.replace(
    CLEAN, mode="reference", aspect_distribution="uniform", min_keep=10
)
SHEETS = {
    "masks-multiblock": CLEAN,
    "masks-reference": REFERENCE_MASKS,
    "masks-small-targets": dataclasses.replace(CLEAN, target_scale=(0.05, 0.1)),
    "masks-wide-aspect": dataclasses.replace(CLEAN, target_aspect=(0.25, 4.0)),
    "masks-two-targets": dataclasses.replace(CLEAN, targets=2, target_scale=(0.2, 0.3)),
}
GRID, COUNT = 14, 4096


def main() -> None:
    for name, mask in SHEETS.items():
        shown = mask_preview.preview(mask, GRID, 0, COUNT)
        print(mask_preview.save_png(shown, IMAGES / f"{name}.png"))
    rows()
    batches()


def rows() -> None:
    """P(context) by row, both modes side by side, on three grids."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True, layout="constrained")
    for axis, grid in zip(axes, (14, 16, 28), strict=True):
        for mask, colour, shift in ((REFERENCE_MASKS, "#f58518", -0.2), (CLEAN, "#4c78a8", 0.2)):
            chance = mask_preview.preview(mask, grid, 0, COUNT).p_context().mean(1)
            axis.bar(np.arange(grid) + shift, chance, 0.4, color=colour, label=mask.mode)
            print(grid, mask.mode, " ".join(f"{v:.2f}" for v in chance))
        axis.set(
            title=f"{grid}x{grid} patches", xlabel="row, top to bottom", xlim=(-0.8, grid - 0.2)
        )
        axis.locator_params(axis="x", integer=True)
    axes[0].set_ylabel("P(context)")
    axes[0].legend(frameon=False)
    figure.savefig(IMAGES / "masks-rows.png", dpi=80)


def batches() -> None:
    """Context fraction against the per-GPU batch."""
    sizes = 2 ** np.arange(9)
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    clean = masks.check(CLEAN, GRID) / GRID**2
    found = []
    for size in sizes:
        mask, slot = (
            dataclasses.replace(REFERENCE_MASKS, reference_batch=int(size)),
            np.arange(size),
        )
        zero = np.zeros_like(slot)
        drawn = [
            masks.sample(mask, GRID, 0, zero, slot, zero + s, slot)
            for s in range(max(100, 2000 // int(size)))
        ]
        found.append(np.mean([d.context.shape[1] for d in drawn]) / GRID**2)
        print(f"reference, {size} a GPU: {found[-1]:.3f}; clean: {clean:.3f}")
    axis.plot(sizes, found, "o-", color="#f58518", label="reference")
    axis.plot(sizes, [clean] * len(sizes), "o-", color="#4c78a8", label="multiblock")
    axis.set_xscale("log", base=2)
    axis.set(
        xlabel="images a GPU",
        ylabel="context, share of patches",
        ylim=(0.2, 0.45),
        xticks=sizes,
        xticklabels=sizes,
    )
    axis.legend(frameon=False)
    figure.savefig(IMAGES / "masks-batch.png", dpi=80)


if __name__ == "__main__":
    main()
