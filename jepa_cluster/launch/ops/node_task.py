"""Measure what one task of a trial really has: `jepa doctor --node` runs this file in every task.

In: a folder that the tasks share. Out: `task.<rank>.json` there, a `TaskReport`. It imports nothing
of this package, because the node runs a copy of the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

TIMEOUT = timedelta(seconds=60)  # of the rendezvous, and of the all-reduce
FLOATS = 16 << 20  # in one all-reduce, 64 MiB
ROUNDS = 5
SIOCGIFADDR = 0x8915  # ioctl: the address of an interface


class TaskReport(TypedDict):
    """cores: that the task may use. memory_gb: that its cgroup allows, else of the machine.

    blocked: USR2 is blocked while Python starts. interface: of the route to rank 0, and its
    address. gpus: that torch sees. gb_per_s: of the all-reduce over all tasks, by the bytes that
    each link carries. error: why torch could not be used.
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
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    name, address = route(host)
    report: TaskReport = {
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": memory_limit() / 2**30,
        "blocked": signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "interface": f"{name} {address}".strip(),
        "gpus": 0,
        "gb_per_s": 0.0,
        "error": "",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    try:
        import torch

        report["gpus"] = torch.cuda.device_count()
        report["gb_per_s"] = all_reduce(folder, host, rank, world)
    except Exception as e:
        report["error"] = f"{type(e).__name__}: {e}"[:300]
    fresh = folder / f".task.{rank}"
    fresh.write_text(json.dumps(report))
    fresh.rename(folder / f"task.{rank}.json")


def all_reduce(folder: Path, host: str, rank: int, world: int) -> float:
    """Return the GB/s of an all-reduce over all tasks: NCCL where each has a GPU, else gloo."""
    import torch
    from torch import distributed

    local = int(os.environ.get("SLURM_LOCALID", "0"))
    on_gpu = torch.cuda.device_count() > local
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    store: Any = rendezvous(folder, host, rank, world)
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT
    )
    data = torch.ones(FLOATS, device=device)
    seconds: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        distributed.all_reduce(data)
        float(data[0])  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    carried = 2 * (world - 1) / world * 4 * FLOATS
    return carried / min(seconds) / 1e9


def rendezvous(folder: Path, host: str, rank: int, world: int) -> Any:
    """Return the store of the tasks. Rank 0 writes its port into the shared folder."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = folder / "port"
    if rank == 0:
        store = TCPStore(host, 0, world, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not port.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 did not start")
        (folder / f"look.{rank}").touch()  # an NFS client lists the folder again
        time.sleep(0.2)
    return TCPStore(host, int(port.read_text()), world, is_master=False, timeout=TIMEOUT)


def route(host: str) -> tuple[str, str]:
    """Return the interface, and its address, by which this node reaches rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return "", ""
        address = str(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name, address
    return "", address


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
    main(Path(sys.argv[1]))
