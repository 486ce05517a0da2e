"""A rank with faults that the machine cannot be made to produce.

In: the environment of a rank. FAULTS: a JSON list of the fields of `Fault`; without it the rank is
an ordinary one.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FAULTS = "JEPA_TEST_FAULTS"
FOREVER = 1_000_000
LONGEST_BLOCK = 600.0  # seconds; then the rank continues, as no test will end it


@dataclass
class Fault:
    """What happens to one rank at one place.

    place: a method of checkpoint_files.Disk, an entry of `install`, or "chunk": each piece of a
    file that is written. marker: a file that the fault creates when it strikes; `<marker>.go` ends
    a blocked one. action: "block", "sleep" (for `seconds`), "EIO", "oom" (of the GPU), "collapse"
    (of the features in a probe) or the name of a signal to this rank. after: strike when the call
    has returned. match: a part of the path that the call is about. skip: matching calls before the
    first strike. times: of strikes.
    """

    place: str
    rank: int
    action: str
    marker: str
    match: str = ""
    after: bool = False
    seconds: float = 0.0
    times: int = FOREVER
    skip: int = 0

    def strike(self) -> None:
        Path(self.marker).touch()
        if self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.match)
        elif self.action == "oom":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        elif self.action == "block":
            self.block()
        else:
            os.kill(os.getpid(), signal.Signals[self.action])

    def block(self) -> None:
        """Wait for `<marker>.go`."""
        end = time.monotonic() + LONGEST_BLOCK
        while not Path(f"{self.marker}.go").exists() and time.monotonic() < end:
            time.sleep(0.02)

    def due(self, arguments: Iterable[Any]) -> bool:
        """Whether it strikes at a call with these arguments; counts the calls that it is about."""
        paths = [str(path) for path in arguments if isinstance(path, (Path, str))]
        if self.match and not any(self.match in path for path in paths):
            return False
        self.skip -= 1
        self.times -= self.skip < 0
        return self.skip < 0 <= self.times


def dump(faults: Iterable[Fault]) -> str:
    """The value of FAULTS."""
    return json.dumps([asdict(fault) for fault in faults])


def wrap(owner: Any, name: str, fault: Fault) -> None:
    """Make a method or function strike."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def faulty(*arguments: Any, **named: Any) -> Any:
        due = fault.due(arguments)
        if due and not fault.after and fault.action != "collapse":
            fault.strike()
        result = original(*arguments, **named)
        if due and fault.action == "collapse":
            return {**result, "probe/rankme": 1.0}
        if due and fault.after:
            fault.strike()
        return result

    setattr(owner, name, faulty)


def wrap_chunks(disk: Any, fault: Fault) -> None:
    """Make the writing of a file strike before each of its pieces."""
    original = disk.write_file

    def pieces(path: Path, chunks: Iterable[Any]) -> Iterable[Any]:
        for chunk in chunks:
            if fault.due([path]):
                fault.strike()
            yield chunk

    def write_file(
        self: Any, path: Path, chunks: Iterable[Any], on_progress: Callable[[], None]
    ) -> tuple[int, int]:
        return original(self, path, pieces(path, chunks), on_progress)

    disk.write_file = write_file


def install(faults: list[Fault]) -> None:
    """Put each fault in its place."""
    import torch

    from jepa_cluster.data.reader import Reader
    from jepa_cluster.training import (
        attempt_log,
        checkpoint,
        checkpoint_files,
        checkpoint_policy,
        distributed,
        probe,
        sharded_adamw,
    )

    owners = {
        "mark_done": attempt_log.AttemptLog,
        "init": distributed,
        "build_model": distributed,
        "set_lr_and_decay": sharded_adamw,
        "final_barrier": distributed,
        "start": checkpoint_policy.CheckpointPolicy,
        "measure": probe,
        "load": checkpoint,
        "rows_into": checkpoint.ShardFile,
        "matmul": torch,
        "check": Reader,
    }
    for fault in faults:
        if fault.place == "chunk":
            wrap_chunks(checkpoint_files.Disk, fault)
        else:
            wrap(owners.get(fault.place, checkpoint_files.Disk), fault.place, fault)


def main() -> None:
    """Run an attempt at a trial, as a launcher would, with the faults of this rank."""
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    faults = [Fault(**fields) for fields in json.loads(os.environ.get(FAULTS, "[]"))]
    mine = [fault for fault in faults if fault.rank == rank]
    if mine:
        install(mine)
    from jepa_cluster.launch.worker import main as worker

    worker.main()
