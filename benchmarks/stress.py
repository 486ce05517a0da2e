"""Claim: 300 trials under random faults end complete, and none is ever trained twice at once.

    python benchmarks/stress.py [--trials 300] [--faults 60]

A private Slurm (slurm/testcluster: four nodes, made and removed), the real command line, job arrays
and trial directories; the trainer is the stub of tests/slurm, 30 steps in three seconds, so what is
tried is everything around it. Faults come one to four seconds apart: USR2, TERM, scontrol requeue,
kill -9 of a rank or of its srun, a node's power cut, a restarted slurmctld; `jepa submit` is
repeated as from cron. Proof: every training holds an exclusive lock of its trial and reports a lock
already taken, and the merged metrics of each trial hold every step once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "slurm" / "testcluster"), str(REPOSITORY / "tests")]
from support.login_node import LoginNode  # noqa: E402
from support.stress import stress  # noqa: E402
from testcluster import Cluster  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--trials", type=int, default=300)
    p.add_argument("--faults", type=int, default=60, help="also the seed they are drawn from")
    a = p.parse_args()
    began, load = time.monotonic(), os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="jepa-stress-") as folder,
        Cluster(nodes=4, cpus=4, gpus=4) as cluster,
    ):
        found = stress(LoginNode(cluster, Path(folder), stub=True), a.trials, a.faults, seconds=0.1)
    minutes, extra = (time.monotonic() - began) / 60, ("trials", "attempts", "trainings")
    faults = ", ".join(f"{n} {what}" for what, n in sorted(found.items()) if what not in extra)
    print(
        "| trials | attempts | faults | complete "
        "| trained twice at once | steps lost or doubled | minutes | load |"
    )
    print("|---:|---:|---|---|---:|---:|---:|---:|")
    print(
        f"| {found['trials']} | {found['attempts']} | {faults} | all "
        f"| 0 | 0 | {minutes:.1f} | {load:.0f} |"
    )


if __name__ == "__main__":
    main()
