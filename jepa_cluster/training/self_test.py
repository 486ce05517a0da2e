"""Test the device of one rank and a collective of the ranks of its node, in a process of its own.

In: runtime.device, the local rank, the ranks of the node, and the path of a file that they share.
Out: exit code 0, else an error on stderr. Where the node is to blame its line begins with
`SELF_TEST_FAILED`. A rank starts it before an attempt is claimed: a broken driver may crash or stop
the process that uses it, and the rank must survive that to record it.

    python -m jepa_cluster.training.self_test cuda 0 8 /tmp/jepa-0123
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from jepa_cluster.errors import SELF_TEST_FAILED, NodeFault
from jepa_cluster.training.devices import choose_device

MATRIX_SIZE = 512  # rows of the matrix by which a device is tested
# In errors that all nodes share: a torch that does not know this kind of GPU, a wrong setting
SHARED = ("no kernel image", "invalid argument", "invalid usage")
# In errors of a collective that blame the node. Others may be those of all nodes, too: a small
# /dev/shm, a rank that was killed.
OF_THIS_NODE = ("cuda error", "timeout", "timed out")
COLLECTIVE_SECONDS = 120.0  # that the ranks of a node may take to meet, and to sum a number


def main(arguments: Sequence[str]) -> None:
    """Run both tests and end the process: without a wait for NCCL, whose groups may not end."""
    code = 1
    try:
        run(*arguments)
        code = 0
    except NodeFault as e:
        print(f"{SELF_TEST_FAILED}{e.what}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def run(
    name: str,
    local_rank: str,
    ranks: str,
    file: str,
) -> None:
    """Run both tests. Raises NodeFault if the node fails one of them."""
    Path(file).touch()  # raises where no file can be made; the store would try again and again
    store = dist.FileStore(file, int(ranks))
    store.set(f"began {local_rank}", "")  # raises where no file can be written
    try:
        device = choose_device(name, int(local_rank))
        check_device(device)
    except RuntimeError as e:
        raise_unless_shared(e)
        raise
    try:
        if int(ranks) > 1:
            check_collective(device, int(local_rank), int(ranks), store)
    except RuntimeError as e:
        if any(word in str(e).lower() for word in OF_THIS_NODE):
            raise_unless_shared(e)
        raise
    if store.add("ended", 1) == int(ranks):
        Path(file).unlink(missing_ok=True)


def raise_unless_shared(error: RuntimeError) -> None:
    """Raise NodeFault, unless the error is one of all nodes."""
    text = str(error)
    if not any(word in text.lower() for word in SHARED):
        raise NodeFault(text.splitlines()[0]) from error


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
    store: dist.Store,
    seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Sum a number over the ranks of this node. Returns when every rank has the right sum.

    Raises NodeFault if the sum is wrong, RuntimeError or NodeFault if a rank does not answer.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = datetime.timedelta(seconds=seconds)
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
    if work:
        work.wait()  # raises where another rank has ended
    if total.item() != ranks:
        raise NodeFault(f"a collective on this node sums to {total.item()}")
    store.set(f"passed {local_rank}", "")
    store.wait([f"passed {rank}" for rank in range(ranks)], limit)


if __name__ == "__main__":
    main(sys.argv[1:])
