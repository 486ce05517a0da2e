"""The device and the threads of a rank, and a test of its GPU and of its node.

In: a runtime, a `DistEnv`, what the launcher has granted. Out: a device that computes right, or
NodeFault, after which the trial runs again on another node.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from jepa_cluster.config import Runtime
from jepa_cluster.errors import NodeFault
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.provenance import node_name

MOST_THREADS = 16  # of torch per rank, unless the user asks for more
SELF_TEST_SIZE = 512  # rows of the matrix by which a GPU is tested
NODE_TEST_SECONDS = 120.0  # that the first collective of the ranks of a node may take


def choose_device(runtime: Runtime, env: DistEnv) -> torch.device:
    """Return cuda:local_rank, or the CPU where neither runtime nor launcher asks for a GPU.

    Raises NodeFault when the GPU is missing or computes wrong results.
    """
    if runtime.device == "cpu" or (runtime.device == "auto" and not wants_gpu()):
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if not available:
        what = f"runtime.device={runtime.device}, and torch sees no GPU here"
        raise NodeFault(what, where=node_name(), hint="nvidia-smi on that node")
    device = torch.device("cuda", env.local_rank % available)
    torch.cuda.set_device(device)
    check_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def wants_gpu() -> bool:
    """Whether there is a GPU, or the launcher has granted one to this process."""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return granted not in ("", "-1") or torch.cuda.device_count() > 0


def check_device(device: torch.device) -> None:
    """Multiply integers, whose product is exact. Raises NodeFault if it is wrong or fails."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 8, (SELF_TEST_SIZE, SELF_TEST_SIZE), generator=generator).float()
    try:
        right = torch.equal((a.to(device) @ a.T.to(device)).cpu(), a @ a.T)
    except RuntimeError as e:
        raise NodeFault(f"{device}: {e}", where=node_name()) from e
    if not right:
        raise NodeFault(f"{device} computes a wrong matrix product", where=node_name())


def check_node(
    env: DistEnv,
    device: torch.device,
    seconds: float = NODE_TEST_SECONDS,
) -> None:
    """Sum a number over the ranks of this node. Raises NodeFault if that is wrong or too slow."""
    # Every node has the same number of ranks.
    group, _ = dist.new_subgroups(env.local_world_size)
    total = torch.ones(1, device=device)
    work = dist.all_reduce(total, group=group, async_op=True)
    end = time.monotonic() + seconds
    while work and not work.is_completed():
        if time.monotonic() > end:
            what = f"no collective on this node within {seconds:.0f} s"
            raise NodeFault(what, where=node_name())
        time.sleep(0.01)
    if total.item() != env.local_world_size:
        raise NodeFault(f"a collective on this node sums to {total.item()}", where=node_name())


def thread_count(cores: int, sharing: int) -> int:
    """Return torch's threads for a rank: OMP_NUM_THREADS, else its part of the cores, capped.

    sharing: ranks that may run on the same cores.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdigit():
        return max(1, int(given))
    return min(MOST_THREADS, max(1, cores // sharing))
