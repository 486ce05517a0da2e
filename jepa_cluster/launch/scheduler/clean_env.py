"""The environment that a job starts from, without the variables of an outer job or launcher."""

from __future__ import annotations

from collections.abc import Mapping

from jepa_cluster.training.dist_env import VARIABLES

PREFIXES = (
    "SLURM_",
    "SBATCH_",
    "SRUN_",
    "SQUEUE_",
    "SACCT_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "TORCHELASTIC_",
    "SUBMITIT_",
)
NAMES = (*VARIABLES, "GROUP_RANK", "MASTER_PORT")
KEPT = ("SLURM_CONF",)  # the address of the cluster


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy without the variables of an outer Slurm job and of a rendezvous.

    An inherited SLURM_CPU_BIND, for example, slows every job.
    """
    clean: dict[str, str] = {}
    for name, value in environment.items():
        inherited = name in NAMES or name.startswith(PREFIXES)
        if name in KEPT or not inherited:
            clean[name] = value
    return clean
