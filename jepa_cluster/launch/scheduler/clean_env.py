"""The environment a job is started from, without what an outer job or launcher left in it."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from jepa_cluster.training.dist_env import VARIABLES

PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_", "SUBMITIT_")
NAMES = (*VARIABLES, "GROUP_RANK", "MASTER_PORT")
KEPT = ("SLURM_CONF",)  # says where the cluster is


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without leaked Slurm settings (an inherited SLURM_CPU_BIND slows every job) and rendezvous variables."""
    return {k: v for k, v in environment.items() if k in KEPT or not (k in NAMES or k.startswith(PREFIXES))}


@contextmanager
def clean_own_environment() -> Generator[None]:
    """This process's environment scrubbed for a while: what `sbatch` then inherits."""
    before = dict(os.environ)
    for key in set(before) - set(clean_environment(before)):
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
