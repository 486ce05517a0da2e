"""Test the device of one rank and a collective of the ranks of its node, in a process of its own.

In: runtime.device, the local rank, the ranks of the node, and the path of a file that they share.
Out: exit code 0, else a message on stderr. A rank starts it before an attempt is claimed: a broken
driver may crash or stop the process that uses it, and the rank must survive that to record it.

    python -m jepa_cluster.training.self_test cuda 0 8 /tmp/jepa-0123
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from jepa_cluster.errors import NodeFault
from jepa_cluster.training.devices import choose_device

MATRIX_SIZE = 512  # rows of the matrix by which a device is tested
COLLECTIVE_SECONDS = 120.0  # that the ranks of a node may take to meet, and to sum a number


def main(arguments: Sequence[str]) -> None:
    """Run both tests. Ends the process with a message if one of them fails."""
    name, local_rank, ranks, file = arguments
    try:
        device = choose_device(name, int(local_rank))
        check_device(device)
        if int(ranks) > 1:
            check_collective(device, int(local_rank), int(ranks), file)
    except (NodeFault, RuntimeError) as e:
        sys.exit(str(e).splitlines()[0])


def check_device(device: torch.device) -> None:
    """Multiply integers, whose product is exact. Raises NodeFault if it is wrong."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 8, (MATRIX_SIZE, MATRIX_SIZE), generator=generator).float()
    if not torch.equal((a.to(device) @ a.T.to(device)).cpu(), a @ a.T):
        raise NodeFault(f"{device} computes a wrong matrix product")


def check_collective(
    device: torch.device,
    local_rank: int,
    ranks: int,
    file: str,
    seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Sum a number over the ranks of this node. Returns when every rank has the right sum.

    Raises NodeFault if the sum is wrong, RuntimeError or NodeFault if a rank does not answer.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = datetime.timedelta(seconds=seconds)
    store = dist.FileStore(file, ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=local_rank,
        world_size=ranks,
        timeout=limit,
    )
    total = torch.ones(1, device=device)
    work = dist.all_reduce(total, async_op=True)
    end = time.monotonic() + seconds
    while work and not work.is_completed():
        if time.monotonic() > end:
            raise NodeFault(f"no collective on this node within {seconds:.0f} s")
        time.sleep(0.01)
    if total.item() != ranks:
        raise NodeFault(f"a collective on this node sums to {total.item()}")
    store.set(f"passed {local_rank}", "")
    store.wait([f"passed {rank}" for rank in range(ranks)], limit)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # a group of NCCL may not end
