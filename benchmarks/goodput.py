"""Goodput: the share of wall time that moved a trial forward.

Measured on a preempted trial, then extrapolated.

    python benchmarks/goodput.py preempt <trial>
        run it here, TERM every minute, then measure and extrapolate
    python benchmarks/goodput.py measure <trial>
        from the records of a trial's attempts
    python benchmarks/goodput.py model
        given failure rates and checkpoint costs, 8 to 1 024 GPUs

The model, for an attempt interrupted gracefully every P seconds and by a failure every F seconds:

    goodput = 1 - stall/interval - (start + save)/P - (start + interval/2)/F

stall: seconds that an asynchronous save stops the training; save: seconds of the one at a signal;
start: imports, joining, loading, the first batch; interval: between checkpoints. After a failure
half an interval is redone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from jepa_cluster.launch.ops.single_trial import environments
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir

GPU_HOURS_PER_FAILURE = (
    50_000.0  # one unexpected interruption; Llama 3's 54 days on 16 384 GPUs (2407.21783, table 5)
)


def model(
    interval: float, stall: float, save: float, start: float, preempted: float, failing: float
) -> float:
    """Share of the time that counts; all arguments in seconds, `preempted` and `failing` the time
    between two.
    """
    return 1 - stall / interval - (start + save) / preempted - (start + interval / 2) / failing


class Inputs(NamedTuple):
    """What the model wants to know, in seconds."""

    stall: float
    save: float
    start: float


def preempt(trial: TrialDir, every: float, total: float) -> None:
    """Cold processes, as on a node; TERM `every` seconds after each start, until the trial is done
    or time is up.
    """
    world = trial.read_config().runtime.procs_per_node
    end = time.monotonic() + total
    while not trial.done.exists() and time.monotonic() < end:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "jepa_cluster.launch.worker.main", str(trial.path)], env=e
            )
            for e in environments(world)
        ]
        leave = min(time.monotonic() + every, end)
        while time.monotonic() < leave and all(r.poll() is None for r in ranks):
            time.sleep(0.2)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        print(
            f"attempt {trial.newest_attempt()}: exit codes {[r.wait() for r in ranks]}", flush=True
        )


def inputs(trial: TrialDir) -> Inputs:
    """Medians over a trial's attempts: a save's stall, the save at a signal, the time to the first
    step.
    """
    stalls, saves, starts = [0.0], [0.0], [0.0]
    for record in trial.attempts():
        lines, _, _ = spool.read_lines(trial.metrics(record["attempt"]))
        rows = [line["t"] for line in lines if "step" in line and "event" not in line]
        commits = sum("commit" in line for line in lines)
        seconds = record.get("seconds", {})
        starts.append(seconds.get("init", 0.0) + seconds.get("compile", 0.0))
        if record.get("cause") == "preempted" and rows:
            saves.append((record["ended"] - rows[-1]) / 1000)
        elif commits:
            stalls.append(seconds.get("checkpoint", 0.0) / commits)
    return Inputs(*(round(statistics.median(v[1:] or v), 3) for v in (stalls, saves, starts)))


def measure(trial: TrialDir) -> None:
    attempts = trial.attempts()
    rows = spool.read(trial).rows
    if not attempts or not rows:
        raise SystemExit(f"{trial.path}: nothing was trained here")
    begun = attempts[0]["started"]
    ended = max([a.get("ended", 0) for a in attempts] + [rows[-1].t])
    parts: dict[str, float] = {}
    redone = sum(a.get("lost_steps", 0) for a in attempts)
    for phase, seconds in itertools.chain.from_iterable(
        a.get("seconds", {}).items() for a in attempts
    ):
        parts[phase] = parts.get(phase, 0.0) + seconds
    wall = (ended - begun) / 1000
    print(f"{trial.name}: {len(attempts)} attempts, {wall:.0f} s, {redone} steps trained twice")
    for phase, seconds in sorted(parts.items(), key=lambda p: -p[1]):
        print(f"  {phase:11s} {seconds:8.1f} s  {seconds / wall:6.1%}")
    print(
        f"  {'between':11s} {wall - sum(parts.values()):8.1f} s  "
        f"{1 - sum(parts.values()) / wall:6.1%}"
    )
    found = inputs(trial)
    print(
        f"a save stalls {found.stall} s, the one at a signal takes {found.save} s, "
        f"a start {found.start} s (medians)"
    )
    print(
        f"goodput {(parts.get('train', 0.0) + parts.get('probe', 0.0)) / wall:.3f} "
        f"(training and probes)"
    )


def table(stall: float, save: float, start: float) -> None:
    print(
        f"stall {stall} s, save at a signal {save} s, start {start} s; "
        f"one failure in {GPU_HOURS_PER_FAILURE:.0f} GPU h"
    )
    print(
        "GPUs   failure every   best interval   not preempted   "
        "every 2 h   every 30 min   every 2 h, 10-min interval"
    )
    for gpus in (8, 32, 128, 512, 1024):
        failing = GPU_HOURS_PER_FAILURE * 3600 / gpus
        best = min(max(math.sqrt(2 * stall * failing), 30.0), 3600.0)  # Young's rule
        shares = [model(best, stall, save, start, p, failing) for p in (math.inf, 7200, 1800)]
        ten = model(600, stall, save, start, 7200, failing)
        print(
            f"{gpus:5d} {failing / 3600:10.0f} h {best:13.0f} s {shares[0]:14.4f} "
            f"{shares[1]:13.4f} {shares[2]:13.4f} {ten:13.4f}"
        )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = p.add_subparsers(dest="verb", required=True)
    m = verbs.add_parser("measure", help="from the records of a trial")
    m.add_argument("trial", type=Path)
    t = verbs.add_parser("model", help="a table for 8 to 1 024 GPUs")
    t.add_argument(
        "--stall", type=float, default=1.0, help="seconds that a save stops the training (1)"
    )
    t.add_argument("--save", type=float, default=10.0, help="seconds of the save at a signal (10)")
    t.add_argument(
        "--start", type=float, default=60.0, help="seconds from the start to the first step (60)"
    )
    r = verbs.add_parser("preempt", help="run a trial here and send it TERM again and again")
    r.add_argument(
        "trial",
        type=Path,
        help="made, but not done: `jepa train ... runtime.stop_after=1` makes one",
    )
    r.add_argument("--every", type=float, default=60.0, help="seconds from a start to TERM (60)")
    r.add_argument("--total", type=float, default=360.0, help="seconds in all (360)")
    a = p.parse_args()
    if a.verb == "model":
        table(a.stall, a.save, a.start)
        return
    trial = TrialDir(a.trial.absolute())
    if a.verb == "preempt":
        preempt(trial, a.every, a.total)
    measure(trial)
    if a.verb == "preempt":
        table(*inputs(trial))


if __name__ == "__main__":
    main()
