"""The batch script of a chained job, from that of the job before it."""

from jepa_cluster.launch.worker import chained_job

ARRAY_SCRIPT = """\
#!/bin/bash
#SBATCH --array=0-9%2
#SBATCH --dependency=afterok:3
#SBATCH --job-name=jepa.x.A.1
#SBATCH --kill-on-invalid-dep=no
#SBATCH --output=/r/jobs/%A_%a/%A_%a_0_log.out
#SBATCH --time=60
srun --output /r/%A_%a.out --cpus-per-task=2 "${block[@]}" \
/py -u -m jepa_cluster.launch.worker.main '/r/sweeps/x y/intents/jepa.x.A.1.json'
"""


def test_a_chained_job_runs_one_trial_if_the_job_before_it_fails():
    """It is no array and has no dependency of the array."""
    script = chained_job.script_text(ARRAY_SCRIPT, "jepa.x.A.2", "12_3")
    assert "--array" not in script
    assert "afterok" not in script
    assert "%A" not in script
    assert "#SBATCH --dependency=afternotok:12_3" in script
    assert "#SBATCH --time=60" in script
    assert script.count("kill-on-invalid-dep") == 1
    assert "#SBATCH --kill-on-invalid-dep=yes" in script
    assert script.rstrip().endswith("worker.main '/r/sweeps/x y/intents/jepa.x.A.2.json'")
    assert "--cpus-per-task=2" in script


def test_each_chained_job_replaces_dependency_and_excluded_nodes():
    first = chained_job.script_text(ARRAY_SCRIPT, "jepa.x.A.2", "12_3")
    second = chained_job.script_text(first, "jepa.x.A.3", "13", ["n1", "n2"])
    assert second.count("afternotok") == 1
    assert "afternotok:13" in second
    assert "#SBATCH --exclude=n1,n2" in second
    third = chained_job.script_text(second, "jepa.x.A.4", "14", ["n1", "n2", "n3"])
    assert third.count("--exclude") == 1
    assert "#SBATCH --exclude=n1,n2,n3" in third
