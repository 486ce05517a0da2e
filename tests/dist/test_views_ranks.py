"""`objective.target=views` on two ranks: the batch of all ranks, kills, probes, precisions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import sharded
from support.attempts import assert_same_bits, kill_and_resume

from jepa_cluster.trial import spool

VIEWS = {"objective": {"target": "views"}}


def test_two_ranks_and_one_train_alike(
    run_ranks: Callable,
    tiny_config: Callable,
) -> None:
    """The statistics of the loss are those of the whole batch, at any number of ranks."""
    two, other = run_ranks(sharded.trained, 2, tiny_config(**VIEWS), 4)
    (one,) = run_ranks(sharded.trained, 1, tiny_config(**VIEWS), 4)
    assert two[0] == other[0]
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[0][-1] < two[0][0]
    for losses, found in (two, one):
        assert max(found["apart"].values()) < 1e-6, losses


def test_gradients_are_those_of_the_whole_batch(
    run_ranks: Callable,
    tiny_config: Callable,
) -> None:
    """AdamW would hide a factor."""
    two, other = run_ranks(sharded.gradients, 2, tiny_config(**VIEWS))
    (one,) = run_ranks(sharded.gradients, 1, tiny_config(**VIEWS))
    assert two == other
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_views_are_trained_in_half_precision(
    run_ranks: Callable,
    tiny_config: Callable,
    precision: str,
) -> None:
    config = tiny_config(**VIEWS, **{"optim.precision": precision})
    losses, _ = run_ranks(sharded.trained, 2, config, 4)[0]
    full, _ = run_ranks(sharded.trained, 2, tiny_config(**VIEWS), 4)[0]
    assert losses == pytest.approx(full, rel=0.02)


def test_a_killed_trial_has_the_same_bits(
    launch: Callable,
    new_trial: Callable,
    trained: Callable,
) -> None:
    """Its probes have no loss with the masks that all trials share, because it has no masks."""
    settings = {"optim.steps": 30, "probe.test_images": 3, **VIEWS}
    alone = trained(**settings)
    killed = new_trial("killed", **settings, **{"runtime.checkpoint_minutes": 0.004})
    kill_and_resume(launch, killed, 15)
    assert_same_bits(alone, killed)
    last = spool.read(alone).settled_rows[-1].values
    assert {"val/loss", "probe/lidar", "loss/invariance", "loss/variance"} < last.keys()
    assert "val/reference_loss" not in last
    assert last["context_fraction"] == 1
    assert last["probe/online/class_top1"] != last["probe/class_top1"]
