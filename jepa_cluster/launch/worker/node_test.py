"""Test this node before an attempt is claimed, so that a bad node makes no attempt.

In: a trial and the `DistEnv` of this rank. Out: nothing, or NodeFault. Each rank tests its GPU, and
a collective of the ranks of its node, in a process of its own (training/self_test.py). On a job of
several nodes rank 0 then waits until each node has passed. Raises FilesystemFault where the test
could not run, which says nothing of the node. Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jepa_cluster.errors import (
    SELF_TEST_FAILED,
    FilesystemFault,
    JepaError,
    NodeFault,
    TrialError,
)
from jepa_cluster.launch.worker.attempt_claim import (
    CLAIM_PATIENCE,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PAUSE_GROWTH,
    socket_name,
)
from jepa_cluster.training.dist_env import DistEnv, has_granted_gpu
from jepa_cluster.training.preemption import SIGNALS
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.provenance import node_name

SELF_TEST_SECONDS = 300.0  # from the start of Python to the end of the test
POLL_SECONDS = 0.05  # between two looks at the process of the test
# Of the node: TMPDIR may be another folder for each rank. The last rank removes the file.
SHARED_FOLDER = Path("/dev/shm")
DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd")  # of a machine with GPUs


def run(
    trial: TrialDir,
    env: DistEnv,
    stopping: Callable[[], bool],
    begun: float,
) -> bool:
    """Test this node, and on rank 0 wait for the other nodes. Returns whether they have passed.

    stopping: whether a signal asked this process to stop; then it returns False at once. begun:
    time.monotonic() at the start of this process. Raises NodeFault if this node fails, LaunchError
    if this user may not write to the trial, FilesystemFault if the test could not run, TrialError
    if another node does not answer, OSError.
    """
    if env.is_first_on_node:
        trial.require_writable()
    device = _device_to_test(trial)
    if device:
        _run_self_test(device, trial, env, stopping)
    if stopping():
        return False
    if env.world_size == env.local_world_size:
        return True
    if env.is_rank0:
        return _wait_for_nodes(trial, env, stopping, begun + CLAIM_PATIENCE)
    if env.is_first_on_node:
        trial.report_node(env.launch, env.node, env.local_world_size)
    return True


def _device_to_test(trial: TrialDir) -> str:
    """Return runtime.device where a GPU may be used, else ''."""
    try:
        device = trial.read_config().runtime.device
    except JepaError:  # the attempt will record it
        return ""
    may_have_gpu = has_granted_gpu() or any(map(os.path.exists, DRIVER_FILES))
    if device == "auto" and not may_have_gpu:
        return ""
    return "" if device == "cpu" else device


def _run_self_test(
    device: str,
    trial: TrialDir,
    env: DistEnv,
    stopping: Callable[[], bool],
) -> None:
    """Run the self-test in a process. Raises NodeFault if that fails, crashes or does not end.

    Raises FilesystemFault if it ended without a result, as without a module, or on a full disk.
    """
    shared = SHARED_FOLDER / socket_name(trial, env)[1:]
    rank, ranks = str(env.local_rank), str(env.local_world_size)
    module = "jepa_cluster.training.self_test"
    with tempfile.TemporaryFile("w+") as log:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the process must not die of them
        process = subprocess.Popen(
            [sys.executable, "-m", module, device, rank, ranks, str(shared)],
            stdout=log,
            stderr=log,
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        end = time.monotonic() + SELF_TEST_SECONDS
        while process.poll() is None and time.monotonic() < end and not stopping():
            time.sleep(POLL_SECONDS)
        process.kill()  # one that waits for a dead GPU may not end
        if process.returncode == 0:
            return
        if env.is_first_on_node:  # the launch ends, so its ranks do not need the file
            with contextlib.suppress(OSError):
                shared.unlink()
        if stopping():
            return
        log.seek(0)
        output = log.read().strip()
    print(output, file=sys.stderr)
    message = output.rpartition("\n")[2]
    is_fault = True
    if process.returncode is None:
        message = f"no answer within {SELF_TEST_SECONDS:.0f} s"
    elif process.returncode < 0:
        message = f"ended by signal {-process.returncode}; {message}"
        is_fault = process.returncode != -signal.SIGKILL  # which a full memory sends
    else:
        _, is_named, fault = output.rpartition(SELF_TEST_FAILED)
        is_fault = bool(is_named)
        if is_fault:
            message = fault.partition("\n")[0]
    error = NodeFault if is_fault else FilesystemFault
    raise error(f"self-test of the GPU on {node_name()}: {message}")


def _wait_for_nodes(
    trial: TrialDir,
    env: DistEnv,
    stopping: Callable[[], bool],
    end: float,
) -> bool:
    """Wait until each other node has reported that it passed, or return False at a STOP file.

    Raises TrialError if one has not by `end`.
    """
    missing = env.world_size - env.local_world_size
    pause = FIRST_PAUSE
    while not (stopping() or trial.stop.exists()):
        found = trial.reported_ranks(env.launch)
        if found == missing:
            trial.forget_reports()
            return True
        if time.monotonic() > end:
            raise TrialError(
                f"the nodes of {missing - found} ranks have not passed their test"
                f" in {CLAIM_PATIENCE:.0f} s",
                where=f"launch {env.launch}",
                hint="look at the output of the ranks in the launcher's log",
            )
        time.sleep(pause)
        pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)
    return False
