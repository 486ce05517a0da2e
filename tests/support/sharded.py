"""Code that runs inside the ranks of test_sharding.py, where no trial directory is needed."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import JepaError
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.training import checkpoint, distributed, probe
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.step_metrics import LocalMetrics, MetricReducer
from jepa_cluster.trial.directory import TrialDir


def run(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call work(rank's World, *args) in `world` forked processes -> what each returned, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jepa_cluster.training.train"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(work, r, world, port, answers, args)) for r in range(world)]
    for p in processes:
        p.start()
    found = dict(answers.get() for _ in processes)
    for p in processes:
        p.join(30)
    errors = [v for v in found.values() if isinstance(v, Exception)]
    if errors:
        raise errors[0]
    return [found[r] for r in range(world)]


def _rank(work: Callable[..., Any], rank: int, world: int, port: int, answers: Any, args: tuple[Any, ...]) -> None:
    config: TrialConfig = args[0]
    try:
        place = DistEnv(rank, world, rank, world, "test", address=f"127.0.0.1:{port}")
        answer = work(distributed.init(place, config.recipe, config.runtime), *args)
    except Exception as e:
        answer = e
    distributed.drain_messages()
    answers.put((rank, answer))
    os._exit(0)


def step(
    model: IJepa, adam: Any, ranks: distributed.World, reducer: MetricReducer, number: int, poison: bool = False
) -> float:
    """One step on images and masks made from the step's number, the same pixels at any world size."""
    size, share = model.recipe.model.image, 8 // ranks.size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(number))[ranks.rank :: ranks.size]
    config = TrialConfig(model.recipe, None)  # type: ignore[arg-type]
    index = torch.arange(8)[ranks.rank :: ranks.size] + 8 * number
    loss, aux = model(images, probe.fixed_masks(config, model.recipe.mask, index))
    (loss * float("nan") if poison else loss).backward()
    assert len(images) == share
    local = LocalMetrics()
    local.add({"loss": loss, **aux}, {}, micro_batches=1)
    squared_norms = distributed.squared_grad_norms(model, ranks.replica_count)
    squared_norm = reducer.all_reduce(number, local, {}, squared_norms)
    adam.found_inf = (~torch.isfinite(squared_norm)).float()
    adam.step()
    adam.zero_grad()
    update_target(model, 0.9)
    return reducer.drain()[-1].means["loss"]


def trained(ranks: distributed.World, config: TrialConfig, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Losses of a few steps, and the whole weights after them with the target that follows from the encoders seen.
    Compiled blocks are traced and differentiated by the compiler, but run by eager kernels, which takes seconds."""
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)
    expected = {
        n: v.clone() for n, v in distributed.named_tensors(probe.full_copy(model, config, ranks.device).target).items()
    }
    losses = []
    for number in range(steps):
        losses.append(step(model, adam, ranks, reducer, number))
        encoder = distributed.named_tensors(probe.full_copy(model, config, ranks.device).encoder)
        expected = {n: torch.lerp(v, encoder[n], 0.1) for n, v in expected.items()}
    whole = probe.full_copy(model, config, ranks.device)
    apart = {n: float((v - expected[n]).abs().max()) for n, v in distributed.named_tensors(whole.target).items()}
    return losses, {"apart": apart, "moved": float((whole.encoder.norm.weight - 1).abs().max())}


def precisions(ranks: distributed.World, config: TrialConfig) -> dict[str, set[torch.dtype]]:
    """Types of the target's weights: as its blocks compute with them in a bf16 step, and as the state keeps them."""
    config = replace(config, recipe=replace(config.recipe, optim=replace(config.recipe.optim, precision="bf16")))
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    used: set[torch.dtype] = set()
    for block in model.target.blocks:
        block.register_forward_pre_hook(lambda block, _: used.update(p.dtype for p in block.parameters()))
    step(model, adam, ranks, MetricReducer(ranks.device, ranks.size), 0)
    return {"used": used, "kept": {p.dtype for p in model.target.parameters()}}


def poisoned(ranks: distributed.World, config: TrialConfig) -> dict[str, float]:
    """How far anything moved in a step in which rank 1 alone saw a NaN, and in the step after it."""
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)

    def weights() -> list[torch.Tensor]:
        return [v.clone() for v in distributed.named_tensors(probe.full_copy(model, config, ranks.device)).values()]

    def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    first = weights()
    step(model, adam, ranks, reducer, 0, poison=ranks.rank == 1)
    second = weights()
    updates = next(iter(adam.state.values()))["step"].item()
    step(model, adam, ranks, reducer, 1)
    return {"skipped": apart(first, second), "updates": updates, "after": apart(second, weights())}


def forgetful(ranks: distributed.World, config: TrialConfig) -> str:
    """What `init_from_seed` says when a parameter is left without values."""
    original = init_weights
    distributed.init_weights = lambda model, recipe: (
        original(model, recipe),
        model.predictor.mask_token.fill_(torch.nan),
    )
    try:
        distributed.init_from_seed(distributed.build_model(config.recipe, config.runtime, ranks), config.recipe)
    except AssertionError as e:
        return str(e)
    return ""


def built(ranks: distributed.World, config: TrialConfig) -> tuple[IJepa, torch.optim.AdamW]:
    """A model and an optimiser whose moments are not zero: two steps from the recipe's seed."""
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)
    for number in range(2):
        step(model, adam, ranks, reducer, number)
    return model, adam


def saved(ranks: distributed.World, config: TrialConfig, trial: TrialDir) -> dict[str, Any]:
    """Save step 2 of a small model; what this rank copied, and the sockets it holds."""
    model, adam = built(ranks, config)
    sockets = open_sockets()
    saver = checkpoint.AsyncSaver(trial, 1, ranks)
    saver.protocol.steps_to_keep = set
    manifest = checkpoint.new_manifest(2, config.id, 1, ranks, {})
    saver.start(manifest, checkpoint.state(model, adam))
    while saver.busy:
        time.sleep(0.01)
    distributed.sum_flags(ranks, {"all are here": True})
    result = saver.take_result()
    staged = sum(t.numel() * t.element_size() for t in saver._buffers.values())
    return {
        "error": result.error if result else None,
        "staged": staged,
        "sockets": open_sockets(),
        "sockets of saving": open_sockets() - sockets,
    }


def loaded(ranks: distributed.World, config: TrialConfig, trial: TrialDir) -> dict[str, np.ndarray]:
    """The whole state after a load into an untrained model, as this rank sees it."""
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    saver = checkpoint.AsyncSaver(trial, 2, ranks)
    manifest, passed = saver.protocol.find_valid("start", trial.committed, lambda manifest: "")
    assert manifest is not None and not passed
    checkpoint.load(trial.checkpoint(manifest.step), model, adam, ranks, "load")
    tensors = checkpoint.state(model, adam)
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.numpy() for name, t in full.items()}


def refused(ranks: distributed.World, config: TrialConfig, trial: TrialDir, fault: str) -> str:
    """What every rank raises when the last rank cannot read its rows, or when the checkpoint is removed meanwhile."""
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = distributed.build_optimizer(model, config.recipe.optim)
    if ranks.rank == ranks.size - 1:
        broken = OSError(errno.EIO, os.strerror(errno.EIO), str(trial.checkpoint(2)))

        def read(self: Any, *_: object) -> Any:
            if fault == "removed" and trial.checkpoint(2).exists():
                trial.checkpoint(2).rename(trial.checkpoints / ".gone")
            raise broken

        checkpoint.ShardFile.rows_into = read
    try:
        checkpoint.load(trial.checkpoint(2), model, adam, ranks, "load")
    except JepaError as e:
        return f"{type(e).__name__}: {e.what}"
    return ""


def open_sockets() -> int:
    return sum(str(p.readlink()).startswith("socket:") for p in Path("/proc/self/fd").iterdir() if p.is_symlink())
