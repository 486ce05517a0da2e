"""Process groups, the device mesh, sharding and precision; the same start on every rank.

In: a recipe, a runtime and a `DistEnv`. Out: a `World` and a sharded `IJepa` with its optimizer.
Fresh weights are made unsharded on the CPU from the recipe's seed, the same on every rank, and then
sharded: they do not depend on the number of ranks. Knows nothing of data, checkpoints or the loop.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch._dynamo  # the first DTensor imports it anyway; here the fork server has it
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jepa_cluster.config import Recipe, Runtime
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import flops
from jepa_cluster.ijepa.objective import IJepa, init_weights, local_part
from jepa_cluster.training.channel import Channel
from jepa_cluster.training.devices import choose_device, thread_count
from jepa_cluster.training.dist_env import DistEnv, divisors, interface_to
from jepa_cluster.trial.provenance import node_name

# of a collective: a hang is the business of the watchdog, which leaves out a suspension
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
# Else torch's NCCL threads abort the process, and no record is written.
NCCL_VARIABLES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
# times runtime.hang_seconds that the save thread waits for another rank: less than the watchdog
SAVE_THREAD_PATIENCE = 0.5
# the same for the main thread: more than the watchdog, so that a rank that hangs reports it
MAIN_THREAD_PATIENCE = 1.05
# that a rank which is done waits for the others
FINAL_BARRIER_TIMEOUT = datetime.timedelta(seconds=20)
DRAIN_SECONDS = 5.0  # that rank 0 waits for the others when an exception ends the attempt
FLIGHT_RECORDER_ENTRIES = "500"  # collectives that the flight recorder remembers
STATE_BYTES_PER_PARAMETER = 20  # fp32 master, EMA, two moments, gradient
# parameters of a part below which one collective is cheaper than one per block
SINGLE_GROUP_PARAMETERS = 10_000_000
STATE_MEMORY_FRACTION = 0.25  # of a GPU's memory that the state may take before it is sharded

_channel: Channel | None = None  # of this process, once it has joined the others


@dataclass(frozen=True)
class World:
    """All ranks of the attempt. mesh: replicate x shard = world. hosts: the node of each rank.

    channel: messages for the main thread, through the store of the process group.
    """

    env: DistEnv
    device: torch.device
    mesh: DeviceMesh
    channel: Channel
    hosts: tuple[str, ...]

    @property
    def rank(self) -> int:
        return self.env.rank

    @property
    def size(self) -> int:
        return self.env.world_size

    @property
    def replica_count(self) -> int:
        return self.mesh.size(0)

    @property
    def shard_count(self) -> int:
        """Ranks that share one copy of the state."""
        return self.mesh.size(1)

    @property
    def replica_index(self) -> int:
        """Index of this rank's copy of the state; replica 0 writes and reads checkpoints."""
        return self.mesh.get_local_rank("replicate")

    @property
    def shard_index(self) -> int:
        """Index of this rank's part of its copy."""
        return self.mesh.get_local_rank("shard")

    def new_channel(self, on_progress: Callable[[], None] = lambda: None) -> Channel:
        """Return a channel for another thread, with its own connection to the store.

        One client of the store does one operation at a time.
        """
        patience = self.channel.patience * SAVE_THREAD_PATIENCE / MAIN_THREAD_PATIENCE
        store = self.channel.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        return replace(self.channel, store=store, patience=patience, on_progress=on_progress)


def init(
    env: DistEnv,
    recipe: Recipe,
    runtime: Runtime,
    attempt: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> World:
    """Join the process group; set this process's device and threads.

    Raises ConfigError for an impossible mesh.

    on_progress: called when this rank makes progress, or one that it waits for in a `Channel`.
    """
    device = choose_device(runtime.device, env.local_rank)
    on_progress()
    callback_handler.register_end_callback(lambda _: on_progress())  # a block has been compiled
    host, _, port = env.address.rpartition(":")
    variables = {**NCCL_VARIABLES, "TORCH_FR_BUFFER_SIZE": FLIGHT_RECORDER_ENTRIES}
    one_node = env.world_size == env.local_world_size
    if interface := "lo" if one_node else interface_to(env.host):
        variables["GLOO_SOCKET_IFNAME"] = interface
    os.environ.update(variables | os.environ)
    store = dist.TCPStore(
        host or "127.0.0.1",
        int(port or 0),
        env.world_size,
        env.is_rank0,
        COLLECTIVE_TIMEOUT,
        False,
        master_listen_fd=env.listener,
    )
    patience = runtime.hang_seconds * MAIN_THREAD_PATIENCE
    channel = Channel(store, env.rank, env.world_size, attempt, patience, on_progress=on_progress)
    global _channel
    _channel = channel
    # Here each rank that arrives is progress; in the rendezvous of gloo nothing would be.
    channel.advance("places")
    cores = sorted(os.sched_getaffinity(0))
    places = channel.gather("places", lambda: [node_name(), cores])
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if on_gpu else None,
    )
    on_progress()
    sharing = places.count([node_name(), cores])
    torch.set_num_threads(runtime.threads or thread_count(len(cores), sharing))
    # The ranks of a job may have different GPUs.
    shard = channel.from_rank0("shard", lambda: shard_size(recipe, runtime, env, device))
    mesh = init_device_mesh(
        device.type, (env.world_size // shard, shard), mesh_dim_names=("replicate", "shard")
    )
    hosts = tuple(host for host, _ in places)
    return World(env, device, mesh, channel, hosts)


def sum_flags(flags: Mapping[str, bool]) -> set[str]:
    """Return the flags that any rank has raised. Every rank passes the same names."""
    # Sums one number per flag over all ranks, on the CPU: a rank may be late, and gloo then raises.
    sums = torch.tensor([float(raised) for raised in flags.values()])
    dist.all_reduce(sums)
    mark_progress()
    return {name for name, total in zip(flags, sums, strict=True) if total > 0}


def mark_progress() -> None:
    """Note for the watchdog that the main thread has made progress."""
    if _channel:
        _channel.on_progress()


def final_barrier() -> None:
    """Wait until no rank needs another, at most FINAL_BARRIER_TIMEOUT.

    The process ends soon after by os._exit, so nothing is destroyed here.
    """
    if dist.is_initialized() and (work := dist.barrier(async_op=True)):
        work.wait(FINAL_BARRIER_TIMEOUT)


def drain_messages() -> None:
    """Let the other ranks read why all end, before rank 0's process takes the store with it."""
    if _channel:
        _channel.close(DRAIN_SECONDS)


def shard_size(recipe: Recipe, runtime: Runtime, env: DistEnv, device: torch.device) -> int:
    """Return the number of ranks that share one copy of the state.

    runtime.shard if set; on GPUs the fewest that leave room for activations; on the CPU all.
    """
    world = env.world_size
    sizes = divisors(world)
    if runtime.fsdp_shard_size is not None:
        if runtime.fsdp_shard_size not in sizes:
            raise ConfigError(
                f"runtime.fsdp_shard_size={runtime.fsdp_shard_size} does not divide {world} ranks",
                hint=f"sizes that do: {sizes}",
            )
        return runtime.fsdp_shard_size
    if device.type == "cpu":
        return world
    count = flops.parameters(recipe)
    room = torch.cuda.get_device_properties(device).total_memory * STATE_MEMORY_FRACTION
    need = STATE_BYTES_PER_PARAMETER * (count.encoder + count.predictor) / room
    return next((size for size in sizes if size >= need), world)


def build_model(recipe: Recipe, runtime: Runtime, world: World) -> IJepa:
    """Return the sharded model on its device, every value NaN.

    Order: activation checkpointing, compile, shard.
    """
    with torch.device("meta"):
        model = IJepa(recipe)
    policy = MixedPrecisionPolicy()
    if recipe.optim.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    # Nothing here writes into a module's output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

    def shard(module: nn.Module, reshard: bool | None = True) -> None:
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)

    for part in (model.encoder, model.predictor, model.target):
        is_target = part is model.target
        is_large = sum(p.numel() for p in part.parameters()) > SINGLE_GROUP_PARAMETERS
        for block in part.blocks:
            if runtime.activation_checkpointing and not is_target:
                checkpoint(block)  # in place, without renaming parameters
            if runtime.compile:
                block.compile()
            if is_large:
                shard(block)
        # The target runs without gradients, so only its own `True` makes it reshard after the
        # forward pass: else the average would be taken over stale, unsharded weights.
        if is_large or is_target:
            shard(part)
    shard(model, None)
    allocate(model, world.device)
    model.of_all_ranks = of_all_ranks
    return model


def of_all_ranks(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the global batch.

    Every rank computes the same from them. Only its own rows carry a gradient to its weights. It is
    multiplied by the number of ranks, because the average over ranks divides by that.
    """
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x
    x.register_hook(lambda gradient: gradient * len(parts))
    return torch.stack(parts, 1).flatten(0, 1)


@torch.no_grad()
def allocate(model: IJepa, device: torch.device) -> None:
    """Give a model on the meta device its memory, every value NaN."""
    model.to_empty(device=device)
    for tensor in named_tensors(model).values():
        local_part(tensor).fill_(torch.nan)


def unsharded_model(recipe: Recipe, device: torch.device) -> IJepa:
    """Return a model of one process, every value NaN."""
    with torch.device("meta"):
        model = IJepa(recipe)
    allocate(model, device)
    return model


@torch.no_grad()
def init_from_seed(model: IJepa, recipe: Recipe) -> None:
    """Fill the model from the recipe's seed: the same on any number of ranks."""
    whole = unsharded_model(recipe, torch.device("cpu"))
    init_weights(whole, recipe)
    targets = named_tensors(model)
    for name, source in named_tensors(whole).items():
        assert torch.isfinite(source).all(), f"{name} was left without values by init_weights"
        target = targets[name]
        if isinstance(target, DTensor):  # takes this rank's rows, without communication
            source = source.to(target.device)
            mesh, placements = target.device_mesh, target.placements
            source = distribute_tensor(source, mesh, placements, src_data_rank=None)
        local_part(target).copy_(local_part(source))
        mark_progress()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def sync_gradients(model: IJepa, on: bool) -> None:
    """Whether the next backward reduces over ranks: only the last micro-batch of a step does."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(on)
