"""Write the directories of the trials of a plan.

In: a plan, whose root is locked. Out: one directory per trial that starts or exists, on disk before
a scheduler gets the trial.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.scheduler import retry_policy
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.trial.files import fsync_folder, sync_filesystem

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

MANY = 16  # trials from which on several processes write them
WRITERS = 8  # processes; each waits for the disk


def write_trials(plan: Plan) -> None:
    """Write the directories of all trials, and make them durable. Raises the first error."""
    names = list(plan.trials)
    if len(names) < MANY:
        for name in names:
            _write_trial(plan, name)
    else:
        _write_in_processes(plan, names)
    if not plan.actions.start:
        return
    try:
        sync_filesystem(plan.root.trials)
    except OSError:  # perhaps of a file of another user
        for name in plan.actions.start:
            _sync_files(plan.root.trial(name).path)


def _sync_files(folder: Path) -> None:
    for path in filter(Path.is_file, folder.glob("*")):
        with path.open("rb") as f:
            os.fsync(f.fileno())
    fsync_folder(folder)


def _write_in_processes(plan: Plan, names: Sequence[str]) -> None:
    """Divide the trials among processes: threads of Python would wait for each other."""
    fork = multiprocessing.get_context("fork")
    errors: SimpleQueue[Exception] = fork.SimpleQueue()

    def write_part(part: Sequence[str]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its writers
        try:
            for name in part:
                _write_trial(plan, name)
        except Exception as e:
            errors.put(e)

    parts = [names[start::WRITERS] for start in range(WRITERS)]
    processes = [fork.Process(target=write_part, args=(part,), daemon=True) for part in parts]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:  # no writer outlives the lock of the root
        for process in filter(lambda process: process.is_alive(), processes):
            process.kill()
            process.join()
    if not errors.empty():
        raise errors.get()
    killed = [str(-process.exitcode) for process in processes if process.exitcode]
    if killed:
        what = f"a process that wrote trials was killed by signal {killed[0]}"
        raise LaunchError(what, where=str(plan.root.trials), hint="submit again")


def _write_trial(plan: Plan, name: str) -> None:
    directory = plan.root.trial(name)
    trial = plan.trials[name]
    point = {**trial.point, "seed": trial.seed}
    is_new = False
    if plan.actions.starts(name):
        directory.stop.unlink(missing_ok=True)
        if plan.resumed:
            retry_policy.forgive_failure(directory)
        config = retry_policy.halve_micro_batch(trial.config, directory.attempts())
        is_new = directory.create(config, {plan.sweep.name: point}, durable=False)
    if not is_new and directory.path.exists():
        directory.add_point(plan.sweep.name, point)
