"""Preview of a mask setting: sampled masks, realised fractions, where patches fall.

In: a mask setting and a grid. Out: text for the terminal, a document, or a PNG.
Numpy only, until a PNG is drawn.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import JepaError
from jepa_cluster.ijepa import masks as m
from jepa_cluster.ijepa.masks.blocks import Bools, Floats, Ints

SHADES = " .:-=+*#%@"  # probability, a tenth each
BACKGROUND = 0.93  # grey level
CONTEXT = "#4c78a8"
TARGETS = ("#e45756", "#f58518", "#eeca3b", "#b279a2", "#54a24b", "#72b7b2")
LEGEND = "blue: context; red, orange, yellow, purple: predicted by 1, 2, 3, 4 targets"


def sample_patches(
    mask: Mask,
    grid: int,
    seed: int,
    count: int,
) -> tuple[Bools, Ints, dict[str, float]]:
    """Sample masks -> is context [count, N], targets per patch [count, N], realised fractions.

    Raises ConfigError when the setting cannot be sampled.
    """
    m.check(mask, grid)
    index = np.arange(count)
    drawn = m.sample(mask, grid, seed, np.zeros_like(index), index)
    context_len, target_len = m.lengths(drawn)
    is_context = np.zeros((count, grid * grid), bool)
    target_count = np.zeros((count, grid * grid), np.int64)
    for i in range(count):
        is_context[i, drawn.context[i, : context_len[i]]] = True
        for target, length in zip(drawn.targets[i], target_len[i], strict=True):
            target_count[i, target[:length]] += 1
    return is_context, target_count, m.fractions(drawn, grid)


def text(
    mask: Mask,
    grid: int,
    seed: int,
    count: int,
    show: int = 3,
) -> str:
    """Some masks, both histograms, and the realised fractions.

    # is context, a digit is the number of targets that predict the patch.
    """
    is_context, target_count, fractions = sample_patches(mask, grid, seed, count)
    digits = np.minimum(target_count, 9).astype(str)
    symbols = np.where(is_context, "#", np.where(target_count > 0, digits, "."))
    panels: dict[str, list[str]] = {}
    for i in range(show):
        panels[f"sample {i}"] = _rows(symbols[i], grid)
    panels["P(context)"] = _rows(_shade(is_context.mean(0)), grid)
    panels["P(target)"] = _rows(_shade((target_count > 0).mean(0)), grid)

    sizes = is_context.sum(1)
    by_row = is_context.reshape(count, grid, grid).mean((0, 2))
    scale, aspect = _interval(mask.target_scale), _interval(mask.target_aspect)
    lines = _side_by_side(panels, width=max(grid, 10))
    lines += [
        "",
        f"mode {mask.mode}, {grid}x{grid} patches, {mask.targets} targets of scale {scale}, "
        f"aspect {aspect}; {count} samples",
        f"realised   {_fraction_list(fractions)}",
        "           (shares of the grid; overlap: share of predicted patches that another target "
        "predicts too)",
        f"context    {sizes.min()}-{sizes.max()} patches; {describe_context(mask, grid)}",
        "P(context) by row  " + " ".join(f"{v:.2f}".lstrip("0") for v in by_row),
    ]
    return "\n".join(line.rstrip() for line in lines)


def document(
    mask: Mask,
    grid: int,
    seed: int,
    count: int,
) -> dict[str, Any]:
    """The numbers of the text. P(context) and P(target) of each patch are [grid][grid]."""
    is_context, target_count, fractions = sample_patches(mask, grid, seed, count)
    sizes = is_context.sum(1)
    return {
        "mask": asdict(mask),
        "grid": grid,
        "samples": count,
        "realised": {k.removesuffix("_fraction"): float(v) for k, v in fractions.items()},
        "context_patches": [int(sizes.min()), int(sizes.max())],
        "kept": describe_context(mask, grid),
        "p_context": is_context.mean(0).reshape(grid, grid).tolist(),
        "p_target": (target_count > 0).mean(0).reshape(grid, grid).tolist(),
    }


def describe_context(mask: Mask, grid: int) -> str:
    return m.sampler_of(mask, grid).describe_context()


def save_png(
    mask: Mask,
    grid: int,
    seed: int,
    count: int,
    path: Path,
    title: str = "",
) -> Path:
    """Draw 16 masks, two maps and the row profile. Raises JepaError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as e:
        raise JepaError("drawing needs matplotlib", hint="pip install 'jepa-cluster[track]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    is_context, target_count, fractions = sample_patches(mask, grid, seed, count)
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2)  # pyright: ignore[reportGeneralTypeIssues]
    for i, axes in enumerate(left.subplots(4, 4).flat):
        axes.imshow(rgb_image(is_context[i], target_count[i], grid), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    left.suptitle(LEGEND, fontsize=9)

    top, bottom = right.subfigures(2, 1, height_ratios=(3, 2))
    maps = {"P(context)": is_context.mean(0), "P(target)": (target_count > 0).mean(0)}
    for axes, (name, probability) in zip(top.subplots(1, 2), maps.items(), strict=True):
        image = axes.imshow(probability.reshape(grid, grid), vmin=0, vmax=1, cmap="viridis")
        axes.set(title=name, xticks=[], yticks=[])
        top.colorbar(image, ax=axes, shrink=0.8)

    axes = bottom.subplots()
    by_row = is_context.reshape(count, grid, grid).mean((0, 2))
    axes.bar(range(grid), by_row, color=CONTEXT)
    axes.set(xlabel="row of patches, top to bottom", ylabel="P(context)")
    axes.set(xlim=(-0.6, grid - 0.4), ylim=(0, 1))
    axes.locator_params(axis="x", integer=True)
    axes.set_title(_fraction_list(fractions), fontsize=9)
    figure.suptitle(title or _title(mask, grid), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def rgb_image(
    is_context: Bools,
    target_count: Ints,
    grid: int,
) -> Floats:
    """One sample [N] as an RGB image [grid, grid, 3]."""
    from matplotlib.colors import to_rgb

    image = np.full((grid * grid, 3), BACKGROUND)
    for count in range(1, int(target_count.max()) + 1):
        image[target_count == count] = to_rgb(TARGETS[min(count, len(TARGETS)) - 1])
    image[is_context] = to_rgb(CONTEXT)
    return image.reshape(grid, grid, 3)


def _rows(symbols: Any, grid: int) -> list[str]:
    """Characters [N] -> one string per row of patches."""
    return ["".join(row) for row in symbols.reshape(grid, grid)]


def _shade(probability: Floats) -> Any:
    tenths = np.minimum((probability * 10).astype(int), 9)
    return np.array(list(SHADES))[tenths]


def _side_by_side(panels: dict[str, list[str]], width: int) -> list[str]:
    rows = [list(panels), *zip(*panels.values(), strict=True)]
    return ["  ".join(cell.ljust(width) for cell in row) for row in rows]


def _title(mask: Mask, grid: int) -> str:
    scale, aspect = _interval(mask.target_scale), _interval(mask.target_aspect)
    return (
        f"{mask.mode}: {mask.targets} targets, scale {scale}, aspect {aspect}, {grid}x{grid}; "
        f"{describe_context(mask, grid)}"
    )


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:g}-{interval[1]:g}"


def _fraction_list(fractions: dict[str, float]) -> str:
    return ", ".join(f"{k.removesuffix('_fraction')} {v:.3f}" for k, v in fractions.items())
