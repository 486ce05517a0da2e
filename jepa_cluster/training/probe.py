"""Probe the frozen target encoder: ridge, k-NN, RankMe, LiDAR, loss on held-out images.

In: the model of all ranks and a trial's config. Out: metrics by name, the same on every rank, or
None when any rank was asked to stop. Each rank works on its share of the images with unsharded
weights, so nothing in between waits for another rank; the ranks meet in a few sums. The ridge probe
is exact: its Gram matrices are summed over ranks and solved in closed form for several penalties,
of which the training images held back choose one.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_cluster.config import Mask, TrialConfig
from jepa_cluster.data.pipeline import labelled, normalise
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.objective import IJepa, features
from jepa_cluster.training.distributed import World, named_tensors, sum_flags, unsharded_model
from jepa_cluster.training.preemption import PreemptionHandler

BATCH = 64  # images at a time
HELD_BACK = 5  # every fifth training image chooses the penalty
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # relative to the mean eigenvalue
NEIGHBOURS = 20
TEMPERATURE = 0.07
FIXED_SEED = 20230119  # of the masks of evaluation, the same for every trial
LIDAR_VIEWS = 4  # masked views of an image
LIDAR_RIDGE = 1e-4  # on their scatter
# One mask setting for all trials, so that what is measured with it does not move with a swept mask.
SHARED_MASK = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), "log")


@dataclass
class Features:
    """This rank's share of a split of n images.

    x: features, float64 [n, D]. labels: by name, [n]. index: of each image, [n].
    losses: sums over validation images with the trial's own masks and with the shared ones.
    views: features of masked views of validation images, [n, V, D].
    """

    x: Tensor
    labels: dict[str, Tensor]
    index: Tensor
    losses: Tensor
    views: Tensor


@torch.no_grad()
def measure(
    model: IJepa,
    config: TrialConfig,
    world: World,
    handler: PreemptionHandler,
) -> dict[str, float] | None:
    """All metrics of one probe.

    Raises DataError when a label that the recipe asks for is not in the shards.
    """
    probe = config.recipe.probe
    whole = full_copy(model, config, world.device)
    train = extract_features(whole, config, "train", probe.images, world, handler)
    test = None
    if train:
        test = extract_features(whole, config, "val", probe.test_images, world, handler)
    if sum_flags({"interrupted": test is None}):
        return None
    assert train is not None and test is not None
    for name in probe.labels:
        if name not in train.labels or name not in test.labels:
            raise DataError(
                f"the probe wants label '{name}', the shards have {sorted(train.labels)}",
                where=config.runtime.data_root,
                hint="set probe.labels to those, or build the shards with it",
            )
    found = {"probe/rankme": rankme(train.x)}
    losses = all_reduce_sum(test.losses) / all_reduce_sum(count_of(test.x))
    own_loss, shared_loss = losses.tolist()
    found["val/loss"] = own_loss
    if shared_mask(config) is not None:
        found["val/reference_loss"] = shared_loss
        found["probe/lidar"] = lidar(test.views)
    for name in probe.labels:
        for kind, value in ridge(train, test, name).items():
            found[f"probe/{name}_{kind}"] = value
    classes = [name for name in probe.labels if not train.labels[name].is_floating_point()]
    if classes:
        found["probe/knn_error"] = knn_error(train, test, classes[0])
    return found


@torch.no_grad()
def full_copy(model: IJepa, config: TrialConfig, device: torch.device) -> IJepa:
    """A whole copy of the sharded model, for inference."""
    whole = unsharded_model(config.recipe, device)
    sources = named_tensors(model)
    for name, target in named_tensors(whole).items():
        source = sources[name]
        # Gathers the rows of all ranks.
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return whole.eval().requires_grad_(False)


def extract_features(
    whole: IJepa,
    config: TrialConfig,
    split: str,
    limit: int,
    world: World,
    handler: PreemptionHandler,
) -> Features | None:
    """Run the target encoder over this rank's share of a split; on "val" the objective, too."""
    width, device = config.recipe.model.width, world.device
    shared = shared_mask(config)
    # A rank without images holds tensors of no rows.
    x = [torch.zeros((0, width), dtype=torch.float64)]
    views = [torch.zeros((0, LIDAR_VIEWS, width), dtype=torch.float64)]
    index = [torch.zeros(0, dtype=torch.int64)]
    labels: dict[str, list[Tensor]] = {}
    losses = torch.zeros(2, dtype=torch.float64)
    batches = labelled(
        config, split, limit, world.rank, world.size, BATCH, world.env.is_first_on_node
    )
    for images, named, numbers in batches:
        if handler.stop_requested:
            return None
        index.append(numbers)
        for name, label in named.items():
            labels.setdefault(name, []).append(label)
        if not len(images):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pixels = normalise(images.to(device, non_blocking=True), config.recipe.data)
            x.append(features(whole.target, pixels).double().cpu())
            if split == "val":
                losses[0] += loss_sum(whole, config.recipe.mask, pixels, numbers)
            if split == "val" and shared is not None:
                losses[1] += loss_sum(whole, shared, pixels, numbers)
                views.append(masked_views(whole, shared, pixels, numbers))
    joined = {name: torch.cat(parts) for name, parts in labels.items()}
    return Features(torch.cat(x), joined, torch.cat(index), losses, torch.cat(views))


def shared_mask(config: TrialConfig) -> Mask | None:
    """The shared mask setting; None where this trial's grid is too coarse for it."""
    try:
        masks.check(SHARED_MASK, config.recipe.model.grid)
    except ConfigError:
        return None
    return SHARED_MASK


def fixed_masks(whole: IJepa, setting: Mask, index: Tensor, view: int = 0) -> masks.Masks:
    """Masks that depend on the image (and the number of the view) alone, on the model's device."""
    sample = index.numpy()
    step, slot = sample // setting.reference_batch, sample % setting.reference_batch
    epoch = np.full_like(sample, view)
    grid = whole.recipe.model.grid
    drawn = masks.sample(setting, grid, FIXED_SEED, epoch, sample, step, slot)
    return to_device(drawn, next(whole.parameters()).device)


def loss_sum(whole: IJepa, setting: Mask, pixels: Tensor, index: Tensor) -> float:
    """Return the sum of the loss over images, with masks of this setting."""
    loss, _ = whole(pixels, fixed_masks(whole, setting, index))
    return loss.item() * len(pixels)


def masked_views(whole: IJepa, setting: Mask, pixels: Tensor, index: Tensor) -> Tensor:
    """Target encoder features of several masked views of each image, [b, VIEWS, D] float64."""
    views: list[Tensor] = []
    for view in range(LIDAR_VIEWS):
        context = fixed_masks(whole, setting, index, 1 + view).context
        views.append(whole.target(pixels, context).mean(1).double().cpu())
    return torch.stack(views, 1)


def to_device(drawn: masks.Masks, device: torch.device) -> masks.Masks:
    """Masks in numpy arrays or tensors -> tensors on the device."""
    return drawn.apply(lambda part: torch.as_tensor(part).to(device, non_blocking=True))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a CPU tensor."""
    dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks [n_r, ...] -> [sum n_r, ...], in the order of ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


def count_of(tensor: Tensor) -> Tensor:
    """Number of this rank's rows, float64 []."""
    return torch.tensor(float(len(tensor)), dtype=torch.float64)


def effective_rank(spectrum: Tensor) -> float:
    """Return exp of the entropy of the spectrum."""
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    entropy = -(share * (share + 1e-12).log()).sum()
    return torch.exp(entropy).item()


def lidar(views: Tensor) -> float:
    """Effective rank of the scatter between images relative to that within their views.

    views: [n, V, D], all with the shared masks (LiDAR, Thilak et al., 2312.04000).
    """
    means = views.mean(1)
    inside = (views - means[:, None]).flatten(0, 1)
    count = all_reduce_sum(count_of(views))
    centred = means - all_reduce_sum(means.sum(0)) / count
    between = all_reduce_sum(centred.T @ centred) / count
    within = all_reduce_sum(inside.T @ inside) / (count * LIDAR_VIEWS)
    scale, axes = torch.linalg.eigh(within)
    white = axes * (scale.clamp_min(0) + LIDAR_RIDGE).rsqrt()
    return effective_rank(torch.linalg.eigvalsh(white.T @ between @ white).clamp_min(0))


def rankme(x: Tensor) -> float:
    """Effective rank of the features [n, D] of all ranks (Garrido et al., 2210.02885)."""
    gram = all_reduce_sum(x.T @ x)
    return effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


# ---- ridge


def sums_of_products(x: Tensor, y: Tensor) -> Tensor:
    """Sums over images of all ranks of the products of [1, x] and [1, x, y], [1 + D, 1 + D + C]."""
    left = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    return all_reduce_sum(left.T @ torch.cat([left, y], dim=1))


def ridge_predictions(sums: Tensor, x: Tensor, penalties: Tensor) -> Iterator[Tensor]:
    """Yield predictions [m, C] for features [m, D] by ridge on standardised ones, per penalty.

    sums: of the images to fit, by `sums_of_products`.
    """
    width = x.shape[1]
    means = sums[0, 1:] / sums[0, 0]
    mean = means[:width]
    offset = means[width:]
    covariance = sums[1:, 1:] / sums[0, 0] - torch.outer(mean, means)
    gram = covariance[:, :width]
    cross = covariance[:, width:]
    deviation = gram.diagonal().clamp_min(0).sqrt() + 1e-8
    spectrum, axes = torch.linalg.eigh(gram / torch.outer(deviation, deviation))
    inner = axes.T @ (cross / deviation[:, None])
    rotated = ((x - mean) / deviation) @ axes
    for penalty in penalties:
        yield rotated / (spectrum.clamp_min(0) + penalty) @ inner + offset


def ridge(train: Features, test: Features, name: str) -> dict[str, float]:
    """{"error": ...} and, for labels that are classes, {"top1": 1 - error}.

    A number's error is the share of its variance that the probe leaves unexplained; none where all
    test images have the same number.
    """
    classes = class_count(train.labels[name], test.labels[name])
    y = label_matrix(train.labels[name], classes)
    truth = label_matrix(test.labels[name], classes)
    held_back = train.index % HELD_BACK == 0
    fit = sums_of_products(train.x[~held_back], y[~held_back])
    held = sums_of_products(train.x[held_back], y[held_back])

    # The penalty with the smallest error on the training images held back, over all ranks.
    predictions = ridge_predictions(fit, train.x[held_back], PENALTIES)
    errors = torch.stack([error_sum(prediction, y[held_back]) for prediction in predictions])
    best = PENALTIES[all_reduce_sum(errors).argmin()]

    (prediction,) = ridge_predictions(fit + held, test.x, best[None])
    error = all_reduce_sum(error_sum(prediction, truth))
    count = all_reduce_sum(count_of(truth))
    if classes:
        return {"error": (error / count).item(), "top1": (1 - error / count).item()}
    deviation = truth - all_reduce_sum(truth.sum(0)) / count
    variance = all_reduce_sum(deviation.square().sum())
    return {"error": (error / variance).item()} if variance > 0 else {}


def class_count(train: Tensor, test: Tensor) -> int:
    """Return the number of classes on all ranks; 0 for labels that are real numbers."""
    if train.is_floating_point():
        return 0
    return 1 + int(all_gather_rows(torch.cat([train, test])).max())


def label_matrix(label: Tensor, classes: int) -> Tensor:
    """Classes as one-hot rows, a number as a column; float64."""
    if classes:
        return nn.functional.one_hot(label.long(), classes).double()
    return label.double()[:, None]


def error_sum(guess: Tensor, truth: Tensor) -> Tensor:
    """Wrong classes, or the sum of squares for one column; a sum over images, float64 []."""
    if truth.shape[1] == 1:
        return (guess - truth).square().sum()
    return (guess.argmax(1) != truth.argmax(1)).sum().double()


# ---- nearest neighbours


def knn_error(train: Features, test: Features, name: str) -> float:
    """Error of a weighted vote of the nearest training images by cosine."""
    bank = all_gather_rows(nn.functional.normalize(train.x.float(), dim=1))
    labels = all_gather_rows(train.labels[name].long())
    queries = nn.functional.normalize(test.x.float(), dim=1)
    wrong = torch.zeros((), dtype=torch.float64)
    for part, truth in zip(queries.split(1024), test.labels[name].split(1024), strict=True):
        nearest, rows = (part @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[rows], (nearest / TEMPERATURE).exp())
        wrong += (votes.argmax(1) != truth).sum()
    return (all_reduce_sum(wrong) / all_reduce_sum(count_of(test.x))).item()
