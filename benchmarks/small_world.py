"""What the drawn set can show: trials of the demo's recipe, run by `jepa submit` on this machine.

Draws the set, trains the studies one after the other, and prints a table of each: the class by
several readouts, few labels, count and distance; means over seeds with Student's 90 % interval, and
the gain over the untrained encoder of the same trial. Peers on the same images: a supervised CNN,
and ridge regression on colour moments. A second run goes on where the first one stopped.

    python benchmarks/small_world.py FOLDER --studies size,target --seeds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import pipeline
from jepa_cluster.results import student, tables
from jepa_cluster.results.tables import Row
from jepa_cluster.training import linear_probes
from jepa_cluster.trial.directory import Root, TrialDir

IMAGES = 4000  # of each split
LEVEL = 0.9
LABELS = ("class", "count", "distance")
Split = tuple[Tensor, dict[str, Tensor]]  # images, and labels by name
CNN_STEPS = 2000
SHIFT = 4
CNN_RATE = 4e-3
RATES = "[2.e-3, 5.e-3]"
WIDE = "model.width=128, model.depth=6, model.heads=4, model.name=wide, optim.steps=2"
BASE = "data=demo, optim=demo, runtime=demo, runtime.probe_every=0, runtime.workers=0"
PROBE = f"probe.images={IMAGES}, probe.test_images=2000, 'probe.labels=[class,count,distance]'"
MINI = "model=vit_mini, optim.steps=750, optim.warmup_steps=94"
# name -> base, grid. The first value of an axis is the recipe's.
STUDIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "wide": (f"model=vit_mini, {WIDE}, optim.warmup_steps=1", {}),
    "size": (
        "optim.lr=4.e-3, optim.warmup_steps=94",
        {"model": "[vit_nano, vit_micro, vit_mini]", "optim.steps": "[375, 750, 1500]"},
    ),
    "rate": (
        "optim.steps=750, optim.warmup_steps=94",
        {"model": "[vit_nano, vit_micro, vit_mini]", "optim.lr": RATES},
    ),
    "demo": (  # short horizons, as of sweeps/demo.yaml, at three rates
        "optim.warmup_steps=25",
        {
            "model": "[vit_nano, vit_micro, vit_mini]",
            "optim.steps": "[100, 200, 400]",
            "optim.lr": "[3.e-3, 6.e-3, 1.2e-2]",
        },
    ),
    "target": (
        MINI,
        {"objective.target": "[representation, frozen, pixels, views]", "optim.lr": RATES},
    ),
    "mask": (
        f"{MINI}, optim.lr=4.e-3, mask.min_keep=4",  # 10 is for a grid of 14x14
        {"mask": "[multiblock, reference, packed, block, random, rasterized]"},
    ),
    "init": (MINI, {"model.init": "[fan_in, reference]", "optim.lr": RATES}),
    "momentum": (
        f"{MINI}, optim.lr=4.e-3",
        {"optim.momentum": "[0.98, 0.99, 0.996]", "optim.final_momentum": "[1.0, 0.999]"},
    ),
    "precision": (f"{MINI}, optim.lr=4.e-3", {"optim.precision": "[fp32, autocast, bf16]"}),
}
ERRORS = {  # column of the table -> metric
    "class": "probe/class_error",
    "online": "probe/online/class_error",
    "mean, std, max": "probe/mean_std_max/class_error",
    "k-NN": "probe/knn_error",
    "1 %": "probe/class_1pct_error",
    "online 1 %": "probe/online/class_1pct_error",
}
EXPLAINED = {"count": "probe/count_r2", "distance": "probe/distance_r2"}


def run_study(folder: Path, name: str, seeds: int) -> None:
    """Submit a study and wait for its end."""
    base, grid = STUDIES[name]
    lines = [
        f"question: What does the drawn set show about {name}?",
        f"base: [{base}, {BASE}, {PROBE}, runtime.data_root={folder / 'data'}]",
        "grid:",
        *(f"  {axis}: {values}" for axis, values in grid.items()),
        f"seeds: {list(range(seeds))}",
        "resources: [{procs_per_node: 1, time: 1h}]",
    ]
    if not grid:
        lines.remove("grid:")
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(lines) + "\n")
    jepa(folder, "submit", str(file), "--yes")
    jepa(folder, "watch", name, "--until-done")


def jepa(folder: Path, *words: str) -> None:
    environment = {**os.environ, "JEPA_ROOT": str(folder / "root")}
    environment.pop("JEPA_DATA", None)
    command = [sys.executable, "-m", "jepa_cluster", *words]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def print_study(folder: Path, name: str) -> None:
    """Print one row per point of the study, in percent; untrained -> trained."""
    sweep = tables.load(Root(folder / "root"), name)
    points: dict[str, list[Row]] = {}
    for row in tables.trial_table(sweep):
        if row["state"] == "done":
            point = " ".join(str(row[axis]) for axis in sweep.axes) or row["model"]
            points.setdefault(point, []).append(row)
    seconds = [60 * 60 * row["gpu_hours"] for rows in points.values() for row in rows]
    print(f"\n{name}: {len(seconds)} trials, at most {max(seconds):.0f} s each\n")
    print(f"| {' | '.join(['', *ERRORS, *EXPLAINED, 'RankMe', 'target_std'])} |")
    print(f"|---|{'---:|' * (len(ERRORS) + len(EXPLAINED) + 2)}")
    for point, rows in points.items():
        cells = [cell(rows, metric, lambda e: 100 * (1 - e)) for metric in ERRORS.values()]
        cells += [cell(rows, metric, lambda r: r, 2) for metric in EXPLAINED.values()]
        cells.append(cell(rows, "probe/rankme", lambda rank: rank))
        cells.append(cell(rows, "target_std", lambda deviation: deviation, 2))
        print(f"| {point} | {' | '.join(cells)} |")


def cell(rows: list[Row], metric: str, scale: Callable[[float], float], digits: int = 1) -> str:
    """Return 'untrained -> trained ± interval' of the mean over seeds."""
    values = [scale(row[metric]) for row in rows]
    text = f"{statistics.mean(values):.{digits}f}"
    if f"initial/{metric}" in rows[0]:
        before = statistics.mean(scale(row[f"initial/{metric}"]) for row in rows)
        text = f"{before:.{digits}f} → {text}"
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        text += f" ± {student.quantile(len(values) - 1, LEVEL) * error:.{digits}f}"
    return text


# ---- peers


def print_peers(folder: Path) -> None:
    """Print what labels teach a CNN of one core, and what colours alone tell."""
    trial = min((folder / "root/trials").iterdir())
    config = TrialDir(trial).read_config()
    train = stacked(*load_split(config, "train"))
    test = stacked(*load_split(config, "val"))
    started = time.process_time()
    top1, count, distance = supervised(config, train, test)
    seconds = time.process_time() - started
    print(f"\nsupervised CNN, {seconds:.0f} s: class {top1:.1f}, R2 {count:.2f}, {distance:.2f}")
    print(f"ridge regression on colour moments: class {colours(train, test):.1f}")


def load_split(config: TrialConfig, split: str, limit: int | None = None) -> Split:
    """Return centred crops, uint8 [n, 3, S, S], and labels by name."""
    images: list[Tensor] = []
    labels: dict[str, list[Tensor]] = {}
    for pixels, named, _ in pipeline.labelled(config, split, limit, 0, 1, 64):
        images.append(pixels.clone())
        for name, label in named.items():
            labels.setdefault(name, []).append(label)
    return torch.cat(images), {name: torch.cat(parts) for name, parts in labels.items()}


def stacked(images: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the images, and class, count and distance as columns [n, 3]."""
    return images, torch.stack([labels[name].float() for name in LABELS], 1)


def supervised(
    config: TrialConfig, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[float]:
    """Train a CNN on all labels; return top-1, and R2 of count and distance.

    Images are moved by up to SHIFT px and never resized, because the size is a label.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = train
    classes = 1 + int(labels[:, 0].max())
    mean, deviation = labels[:, 1:].mean(0), labels[:, 1:].std(0)
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((24, 2), (48, 2), (96, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
        channels = width
    layers += [nn.AvgPool2d(4), nn.Flatten(), nn.LazyLinear(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, classes + 2))
    model(pipeline.normalise(images[:2], config.recipe.data))
    solver = torch.optim.AdamW(model.parameters(), lr=CNN_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, CNN_RATE, total_steps=CNN_STEPS)
    for _ in range(CNN_STEPS):
        chosen = torch.randint(len(images), (32,))
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        moved = images[chosen].roll(shift, (2, 3))
        output = model(pipeline.normalise(moved, config.recipe.data))
        truth = labels[chosen]
        numbers = (truth[:, 1:] - mean) / deviation
        loss = F.cross_entropy(output[:, :classes], truth[:, 0].long())
        loss = loss + F.mse_loss(output[:, classes:], numbers)
        solver.zero_grad()
        loss.backward()
        solver.step()
        schedule.step()
    model.eval()
    images, truth = test
    with torch.no_grad():
        parts = [model(pipeline.normalise(part, config.recipe.data)) for part in images.split(256)]
    output = torch.cat(parts)
    top1 = 100 * (output[:, :classes].argmax(1) == truth[:, 0]).float().mean()
    error = (output[:, classes:] * deviation + mean - truth[:, 1:]).square().mean(0)
    return [top1.item(), *(1 - error / truth[:, 1:].var(0)).tolist()]


def colours(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the top-1 of ridge regression on the first four moments of each channel."""
    x, test_x = moments(train[0]), moments(test[0])
    x, test_x = (x - x.mean(0)) / x.std(0), (test_x - x.mean(0)) / x.std(0)
    y = F.one_hot(train[1][:, 0].long()).double()
    weights, offset = linear_probes.ridge_leave_one_out(x, y)
    right = (test_x @ weights + offset).argmax(1) == test[1][:, 0]
    return 100 * right.double().mean().item()


def moments(images: Tensor) -> Tensor:
    """Return mean, deviation, skewness and kurtosis of each channel and of the grey image."""
    channels = torch.cat([images, images.float().mean(1, keepdim=True)], 1).flatten(2).double()
    mean, deviation = channels.mean(2), channels.std(2)
    scaled = (channels - mean[..., None]) / deviation[..., None]
    higher = [scaled.pow(3).mean(2), scaled.pow(4).mean(2)]
    return torch.cat([mean, deviation, *higher], 1)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path)
    p.add_argument("--studies", default=",".join(STUDIES))
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args()
    unknown = set(args.studies.split(",")) - STUDIES.keys()
    if unknown:
        p.error(f"unknown studies: {', '.join(unknown)}; known: {', '.join(STUDIES)}")
    folder: Path = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    counts = ["--train", str(IMAGES), "--val", str(IMAGES)]
    jepa(folder, "shards", "synthetic", str(folder / "images"), *counts)
    jepa(folder, "shards", "build", str(folder / "images"), str(folder / "data"))
    for name in args.studies.split(","):
        run_study(folder, name, args.seeds)
        print_study(folder, name)
    print_peers(folder)


if __name__ == "__main__":
    main()
