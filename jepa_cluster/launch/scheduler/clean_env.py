"""The environment that a job starts from, without the variables of an outer job or launcher."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

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


@contextmanager
def clean_own_environment() -> Generator[None]:
    """Clean this process's environment, which `sbatch` inherits, until the block ends."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(clean_environment(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
