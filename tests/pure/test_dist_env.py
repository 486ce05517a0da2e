"""The place of a rank in its job, from the variables of the launcher or of Slurm."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.worker import slurm_rank
from jepa_cluster.training import dist_env

ELSEWHERE = "192.0.2.1"  # an address for documentation; nothing is sent to it
LAUNCHER = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "JEPA_LAUNCH": "one",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def has_route() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return s.connect_ex((ELSEWHERE, 9)) == 0


def test_a_rank_reads_the_variables_of_the_launcher() -> None:
    assert not slurm_rank.is_slurm_task(LAUNCHER)
    found = dist_env.from_environment(LAUNCHER)
    assert found.rank == 3
    assert found.world_size == 4
    assert found.local_rank == 1
    assert found.local_world_size == 2


def test_a_slurm_task_reads_the_variables_of_slurm() -> None:
    assert slurm_rank.is_slurm_task(SLURM)
    found = slurm_rank.from_slurm(SLURM)
    assert found.rank == 2
    assert found.world_size == 5
    assert found.local_rank == 0
    assert found.local_world_size == 2


def test_a_process_without_variables_is_the_only_rank() -> None:
    assert not slurm_rank.is_slurm_task({})
    found = dist_env.from_environment({})
    assert found.rank == 0
    assert found.world_size == 1
    assert found.local_rank == 0
    assert found.local_world_size == 1


def test_a_rank_of_a_local_launcher_inside_a_slurm_job_is_no_slurm_task() -> None:
    """It reads the launcher's variables and does not ask Slurm for a requeue."""
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    env = dist_env.local_environment(1, 2, "here") | job
    assert not slurm_rank.is_slurm_task(env)
    assert dist_env.from_environment(env).world_size == 2


def test_training_names_no_program_or_variable_of_slurm() -> None:
    """Training gets what it needs from the scheduler as arguments."""
    folder = Path(dist_env.__file__).parent
    slurm = re.compile(r"\b(SLURM\w*|squeue|scontrol|sbatch|scancel|sacct|srun)\b")
    for path in folder.glob("*.py"):
        assert not slurm.findall(path.read_text()), path.name


def test_an_impossible_rank_is_refused_with_the_variables() -> None:
    with pytest.raises(LaunchError, match="rank 2 of 2") as e:
        dist_env.from_environment({"RANK": "2", "WORLD_SIZE": "2", "JEPA_LAUNCH": "one"})
    assert "RANK=2" in e.value.where


def test_ranks_of_torchrun_are_refused_at_once() -> None:
    """Each of them would open an attempt, or wait ten minutes for one."""
    torchrun = {**LAUNCHER, "TORCHELASTIC_RUN_ID": "none"}
    del torchrun["JEPA_LAUNCH"]
    with pytest.raises(LaunchError, match="4 ranks were started by a launcher") as e:
        dist_env.from_environment(torchrun)
    assert "not torchrun" in e.value.hint
    with pytest.raises(LaunchError, match="was started by torchrun, not by srun"):
        slurm_rank.from_slurm(torchrun | SLURM)


def test_a_batch_script_without_srun_is_refused_at_once() -> None:
    """`sbatch -n2 --wrap python`: one process, which would wait for the second one."""
    batch = {**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    del batch["SLURM_STEP_ID"]
    with pytest.raises(LaunchError, match="was started by sbatch, not by srun") as e:
        slurm_rank.from_slurm(batch)
    assert "srun" in e.value.hint
    assert slurm_rank.from_slurm({**batch, "SLURM_NTASKS": "1"}).world_size == 1


def test_the_interface_is_that_of_the_route_to_rank_0() -> None:
    """A host name may resolve to loopback or to a management network; the route does not."""
    assert dist_env.interface_to("127.0.0.1") == "lo"
    assert dist_env.interface_to("no such host") == ""


@pytest.mark.skipif(not has_route(), reason="this machine has no route to others")
def test_the_interface_of_this_machine_s_own_address_is_that_of_the_route() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((ELSEWHERE, 9))
        own = s.getsockname()[0]
    names = {name for _, name in socket.if_nameindex()} - {"lo"}
    assert dist_env.interface_to(ELSEWHERE) in names
    assert dist_env.interface_to(own) == dist_env.interface_to(ELSEWHERE)
