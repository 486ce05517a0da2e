"""Functions that run inside ranks, for tests that need no attempt; `run` calls them."""

from __future__ import annotations

import errno
import functools
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ExitCode, JepaError
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.launch.scheduler.fork_server import ForkServer, RankProcess
from jepa_cluster.training import (
    checkpoint,
    dist_env,
    distributed,
    linear_probes,
    probe,
    sharded_adamw,
)
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler
from jepa_cluster.training.save_protocol import CheckpointSearch
from jepa_cluster.training.sharded_adamw import ShardedAdamW
from jepa_cluster.training.step_metrics import LocalMetrics, MetricReducer
from jepa_cluster.training.train import train
from jepa_cluster.training.watchdog import PhaseTimer
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_atomic


def run(
    server: ForkServer, folder: Path, work: Callable[..., Any], world: int, *args: Any
) -> list[Any]:
    """Call work(DistEnv, *args) in `world` ranks and return what each returned, by rank.

    folder: for its files, made here. An exception of a rank is raised here.
    """
    folder.mkdir()
    log = folder / "log"
    calls = [folder / f"{rank}.call" for rank in range(world)]
    ranks: list[RankProcess] = []
    for rank, call in enumerate(calls):
        call.write_bytes(pickle.dumps((work, rank, world, args)))
        ranks.append(server.spawn(call, {**os.environ, "OMP_NUM_THREADS": "1"}, log))
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert codes == [0] * world, log.read_text()
    answers = [pickle.loads(call.with_suffix(".answer").read_bytes()) for call in calls]
    for found in answers:
        if isinstance(found, Exception):
            raise found
    return answers


def answer(path: Path) -> None:
    """Make the call of this file, as a rank, and write what it returned or raised."""
    work, rank, world, args = pickle.loads(path.read_bytes())
    try:
        found = work(meet(path.with_name("port"), rank, world), *args)
    except Exception as e:
        found = e
    distributed.drain_messages()
    path.with_suffix(".answer").write_bytes(pickle.dumps(found))
    os._exit(0)


def meet(file: Path, rank: int, world: int) -> DistEnv:
    """Rank 0 listens and writes its port into this file, where the others read it."""
    env = DistEnv(rank, world, rank, world, "test")
    if rank == 0:
        listener = dist_env.listen("127.0.0.1")
        write_atomic(file, str(listener.getsockname()[1]).encode())
        env = replace(env, listener=listener.detach())
    while not file.exists():
        time.sleep(0.01)
    return replace(env, address=f"127.0.0.1:{file.read_text()}")


def join(env: DistEnv, config: TrialConfig) -> distributed.World:
    return distributed.init(env, config.recipe, config.runtime)


def step(
    model: IJepa,
    adam: Any,
    ranks: distributed.World,
    reducer: MetricReducer,
    number: int,
    poison: bool = False,
) -> float:
    """Make one step on images and masks of the step's number, the same at any world size."""
    size = model.recipe.model.image
    generator = torch.Generator().manual_seed(number)
    mine = slice(ranks.rank, None, ranks.size)
    images = torch.randn(8, 3, size, size, generator=generator)[mine]
    index = torch.arange(8)[mine] + 8 * number
    assert len(images) == 8 // ranks.size
    loss, aux = model(images, probe.fixed_masks(model, model.recipe.mask, index))
    factor = float("nan") if poison else 1.0
    (loss * factor).backward()
    local = LocalMetrics()
    local.add({"loss": loss, **aux}, {}, micro_batches=1)
    squared_norms = sharded_adamw.squared_grad_norms(model, ranks.replica_count)
    squared_norm = reducer.all_reduce(number, local, {}, squared_norms)
    adam.found_inf = (~torch.isfinite(squared_norm)).float()
    adam.step()
    adam.zero_grad()
    update_target(model, 0.9)
    return reducer.take(drain=True)[-1].means["loss"]


def trained(env: DistEnv, config: TrialConfig, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Return the losses of a few steps, and how far the target is from the expected average.

    Compiled blocks are traced and differentiated by the compiler, but run by eager kernels, which
    takes seconds.
    """
    ranks = join(env, config)
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)
    whole = probe.full_copy(model, config, ranks.device)
    expected = copies(distributed.named_tensors(whole.target))
    losses: list[float] = []
    for number in range(steps):
        losses.append(step(model, adam, ranks, reducer, number))
        whole = probe.full_copy(model, config, ranks.device)
        for name, weights in distributed.named_tensors(whole.encoder).items():
            expected[name] = torch.lerp(expected[name], weights, 0.1)
    apart: dict[str, float] = {}
    for name, weights in distributed.named_tensors(whole.target).items():
        apart[name] = largest_difference(weights, expected[name])
    norm = whole.encoder.norm.weight
    return losses, {"apart": apart, "moved": largest_difference(norm, torch.ones_like(norm))}


def gradients(env: DistEnv, config: TrialConfig) -> list[float]:
    """Return the norms of the first gradients of encoder and predictor, of all ranks."""
    ranks = join(env, config)
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    distributed.init_from_seed(model, config.recipe)
    size = config.recipe.model.image
    mine = slice(ranks.rank, None, ranks.size)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))[mine]
    loss, _ = model(images, probe.fixed_masks(model, config.recipe.mask, torch.arange(8)[mine]))
    loss.backward()
    squared_norms = sharded_adamw.squared_grad_norms(model, ranks.replica_count)
    if ranks.size > 1:
        torch.distributed.all_reduce(squared_norms)
    return squared_norms.sqrt().tolist()


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def precisions(env: DistEnv, config: TrialConfig, precision: str) -> dict[str, set[torch.dtype]]:
    """Return the target's dtypes: in its blocks during a step, between them, and in the state."""
    ranks = join(env, config)
    optim = replace(config.recipe.optim, precision=precision)
    config = replace(config, recipe=replace(config.recipe, optim=optim))
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    used: set[torch.dtype] = set()
    residual: set[torch.dtype] = set()
    products: set[torch.dtype] = set()

    def note_product(_: object, inputs: object, output: torch.Tensor) -> None:
        products.add(output.dtype)

    def note_dtypes(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        used.update(dtypes(block))
        residual.add(inputs[0].dtype)

    for block in model.target.blocks:
        block.register_forward_pre_hook(note_dtypes)
        block.attn.register_forward_hook(note_product)
    step(model, adam, ranks, MetricReducer(ranks.device, ranks.size), 0)
    kept = dtypes(model.target)
    return {"used": used, "products": products, "residual": residual, "kept": kept}


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def poisoned(env: DistEnv, config: TrialConfig) -> dict[str, float]:
    """Return how far weights moved in a step with a NaN on rank 1, and in the step after it."""
    ranks = join(env, config)
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)

    def weights() -> dict[str, torch.Tensor]:
        whole = probe.full_copy(model, config, ranks.device)
        return copies(distributed.named_tensors(whole))

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(largest_difference(tensor, b[name]) for name, tensor in a.items())

    first = weights()
    step(model, adam, ranks, reducer, 0, poison=ranks.rank == 1)
    second = weights()
    updates = next(iter(adam.state.values()))["step"].item()
    step(model, adam, ranks, reducer, 1)
    return {"skipped": apart(first, second), "updates": updates, "after": apart(second, weights())}


def forgetful(env: DistEnv, config: TrialConfig) -> str:
    """Return the error of `init_from_seed` when a parameter is left without values."""
    ranks = join(env, config)
    original = init_weights

    def forget_mask_token(model: IJepa, recipe: Any) -> None:
        original(model, recipe)
        model.predictor.mask_token.fill_(torch.nan)

    distributed.init_weights = forget_mask_token
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    try:
        distributed.init_from_seed(model, config.recipe)
    except AssertionError as e:
        return str(e)
    return ""


def built(ranks: distributed.World, config: TrialConfig) -> tuple[IJepa, ShardedAdamW]:
    """A model and an optimiser whose moments are not zero: two steps from the recipe's seed."""
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
    distributed.init_from_seed(model, config.recipe)
    reducer = MetricReducer(ranks.device, ranks.size)
    for number in range(2):
        step(model, adam, ranks, reducer, number)
    return model, adam


def saved(env: DistEnv, config: TrialConfig, trial: TrialDir) -> dict[str, Any]:
    """Save step 2 of a small model; what this rank copied, and the sockets it holds."""
    ranks = join(env, config)
    model, adam = built(ranks, config)
    sockets = open_sockets()
    saver = checkpoint.AsyncSaver(trial, 1, ranks)
    saver.protocol.steps_to_keep = set
    manifest = checkpoint.new_manifest(2, config.id, 1, ranks, {})
    saver.start(manifest, checkpoint.state(model, adam))
    while saver.busy:
        time.sleep(0.01)
    distributed.sum_flags({"all have saved": True})
    after = open_sockets()
    distributed.sum_flags({"all have counted": True})  # a rank that ends closes a socket of each
    result = saver.take_result()
    return {
        "error": result.error if result else None,
        "staged": sum(buffer.nbytes for buffer in saver._buffers.values()),
        "sockets": after,
        "sockets of saving": after - sockets,
    }


def loaded(env: DistEnv, config: TrialConfig, trial: TrialDir) -> dict[str, np.ndarray]:
    """The whole state after a load into an untrained model, as this rank sees it."""
    ranks = join(env, config)
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
    saver = checkpoint.AsyncSaver(trial, 2, ranks)
    search = CheckpointSearch(saver.protocol, ranks.channel, trial.committed, lambda manifest: "")
    manifest, passed = search.find("start")
    assert manifest is not None
    assert not passed
    checkpoint.load(trial.checkpoint(manifest.step), model, adam, ranks, "load")
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in checkpoint.state(model, adam).items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        arrays[name] = tensor.numpy()
    return arrays


def refused(env: DistEnv, config: TrialConfig, trial: TrialDir, fault: str) -> str:
    """Return the error of every rank when the last rank cannot read its rows.

    fault: "removed" when the checkpoint is removed meanwhile.
    """
    ranks = join(env, config)
    model = distributed.build_model(config.recipe, config.runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, config.recipe.optim)
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


def with_new_scalar(env: DistEnv, trial: TrialDir) -> ExitCode:
    """Train attempt 1 with one more scalar in the objective's aux: rank + images per call."""
    original = IJepa.forward

    def forward(
        model: IJepa, images: torch.Tensor, masks: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, aux = original(model, images, masks)
        if not model.training:  # the probe's copy of the model
            return loss, aux
        return loss, {**aux, "rank_and_images": torch.tensor(float(env.rank + len(images)))}

    IJepa.forward = forward  # type: ignore[method-assign]
    return train_attempt(env, trial)


def train_attempt(env: DistEnv, trial: TrialDir) -> ExitCode:
    """Train attempt 1."""
    return train(ForcedExit(trial, env, PhaseTimer(), PreemptionHandler(), JobHooks(), 1))


def open_sockets() -> int:
    sockets = 0
    for file in Path("/proc/self/fd").iterdir():
        if file.is_symlink() and str(file.readlink()).startswith("socket:"):
            sockets += 1
    return sockets


def shard_count_of_unequal_ranks(env: DistEnv, config: TrialConfig) -> int:
    """Return the ranks that share the state, where each rank alone would choose rank + 1."""
    distributed.shard_size = lambda *arguments: env.rank + 1
    return join(env, config).shard_count


def thread_count(env: DistEnv, config: TrialConfig, threads: int | None) -> int:
    """Return the threads of torch in a rank. threads: that the user asks for."""
    os.environ.pop("OMP_NUM_THREADS", None)
    join(env, replace(config, runtime=replace(config.runtime, threads=threads)))
    return torch.get_num_threads()


def gloo_interface(env: DistEnv, config: TrialConfig, host: str, local_world: int) -> str:
    """Return the interface that gloo uses. host: that of rank 0, as a launcher says."""
    local = env.rank % local_world
    join(replace(env, host=host, local_rank=local, local_world_size=local_world), config)
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def probed(env: DistEnv, config: TrialConfig, images: int) -> dict[str, float]:
    """Metrics of made-up features of all readouts; rank r has every world-th image."""
    join(env, config)
    train, test = made_up_features(images, env, 0), made_up_features(images, env, 1)
    labels = ("class", "count", "distance")
    found = linear_probes.ridge(train, test, linear_probes.TARGET, labels)
    found |= linear_probes.few_labels(train, test, linear_probes.TARGET, "class")
    return {**found, "knn": linear_probes.knn_error(train, test, "class")}


def made_up_features(images: int, env: DistEnv, seed: int) -> linear_probes.Features:
    """Features that are noise but for a class, a count and a distance in three directions."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(images)
    x = torch.randn(images, 8, generator=generator, dtype=torch.float64)
    labels = {"class": index % 3, "count": 2 + index % 5}
    labels["distance"] = torch.randn(images, generator=generator)
    x[:, 0] += 4 * (labels["class"] == 1)
    x[:, 1] += 4 * (labels["class"] == 2)
    x[:, 2] += labels["count"]
    x[:, 3] = 0.1 * x[:, 3] + labels["distance"]
    mine = slice(env.rank, None, env.world_size)
    own = {name: label[mine] for name, label in labels.items()}
    empty = torch.zeros(0)
    return linear_probes.Features({"": x[mine]}, own, index[mine], empty, empty)
