"""Probe the frozen encoders: ridge, k-NN, RankMe, LiDAR, loss on held-out images.

In: the model of all ranks and a trial's config. Out: metrics by name, the same on every rank, or
None when any rank was asked to stop. Each rank works on its share of the images with unsharded
weights, so nothing in between waits for another rank; the ranks meet in a few sums.

The first and the last probe of a trial are full: they also read the online encoder, a second
readout, and few labels.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_cluster.config import Mask, TrialConfig
from jepa_cluster.data.pipeline import labelled, normalise
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.objective import IJepa, mean_std_max
from jepa_cluster.labels import ONLINE, SECOND_READOUT
from jepa_cluster.training import linear_probes
from jepa_cluster.training.distributed import World, named_tensors, sum_flags, unsharded_model
from jepa_cluster.training.linear_probes import (
    TARGET,
    Features,
    all_reduce_sum,
    count_of,
)
from jepa_cluster.training.preemption import PreemptionHandler

BATCH = 64  # images at a time
FIXED_SEED = 20230119  # of the masks of evaluation, the same for every trial
LIDAR_VIEWS = 4  # masked views of an image
LIDAR_RIDGE = 1e-4  # on their scatter
# One mask setting for all trials, so that what is measured with it does not move with a swept mask.
SHARED_MASK = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), "log")


@torch.no_grad()
def measure(
    model: IJepa,
    config: TrialConfig,
    world: World,
    handler: PreemptionHandler,
    full: bool,
    topic: str,
) -> dict[str, float] | None:
    """All metrics of one probe. topic: under which the ranks report progress to each other.

    Raises DataError when a label that the recipe asks for is not in the shards.
    """
    probe = config.recipe.probe
    whole = full_copy(model, config, world.device)
    train = extract_features(whole, config, "train", probe.images, world, handler, full, topic)
    test = None
    if train:
        images = probe.test_images
        test = extract_features(whole, config, "val", images, world, handler, full, topic)
    # A rank waits as long as another one makes progress, which in a collective it would not see.
    if any(world.channel.gather(topic, lambda: test is None)):
        return None
    assert train is not None and test is not None
    for name in probe.labels:
        if name not in train.labels or name not in test.labels:
            raise DataError(
                f"the probe wants label '{name}', the shards have {sorted(train.labels)}",
                where=config.runtime.data_root,
                hint="set probe.labels to those, or build the shards with it",
            )
    found = {"probe/rankme": rankme(train.x[TARGET])}
    losses = all_reduce_sum(test.losses) / all_reduce_sum(count_of(test.x[TARGET]))
    found["val/loss"], shared_loss = losses.tolist()
    if shared_mask(config) is not None:
        if predicts(config):
            found["val/reference_loss"] = shared_loss
        found["probe/lidar"] = lidar(test.views)
    for readout in train.x:
        if sum_flags({"interrupted": handler.stop_requested}):
            return None
        for name, value in linear_probes.ridge(train, test, readout, probe.labels).items():
            found[f"probe/{readout}{name}"] = value
    classes = [name for name in probe.labels if not train.labels[name].is_floating_point()]
    if classes:
        found["probe/knn_error"] = linear_probes.knn_error(train, test, classes[0])
    if classes and full:
        for readout in (TARGET, ONLINE):
            if sum_flags({"interrupted": handler.stop_requested}):
                return None
            for name, value in linear_probes.few_labels(train, test, readout, classes[0]).items():
                found[f"probe/{readout}{name}"] = value
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
    full: bool,
    topic: str,
) -> Features | None:
    """Run the target encoder over this rank's share of a split; on "val" the objective, too.

    full: read the patches twice, and run the online encoder.
    """
    width, device = config.recipe.model.width, world.device
    shared = shared_mask(config)
    # A rank without images holds tensors of no rows.
    x = {TARGET: [torch.zeros((0, width), dtype=torch.float64)]}
    if full:
        x[ONLINE] = [torch.zeros((0, width), dtype=torch.float64)]
        x[SECOND_READOUT] = [torch.zeros((0, 3 * width), dtype=torch.float64)]
    views = [torch.zeros((0, LIDAR_VIEWS, width), dtype=torch.float64)]
    index = [torch.zeros(0, dtype=torch.int64)]
    labels: dict[str, list[Tensor]] = {}
    losses = torch.zeros(2, dtype=torch.float64)
    batches = labelled(
        config, split, limit, world.rank, world.size, BATCH, world.env.is_first_on_node
    )
    for images, named, numbers in batches:
        world.channel.advance(topic)
        if handler.stop_requested:
            return None
        index.append(numbers)
        for name, label in named.items():
            labels.setdefault(name, []).append(label)
        if not len(images):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pixels = normalise(images.to(device, non_blocking=True), config.recipe.data)
            patches = whole.target(pixels).float()
            x[TARGET].append(patches.mean(1).double().cpu())
            if full:
                x[ONLINE].append(whole.encoder(pixels).float().mean(1).double().cpu())
                x[SECOND_READOUT].append(mean_std_max(patches).double().cpu())
            if split == "val":
                losses[0] += loss_sum(whole, config.recipe.mask, pixels, numbers)
            if split == "val" and shared is not None:
                if predicts(config):
                    losses[1] += loss_sum(whole, shared, pixels, numbers)
                views.append(masked_views(whole, shared, pixels, numbers))
    features = {readout: torch.cat(parts) for readout, parts in x.items()}
    joined = {name: torch.cat(parts) for name, parts in labels.items()}
    return Features(features, joined, torch.cat(index), losses, torch.cat(views))


def predicts(config: TrialConfig) -> bool:
    """Whether the loss depends on masks."""
    return config.recipe.objective.target != "views"


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
