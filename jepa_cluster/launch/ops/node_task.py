"""Measure what one task of a trial really has: `jepa doctor --node` runs this in every task.

In: a folder that the tasks share, and the environment of a task. Out: `task.<rank>.json` there, a
`TaskReport`. The tasks meet as the ranks of a trial do: by the record of an attempt in that folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

from jepa_cluster.launch.worker.main import claim
from jepa_cluster.launch.worker.slurm_rank import from_slurm
from jepa_cluster.training.dist_env import DistEnv, interface_to
from jepa_cluster.training.preemption import PreemptionHandler
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.provenance import available_cores, node_name

TIMEOUT = timedelta(seconds=60)  # of the rendezvous, and of the all-reduce
FLOATS = 16 << 20  # in one all-reduce, 64 MiB
ROUNDS = 5


class TaskReport(TypedDict):
    """cores: that the task may use. memory_gb: that its cgroup allows, else of the machine.

    blocked: USR2 is blocked while Python starts. interface: of the route to rank 0. gpus: that
    torch sees. gb_per_s: of the all-reduce over all tasks, by the bytes that each link carries.
    error: why torch could not be used.
    """

    node: str
    cores: int
    memory_gb: float
    blocked: bool
    interface: str
    gpus: int
    gb_per_s: float
    error: str


def main(folder: Path) -> None:
    env = from_slurm(os.environ)
    report: TaskReport = {
        "node": node_name(),
        "cores": available_cores(),
        "memory_gb": memory_limit() / 2**30,
        "blocked": signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "interface": interface_to(env.host),
        "gpus": 0,
        "gb_per_s": 0.0,
        "error": "",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", report["interface"])
    try:
        import torch

        report["gpus"] = torch.cuda.device_count()
        report["gb_per_s"] = all_reduce(folder, env)
    except Exception as e:
        report["error"] = f"{type(e).__name__}: {e}"[:300]
    fresh = folder / f".task.{env.rank}"
    fresh.write_text(json.dumps(report))
    fresh.rename(folder / f"task.{env.rank}.json")


def all_reduce(folder: Path, env: DistEnv) -> float:
    """Return the GB/s of an all-reduce over all tasks: NCCL where each has a GPU, else gloo."""
    import torch
    from torch import distributed

    on_gpu = torch.cuda.device_count() > env.local_rank
    device = torch.device("cuda", env.local_rank) if on_gpu else torch.device("cpu")
    claimed = claim(TrialDir(folder), env, PreemptionHandler())
    assert claimed
    env = claimed[1]
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        env.host,
        int(env.address.rpartition(":")[2]),
        env.world_size,
        env.is_rank0,
        TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=env.listener,
    )
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=TIMEOUT,
    )
    data = torch.ones(FLOATS, device=device)
    seconds: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        distributed.all_reduce(data)
        float(data[0])  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    carried = 2 * (env.world_size - 1) / env.world_size * 4 * FLOATS
    return carried / min(seconds) / 1e9


def memory_limit() -> int:
    """Return the bytes that the cgroups of this process allow, at most those of the machine."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        group = Path(line.split(":", 2)[2].lstrip("/"))
        for base, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
            for folder in (group, *group.parents):
                file = Path("/sys/fs/cgroup", base, folder, name)
                if file.exists() and file.read_text().strip().isdigit():
                    limit = min(limit, int(file.read_text()))
    return limit


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
