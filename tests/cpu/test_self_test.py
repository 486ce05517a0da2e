"""The self-test of a node: which errors blame it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from jepa_cluster.errors import SELF_TEST_FAILED, NodeFault
from jepa_cluster.training import self_test

SELF_TEST = (sys.executable, "-m", "jepa_cluster.training.self_test")
SHORT_TEST = """
import sys
from jepa_cluster.training import self_test
self_test.check_collective.__defaults__ = (0.5,)
self_test.main(sys.argv[1:])
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*SELF_TEST, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_the_ranks_of_a_node_sum_a_number(tmp_path: Path) -> None:
    """The last one removes the file that they share."""
    ranks = [start("cpu", rank, 2, tmp_path / "shared") for rank in range(2)]
    assert [rank.communicate(timeout=120)[1] for rank in ranks] == ["", ""]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert not (tmp_path / "shared").exists()


def test_a_rank_whose_neighbour_does_not_come_fails_its_test(tmp_path: Path) -> None:
    words = ["cpu", "0", "2", str(tmp_path / "shared")]
    alone = [sys.executable, "-c", SHORT_TEST, *words]
    done = subprocess.run(
        alone,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(SELF_TEST_FAILED)
    assert len(done.stderr.splitlines()) == 1


def test_a_rank_that_is_killed_says_nothing_of_the_node(tmp_path: Path) -> None:
    """The others see that it went away during the collective."""
    killed = (
        "import os, signal, sys, torch.distributed as dist;"
        "os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo');"
        "dist.init_process_group('gloo', store=dist.FileStore(sys.argv[1], 2), rank=1,"
        " world_size=2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    shared = tmp_path / "shared"
    other = subprocess.Popen([sys.executable, "-c", killed, str(shared)])
    rank = start("cpu", 0, 2, shared)
    error = rank.communicate(timeout=120)[1]
    assert other.wait() == -signal.SIGKILL
    assert rank.returncode == 1
    assert "by peer" in error
    assert SELF_TEST_FAILED not in error


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        ("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO)", True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("store->get('0') got error: wait timeout after 120000ms", True),
        ("NCCL error: unhandled system error; Error while creating shared memory", False),
        ("NCCL error: internal error - please report this issue", False),
        ("NCCL error: invalid usage", False),
        ("unhandled cuda error; invalid argument", False),
    ],
)
def test_an_error_that_all_nodes_may_share_blames_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    blamed: bool,
) -> None:
    """As a small /dev/shm, or a wrong setting of NCCL."""

    def fail(*_: object) -> None:
        raise dist.DistBackendError(error)

    monkeypatch.setattr(self_test, "check_collective", fail)
    with pytest.raises(NodeFault if blamed else dist.DistBackendError, match=re.escape(error)):
        self_test.run("cpu", "0", "2", str(tmp_path / "shared"))


def test_a_gpu_that_this_torch_does_not_know_blames_no_node(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = "CUDA error: no kernel image is available for execution on the device"

    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(self_test, "check_device", fail)
    with pytest.raises(RuntimeError, match=message):
        self_test.run("cpu", "0", "1", str(tmp_path / "shared"))


def test_a_folder_that_takes_no_file_says_nothing_of_the_node(tmp_path: Path) -> None:
    rank = start("cpu", 0, 2, tmp_path / "missing" / "shared")
    error = rank.communicate(timeout=120)[1]
    assert rank.returncode == 1
    assert "No such file" in error
    assert SELF_TEST_FAILED not in error
