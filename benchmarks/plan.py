"""Claim: plan a thousand trials in 2 s, submit them in 10 s, read their status in 1 s by one query.

    python benchmarks/plan.py                     # --trials 10000: a multiple of 200

Whole commands, a new process each, median of 3; Slurm's part on a private cluster
(slurm/testcluster) where every job is held, so that nothing but the queue is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "slurm" / "testcluster"))
from testcluster import Cluster, missing  # noqa: E402

SWEEP = """
question: How fast is a plan of a thousand?
base: [data=synthetic, optim.batch=32, optim.epochs=2, optim.warmup_epochs=0.2, model.image=96]
grid:
  model: [vit_ti, vit_s, vit_b, vit_l]
  mask.target_scale: [[.05, .1], [.06, .11], [.07, .12], [.08, .13], [.09, .14], [.1, .15],
                      [.11, .16], [.12, .17], [.13, .18], [.14, .19]]
  optim.lr: [1e-3, 5e-4, 2e-4, 1e-4, 5e-5]
seeds: {seeds}
resources: [{when: "model == 'vit_l'", time: 2h}, {time: 1h}]
"""
PROFILE = "kind: slurm\nprocs_per_node: 1\ntime: 1h\npeak_tflops: 1\nsbatch: {hold: true}\n"
COUNTER = '#!/bin/sh\necho "$0" >> "$COUNT"\nexec "$REAL" "$@"\n'


def jepa(folder: Path, *words: str, times: int = 1) -> str:
    """Median wall seconds of a command, as a whole process, and the CPU seconds it took: the rest
    is waiting.
    """
    taken: list[tuple[float, float]] = []
    for _ in range(times):
        began, before = time.perf_counter(), cpu()
        subprocess.run(
            [sys.executable, "-m", "jepa_cluster", *words],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        taken.append((time.perf_counter() - began, cpu() - before))
    wall, busy = (statistics.median(t) for t in zip(*taken, strict=True))
    return f"{wall:.2f} s | {busy:.2f} s"


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare(folder: Path, trials: int) -> None:
    facts = {
        "version": 1,
        "digest": "0" * 16,
        "images": 6400,
        "shards": [],
        "labels": ["class"],
        "classes": [],
    }
    for split in ("train", "val"):
        (folder / "data" / split).mkdir(parents=True)
        text = json.dumps({**facts, "report": {}})
        (folder / "data" / split / "manifest.json").write_text(text)
    sweep = SWEEP.replace("{seeds}", str(list(range(trials // 200))))
    (folder / "thousand.yaml").write_text(sweep)
    (folder / "held.yaml").write_text(PROFILE)
    os.environ |= {"JEPA_ROOT": str(folder / "root"), "JEPA_DATA": str(folder / "data")}


def count_squeue(folder: Path) -> Path:
    """From now on, calls of squeue leave a line in the file that is returned."""
    shim, count = folder / "bin" / "squeue", folder / "count"
    shim.parent.mkdir()
    shim.write_text(COUNTER)
    shim.chmod(0o755)
    os.environ |= {
        "REAL": str(shutil.which("squeue")),
        "COUNT": str(count),
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
    }
    return count


def inodes(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory(prefix="jepa-plan-") as name:
        folder = Path(name)
        prepare(folder, trials)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"| command, {trials} trials | wall | CPU |\n|---|---:|---:|")
        print("| `jepa --help` |", jepa(folder, "--help", times=3), "|")
        print("| `jepa plan` |", jepa(folder, "plan", "thousand.yaml", times=3), "|", flush=True)
        if missing():
            print(f"(Slurm's part left out: {missing()})")
            return
        with Cluster(nodes=2) as cluster:
            os.environ |= {k: v for k, v in cluster.env.items() if k in ("SLURM_CONF", "PATH")}
            words = ("submit", "thousand.yaml", "--cluster", "held.yaml", "--yes")
            arrays = 2 * -(-trials // 2002)
            print(f"| `jepa submit` ({arrays} arrays) |", jepa(folder, *words), "|", flush=True)
            count = inodes(folder / "root" / "trials") + inodes(folder / "root" / "sweeps")
            print(f"inodes per trial that has not started: {count / trials:.3g}", file=sys.stderr)
            queued = cluster.run("squeue", "-h", "-r").count("\n")
            calls = count_squeue(folder)
            taken = jepa(folder, "status", "thousand", times=3)
            print(
                f"| `jepa status` ({queued} in Slurm, "
                f"{calls.read_text().count('squeue') / 3:g} squeue) |",
                taken,
                "|",
            )
            print("| `jepa submit` again (nothing to do) |", jepa(folder, *words), "|")
            cancel = ("cancel", "thousand", "--yes")
            print("| `jepa cancel` |", jepa(folder, *cancel), "|")


if __name__ == "__main__":
    main()
