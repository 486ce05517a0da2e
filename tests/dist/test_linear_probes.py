"""Ridge regression, few labels and nearest neighbours: exact, and the same at any world size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import sharded

from jepa_cluster.training import linear_probes


@pytest.mark.parametrize("world", [1, 3])
def test_probes_find_what_was_put_into_the_features(
    run_ranks: Callable, tiny_config: Callable, world: int
) -> None:
    """Each rank returns the same; classes have errors, numbers have R2."""
    found = run_ranks(sharded.probed, world, tiny_config(), 600)
    assert found == [found[0]] * world
    metrics = found[0]
    assert metrics["class_error"] < 0.05
    assert metrics["class_top1"] == 1 - metrics["class_error"]
    assert "class_r2" not in metrics
    assert 0.55 < metrics["count_r2"] < 0.75, "variance 2 of the count, 1 of the noise"
    assert metrics["count_error"] < 0.8, "of five classes"
    assert metrics["distance_r2"] > 0.98
    assert metrics["distance_error"] == pytest.approx(1 - metrics["distance_r2"])
    assert metrics["class_error"] < metrics["class_1pct_error"] < 0.5
    assert 0 < metrics["class_1pct_sd"] < 0.2
    assert metrics["knn"] < 0.2


def test_the_number_of_ranks_changes_no_probe(
    run_ranks: Callable,
    tiny_config: Callable,
) -> None:
    (alone,) = run_ranks(sharded.probed, 1, tiny_config(), 100)
    shared = run_ranks(sharded.probed, 3, tiny_config(), 100)[0]
    assert shared == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("features", [6, 200])
def test_leave_one_out_is_what_fits_without_each_row_predict(features: int) -> None:
    """Of all penalties, the one whose fits to all other rows predict the rows best is chosen.

    Also where rows are fewer than features, and a fit without penalty reaches all of them.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, features, generator=generator, dtype=torch.float64)
    y = x[:, :2] + torch.randn(20, 2, generator=generator, dtype=torch.float64)
    errors = []
    for penalty in linear_probes.PENALTIES:
        error = 0.0
        for row in range(20):
            others = [k for k in range(20) if k != row]
            weights, offset = fit(x[others], y[others], 20 * penalty)
            error += (x[row] @ weights + offset - y[row]).square().sum().item()
        errors.append(error)
    best = linear_probes.PENALTIES[errors.index(min(errors))]
    weights, offset = linear_probes.ridge_leave_one_out(x, y)
    want = fit(x, y, 20 * best)
    assert torch.allclose(weights, want[0])
    assert torch.allclose(offset, want[1])


def fit(
    x: torch.Tensor,
    y: torch.Tensor,
    penalty: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return weights and offset of ridge regression with an offset that is not penalised."""
    mean, offset = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, centred.T @ (y - offset))
    return weights, offset - mean @ weights


def test_few_labels_are_the_same_number_of_each_class() -> None:
    """At least two, and other ones in each draw."""
    labels = torch.arange(1000) % 4
    chosen = linear_probes.stratified_subset(labels, 0.02, draw=0)
    assert torch.bincount(labels[chosen]).tolist() == [5] * 4
    fewest = linear_probes.stratified_subset(labels, 0.0001, draw=0)
    assert torch.bincount(labels[fewest]).tolist() == [2] * 4
    other = linear_probes.stratified_subset(labels, 0.02, draw=1)
    assert set(chosen.tolist()) != set(other.tolist())
