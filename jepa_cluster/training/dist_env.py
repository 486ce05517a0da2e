"""Rank, world size and rendezvous of a process, from its environment.

In: the environment that a launcher or Slurm sets. Out: `DistEnv`. Rank 0 listens before it opens
the attempt and writes its address into the attempt's record; the others read it there, so no port
is agreed in advance. Imports no torch.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from jepa_cluster.errors import LaunchError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's names
SLURM_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_NTASKS_PER_NODE",
)
VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "JEPA_LAUNCH")


@dataclass(frozen=True)
class DistEnv:
    """This process among all ranks of the launch. launch: unique per allocation.

    host: rank 0's address.

    address: "host:port" where rank 0 listens, known once the attempt is claimed. listener: rank 0's
    open socket. node: number of this node, the same for its ranks and for no other's; it need not
    count from 0.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launch: str
    host: str = "127.0.0.1"
    slurm: bool = False
    address: str = ""
    listener: int | None = None
    node: int = 0

    @property
    def is_rank0(self) -> bool:
        """Rank 0: the one that writes the spool, the markers and the attempt's record."""
        return self.rank == 0


def from_environment(env: Mapping[str, str]) -> DistEnv:
    """Read our own variables (RANK, WORLD_SIZE, ...), else Slurm's, else be alone.

    Raises LaunchError.
    """

    def number(*names: str, default: int) -> int:
        for name in names:
            if name in env:
                try:
                    return int(env[name])
                except ValueError as e:
                    raise LaunchError(
                        f"{name}={env[name]!r} is not a number", where="environment"
                    ) from e
        return default

    slurm = "SLURM_PROCID" in env and "JEPA_LAUNCH" not in env
    names = SLURM_VARIABLES if slurm else RANK_VARIABLES
    rank, world = number(names[0], default=0), number(names[1], default=1)
    local_rank = number(names[2], default=rank)
    local_world = number(names[3], default=_tasks_here(env) if slurm else world)
    if not (0 <= rank < world and 0 <= local_rank < max(local_world, 1)):
        raise LaunchError(
            f"rank {rank} of {world}, local rank {local_rank} of {local_world}:"
            " these cannot all be true",
            where=", ".join(f"{name}={env.get(name)}" for name in names),
            hint="start the process with `jepa submit` or `jepa train`",
        )
    if slurm:
        launch = f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_RESTART_COUNT', '0')}"
        host = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
    else:
        launch = env.get("JEPA_LAUNCH") or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        host = env.get("MASTER_ADDR", "127.0.0.1")
    node = number("SLURM_NODEID", default=rank - local_rank) if slurm else rank - local_rank
    return DistEnv(
        rank,
        world,
        local_rank,
        local_world,
        launch,
        host,
        "SLURM_JOB_ID" in env and slurm,
        node=node,
    )


def local_environment(rank: int, world: int, launch: str) -> dict[str, str]:
    """The variables that `find` reads, for one rank of a launch on this machine alone."""
    numbers = (rank, world, rank, world)
    return {
        **dict(zip(RANK_VARIABLES, map(str, numbers), strict=True)),
        "MASTER_ADDR": "127.0.0.1",
        "JEPA_LAUNCH": launch,
    }


def _tasks_here(env: Mapping[str, str]) -> int:
    """Slurm's tasks on this node, by SLURM_STEP_TASKS_PER_NODE: '2' or '2(x3),1', by node."""
    counts: list[int] = []
    for part in (
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    ).split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1) if times else [int(tasks)]
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[0]


def listen(host: str) -> socket.socket:
    """Return a listening socket on a free port. host: this machine as other ranks know it."""
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.bind(("127.0.0.1" if loopback else "0.0.0.0", 0))
    s.listen(2048)
    return s
