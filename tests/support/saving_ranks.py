"""The ranks of one attempt on a real folder, in virtual time, with faults at calls of the disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from support.simulated_disk import content, folder_fault
from support.simulated_ranks import (
    Clock,
    Faults,
    Process,
    Scheduler,
    SimulatedStore,
    WatchedChannel,
    os_error,
)

from jepa_cluster.training.checkpoint_files import Disk, Manifest
from jepa_cluster.training.save_protocol import CheckpointSearch, SaveProtocol, SaveResult

PATIENCE = 5.0  # virtual seconds


class FaultyDisk(Disk):
    """A real filesystem with faults.

    before, after: method name -> function called once with the arguments of the method.
    calls: (method name, name of its first path).
    """

    def __init__(self) -> None:
        self.before: dict[str, Callable[..., None]] = {}
        self.after: dict[str, Callable[..., None]] = {}
        self.calls: list[tuple[str, str]] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        self.calls.append((name, arguments[0].name))
        self.before.pop(name, lambda *_: None)(*arguments)
        result = getattr(Disk, name)(self, *arguments)
        self.after.pop(name, lambda *_: None)(*arguments)
        return result

    def make_folder(self, path: Path) -> None:
        self._call("make_folder", path)

    def write_file(
        self,
        path: Path,
        chunks: Iterable[Any],
        on_progress: Callable[[], None],
    ) -> tuple[int, int]:
        return self._call("write_file", path, chunks, on_progress)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", source, target)

    def sync_folder(self, path: Path) -> None:
        self._call("sync_folder", path)

    def remove(self, folder: Path) -> None:
        self._call("remove", folder)

    def pause(self, seconds: float) -> None:
        pass


def search(protocol: SaveProtocol, candidates: Callable[[], list[int]]) -> CheckpointSearch:
    """Return a search that accepts every manifest."""
    return CheckpointSearch(protocol, protocol.channel, candidates, lambda manifest: "")


class Ranks:
    """The ranks of one attempt on a real folder, in virtual time."""

    def __init__(self, folder: Path, world: int, attempt: int = 1) -> None:
        self.folder = folder
        self.world = world
        self.attempt = attempt
        self.scheduler = Scheduler(0)
        self.store = SimulatedStore(Faults(self.scheduler, PATIENCE))
        self.newest_attempt = attempt
        self.progress_at: dict[str, float] = {}
        self.disks = [FaultyDisk() for _ in range(world)]
        self.protocols = [self.protocol(rank) for rank in range(world)]

    def protocol(self, rank: int) -> SaveProtocol:
        store = self.store.of(Process(f"rank {rank}"), rank)
        clock = Clock(self.scheduler)
        channel = WatchedChannel(store, rank, self.world, self.attempt, PATIENCE, clock)
        channel.progress_at = self.progress_at
        superseded = lambda: self.newest_attempt > self.attempt  # noqa: E731
        disk = self.disks[rank]
        protocol = SaveProtocol(self.folder, self.attempt, self.world, channel, disk, superseded)
        protocol.steps_to_keep = lambda steps: set(steps[-2:])
        return protocol

    def together(self, *functions: Callable[[], Any]) -> list[Any]:
        """Call each function in a task of its own; return their results or exceptions."""
        results: list[Any] = [None] * len(functions)

        def keep(index: int) -> None:
            try:
                results[index] = functions[index]()
            except Exception as e:
                results[index] = e

        for index in range(len(functions)):
            name = f"{index}"
            self.scheduler.spawn(Process(name), name, functools.partial(keep, index))
        self.scheduler.run()
        assert not self.scheduler.violations
        return results

    def each(
        self,
        function: Callable[[SaveProtocol], Any],
        ranks: Sequence[int] | None = None,
    ) -> list[Any]:
        """Call the function on all ranks, or on these, side by side."""
        chosen = range(self.world) if ranks is None else ranks
        calls = [functools.partial(function, self.protocols[rank]) for rank in chosen]
        return self.together(*calls)

    def save(self, number: int, step: int) -> SaveResult:
        """Save on all ranks and return the result on rank 0."""
        return self.each(lambda protocol: self.save_part(protocol, number, step))[0]

    def save_part(self, protocol: SaveProtocol, number: int, step: int) -> SaveResult:
        data = content(self.attempt, number, step, protocol.channel.rank)
        manifest = Manifest(
            step=step,
            recipe="recipe",
            world=self.world,
            attempt=self.attempt,
            counters={},
            row=None,
            files={},
            versions={},
            t=0,
        )
        return protocol.save(number, manifest, [data])

    def find(self) -> list[Any]:
        """Find the newest valid checkpoint on all ranks."""

        def find(protocol: SaveProtocol) -> Any:
            return search(protocol, protocol.committed).find("start")

        return self.each(find)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def whole(self, step: int) -> bool:
        folder = self.protocols[0].checkpoint(step)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return not folder_fault(folder.name, files)


def raises(name: str) -> Callable[..., None]:
    """Return a function that raises the OSError of an error name, such as EIO."""

    def fail(*_: Any) -> None:
        raise os_error(name)

    return fail
