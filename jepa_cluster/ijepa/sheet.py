"""What a mask setting means, for a person: sampled masks, realised fractions, where patches fall.

In: a mask setting and a grid. Out: text for the terminal, or a PNG. Numpy only until something is drawn.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import JepaError
from jepa_cluster.ijepa import masks as m

SHADES = " .:-=+*#%@"  # probability, a tenth each
CONTEXT, COLOURS = "#4c78a8", ("#e45756", "#f58518", "#eeca3b", "#b279a2", "#54a24b", "#72b7b2")


def sampled(mask: Mask, grid: int, seed: int, count: int) -> tuple[Any, Any, dict[str, float]]:
    """-> is context [count, N], times predicted [count, N], realised fractions. ConfigError when not possible."""
    m.check(mask, grid)
    index = np.arange(count)
    drawn = m.sample(mask, grid, seed, np.zeros_like(index), index)
    context, goals = np.zeros((count, grid * grid), bool), np.zeros((count, grid * grid), int)
    for one, (size, lengths) in enumerate(zip(*m.lengths(drawn), strict=True)):
        context[one, drawn.context[one, :size]] = True
        for target, length in zip(drawn.targets[one], lengths, strict=True):
            goals[one, target[:length]] += 1
    return context, goals, m.fractions(drawn, grid)


def text(mask: Mask, grid: int, seed: int, count: int, show: int = 3) -> str:
    """Some masks (# context, 1-9 how many targets predict the patch), both histograms, and the fractions."""
    context, goals, fractions = sampled(mask, grid, seed, count)
    symbols = np.where(context, "#", np.where(goals > 0, np.minimum(goals, 9).astype(str), "."))
    pictures = [["".join(row) for row in symbols[i].reshape(grid, grid)] for i in range(show)]
    for chance in (context.mean(0), (goals > 0).mean(0)):
        shade = np.array(list(SHADES))[np.minimum((chance * 10).astype(int), 9)]
        pictures.append(["".join(row) for row in shade.reshape(grid, grid)])
    titles = [f"sample {i}" for i in range(show)] + ["P(context)", "P(target)"]
    width = max(grid, 10)
    lines = ["  ".join(t.ljust(width) for t in titles)]
    lines += ["  ".join(row.ljust(width) for row in rows) for rows in zip(*pictures, strict=True)]
    rows = context.reshape(count, grid, grid).mean((0, 2))
    lines += [
        "",
        f"mode {mask.mode}, {grid}x{grid} patches, {mask.targets} targets of scale {mask.target_scale[0]:g}-"
        f"{mask.target_scale[1]:g}, aspect {mask.target_aspect[0]:g}-{mask.target_aspect[1]:g}; {count} samples",
        "realised   " + ", ".join(f"{k.removesuffix('_fraction')} {v:.3f}" for k, v in fractions.items()),
        "           (shares of the grid; overlap: share of predicted patches that another target predicts too)",
        f"context    {context.sum(1).min()}-{context.sum(1).max()} patches; {kept(mask, grid)}",
        "P(context) by row  " + " ".join(f"{v:.2f}".lstrip("0") for v in rows),
    ]
    return "\n".join(line.rstrip() for line in lines)


def document(mask: Mask, grid: int, seed: int, count: int) -> dict[str, Any]:
    """The numbers of the text: the setting, what it realises, and P(context), P(target) of each patch [grid][grid]."""
    context, goals, fractions = sampled(mask, grid, seed, count)
    sizes = context.sum(1)
    return {
        "mask": asdict(mask),
        "grid": grid,
        "samples": count,
        "realised": {k.removesuffix("_fraction"): float(v) for k, v in fractions.items()},
        "context_patches": [int(sizes.min()), int(sizes.max())],
        "kept": kept(mask, grid),
        "p_context": context.mean(0).reshape(grid, grid).tolist(),
        "p_target": (goals > 0).mean(0).reshape(grid, grid).tolist(),
    }


def kept(mask: Mask, grid: int) -> str:
    return m.sampler_of(mask).describe_context(mask, grid)


def draw(mask: Mask, grid: int, seed: int, count: int, path: Path, title: str = "") -> Path:
    """The same as a picture: 16 masks, two maps, the row profile. JepaError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as e:
        raise JepaError("drawing needs matplotlib", now="pip install 'jepa-cluster[track]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    context, goals, fractions = sampled(mask, grid, seed, count)
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    for i, axes in enumerate(left.subplots(4, 4).flat):
        axes.imshow(picture(context[i], goals[i], grid), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    left.suptitle("blue: context; red, orange, yellow, purple: predicted by 1, 2, 3, 4 targets", fontsize=9)
    top, bottom = right.subfigures(2, 1, height_ratios=(3, 2))
    maps = {"P(context)": context.mean(0), "P(target)": (goals > 0).mean(0)}
    for axes, (name, chance) in zip(top.subplots(1, 2), maps.items(), strict=True):
        shown = axes.imshow(chance.reshape(grid, grid), vmin=0, vmax=1, cmap="viridis")
        axes.set(title=name, xticks=[], yticks=[])
        top.colorbar(shown, ax=axes, shrink=0.8)
    axes = bottom.subplots()
    axes.bar(range(grid), context.reshape(count, grid, grid).mean((0, 2)), color=CONTEXT)
    axes.set(xlabel="row of patches, top to bottom", ylabel="P(context)", xlim=(-0.6, grid - 0.4), ylim=(0, 1))
    axes.locator_params(axis="x", integer=True)
    axes.set_title(", ".join(f"{k.removesuffix('_fraction')} {v:.3f}" for k, v in fractions.items()), fontsize=9)
    scale, aspect = (f"{a:g}-{b:g}" for a, b in (mask.target_scale, mask.target_aspect))
    said = f"{mask.mode}: {mask.targets} targets, scale {scale}, aspect {aspect}, {grid}x{grid}; {kept(mask, grid)}"
    figure.suptitle(title or said, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def picture(context: Any, goals: Any, grid: int) -> Any:
    """One sample as an RGB image [grid, grid, 3]."""
    from matplotlib.colors import to_rgb

    out = np.full((grid * grid, 3), 0.93)
    for times in range(1, int(goals.max()) + 1):
        out[goals == times] = to_rgb(COLOURS[min(times, len(COLOURS)) - 1])
    out[context] = to_rgb(CONTEXT)
    return out.reshape(grid, grid, 3)
