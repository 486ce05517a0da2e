"""What an asynchronous checkpoint costs the steps around it: one trial, timed by its own records.

    python benchmarks/checkpoint_stall.py <trial>

Reads the rows and commits of a trial that ran with `runtime.log_every=1`: the time of steps during
whose course a save began or ran, against all other steps of the same attempt, and the stall that
the record counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("trial", type=Path)
    trial = TrialDir(p.parse_args().trial.absolute())
    for record in trial.attempts():
        lines, _, _ = spool.read_lines(trial.metrics(record["attempt"]))
        rows = [line for line in lines if "step" in line and "event" not in line]
        commits = [line["t"] for line in lines if "commit" in line]
        quiet, busy = [], []
        for before, after in itertools.pairwise(rows):
            if after["step"] != before["step"] + 1 or before["step"] == 0:
                continue  # not one step, or the first, which carries the start
            meets = any(before["t"] <= t <= after["t"] for t in commits)
            (busy if meets else quiet).append(after["t"] - before["t"])
        if not quiet or not busy:
            continue
        stalled = record.get("seconds", {}).get("checkpoint", 0.0)
        size = (
            sum(f.stat().st_size for f in trial.checkpoint(trial.committed()[-1]).iterdir()) / 1e6
        )
        print(
            f"attempt {record['attempt']}: {len(commits)} checkpoints of {size:.1f} MB; "
            f"step {statistics.median(quiet):.0f} ms, "
            f"with a commit in it {statistics.median(busy):.0f} ms "
            f"(medians of {len(quiet)} and {len(busy)}); "
            f"training stood still {1000 * stalled / len(commits):.0f} ms a save, "
            f"the last one waited for included"
        )


if __name__ == "__main__":
    main()
