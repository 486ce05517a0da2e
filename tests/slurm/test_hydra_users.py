"""Hydra's own command line on a real Slurm: the launcher plugin as its users know it, our trial directories beneath."""

import subprocess
import sys
from pathlib import Path

from desk import TINY, Desk, causes, every_step_once, orders
from testcluster import Cluster

LAUNCHER = ("-m", "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=10")


def test_a_multirun_trains_into_trial_directories_resumes_after_a_requeue_and_fails_as_a_job(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Three seeds: one undisturbed, one sent back by USR2, one with a bug; the launcher waits for them all."""
    desk = Desk(cluster, tmp_path, stub=True)
    orders(desk, hold=2, **{"2": "error"})
    words = [sys.executable, "-m", "jepa_cluster", *LAUNCHER, *TINY, "seed=0,1,2", "runtime.compile=false"]
    environment = {**cluster.env, **desk.environment()}
    person = subprocess.Popen(words, cwd=desk.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    desk.wait(lambda: len(list(desk.root.trials.glob("*-s*/attempts/*.json"))) >= 3, "three trials have begun")
    found = {
        int(p.name.rsplit("-s", 1)[1].split("-")[0]): desk.root.trial(p.name) for p in desk.root.trials.glob("*-s*")
    }
    desk.wait_step(found[1], 2)
    jobs = [line.split() for line in cluster.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()]
    (second,) = [job for job, _ in jobs if job.endswith("_1")]
    cluster.run("scancel", "-s", "USR2", second)
    desk.release()
    desk.wait_done([found[0], found[1]])
    desk.wait(lambda: person.poll() is not None, "the launcher has seen all jobs end")
    out = person.communicate()[0].decode()
    assert causes(found[1]) == ["preempted", "done"] and every_step_once(found[1]), desk.evidence()
    assert causes(found[2]) == ["error"] and found[2].failed.exists()
    assert person.returncode != 0, out  # one of its jobs failed, and Hydra says so
    assert any(state == "FAILED" for state in cluster.jobs().values()), cluster.jobs()
