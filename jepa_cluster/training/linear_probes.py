"""Probes on frozen features: ridge regression, few labels, nearest neighbours.

In: each rank's share of the features and labels of two splits. Out: metrics by name, the same on
every rank. The ridge probe is exact: its Gram matrices are summed over ranks and solved in closed
form for several penalties, of which the training images held back choose one.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_cluster.training.distributed import mark_progress

# Readouts, as they begin the names of metrics
TARGET = ""  # the mean of the target encoder's patches
HELD_BACK = 5  # every fifth training image chooses the penalty
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # relative to the mean eigenvalue
NEIGHBOURS = 20
TEMPERATURE = 0.07
DRAWS = 10  # of few labels
FEW = 0.01  # of the images of a class, at least FEWEST
FEWEST = 2

Goal = tuple[str, int]  # a label, and the number of its classes; 0: it is read as a number


@dataclass
class Features:
    """This rank's share of a split of n images.

    x: by readout, float64 [n, D]; "" is the mean of the target encoder's patches. labels: by name,
    [n]. index: of each image, [n]. losses: sums over validation images with the trial's own masks
    and with the shared ones. views: features of masked views of validation images, [n, V, D].
    """

    x: dict[str, Tensor]
    labels: dict[str, Tensor]
    index: Tensor
    losses: Tensor
    views: Tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a CPU tensor."""
    dist.all_reduce(tensor)
    mark_progress()
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks [n_r, ...] -> [sum n_r, ...], in the order of ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


def count_of(tensor: Tensor) -> Tensor:
    """Number of this rank's rows, float64 []."""
    return torch.tensor(float(len(tensor)), dtype=torch.float64)


def sums_of_products(x: Tensor, y: Tensor) -> Tensor:
    """Sums over images of all ranks of the products of [1, x] and [1, x, y], [1 + D, 1 + D + C]."""
    left = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    return all_reduce_sum(left.T @ torch.cat([left, y], dim=1))


def ridge_predictions(
    sums: Tensor,
    x: Tensor,
    penalties: Tensor,
) -> Iterator[Tensor]:
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


def ridge(
    train: Features,
    test: Features,
    readout: str,
    labels: tuple[str, ...],
) -> dict[str, float]:
    """Return the errors of all labels by one readout.

    A class has <label>_error and <label>_top1. A number has <label>_r2, the share of its variance
    that is explained, and 1 - R2 as <label>_error; neither where all test images have the same
    number. Whole numbers are read both ways, except the label `class`.
    """
    goals: list[Goal] = []
    for label in labels:
        classes = class_count(train.labels[label], test.labels[label])
        if classes:
            goals.append((label, classes))
        if label != "class" or not classes:
            goals.append((label, 0))
    found: dict[str, float] = {}
    errors = ridge_errors(train, test, readout, goals)
    for (label, classes), error in zip(goals, errors, strict=True):
        if classes:
            found |= {f"{label}_error": error, f"{label}_top1": 1 - error}
        elif math.isfinite(error):
            found[f"{label}_r2"] = 1 - error
            found.setdefault(f"{label}_error", error)
    return found


def ridge_errors(
    train: Features,
    test: Features,
    readout: str,
    goals: Sequence[Goal],
) -> list[float]:
    """Return the error of each goal on the test images."""
    if not goals:
        return []
    x = train.x[readout]
    y = [label_matrix(train.labels[label], classes) for label, classes in goals]
    truths = [label_matrix(test.labels[label], classes) for label, classes in goals]
    widths = [part.shape[1] for part in y]
    held_back = train.index % HELD_BACK == 0
    all_y = torch.cat(y, 1)
    fit = sums_of_products(x[~held_back], all_y[~held_back])
    held = sums_of_products(x[held_back], all_y[held_back])

    # The penalty with the smallest error on the training images held back, over all ranks.
    errors = torch.zeros(len(PENALTIES), len(goals), dtype=torch.float64)
    predictions = ridge_predictions(fit, x[held_back], PENALTIES)
    for row, prediction in zip(errors, predictions, strict=True):
        for number, part in enumerate(prediction.split(widths, 1)):
            row[number] = error_sum(part, y[number][held_back], goals[number])
    best = PENALTIES[all_reduce_sum(errors).argmin(0)]

    found: list[float] = []
    predictions = ridge_predictions(fit + held, test.x[readout], best)
    for number, prediction in enumerate(predictions):
        part, truth = prediction.split(widths, 1)[number], truths[number]
        error = all_reduce_sum(error_sum(part, truth, goals[number]))
        found.append((error / largest_error(truth, goals[number])).item())
    return found


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


def error_sum(
    guess: Tensor,
    truth: Tensor,
    goal: Goal,
) -> Tensor:
    """Wrong classes, or the sum of squares of a number; a sum over images, float64 []."""
    _, classes = goal
    if classes:
        return (guess.argmax(1) != truth.argmax(1)).sum().double()
    return (guess - truth).square().sum()


def largest_error(truth: Tensor, goal: Goal) -> Tensor:
    """Return the images of all ranks, or the sum of squares of a number around its mean."""
    _, classes = goal
    count = all_reduce_sum(count_of(truth))
    if classes:
        return count
    deviation = truth - all_reduce_sum(truth.sum(0)) / count
    return all_reduce_sum(deviation.square().sum())


# ---- few labels


def few_labels(
    train: Features,
    test: Features,
    readout: str,
    name: str,
) -> dict[str, float]:
    """Ridge regression on few labels of each class: mean error and deviation over draws."""
    numbers, order = all_gather_rows(train.index).sort()
    labels = all_gather_rows(train.labels[name])[order].long()
    draws = [stratified_subset(labels, FEW, draw) for draw in range(DRAWS)]

    # Each rank sends what it has of the images of all draws; they are sorted by number.
    needed = torch.cat(draws).unique()
    mine = torch.isin(train.index, numbers[needed])
    place = all_gather_rows(train.index[mine]).argsort()
    bank = all_gather_rows(train.x[readout][mine])[place]

    mean, deviation = moments(train.x[readout])
    goal = name, class_count(train.labels[name], test.labels[name])
    truth = label_matrix(test.labels[name], goal[1])
    errors: list[Tensor] = []
    for chosen in draws:
        mark_progress()
        x = (bank[torch.searchsorted(needed, chosen)] - mean) / deviation
        y = labels[chosen]
        weights, offset = ridge_leave_one_out(x, label_matrix(y, goal[1]))
        prediction = (test.x[readout] - mean) / deviation @ weights + offset
        errors.append(error_sum(prediction, truth, goal))
    shares = all_reduce_sum(torch.stack(errors)) / all_reduce_sum(count_of(truth))
    return {
        f"{name}_1pct_error": shares.mean().item(),
        f"{name}_1pct_sd": shares.std().item(),
        f"{name}_1pct_labels": float(len(draws[0])),
    }


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the features of all ranks."""
    count = all_reduce_sum(count_of(x))
    mean = all_reduce_sum(x.sum(0)) / count
    return mean, (all_reduce_sum((x - mean).square().sum(0)) / count).sqrt() + 1e-8


def stratified_subset(
    labels: Tensor,
    share: float,
    draw: int = 0,
) -> Tensor:
    """Indices of a share of the images, at least FEWEST of each class, the same ones every time."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    chosen: list[Tensor] = []
    for c in labels.unique():
        members = order[labels[order] == c]
        chosen.append(members[: max(FEWEST, round(share * len(members)))])
    return torch.cat(chosen)


def ridge_leave_one_out(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [D, C] and offset [C], with the penalty that predicts left-out rows best.

    x: [n, D]. y: [n, C]. The prediction of a row by a fit to all others is exact, from one SVD.
    """
    count = len(x)
    x_mean, y_mean = x.mean(0), y.mean(0)
    left, spectrum, right = torch.linalg.svd(x - x_mean, full_matrices=False)
    inner = left.T @ (y - y_mean)
    unreached = y - y_mean - left @ inner  # what no penalty can fit
    free = 1 - 1 / count - left.square().sum(1)  # 0 where rows are fewer than features
    best = math.inf
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)
    for penalty in PENALTIES:
        removed = count * penalty / (spectrum.square() + count * penalty)
        residual = unreached + left @ (removed[:, None] * inner)
        # 1 - leverage, as a sum of small numbers: their difference to 1 would lose all digits
        left_out = (free + left.square() @ removed).clamp_min(1e-12)
        error = (residual / left_out[:, None]).square().sum().item()
        if error < best:
            best = error
            shrunk = spectrum / (spectrum.square() + count * penalty)
            weights = right.T @ (shrunk[:, None] * inner)
    return weights, y_mean - x_mean @ weights


# ---- nearest neighbours


def knn_error(
    train: Features,
    test: Features,
    name: str,
) -> float:
    """Error of a weighted vote of the nearest training images by cosine."""
    bank = all_gather_rows(nn.functional.normalize(train.x[TARGET].float(), dim=1))
    labels = all_gather_rows(train.labels[name].long())
    queries = nn.functional.normalize(test.x[TARGET].float(), dim=1)
    wrong = torch.zeros((), dtype=torch.float64)
    for part, truth in zip(queries.split(1024), test.labels[name].split(1024), strict=True):
        mark_progress()
        nearest, rows = (part @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[rows], (nearest / TEMPERATURE).exp())
        wrong += (votes.argmax(1) != truth).sum()
    return (all_reduce_sum(wrong) / all_reduce_sum(count_of(queries))).item()
