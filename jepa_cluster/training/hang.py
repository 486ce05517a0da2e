"""Record why a rank hangs, and end its process.

In: a trial and what the watchdog saw. Out: the attempt's record and torch's flight record on disk,
and an exit that lets the scheduler run the trial again.
"""

# pyright: standard

from __future__ import annotations

import contextlib
import json
import pickle
import threading
import time
from typing import Any

from jepa_cluster.errors import ExitCode
from jepa_cluster.training.attempt_log import close_record
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.preemption import JobHooks, exit_rank
from jepa_cluster.training.watchdog import OTHER_RANKS_SECONDS, PhaseTimer, print_stderr
from jepa_cluster.trial.directory import TrialDir


def on_hang(
    trial: TrialDir,
    attempt: int,
    env: DistEnv,
    timer: PhaseTimer,
    hooks: JobHooks,
    what: str,
) -> None:
    """Called by the watchdog when this rank makes no progress. Never returns.

    The filesystem may be what hangs. So a thread writes the record. If it does not end, this rank
    asks for another run of the job without the files of the trial.
    """
    may_run_again: list[bool] = []

    def record() -> None:
        write_flight_record(trial, attempt, env)
        close_record(trial, attempt, ExitCode.HANG, timer, None, "hang", what)
        with contextlib.suppress(OSError):
            may_run_again.append(not trial.is_stuck())

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    thread.join(5 * OTHER_RANKS_SECONDS)
    time.sleep(OTHER_RANKS_SECONDS)
    if all(may_run_again):
        hooks.requeue(not thread.is_alive())
    exit_rank(ExitCode.HANG)


def write_flight_record(trial: TrialDir, attempt: int, env: DistEnv) -> None:
    """Write rankR.flight.json; print the newest collectives that did not end."""
    with contextlib.suppress(Exception):
        entries = flight_record()
        path = trial.logs(attempt) / f"rank{env.rank}.flight.json"
        path.write_text(json.dumps(entries, indent=1, default=str))
        unfinished = [entry for entry in entries if not entry.get("retired")]
        for entry in unfinished[-5:]:
            name, sizes = entry["profiling_name"], entry["input_sizes"]
            print_stderr(f"watchdog: {name} of {sizes} began and did not end")


def flight_record() -> list[dict[str, Any]]:
    """Return this rank's last collectives from torch's flight recorder, oldest first.

    Those of gloo and of NCCL.
    """
    from torch._C import _distributed_c10d as c10d

    found: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        dump = getattr(c10d, name, None)
        found += pickle.loads(dump()).get("entries", []) if dump else []
    return sorted(found, key=lambda entry: entry["time_created_ns"])
