"""The device and the threads of a rank.

In: runtime.device and what the launcher has granted. Out: a device, or NodeFault, after which the
trial runs again on another node.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import os

import torch

from jepa_cluster.errors import NodeFault
from jepa_cluster.training.dist_env import has_granted_gpu
from jepa_cluster.trial.provenance import node_name

MOST_THREADS = 16  # of torch per rank, unless the user asks for more


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return cuda:local_rank, or the CPU where neither runtime nor launcher asks for a GPU.

    name: runtime.device. Raises NodeFault when the GPU is missing.
    """
    if name == "cpu" or (name == "auto" and not wants_gpu()):
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if not available:
        what = f"runtime.device={name}, and torch sees no GPU here"
        raise NodeFault(what, where=node_name(), hint="nvidia-smi on that node")
    device = torch.device("cuda", local_rank % available)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def wants_gpu() -> bool:
    """Whether there is a GPU, or the launcher has granted one to this process."""
    return has_granted_gpu() or torch.cuda.device_count() > 0


def thread_count(cores: int, sharing: int) -> int:
    """Return torch's threads for a rank: OMP_NUM_THREADS, else its part of the cores, capped.

    sharing: ranks that may run on the same cores.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdigit():
        return max(1, int(given))
    return min(MOST_THREADS, max(1, cores // sharing))
