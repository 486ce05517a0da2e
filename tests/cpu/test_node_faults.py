"""A node without its GPU, with a wrong one, or with another number of cores than it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_trials import config

from jepa_cluster.errors import ExitCode, NodeFault
from jepa_cluster.launch.scheduler import retry_policy
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.training import attempt_log, devices, self_test
from jepa_cluster.training.attempt_record import close_record
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.watchdog import PhaseTimer
from jepa_cluster.trial.directory import Root

RANK_0 = DistEnv(0, 1, 0, 1, "launch")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("device", "granted"), [("cuda", None), ("cuda", ""), ("auto", "0,1")])
def test_a_granted_gpu_that_torch_does_not_see_is_a_fault_of_the_node(
    monkeypatch: pytest.MonkeyPatch, device: str, granted: str | None
) -> None:
    """It must not train on the CPU, nor fail the trial as a wrong setting."""
    if granted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
    with pytest.raises(NodeFault, match="no GPU here"):
        devices.choose_device(device, 0)


def test_without_a_granted_gpu_auto_means_the_cpu() -> None:
    assert devices.choose_device("auto", 0) == CPU


def test_a_device_that_computes_wrong_products_is_a_fault_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    self_test.check_device(CPU)
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.raises(NodeFault, match="wrong matrix product"):
        self_test.check_device(CPU)


def test_a_trial_on_a_broken_node_is_retried_and_the_node_is_recorded(tmp_path: Path) -> None:
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    trial = Root(tmp_path).trial_of(settings)
    trial.create(settings)
    trial.claim({"launch": "launch"})
    error = NodeFault("runtime.device=cuda, and torch sees no GPU here")
    code, cause, text = attempt_log.classify_exception(error, trial, 1, RANK_0)
    assert (code, cause) == (ExitCode.ERROR, "node")
    close_record(trial, 1, code, PhaseTimer(), 0, cause, text)
    assert trial.attempts()[-1]["node"]
    assert retry_policy.apply_retry(trial, RETRIES)
    assert not trial.failed.exists()


def test_threads_are_the_cores_that_a_rank_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.thread_count(cores=12, sharing=1) == 12
    assert devices.thread_count(cores=12, sharing=8) == 1
    assert devices.thread_count(cores=4, sharing=8) == 1
    assert devices.thread_count(cores=192, sharing=1) == devices.MOST_THREADS
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert devices.thread_count(cores=192, sharing=1) == 3


def test_slots_and_workers_are_counted_from_the_allowed_cores() -> None:
    """`os.cpu_count` also counts cores of other jobs on the node."""
    package = Path(devices.__file__).parents[1]
    users = [path for path in package.rglob("*.py") if "cpu_count" in path.read_text()]
    assert not users
