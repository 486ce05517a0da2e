"""Rank, world size and launch of a process that srun started.

In: the environment of a task of a Slurm job. Out: its `DistEnv`. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from jepa_cluster.errors import LaunchError
from jepa_cluster.training.dist_env import DistEnv


def is_slurm_task(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process.

    A local launcher inside a Slurm job sets JEPA_LAUNCH.
    """
    return "SLURM_PROCID" in env and "JEPA_LAUNCH" not in env


def launch_of(env: Mapping[str, str]) -> str:
    """Return the value of `DistEnv.launch`: one per start of a job."""
    return f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_RESTART_COUNT', '0')}"


def from_slurm(env: Mapping[str, str]) -> DistEnv:
    """Return the rank of this task. Raises LaunchError, also for a process that is no task."""
    job = env.get("SLURM_JOB_ID", "0")
    tasks = env.get("SLURM_NTASKS", "1")
    by_torchrun = "TORCHELASTIC_RUN_ID" in env
    if by_torchrun or (tasks != "1" and "SLURM_STEP_ID" not in env):
        launcher = "torchrun" if by_torchrun else "sbatch"
        raise LaunchError(
            f"a rank of a job of {tasks} tasks was started by {launcher}, not by srun",
            where=f"job {job}",
            hint="use `jepa submit`, or put srun before the command",
        )
    try:
        node = int(env.get("SLURM_NODEID", "0"))
        tasks_here = env.get("SLURM_NTASKS_PER_NODE") or _tasks_on_node(env, node)
        return DistEnv(
            rank=int(env["SLURM_PROCID"]),
            world_size=int(tasks),
            local_rank=int(env.get("SLURM_LOCALID", "0")),
            local_world_size=int(tasks_here),
            launch=launch_of(env),
            host=env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1",
            node=node,
        )
    except ValueError as e:
        raise LaunchError(f"a variable of Slurm is not a number: {e}", where=f"job {job}") from e


def _tasks_on_node(env: Mapping[str, str], node: int) -> int:
    """Return the number of tasks on a node, from '2' or '2(x3),1', which lists them by node."""
    counts: list[int] = []
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    for part in listed.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[node] if node < len(counts) else counts[0]
