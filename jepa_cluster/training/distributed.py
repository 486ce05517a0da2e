"""Many processes as one: process groups, the mesh, sharding, precision, and the same start everywhere.

In: a recipe, a runtime and a Place. Out: `Ranks` (who we are together) and a sharded `IJepa` with its optimiser.
The weights of a fresh trial are made whole on the CPU from the recipe's seed, the same on every rank, and then cut:
they do not depend on the number of ranks. Knows nothing of data, checkpoints or the loop.
"""

from __future__ import annotations

import datetime
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo  # the first DTensor imports it anyway; here a warm process has it before it forks
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jepa_cluster.config import Optim, Recipe, Runtime
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import flops
from jepa_cluster.ijepa.objective import IJepa, init_weights
from jepa_cluster.training.channel import Channel
from jepa_cluster.training.dist_env import Place
from jepa_cluster.training.watchdog import FIRST

PATIENCE = datetime.timedelta(minutes=30)  # of a collective; the watchdog notices long before
SAVE_PATIENCE = 0.8  # times runtime.hang_seconds that the save thread waits for another rank: less than the watchdog
MAIN_PATIENCE = 1.05 * FIRST  # the same for the main thread: more than the watchdog, so that a rank that hangs says so
PARTING = datetime.timedelta(seconds=20)  # that a rank which is done waits for the others
PARTING_AFTER_ERROR = 5.0  # seconds that rank 0 waits for the others when an exception ends the attempt
FLIGHT = "500"  # collectives that the flight recorder remembers
STATE_BYTES = 20  # a parameter: fp32 master, EMA, two moments, gradient
ONE_GROUP = 10_000_000  # parameters of a part below which one collective is cheaper than one a block
STATE_SHARE = 0.25  # of a GPU's memory that the state may take before it is sharded

_channel: Channel | None = None  # of this process, once it has joined the others


@dataclass(frozen=True)
class Ranks:
    """All ranks of the attempt. mesh: replicate x shard = world. hosts: the node of each rank.

    store: the key-value store that the process group was made with. channel: messages through it, for the main thread.
    """

    place: Place
    device: torch.device
    mesh: DeviceMesh
    store: dist.TCPStore
    channel: Channel
    hosts: tuple[str, ...]

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def replicas(self) -> int:
        return self.mesh.size(0)

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the state."""
        return self.mesh.size(1)

    @property
    def replica(self) -> int:
        """Index of the copy that this rank holds a part of; replica 0 writes checkpoints and reads them."""
        return self.mesh.get_local_rank("replicate")

    @property
    def shard(self) -> int:
        """Index of this rank's part of its copy."""
        return self.mesh.get_local_rank("shard")

    def new_channel(self, on_progress: Callable[[], None]) -> Channel:
        """A channel for another thread, with a connection of its own: one client does one operation at a time."""
        main = self.channel
        patience = main.patience * SAVE_PATIENCE / MAIN_PATIENCE
        return Channel(self.store.clone(), self.rank, self.world, main.attempt, patience, on_progress=on_progress)


def join(
    place: Place,
    recipe: Recipe,
    runtime: Runtime,
    attempt: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> Ranks:
    """Meet the other ranks. Sets this process's device and threads; raises ConfigError for an impossible mesh.

    on_progress: called when this rank, or one that it waits for, makes progress while a checkpoint is loaded.
    """
    device = choose_device(runtime, place)
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // place.local_world))
    if place.host.startswith("127.") or place.world == place.local_world:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT)
    host, _, port = place.address.rpartition(":")
    store = dist.TCPStore(
        host or "127.0.0.1", int(port or 0), place.world, place.first, PATIENCE, False, master_listen_fd=place.listener
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    pinned = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world, timeout=PATIENCE, device_id=pinned
    )
    shard = shard_size(recipe, runtime, place, device)
    mesh = init_device_mesh(device.type, (place.world // shard, shard), mesh_dim_names=("replicate", "shard"))
    patience = runtime.hang_seconds * MAIN_PATIENCE
    channel = Channel(store, place.rank, place.world, attempt, patience, on_progress=on_progress)
    global _channel
    _channel = channel
    hosts = channel.gather("hosts", lambda: os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    return Ranks(place, device, mesh, store, channel, tuple(hosts))


def sum_flags(ranks: Ranks, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Which flags any rank has raised. Every rank calls it with the same names, from its main thread."""
    # Sums one number per flag over all ranks.
    sums = torch.tensor([float(raised) for raised in flags.values()], device=ranks.device)
    dist.all_reduce(sums)
    return {name: total > 0 for name, total in zip(flags, sums.tolist(), strict=True)}


def leave() -> None:
    """Part in an orderly way: no rank goes while another needs it, but none is waited for longer than PARTING. The
    process ends soon after by os._exit, which leaves nothing to be destroyed."""
    if dist.is_initialized() and (work := dist.barrier(async_op=True)):
        work.wait(PARTING)


def leave_after_error() -> None:
    """Let the other ranks read why all of them end, before rank 0's process takes the store with it."""
    if _channel:
        _channel.part(PARTING_AFTER_ERROR)


def flight_record() -> list[dict[str, Any]]:
    """The last collectives of this rank as torch's flight recorder saw them, gloo's and NCCL's, oldest first."""
    from torch._C import _distributed_c10d as c10d

    found: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        dump = getattr(c10d, name, None)
        found += pickle.loads(dump()).get("entries", []) if dump else []
    return sorted(found, key=lambda entry: entry["time_created_ns"])


def choose_device(runtime: Runtime, place: Place) -> torch.device:
    """cuda:local_rank where there is one, else cpu. Raises ConfigError when a GPU was asked for and is missing."""
    available = torch.cuda.device_count() if runtime.device != "cpu" else 0
    if runtime.device == "cuda" and not available:
        raise ConfigError("runtime.device=cuda, and torch sees no GPU here", where=socket.gethostname())
    if not available:
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank % available)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def shard_size(recipe: Recipe, runtime: Runtime, place: Place, device: torch.device) -> int:
    """Ranks that share one copy of the state: as asked; on GPUs the fewest that leave it room; on CPU all of them."""
    world = place.world
    if runtime.fsdp_shard_size is not None:
        if world % runtime.fsdp_shard_size:
            divisors = [d for d in range(1, world + 1) if world % d == 0]
            raise ConfigError(
                f"runtime.fsdp_shard_size={runtime.fsdp_shard_size} does not divide {world} ranks",
                hint=f"sizes that do: {divisors}",
            )
        return runtime.fsdp_shard_size
    if device.type == "cpu":
        return world
    count = flops.parameters(recipe)
    room = torch.cuda.get_device_properties(device).total_memory * STATE_SHARE
    need = STATE_BYTES * (count.encoder + count.predictor) / room
    return next((d for d in range(1, world + 1) if world % d == 0 and d >= need), world)


def micro_batch(recipe: Recipe, runtime: Runtime, world: int) -> int:
    """Images of a rank and backward pass at this world size: as asked or the largest divisor below.

    Raises ConfigError, with the nearest world size that can, when the global batch cannot be kept.
    """
    batch = recipe.optim.batch
    if batch % world:
        fits = [w for w in range(1, batch + 1) if batch % w == 0]
        below, above = max(w for w in fits if w < world), min((w for w in fits if w > world), default=batch)
        raise ConfigError(
            f"optim.batch={batch} cannot be shared equally by {world} ranks",
            where=f"world size {world}",
            hint=f"run it on {below} or {above}",
        )
    share = batch // world
    most = min(runtime.micro_batch or share, share)
    return max(b for b in range(1, most + 1) if share % b == 0)


def build(recipe: Recipe, runtime: Runtime, ranks: Ranks) -> IJepa:
    """The model, sharded, on its device, every value NaN. Order: activation checkpointing, compile, shard."""
    with torch.device("meta"):
        model = IJepa(recipe)
    policy = MixedPrecisionPolicy()
    if recipe.optim.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here writes into a module's output

    def shard(module: nn.Module, reshard: bool | None = True) -> None:
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard)

    for part in (model.encoder, model.predictor, model.target):
        for block in part.blocks:
            if runtime.activation_checkpointing and part is not model.target:
                recompute(block)
            if runtime.compile:
                block.compile()
            if size(part) > ONE_GROUP:
                shard(block)
        # The target runs without gradients, so nothing but its own `True` makes it give its full weights back: else
        # the average would be taken over stale, unsharded ones.
        if size(part) > ONE_GROUP or part is model.target:
            shard(part)
    shard(model, None)
    model.to_empty(device=ranks.device)
    with torch.no_grad():
        for tensor in local(values(model).values()):
            tensor.fill_(torch.nan)
    return model


def size(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def recompute(block: nn.Module) -> None:
    """Keep only the block's input for the backward pass, in place and without renaming its parameters."""
    from torch.distributed._composable import checkpoint

    checkpoint(block)


def initialise(model: IJepa, recipe: Recipe) -> None:
    """Values from the recipe's seed, the same whole weights on every rank, of which each takes its part."""
    with torch.device("meta"):
        whole = IJepa(recipe)
    whole.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in values(whole).values():
            tensor.fill_(torch.nan)
        init_weights(whole, recipe)
        source = values(whole)
        for name, tensor in values(model).items():
            assert torch.isfinite(source[name]).all(), f"{name} was left without values by init_weights"
            put(tensor, source[name])


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Write this rank's part of a whole CPU tensor into a sharded (or plain) one. No communication."""
    if isinstance(target, DTensor):
        whole = whole.to(target.device)
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def local(tensors: Any) -> list[Tensor]:
    """This rank's parts."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def trained(model: IJepa) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def optimizer(model: IJepa, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay for biases and other 1-d tensors. Its state exists from the start."""
    decayed = [p for _, p in trained(model) if p.dim() > 1]
    kept = [p for _, p in trained(model) if p.dim() <= 1]
    groups = [{"params": decayed, "decay": True}, {"params": kept, "decay": False, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for group in adam.param_groups:
        for p in group["params"]:
            adam.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return adam


def steer(adam: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """A step's settings."""
    for group in adam.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


@torch.no_grad()
def forget(adam: torch.optim.Optimizer) -> None:
    """The optimiser as it was before its first step."""
    for moments in adam.state.values():
        for tensor in moments.values():
            tensor.zero_()


def sync_gradients(model: IJepa, on: bool) -> None:
    """Whether the next backward reduces over ranks: only the last micro-batch of a step does."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(on)


@torch.no_grad()
def square_norms(model: IJepa, replicas: int) -> Tensor:
    """[2] float64: this rank's part of the squared gradient norms of encoder and predictor; sum it over ranks."""
    out = []
    for part in (model.encoder, model.predictor):
        grads = local(p.grad for p in part.parameters() if p.grad is not None)
        norms = torch.stack(torch._foreach_norm([g for g in grads if g.numel()]))
        out.append(norms.double().square().sum() / replicas)
    return torch.stack(out)


@torch.no_grad()
def clip(model: IJepa, square_norm: Tensor, most: float) -> None:
    """Scale the gradients so that their global norm is at most `most`."""
    grads = local(p.grad for _, p in trained(model) if p.grad is not None)
    factor = (most / (square_norm.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor.to(grads[0].dtype))
