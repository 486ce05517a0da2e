"""Preview of a mask setting: sampled masks, realised fractions, where patches fall.

In: a mask setting and a grid. Out: text for the terminal, a document, or a PNG.
Numpy only, until a PNG is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_cluster.config import Mask
from jepa_cluster.errors import JepaError
from jepa_cluster.ijepa import masks as m
from jepa_cluster.ijepa.masks.blocks import Bools, Floats, Ints, target_cover

SHOWN_SAMPLES = 3  # in the text
SHADES = " .:-=+*#%@"  # probability, a tenth each
BACKGROUND = "0.93"  # grey level
CONTEXT = "#4c78a8"
TARGETS = ("#e45756", "#f58518", "#eeca3b", "#b279a2", "#54a24b", "#72b7b2")
LEGEND = "blue: context; red, orange, yellow, purple: predicted by 1, 2, 3, 4 targets"


class Preview(NamedTuple):
    """Sampled masks of a setting, by patch: whether it is context, and how many targets it is in.

    settings, kept: the setting and its number of context patches in words.
    """

    mask: Mask
    is_context: Bools  # [samples, grid, grid]
    target_count: Ints  # [samples, grid, grid]
    fractions: dict[str, float]
    settings: str
    kept: str

    def p_context(self) -> Floats:
        return self.is_context.mean(0)

    def p_target(self) -> Floats:
        return (self.target_count > 0).mean(0)

    def context_patches(self) -> Ints:
        return self.is_context.sum((1, 2))

    def fraction_list(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.fractions.items())


def preview(
    mask: Mask,
    grid: int,
    seed: int,
    samples: int,
) -> Preview:
    """Sample masks of a setting. Raises ConfigError when it cannot be sampled."""
    m.check(mask, grid)
    index = np.arange(samples)
    step = index // mask.reference_batch  # of a trial with this batch per rank
    drawn = m.sample(mask, grid, seed, np.zeros_like(index), index, step, slot=index)
    shape = (samples, grid, grid)
    target_count = np.zeros(shape, np.int64)
    for k in range(drawn.targets.shape[1]):
        target_count += target_cover(drawn.targets[:, k], grid).reshape(shape)
    fractions: dict[str, float] = {}
    for name, value in m.fractions(drawn, grid).items():
        fractions[name.removesuffix("_fraction")] = value
    scale = "{:g}-{:g}".format(*mask.target_scale)
    aspect = "{:g}-{:g}".format(*mask.target_aspect)
    is_context = target_cover(drawn.context, grid).reshape(shape)
    patches = f"{grid}x{grid} patches"
    targets = f"{mask.targets} targets of scale {scale}, aspect {aspect}"
    settings = f"mode {mask.mode}, {patches}, {targets}; {samples} samples"
    kept = m.sampler_of(mask, grid).describe_context()
    return Preview(
        mask,
        is_context,
        target_count,
        fractions,
        settings,
        kept,
    )


def text(shown: Preview) -> str:
    """Some masks, both histograms, and the realised fractions.

    # is context, a digit is the number of targets that predict the patch.
    """
    digits = np.minimum(shown.target_count, 9).astype(str)
    symbols = np.where(shown.is_context, "#", np.where(shown.target_count > 0, digits, "."))
    panels: dict[str, Any] = {}
    for i in range(SHOWN_SAMPLES):
        panels[f"sample {i}"] = symbols[i]
    panels["P(context)"] = _shade(shown.p_context())
    panels["P(target)"] = _shade(shown.p_target())
    width = max(len(symbols[0]), 10)
    lines = [_line(panels, width)]
    for row in zip(*panels.values(), strict=True):
        cells = map("".join, row)
        lines.append(_line(cells, width))

    sizes = shown.context_patches()
    by_row = " ".join(f"{v:.2f}".lstrip("0") for v in shown.p_context().mean(1))
    lines += [
        "",
        shown.settings,
        f"realised   {shown.fraction_list()}",
        "           (shares of the grid; overlap: share of predicted patches that another target "
        "predicts too)",
        f"context    {sizes.min()}-{sizes.max()} patches; {shown.kept}",
        f"P(context) by row  {by_row}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def document(shown: Preview) -> dict[str, Any]:
    """The numbers of the text. P(context) and P(target) of each patch are [grid][grid]."""
    sizes = shown.context_patches()
    samples, grid, _ = shown.is_context.shape
    return {
        "mask": asdict(shown.mask),
        "grid": grid,
        "samples": samples,
        "realised": shown.fractions,
        "context_patches": [int(sizes.min()), int(sizes.max())],
        "kept": shown.kept,
        "p_context": shown.p_context().tolist(),
        "p_target": shown.p_target().tolist(),
    }


def save_png(
    shown: Preview,
    path: Path,
) -> Path:
    """Draw 16 masks, two maps and the row profile. Raises JepaError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as e:
        raise JepaError("drawing needs matplotlib", hint="pip install 'jepa-cluster[track]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([BACKGROUND, *TARGETS, CONTEXT])
    most = len(TARGETS)
    colour = np.where(shown.is_context, most + 1, np.minimum(shown.target_count, most))
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2)  # pyright: ignore[reportGeneralTypeIssues]
    for i, axes in enumerate(left.subplots(4, 4).flat):
        axes.imshow(
            colour[i],
            cmap=colours,
            vmin=0,
            vmax=most + 1,
            interpolation="nearest",
        )
        axes.set(xticks=[], yticks=[])
    left.suptitle(LEGEND, fontsize=9)

    top, bottom = right.subfigures(2, 1, height_ratios=(3, 2))
    maps = {"P(context)": shown.p_context(), "P(target)": shown.p_target()}
    for axes, (name, probability) in zip(top.subplots(1, 2), maps.items(), strict=True):
        image = axes.imshow(probability, vmin=0, vmax=1, cmap="viridis")
        axes.set(title=name, xticks=[], yticks=[])
        top.colorbar(image, ax=axes, shrink=0.8)

    axes = bottom.subplots()
    by_row = shown.p_context().mean(1)
    axes.bar(range(len(by_row)), by_row, color=CONTEXT)
    axes.set(xlabel="row of patches, top to bottom", ylabel="P(context)")
    axes.set(xlim=(-0.6, len(by_row) - 0.4), ylim=(0, 1))
    axes.locator_params(axis="x", integer=True)
    axes.set_title(shown.fraction_list(), fontsize=9)
    figure.suptitle(f"{shown.settings}; {shown.kept}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _line(cells: Iterable[str], width: int) -> str:
    return "  ".join(cell.ljust(width) for cell in cells)


def _shade(probability: Floats) -> Any:
    tenths = np.minimum((probability * 10).astype(int), 9)
    return np.array(list(SHADES))[tenths]
