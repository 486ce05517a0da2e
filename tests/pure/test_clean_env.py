"""The environment of a job, without what an outer job or launcher left in it."""

from jepa_cluster.launch.scheduler.clean_env import clean_environment


def test_variables_of_an_outer_job_and_of_a_rendezvous_are_removed():
    leaked = {
        "SLURM_CPU_BIND": "x",
        "SBATCH_QOS": "x",
        "RANK": "3",
        "MASTER_PORT": "1",
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "JEPA_ROOT": "/r"}
    assert clean_environment({**leaked, **kept}) == kept
