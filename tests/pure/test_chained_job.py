"""The job that follows where a job cannot requeue itself."""

from pathlib import Path

from jepa_cluster.launch.worker import chained_job


def test_a_chained_job_runs_the_same_script_for_one_trial():
    """No array and no old dependency; it starts only after this job ended without success."""
    script = (
        "#!/bin/bash\n#SBATCH --array=0-9%2\n#SBATCH --dependency=afterok:3\n#SBATCH --job-name=jepa.x.A.1\n"
        "#SBATCH --kill-on-invalid-dep=no\n"
        "#SBATCH --output=/r/jobs/%A_%a/%A_%a_0_log.out\n#SBATCH --time=60\nsrun --output /r/%A_%a.out "
        "env --block-signal=USR2,TERM /py -u -m submitit.core._submit /r/sweeps/x/jobs/%j\n"
    )
    made = chained_job.script_text(script, "jepa.x.A.2", "12_3", Path("/r/trials/a b"))
    assert "--array" not in made and "afterok" not in made and "%A" not in made
    assert "#SBATCH --dependency=afternotok:12_3" in made and "#SBATCH --time=60" in made
    assert made.rstrip().endswith("-u -m jepa_cluster.launch.worker.main '/r/trials/a b'")
    assert made.count("kill-on-invalid-dep") == 1 and "#SBATCH --kill-on-invalid-dep=yes" in made
    again = chained_job.script_text(made, "jepa.x.A.3", "13", Path("/r/trials/a b"), ["n1", "n2"])
    assert again.count("afternotok") == 1 and "afternotok:13" in again and "#SBATCH --exclude=n1,n2" in again
    third = chained_job.script_text(again, "jepa.x.A.4", "14", Path("/r/trials/a b"), ["n1", "n2", "n3"])
    assert third.count("--exclude") == 1 and "#SBATCH --exclude=n1,n2,n3" in third
