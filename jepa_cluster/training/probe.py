"""Probe the frozen target encoder: ridge, k-NN, RankMe, LiDAR, loss on held-out images.

In: the model of all ranks and a trial's config. Out: numbers by metric name, the same on every
rank, or None when somebody wants to stop. Each rank works on its share of the images with whole,
unsharded weights, so nothing inside waits for another rank; they meet in a few sums. The ridge
probe is exact: its moments are summed over ranks and solved in closed form for a range of
penalties, of which the training images held back choose one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_cluster.config import Mask, TrialConfig
from jepa_cluster.data.pipeline import labelled, normalise
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.objective import IJepa, features
from jepa_cluster.training.distributed import World, named_tensors
from jepa_cluster.training.preemption import PreemptionHandler

BATCH = 64  # images at a time
HELD_BACK = 5  # every fifth training image chooses the penalty
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # relative to the mean eigenvalue
NEIGHBOURS, TEMPERATURE = 20, 0.07
FIXED_SEED = 20230119  # of the masks of evaluation, the same for every trial
LIDAR_VIEWS, LIDAR_RIDGE = 4, 1e-4  # LiDAR: masked views of an image, ridge on their scatter
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
    model: IJepa, config: TrialConfig, world: World, handler: PreemptionHandler
) -> dict[str, float] | None:
    """All metrics of one probe.

    Raises DataError when a label that the recipe asks for is not in the shards.
    """
    probe = config.recipe.probe
    whole = full_copy(model, config, world.device)
    train = extract_features(whole, config, "train", probe.images, world, handler)
    test = (
        extract_features(whole, config, "val", probe.test_images, world, handler) if train else None
    )
    if all_reduce_sum(torch.tensor([float(test is None)])).item() > 0:
        return None
    assert train is not None and test is not None
    for name in probe.labels:
        if name not in train.labels or name not in test.labels:
            raise DataError(
                f"the probe wants label '{name}', the shards have {sorted(train.labels)}",
                where=config.runtime.data_root,
                hint="set probe.labels to those, or build the shards with it",
            )
    out = {"probe/rankme": rankme(train.x), **losses(test, shared_mask(config) is not None)}
    if shared_mask(config) is not None:
        out["probe/lidar"] = lidar(test.views)
    for name in probe.labels:
        out |= {f"probe/{name}_{k}": v for k, v in ridge(train, test, name).items()}
    out["probe/knn_error"] = knn_error(train, test, probe.labels[0])
    return out


@torch.no_grad()
def full_copy(model: IJepa, config: TrialConfig, device: torch.device) -> IJepa:
    """A whole copy of the sharded model, for inference."""
    with torch.device("meta"):
        whole = IJepa(config.recipe)
    whole.to_empty(device=device)
    for (name, target), source in zip(
        named_tensors(whole).items(), named_tensors(model).values(), strict=True
    ):
        assert target.shape == source.shape, name
        target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)
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
    none = torch.zeros((0, width), dtype=torch.float64)
    x, views, index, labels = (
        [none],
        [none[:, None].expand(0, LIDAR_VIEWS, width)],
        [torch.zeros(0, dtype=torch.int64)],
        [],
    )
    losses = torch.zeros(2, dtype=torch.float64)
    shared = shared_mask(config)
    for images, named, numbers in labelled(config, split, limit, world.rank, world.size, BATCH):
        if handler.stop_requested:
            return None
        if not len(images):
            continue
        index.append(numbers)
        labels.append(named)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pixels = normalise(images.to(device, non_blocking=True), config.recipe.data)
            x.append(features(whole.target, pixels).double().cpu())
            if split == "val":
                for i, setting in enumerate((config.recipe.mask, shared)):
                    if setting is not None:
                        chosen = to_device(fixed_masks(config, setting, numbers), device)
                        losses[i] += whole(pixels, chosen)[0].item() * len(images)
                if shared is not None:
                    views.append(masked_views(whole, config, shared, pixels, numbers))
    names = labels[0] if labels else {}
    joined = {n: torch.cat([part[n] for part in labels]) for n in names}
    return Features(torch.cat(x), joined, torch.cat(index), losses, torch.cat(views))


def shared_mask(config: TrialConfig) -> Mask | None:
    """The shared mask setting on this trial's grid; None where the grid is too coarse for it."""
    try:
        return replace(
            SHARED_MASK, context_keep=masks.context_keep(SHARED_MASK, config.recipe.model.grid)
        )
    except ConfigError:
        return None


def fixed_masks(config: TrialConfig, setting: Mask, index: Tensor, view: int = 0) -> masks.Masks:
    """Masks that depend on the image (and the number of the view) alone."""
    sample = index.numpy()
    step, slot = sample // setting.reference_batch, sample % setting.reference_batch
    epoch = np.full_like(sample, view)
    grid = config.recipe.model.grid
    drawn = masks.sample(setting, grid, FIXED_SEED, epoch, sample, step, slot)
    return masks.Masks(*(None if v is None else torch.from_numpy(v) for v in drawn))


def masked_views(
    whole: IJepa, config: TrialConfig, setting: Mask, pixels: Tensor, index: Tensor
) -> Tensor:
    """Target encoder features of several masked views of each image, [b, VIEWS, D] float64."""
    kept = [
        fixed_masks(config, setting, index, 1 + view).context.to(pixels.device)
        for view in range(LIDAR_VIEWS)
    ]
    return torch.stack([whole.target(pixels, keep).mean(1).double().cpu() for keep in kept], 1)


def to_device(chosen: masks.Masks, device: torch.device) -> masks.Masks:
    return masks.Masks(*(None if v is None else v.to(device, non_blocking=True) for v in chosen))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a CPU tensor."""
    dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks [n_r, ...] -> [sum n_r, ...], in the order of ranks."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = len(tensor)
    all_reduce_sum(counts)
    padded = torch.zeros((int(counts.max()), *tensor.shape[1:]), dtype=tensor.dtype)
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[:n] for p, n in zip(parts, counts.tolist(), strict=True)])


def losses(test: Features, shared: bool) -> dict[str, float]:
    """Mean losses on held-out images, with the trial's own masks and with the reference ones."""
    own, other, n = all_reduce_sum(
        torch.cat([test.losses, torch.tensor([float(len(test.x))], dtype=torch.float64)])
    ).tolist()
    return {"val/loss": own / n, **({"val/reference_loss": other / n} if shared else {})}


def lidar(views: Tensor) -> float:
    """Effective rank of the scatter between images relative to that within their views.

    views: [n, V, D], all with the shared masks (LiDAR, Thilak et al., 2312.04000).
    """
    means = views.mean(1)
    inside = (views - means[:, None]).flatten(0, 1)
    n = all_reduce_sum(torch.tensor([float(len(views))], dtype=torch.float64))
    centre = all_reduce_sum(means.sum(0)) / n
    between = all_reduce_sum((means - centre).T @ (means - centre)) / n
    within = all_reduce_sum(inside.T @ inside) / (n * LIDAR_VIEWS)
    scale, axes = torch.linalg.eigh(within)
    white = axes * (scale.clamp_min(0) + LIDAR_RIDGE).rsqrt()
    spectrum = torch.linalg.eigvalsh(white.T @ between @ white).clamp_min(0)
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    return torch.exp(-(share * (share + 1e-12).log()).sum()).item()


def rankme(x: Tensor) -> float:
    """Effective rank of the features [n, D] of all ranks (Garrido et al., 2210.02885)."""
    spectrum = torch.linalg.eigvalsh(all_reduce_sum(x.T @ x)).clamp_min(0).sqrt()
    share = spectrum / spectrum.sum().clamp_min(1e-30)
    return torch.exp(-(share * (share + 1e-12).log()).sum()).item()


# ---- ridge


class GramMatrices:
    """Sums over images of all ranks: enough for ridge on standardised features."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.n = all_reduce_sum(torch.tensor([float(len(x))], dtype=torch.float64))
        self.x, self.y = all_reduce_sum(x.sum(0)), all_reduce_sum(y.sum(0))
        self.xx, self.xy = all_reduce_sum(x.T @ x), all_reduce_sum(x.T @ y)

    def plus(self, other: GramMatrices) -> GramMatrices:
        both = object.__new__(GramMatrices)
        for key, value in vars(self).items():
            setattr(both, key, value + vars(other)[key])
        return both

    def solve(self) -> Callable[[Tensor], Iterator[Tensor]]:
        """-> a function from features [m, D] to predictions [m, C], one for each penalty."""
        mean, target = self.x / self.n, self.y / self.n
        gram = self.xx / self.n - torch.outer(mean, mean)
        deviation = gram.diagonal().clamp_min(0).sqrt() + 1e-8
        gram = gram / torch.outer(deviation, deviation)
        cross = (self.xy / self.n - torch.outer(mean, target)) / deviation[:, None]
        spectrum, axes = torch.linalg.eigh(gram)
        inner = axes.T @ cross

        def predict(x: Tensor) -> Iterator[Tensor]:
            turned = ((x - mean) / deviation) @ axes
            for penalty in PENALTIES:
                yield turned / (spectrum.clamp_min(0) + penalty) @ inner + target

        return predict


def ridge(train: Features, test: Features, name: str) -> dict[str, float]:
    """{"error": ...} and, for labels that are classes, {"top1": 1 - error}.

    A number's error is the share of its variance that the probe leaves unexplained.
    """
    classes = 0
    if not train.labels[name].is_floating_point():
        most = torch.tensor(
            [max((int(s.labels[name].max()) for s in (train, test) if len(s.x)), default=0)]
        )
        dist.all_reduce(most, dist.ReduceOp.MAX)
        classes = int(most.item()) + 1
    y = label_matrix(train.labels[name], classes)
    back = train.index % HELD_BACK == 0
    fit, held = GramMatrices(train.x[~back], y[~back]), GramMatrices(train.x[back], y[back])
    errors = torch.stack([error_sum(p, y[back]) for p in fit.solve()(train.x[back])])
    best = int(all_reduce_sum(errors).argmin())
    truth = label_matrix(test.labels[name], classes)
    guess = next(p for i, p in enumerate(fit.plus(held).solve()(test.x)) if i == best)
    if classes:
        error = all_reduce_sum(
            torch.stack([error_sum(guess, truth), torch.tensor(float(len(truth)))])
        )
        return {"error": (error[0] / error[1]).item(), "top1": (1 - error[0] / error[1]).item()}
    n, total, squares = all_reduce_sum(
        torch.stack([torch.tensor(float(len(truth))).double(), truth.sum(), truth.square().sum()])
    )
    left = all_reduce_sum(error_sum(guess, truth).reshape(1))[0]
    return {"error": (left / (squares - total**2 / n)).item()}


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
    wrong_votes = torch.zeros(2, dtype=torch.float64)
    classes = int(labels.max()) + 1
    for part, truth in zip(
        test.x.float().split(1024), test.labels[name].long().split(1024), strict=True
    ):
        near, where = (nn.functional.normalize(part, dim=1) @ bank.T).topk(
            min(NEIGHBOURS, len(bank)), dim=1
        )
        votes = torch.zeros(len(part), classes).scatter_add_(
            1, labels[where], (near / TEMPERATURE).exp()
        )
        wrong_votes += torch.tensor([float((votes.argmax(1) != truth).sum()), float(len(part))])
    total = all_reduce_sum(wrong_votes)
    return (total[0] / total[1]).item()


def only_probes(row: Mapping[str, float]) -> dict[str, float]:
    """What a probe measured, out of a row of metrics."""
    return {k: float(v) for k, v in row.items() if k.startswith(("probe/", "val/"))}
