"""Rank, world size and rendezvous of a process, from its environment; its part of a batch.

In: the environment that a launcher sets. Out: `DistEnv`. Rank 0 listens before it opens the attempt
and writes its address into the attempt's record; the others read it there, so no port is agreed in
advance. Imports no torch.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from jepa_cluster.config import Recipe, Runtime
from jepa_cluster.errors import ConfigError, LaunchError

GET_ADDRESS = 0x8915  # SIOCGIFADDR of ioctl: the IPv4 address of an interface
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's names
VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "JEPA_LAUNCH")


@dataclass(frozen=True)
class DistEnv:
    """This process among all ranks of the launch. Raises LaunchError for an impossible rank.

    launch: unique per allocation. host: rank 0's address. address: "host:port" where rank 0
    listens, known once the attempt is claimed. listener: rank 0's open socket. node: number of this
    node, the same for its ranks and for no other's; it need not count from 0.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launch: str
    host: str = "127.0.0.1"
    address: str = ""
    listener: int | None = None
    node: int = 0

    def __post_init__(self) -> None:
        numbers = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        rank, world, local_rank, local_world = numbers
        if not (0 <= rank < world and 0 <= local_rank < local_world):
            named = zip(RANK_VARIABLES, numbers, strict=True)
            raise LaunchError(
                f"rank {rank} of {world}, local rank {local_rank} of {local_world}:"
                " these cannot all be true",
                where=", ".join(f"{name}={number}" for name, number in named),
                hint="start the process with `jepa submit` or `jepa train`",
            )

    @property
    def is_rank0(self) -> bool:
        """Rank 0: the one that writes the spool, the markers and the attempt's record."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """The rank that does what each node needs once."""
        return self.local_rank == 0


def from_environment(env: Mapping[str, str]) -> DistEnv:
    """Return the rank that the launcher's variables name; without them the only one.

    Raises LaunchError.
    """
    try:
        rank, world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        local_rank = int(env.get("LOCAL_RANK", rank))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    except ValueError as e:
        raise LaunchError(f"{', '.join(RANK_VARIABLES)}: {e}", where="environment") from e
    launch = env.get("JEPA_LAUNCH", "")
    if world_size > 1 and not launch:
        raise LaunchError(
            f"{world_size} ranks were started by a launcher that this program does not know",
            where=f"RANK={rank}, WORLD_SIZE={world_size}, and no JEPA_LAUNCH",
            hint="use `jepa submit` or `jepa train`, not torchrun",
        )
    alone = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    return DistEnv(
        rank,
        world_size,
        local_rank,
        local_world_size,
        launch or alone,
        env.get("MASTER_ADDR", "127.0.0.1"),
        node=rank - local_rank,
    )


def local_environment(rank: int, world: int, launch: str) -> dict[str, str]:
    """The variables that `from_environment` reads, for one rank of a launch on one machine."""
    numbers = (rank, world, rank, world)
    return {
        **dict(zip(RANK_VARIABLES, map(str, numbers), strict=True)),
        "MASTER_ADDR": "127.0.0.1",
        "JEPA_LAUNCH": launch,
    }


def has_granted_gpu() -> bool:
    """Whether the launcher has granted a GPU to this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1")


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def micro_batch(recipe: Recipe, runtime: Runtime, world: int) -> int:
    """Images of a rank and backward pass at this world size: as asked or the largest divisor below.

    Raises ConfigError, with the nearest world size that can, when the global batch cannot be kept.
    """
    batch = recipe.optim.batch
    if batch % world:
        fits = divisors(batch)
        below, above = (
            max(w for w in fits if w < world),
            min((w for w in fits if w > world), default=batch),
        )
        raise ConfigError(
            f"optim.batch={batch} cannot be shared equally by {world} ranks",
            where=f"world size {world}",
            hint=f"run it on {below} or {above}",
        )
    share = batch // world
    most = min(runtime.micro_batch or share, share)
    return max(size for size in divisors(share) if size <= most)


def interface_to(host: str) -> str:
    """Return the network interface of the route to a host; '' if it cannot be found.

    For a rank on the host itself: the interface that has its address.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))  # sends nothing, but looks up the route
        own, there = s.getsockname()[0], s.getpeername()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(s, GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) in (own, there):
                    return name
    return ""


def listen(host: str) -> socket.socket:
    """Return a listening socket on a free port. host: this machine as other ranks know it."""
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.bind(("127.0.0.1" if loopback else "0.0.0.0", 0))
    s.listen(2048)
    return s
