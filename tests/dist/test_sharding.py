"""Many ranks compute what one would: sharding, the target's average, NaN, initial weights."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from support import sharded

from jepa_cluster.training import devices, dist_env


def test_the_target_is_the_average_of_the_full_encoder_after_sharded_steps(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """Every parameter of the target is the EMA of the encoder, on two ranks and on one.

    Their losses agree too.
    """
    config = tiny_config()
    two, again = run_ranks(sharded.trained, 2, config, 4)
    (one,) = run_ranks(sharded.trained, 1, config, 4)
    for losses, found in (two, again, one):
        assert max(found["apart"].values()) < 1e-6, found["apart"]
        assert found["moved"] > 1e-4
        assert losses == pytest.approx(two[0], abs=1e-6)


def test_the_target_computes_in_bf16_and_averages_in_fp32(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """fully_shard gathers a bf16 copy for the target's forward; the average stays in fp32."""
    (found,) = run_ranks(sharded.precisions, 1, tiny_config(), "bf16")
    half, full = {torch.bfloat16}, {torch.float32}
    assert found == {"used": half, "products": half, "residual": half, "kept": full}


def test_autocast_keeps_the_residual_stream_in_fp32(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """As the published code trains: fp32 weights, products in bf16."""
    (found,) = run_ranks(sharded.precisions, 1, tiny_config(), "autocast")
    half, full = {torch.bfloat16}, {torch.float32}
    assert found == {"used": full, "products": half, "residual": full, "kept": full}


@pytest.mark.slow
def test_activation_checkpointing_compile_and_replicas_change_no_loss(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """Activation checkpointing, compile, then sharding, and a mesh of 2 x 1: the same losses."""
    plain = run_ranks(sharded.trained, 2, tiny_config(), 3)[0][0]
    recomputed = {"runtime.activation_checkpointing": True}
    for overrides in ({"runtime.compile": True}, {"runtime.fsdp_shard_size": 1}):
        config = tiny_config(**overrides, **recomputed)
        losses, found = run_ranks(sharded.trained, 2, config, 3)[0]
        assert losses == pytest.approx(plain, abs=1e-5), overrides
        assert max(found["apart"].values()) < 1e-6


def test_a_nan_on_one_rank_skips_the_step_on_all(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """No weight, moment count or target moves in that step; the next step is as usual."""
    for found in run_ranks(sharded.poisoned, 2, tiny_config()):
        assert found["skipped"] == 0.0
        assert found["updates"] == 0.0
        assert found["after"] > 0


def test_a_parameter_without_initial_values_is_named(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """Memory is filled with NaN before init_weights, so that a forgotten parameter is found."""
    assert "predictor.mask_token" in run_ranks(sharded.forgetful, 1, tiny_config())[0]


def test_an_indivisible_global_batch_is_refused_with_the_nearest_world_sizes(
    tiny_config: Callable,
) -> None:
    """The batch is the same at any world size; micro-batches divide each rank's share."""
    from jepa_cluster.errors import ConfigError

    config = tiny_config(**{"runtime.procs_per_node": 1, "runtime.micro_batch": 8})
    for world, expected in ((1, 8), (2, 8), (4, 4), (16, 1)):
        assert dist_env.micro_batch(config.recipe, config.runtime, world) == expected
    message = r"optim\.batch=16 cannot be shared equally by 3 ranks"
    with pytest.raises(ConfigError, match=message) as e:
        dist_env.micro_batch(config.recipe, config.runtime, 3)
    assert e.value.hint == "run it on 2 or 4"


def test_rank_0_decides_how_many_ranks_share_the_state(
    run_ranks: Callable, tiny_config: Callable
) -> None:
    """Ranks with different GPUs would choose different meshes."""
    assert run_ranks(sharded.shard_count_of_unequal_ranks, 2, tiny_config()) == [1, 1]


def test_ranks_share_the_cores_unless_the_user_sets_their_threads(
    run_ranks: Callable,
    tiny_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shared = devices.thread_count(len(os.sched_getaffinity(0)), sharing=2)
    assert run_ranks(sharded.thread_count, 2, tiny_config(), None) == [shared] * 2
    assert run_ranks(sharded.thread_count, 2, tiny_config(), 7) == [7] * 2


NOWHERE = "no such host"


@pytest.mark.parametrize(
    ("host", "local_world", "own", "expected"),
    [
        pytest.param("127.0.0.1", 1, "", "lo", id="of the route to rank 0"),
        pytest.param(NOWHERE, 1, "", "", id="without a route gloo chooses"),
        pytest.param(NOWHERE, 2, "", "lo", id="one node needs no network"),
        pytest.param(NOWHERE, 1, "lo", "lo", id="the user's choice"),
    ],
)
def test_gloo_uses_the_interface_of_the_route_to_rank_0(
    run_ranks: Callable,
    tiny_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    local_world: int,
    own: str,
    expected: str,
) -> None:
    """Two ranks, on two nodes or on one."""
    if own:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", own)
    found = run_ranks(sharded.gloo_interface, 2, tiny_config(), host, local_world)
    assert found == [expected] * 2
