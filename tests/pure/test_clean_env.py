"""The environment of a job, without what an outer job or launcher left in it."""

import os

import pytest

from jepa_cluster.launch.scheduler.clean_env import clean_environment, clean_own_environment


def test_variables_of_an_outer_job_and_of_a_rendezvous_are_removed():
    leaked = {
        "SLURM_CPU_BIND": "x",
        "SBATCH_QOS": "x",
        "RANK": "3",
        "MASTER_PORT": "1",
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "JEPA_ROOT": "/r"}
    assert clean_environment({**leaked, **kept}) == kept


def test_the_own_environment_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CPU_BIND", "leaked")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), clean_own_environment():
        assert "SLURM_CPU_BIND" not in os.environ
        assert os.environ["PATH"] == before["PATH"]
        raise ZeroDivisionError
    assert dict(os.environ) == before
