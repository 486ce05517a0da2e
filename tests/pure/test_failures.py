"""The cause of the end of an attempt, from its record, its log, Slurm and exit codes."""

from typing import get_args

import pytest

from jepa_cluster.trial import failures

BROKEN = (
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: unspecified launch failure",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: initialization error",
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "No CUDA-capable device is detected",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
)


@pytest.mark.parametrize(
    ("record", "state", "log", "cause"),
    [
        ({"cause": "preempted"}, "COMPLETED", "", "preempted"),
        ({}, "TIMEOUT", "", "timeout"),
        ({}, "NODE_FAIL", "", "node"),
        ({}, "OUT_OF_MEMORY", "", "host_oom"),
        ({}, "CANCELLED by 1000", "", "stopped"),
        ({}, "", "", "unknown"),
        (
            {"cause": "error", "error": "CUDA out of memory. Tried to allocate"},
            "FAILED",
            "",
            "gpu_oom",
        ),
        ({"cause": "error", "error": "ZeroDivisionError"}, "FAILED", "", "error"),
        (
            {"cause": "error", "error": "DataLoader worker (pid 7) is killed by signal: Killed. "},
            "",
            "",
            "host_oom",
        ),
        (
            {"cause": "error", "error": "No module named torch"},
            "",
            "ModuleNotFoundError: No module",
            "error",
        ),
        ({}, "FAILED", "ModuleNotFoundError: No module named 'torch'", "infrastructure"),
        ({"cause": "hang"}, "", "", "hang"),
        ({"cause": "node", "error": "cuda:0: CUDA out of memory"}, "", "", "node"),
        *[
            ({"cause": "error", "error": f"RuntimeError: {text}"}, "", "", "node")
            for text in BROKEN
        ],
    ],
)
def test_the_cause_of_the_end_of_an_attempt(
    record: dict[str, str], state: str, log: str, cause: str
):
    """The record of the attempt comes first, then the log, then the state of Slurm."""
    assert failures.classify_attempt(record, state, log).cause == cause


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([0, 0], "done"),
        ([-9, 1], "killed"),
        ([1, -9], "error"),
        ([1, 75], "preempted"),
        ([77, 0], "fenced"),
        ([139], "unknown"),
    ],
)
def test_the_first_exit_code_counts_unless_another_one_is_deliberate(
    codes: list[int],
    cause: str,
):
    """A killed rank causes errors on the other ranks."""
    assert failures.classify_exit_codes(codes).cause == cause


def test_every_cause_has_a_rule():
    """`jepa why` prints it."""
    assert set(get_args(failures.Cause)) == set(failures.RULES)


def test_a_preempted_attempt_without_time_to_save_names_its_last_checkpoint():
    late = {
        "cause": "preempted",
        "error": "SIGTERM: left with the commit of step 40; no time to save",
        "attempt": 1,
    }
    assert "left with the commit of step 40" in failures.classify_attempt(late).summary


def test_a_preempted_attempt_with_time_to_save_has_a_checkpoint():
    saved = {"cause": "preempted", "error": "SIGTERM", "attempt": 1}
    assert failures.classify_attempt(saved).summary == "preempted after saving a checkpoint"


def test_slurms_word_for_an_end_without_a_record():
    """A preemption is free of charge. slurmctld cancels too, and then no user stopped the trial."""
    preempted = failures.classify_attempt({}, "PREEMPTED")
    assert preempted.cause == "preempted"
    assert not preempted.rule.budget
    assert preempted.summary == "preempted before a checkpoint was saved"
    assert failures.classify_attempt({}, "CANCELLED by alice").cause == "stopped"
    assert failures.classify_attempt({}, "CANCELLED").cause == "unknown"
