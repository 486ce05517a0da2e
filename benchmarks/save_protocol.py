"""What the save protocol alone costs rank 0: ranks as threads, tiny files, a store in memory.

    python benchmarks/save_protocol.py [--ranks 64 256 1024] [--saves 5]

Every rank writes a file of 64 bytes to a real temporary folder. One line per number of ranks: CPU
time of rank 0's thread and time of the clock, per save. All threads share one interpreter, so the
clock says little about a cluster; rank 0's CPU time holds no network.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from pathlib import Path

from jepa_cluster.training.channel import Channel
from jepa_cluster.training.checkpoint_files import Disk, Manifest
from jepa_cluster.training.save_protocol import SaveProtocol, SaveResult

PATIENCE = 300.0  # seconds


class MemoryStore:
    """The part of TCPStore that Channel uses, for threads of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        with self.lock:
            return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self.lock:
            return [self.values[key] for key in keys]

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            value = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(value).encode()
            return value

    def delete_key(self, key: str) -> bool:
        with self.lock:
            return self.values.pop(key, None) is not None


class Rank(threading.Thread):
    """Runs all saves of one rank. cpu: seconds of this thread. results: of each save."""

    def __init__(self, folder: Path, store: MemoryStore, rank: int, world: int, saves: int) -> None:
        super().__init__(daemon=True)
        channel = Channel(store, rank, world, attempt=1, patience=PATIENCE)
        self.protocol = SaveProtocol(folder, 1, world, channel, Disk(), lambda: False)
        self.protocol.steps_to_keep = lambda steps: set(steps[-2:])
        self.world, self.saves = world, saves
        self.cpu, self.results = 0.0, list[SaveResult]()

    def run(self) -> None:
        begin = time.thread_time()
        for number in range(1, self.saves + 1):
            manifest = Manifest(number, "recipe", self.world, 1, {}, None, {}, {}, 0)
            self.results.append(self.protocol.save(number, manifest, [bytes(64)]))
        self.cpu = time.thread_time() - begin


def measure(world: int, saves: int) -> tuple[float, float]:
    """-> seconds per save: CPU of rank 0, clock."""
    folder = Path(tempfile.mkdtemp(prefix="save_protocol."))
    store = MemoryStore()
    ranks = [Rank(folder, store, rank, world, saves) for rank in range(world)]
    begin = time.monotonic()
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        clock = time.monotonic() - begin
        failed = [result.error for rank in ranks for result in rank.results if result.error]
        assert not failed and not store.values, failed[:3]
    finally:
        shutil.rmtree(folder)
    return ranks[0].cpu / saves, clock / saves


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    p.add_argument("--saves", type=int, default=5)
    a = p.parse_args()
    for world in a.ranks:
        cpu, clock = measure(world, a.saves)
        print(
            f"{world} ranks, {world} writers: rank 0 {1000 * cpu:.1f} ms CPU per save, "
            f"{1000 * clock:.0f} ms in all"
        )


if __name__ == "__main__":
    main()
