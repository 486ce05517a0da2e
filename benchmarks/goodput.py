"""Goodput: the share of wall time that moved a trial forward. Measured on a preempted trial, then extrapolated.

    python benchmarks/goodput.py measure <trial>     # from the records of a trial's attempts
    python benchmarks/goodput.py model               # given failure rates and checkpoint costs, 8 to 1 024 GPUs

The model, for an attempt interrupted gracefully every P seconds and by a failure every F seconds:

    goodput = 1 - stall/interval - (start + save)/P - (start + interval/2)/F

stall: seconds that training stands still for an asynchronous save; save: seconds of the one at a signal; start:
imports, joining, loading, the first batch; interval: between checkpoints. After a failure half an interval is redone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir

GPU_HOURS_PER_FAILURE = 50_000.0  # one unexpected interruption; Llama 3's 54 days on 16 384 GPUs (2407.21783, table 5)


def model(interval: float, stall: float, save: float, start: float, preempted: float, failing: float) -> float:
    """Share of the time that counts; all arguments in seconds, `preempted` and `failing` the time between two."""
    return 1 - stall / interval - (start + save) / preempted - (start + interval / 2) / failing


def measure(trial: TrialDir) -> None:
    attempts = trial.attempts()
    rows = spool.read(trial).rows
    if not attempts or not rows:
        raise SystemExit(f"{trial.path}: nothing was trained here")
    begun = attempts[0]["started"]
    ended = max([a.get("ended", 0) for a in attempts] + [rows[-1].t])
    parts: dict[str, float] = {}
    redone = 0
    for now, after in zip(attempts, [*attempts[1:], None], strict=True):
        for phase, seconds in now.get("seconds", {}).items():
            parts[phase] = parts.get(phase, 0.0) + seconds
        if after is not None and "start_step" in after:
            redone += max(0, now.get("end_step", 0) - after["start_step"])
    wall = (ended - begun) / 1000
    print(f"{trial.name}: {len(attempts)} attempts, {wall:.0f} s, {redone} steps trained twice")
    for phase, seconds in sorted(parts.items(), key=lambda p: -p[1]):
        print(f"  {phase:11s} {seconds:8.1f} s  {seconds / wall:6.1%}")
    print(f"  {'between':11s} {wall - sum(parts.values()):8.1f} s  {1 - sum(parts.values()) / wall:6.1%}")
    print(f"goodput {(parts.get('train', 0.0) + parts.get('probe', 0.0)) / wall:.3f} (training and probes)")


def table(stall: float, save: float, start: float) -> None:
    print(
        f"stall {stall} s, save at a signal {save} s, start {start} s; one failure in {GPU_HOURS_PER_FAILURE:.0f} GPU h"
    )
    print(
        "GPUs   failure every   best interval   not preempted   every 2 h   every 30 min   every 2 h, 10-min interval"
    )
    for gpus in (8, 32, 128, 512, 1024):
        failing = GPU_HOURS_PER_FAILURE * 3600 / gpus
        best = min(max(math.sqrt(2 * stall * failing), 30.0), 3600.0)  # Young's rule
        shares = [model(best, stall, save, start, p, failing) for p in (math.inf, 7200, 1800)]
        ten = model(600, stall, save, start, 7200, failing)
        print(
            f"{gpus:5d} {failing / 3600:10.0f} h {best:13.0f} s {shares[0]:14.4f} {shares[1]:13.4f} {shares[2]:13.4f} "
            f"{ten:13.4f}"
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest="verb", required=True)
    m = verbs.add_parser("measure", help="from the records of a trial")
    m.add_argument("trial", type=Path)
    t = verbs.add_parser("model", help="a table for 8 to 1 024 GPUs")
    t.add_argument("--stall", type=float, default=1.0, help="seconds that training stands still for a save (1)")
    t.add_argument("--save", type=float, default=10.0, help="seconds of the save at a signal (10)")
    t.add_argument("--start", type=float, default=60.0, help="seconds from the start to the first step (60)")
    a = p.parse_args()
    measure(TrialDir(a.trial.absolute())) if a.verb == "measure" else table(a.stall, a.save, a.start)


if __name__ == "__main__":
    main()
