"""A scalar that the objective returns beside the loss is logged by its name.

No other code is changed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import sharded

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.step_metrics import LocalMetrics, MetricReducer
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir

CUTS = (  # ranks, images of a micro-batch
    (1, 64),
    (1, 8),
    (1, 1),
    (2, 8),
    (4, 2),
)
TIMES = {
    "images_per_s",
    "images_per_s_rank",
    "data_wait",
    "checkpoint_stall",
    "memory_gb",
}


def test_a_new_scalar_of_the_objective_is_logged_by_its_name(
    new_trial: Callable[..., TrialDir], run_ranks: Callable[..., list[Any]]
) -> None:
    """Two ranks, two micro-batches of four images each: the mean over both."""
    overrides = {
        "runtime.log_every": 1,
        "runtime.micro_batch": 4,
        "optim.steps": 3,
        "optim.warmup_steps": 1,
    }
    trial = new_trial(**overrides)
    trial.claim({"launch": "test"})
    assert run_ranks(sharded.with_new_scalar, 2, trial) == [ExitCode.DONE] * 2
    rows = [row for row in spool.read(trial).rows if row.step > 0]
    assert [row.step for row in rows] == [1, 2, 3]
    usual = {"loss", "target_std", "context_fraction", "grad_norm", "lr", "images_seen"}
    for row in rows:
        assert row.values["rank_and_images"] == 4.5
        assert usual <= row.values.keys()


def test_the_first_step_fixes_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are sorted, so that all ranks agree; a step with other names is an error."""
    # As if two ranks had the same numbers.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    reducer = MetricReducer(torch.device("cpu"), world_size=2)
    local = LocalMetrics()
    for number in (1.0, 3.0):
        local.add({"z": torch.tensor(number), "a": number}, {"images": 4}, micro_batches=2)
    squared_norm = reducer.all_reduce(1, local, {"stop": True}, torch.tensor([4.0, 5.0]))
    (metrics,) = reducer.take(drain=False)
    assert metrics.means == {"a": 2.0, "z": 2.0}
    assert metrics.sums == {"images": 16.0}
    assert metrics.flags == {"stop"}
    assert squared_norm.item() == 18.0
    expected = {
        "grad_norm": 18**0.5,
        "grad_norm_encoder": 8**0.5,
        "grad_norm_predictor": 10**0.5,
    }
    assert metrics.grad_norms() == pytest.approx(expected)
    local.add({"extra": 1.0}, {}, micro_batches=1)
    with pytest.raises(ValueError, match=r"step 2 .*\['extra'\]"):
        reducer.all_reduce(2, local, {}, torch.zeros(2))


@pytest.mark.parametrize("mask", ["multiblock", "reference"])
def test_no_logged_number_depends_on_where_a_step_is_cut(
    new_trial: Callable[..., TrialDir], run_ranks: Callable[..., list[Any]], mask: str
) -> None:
    """The first step of 64 images at micro-batch 1 to 64 and at 1 to 4 ranks, but for the times."""
    overrides = {
        "runtime.log_every": 1,
        "optim.batch": 64,
        "optim.steps": 2,
        "optim.warmup_steps": 1,
        "mask.mode": mask,
        "mask.min_keep": 2,
    }
    logged: dict[tuple[int, int], dict[str, float]] = {}
    for world, micro_batch in CUTS:
        name = f"root-{world}-{micro_batch}"
        cut = {"runtime.micro_batch": micro_batch, "runtime.procs_per_node": world}
        trial = new_trial(name, **overrides, **cut)
        trial.claim({"launch": name})
        assert run_ranks(sharded.train_attempt, world, trial) == [ExitCode.DONE] * world
        (row,) = [row for row in spool.read(trial).rows if row.step == 1]
        logged[world, micro_batch] = {
            name: value for name, value in row.values.items() if name not in TIMES
        }
    whole = logged[1, 64]
    assert {"loss", "target_std", "grad_norm", "context_fraction"} <= whole.keys()
    for sizes, values in logged.items():
        assert values == pytest.approx(whole, rel=1e-6, abs=1e-12), sizes
