"""The queue without Slurm: files over the GPUs or CPU cores of this machine.

    <root>/local/queue/<order>-<trial>.json     waiting, in the order of their names; those that
                                                begin with 2 are held until a canary has succeeded
    <root>/local/running/<trial>.json           running, with the ids of its processes
    <root>/local/{lock,runner.log,logs/}

A detached process, local_runner.py, starts the trials as the user who made the queue. Other users
of the root can read the queue, and cannot add to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, cast

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.scheduler.clean_env import clean_environment
from jepa_cluster.records import QueueEntry
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import owner, read_json, write_json
from jepa_cluster.trial.spool import now_ms

TICK = 0.1  # s between two polls of the queue and the processes
START_TIMEOUT = 60.0  # s that a signal waits for the ranks of a trial that is being started


class QueuedTrial(NamedTuple):
    """The state of a trial in the local queue. canary: name of the canary that holds it, or ''."""

    state: Literal["", "queued", "running"]
    canary: str = ""


def enqueue(root: Root, entries: Iterable[QueueEntry], slots: int) -> None:
    """Append trials to the queue and start a runner."""
    create_folders(root)
    write_json(root.local / "machine.json", {"slots": slots})
    now = now_ms()
    try:
        for number, entry in enumerate(entries):
            order = 2 if entry.get("after") else 1
            name = f"{order}-{now:015d}-{number:05d}-{entry['trial']}.json"
            write_json(queue_folder(root) / name, entry)
    finally:  # also for the entries before Ctrl-C or a full disk
        start_runner(root)


def start_if_waiting(root: Root) -> None:
    """Start a runner if trials wait in this user's queue: the last one may have been killed."""
    if waiting_entries(root) and os.access(root.local, os.W_OK):
        start_runner(root)


def list_trials(root: Root) -> dict[str, QueuedTrial]:
    """Return the trials in the queue and those that run."""
    found: dict[str, QueuedTrial] = {}
    for path in waiting_entries(root):
        found[_trial_of(path)] = QueuedTrial("queued")
    for path in held_entries(root):
        found[_trial_of(path)] = QueuedTrial("queued", _canary_of(path))
    for path in running_folder(root).glob("*.json"):
        found[path.stem] = QueuedTrial("running")
    return found


def waiting_entries(root: Root) -> list[Path]:
    """Return the queue entries that may start, the next one first."""
    return sorted(queue_folder(root).glob("[01]-*.json"))


def held_entries(root: Root) -> list[Path]:
    """Return the queue entries that wait for a canary."""
    return sorted(queue_folder(root).glob("2-*.json"))


def release_held(root: Root) -> None:
    """Let the entries start whose canary has succeeded."""
    for path in held_entries(root):
        if root.trial(_canary_of(path)).succeeded():
            with contextlib.suppress(FileNotFoundError):  # dequeued meanwhile
                path.rename(path.with_name(f"1{path.name[1:]}"))


def dequeue(root: Root, trials: Iterable[str]) -> list[str]:
    """Remove trials from the queue and return those that were in it.

    The runner takes an entry by renaming it, so a rename decides which of the two has it. Entries
    of another user's queue stay; its runner drops an entry whose trial has a STOP file.
    """
    names = set(trials)
    removed: list[str] = []
    for path in [*waiting_entries(root), *held_entries(root)]:
        if _trial_of(path) in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.rename(path.with_suffix(".gone")).unlink()
                removed.append(_trial_of(path))
    return removed


def signal_trials(root: Root, trials: Iterable[str], number: signal.Signals) -> list[str]:
    """Signal all ranks of running trials, and return the trials that had a rank alive.

    Raises LaunchError for processes of another user.
    """
    reached: list[str] = []
    for name in trials:
        alive = [pid for pid, started in _rank_pids(root, name) if is_alive(pid, started)]
        for pid in alive:
            _send(pid, number, name)
        if alive:
            reached.append(name)
    return reached


def _send(pid: int, number: signal.Signals, trial: str) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as e:
        raise LaunchError(
            f"the processes of {trial} belong to {owner(Path(f'/proc/{pid}'))}",
            hint="jepa cancel without --now stops it: its rank 0 reads the STOP file",
        ) from e


def _rank_pids(root: Root, trial: str) -> list[tuple[int, int]]:
    """Return process id and start time of each rank, once the runner has started all of them."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        entry = read_entry(running_folder(root) / f"{trial}.json")
        if entry is None:
            return []
        pids = entry.get("pids", [])
        if len(pids) >= entry["world"] or time.monotonic() > deadline:
            return pids
        time.sleep(TICK)


def start_runner(root: Root) -> None:
    """Start a detached runner. It exits at once when another one runs."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    with (root.local / "runner.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "jepa_cluster.launch.scheduler.local_runner", str(root.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root.local,
            env={**clean_environment(os.environ), "PYTHONPATH": path},
            start_new_session=True,
        )


def start_time(pid: int) -> int:
    """Return the start time of a process, which makes its id unique; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    return started != 0 and start_time(pid) == started


def read_entry(path: Path) -> QueueEntry | None:
    return cast("QueueEntry | None", read_json(path))


def _trial_of(path: Path) -> str:
    return path.stem.split("-", 3)[3]


def _canary_of(path: Path) -> str:
    return (read_json(path) or {}).get("after", "")


def queue_folder(root: Root) -> Path:
    return root.local / "queue"


def running_folder(root: Root) -> Path:
    return root.local / "running"


def create_folders(root: Root) -> None:
    root.local.mkdir(0o755, parents=True, exist_ok=True)
    for folder in (queue_folder(root), running_folder(root), root.local / "logs"):
        folder.mkdir(0o755, exist_ok=True)
