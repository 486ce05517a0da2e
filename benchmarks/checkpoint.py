"""Lay out a checkpoint in files, write it, and read it back on any number of ranks.

    python benchmarks/checkpoint.py
        ViT-Ti, 2, 4 and 8 ranks, one copy of the state
    python benchmarks/checkpoint.py --shard 1 --ranks 2 4 8
        every rank is a replica: data parallel

Needs torch and this repository's files. Ranks are processes of this machine, with gloo. The peer is
what this project used before: torch's stager and file writer over a gloo group of its own, a CRC-32
of every file read back, a manifest, a rename. Both sync every file. Prints, as medians over rounds:
seconds that a save stops the training, seconds until it is committed, CPU seconds of rank 0's
process for it, bytes copied on this node, seconds of a load with every byte verified, and the
sockets that a process holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from step import commit, hardware, load  # noqa: E402

from jepa_cluster.config import Runtime  # noqa: E402
from jepa_cluster.training import checkpoint, distributed, sharded_adamw  # noqa: E402
from jepa_cluster.training.dist_env import DistEnv  # noqa: E402
from jepa_cluster.training.save_protocol import CheckpointSearch  # noqa: E402
from jepa_cluster.trial.directory import TrialDir  # noqa: E402

COLUMNS = (
    "stall_s",
    "commit_s",
    "rank0_cpu_s",
    "staged_mb",
    "load_s",
    "rank0_sockets",
    "rank1_sockets",
)


class Ours:
    def __init__(self, ranks: distributed.World, folder: Path) -> None:
        self.ranks, self.trial = ranks, TrialDir(folder / "ours")
        if ranks.rank == 0:
            self.trial.checkpoints.mkdir(parents=True)
            (self.trial.path / "attempts").mkdir()
        self.saver = checkpoint.AsyncSaver(self.trial, 1, ranks)
        self.saver.protocol.steps_to_keep = lambda steps: set(steps[-2:])
        self.step = 0

    def start(self, tensors: dict[str, torch.Tensor]) -> None:
        self.step += 1
        self.saver.start(
            checkpoint.new_manifest(self.step, "benchmark", 1, self.ranks, {}), tensors
        )

    def wait(self) -> None:
        while self.saver.busy:
            time.sleep(0.001)
        result = self.saver.take_result()
        assert result is None or not result.error, result

    @property
    def staged(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.saver._buffers.values())

    def load(self, model: Any, adam: Any) -> None:
        search = CheckpointSearch(
            self.saver.protocol, self.ranks.channel, self.trial.committed, accept
        )
        manifest, _ = search.find(f"load-{self.step}")
        assert manifest is not None and manifest.step == self.step
        checkpoint.load(
            self.trial.checkpoint(self.step), model, adam, self.ranks, f"rows-{self.step}"
        )


def accept(manifest: object) -> str:
    return ""


class TorchDistributedCheckpoint:
    def __init__(self, ranks: distributed.World, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder / "dcp"
        self.group = dist.new_group(backend="gloo")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.step, self.staged = 0, 0
        if ranks.rank == 0:
            self.folder.mkdir()

    def start(self, tensors: dict[str, torch.Tensor]) -> None:
        self.step += 1
        staged: Any = self.stager.stage(dict(tensors))
        local = [t.to_local() if hasattr(t, "to_local") else t for t in staged.values()]
        self.staged = sum(t.numel() * t.element_size() for t in local)
        self.thread = threading.Thread(target=self._save, args=(staged,))
        self.thread.start()

    def _save(self, staged: dict[str, torch.Tensor]) -> None:
        work, first = self.folder / f".step-{self.step}", self.ranks.rank == 0
        if first:
            work.mkdir()
        writer = dcp.FileSystemWriter(work, thread_count=1, sync_files=True)
        dist.barrier(self.group)
        dcp.save(staged, storage_writer=writer, process_group=self.group)
        names = [f.name for f in work.iterdir() if f.name.startswith(f"__{self.ranks.rank}_")]
        mine = {name: crc(work / name) for name in [*names, *([".metadata"] if first else [])]}
        everybody: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(everybody, mine, group=self.group)
        if first:
            (work / "manifest.json").write_text(json.dumps(everybody))
            work.rename(self.folder / f"step-{self.step}")
            shutil.rmtree(self.folder / f"step-{self.step - 2}", ignore_errors=True)
        dist.barrier(self.group)

    def wait(self) -> None:
        self.thread.join()

    def load(self, model: Any, adam: Any) -> None:
        folder = self.folder / f"step-{self.step}"
        for name in sorted(p.name for p in folder.iterdir())[self.ranks.rank :: self.ranks.size]:
            crc(folder / name)
        dist.barrier(self.group)
        target = checkpoint.state(model, adam)
        with torch.no_grad():
            dcp.load(target, storage_reader=dcp.FileSystemReader(folder), process_group=self.group)


def crc(path: Path) -> int:
    value = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def rank_main(
    rank: int, world: int, port: int, args: argparse.Namespace, folder: Path, answers: Any
) -> None:
    torch.set_num_threads(1)
    recipe, place = (
        load(args.model, 8),
        DistEnv(rank, world, rank, world, "benchmark", address=f"127.0.0.1:{port}"),
    )
    runtime = Runtime("", procs_per_node=world, device="cpu", threads=1, fsdp_shard_size=args.shard)
    ranks = distributed.init(place, recipe, runtime, attempt=1)
    model = distributed.build_model(recipe, runtime, ranks)
    adam = sharded_adamw.build_optimizer(model, recipe.optim)
    distributed.init_from_seed(model, recipe)
    for moments in adam.state.values():
        for tensor in moments.values():
            checkpoint.local_part(tensor).normal_()
    found: dict[str, dict[str, list[float]]] = {}
    before = sockets()
    for kind in (Ours, TorchDistributedCheckpoint):
        name, begun = kind.__name__, sockets()
        found[name] = {"method": [], **{column: [] for column in COLUMNS}}
        found[name]["method"] = kind(ranks, folder)  # type: ignore[assignment]
        found[name]["sockets"] = [before + sockets() - begun]
    for turn in range(args.rounds + 1):  # the first allocates buffers
        for rows in found.values():
            measured = measure(rows["method"], model, adam, ranks)
            for column, value in measured.items() if turn else []:
                rows[column].append(value)
    for rows in found.values():
        method: Any = rows.pop("method")
        rows["staged_mb"] = [method.staged / 1e6]
    answers.put((rank, found))
    dist.barrier()
    os._exit(0)


def measure(method: Any, model: Any, adam: Any, ranks: distributed.World) -> dict[str, float]:
    dist.barrier()
    cpu, begun = time.process_time(), time.monotonic()
    method.start(checkpoint.state(model, adam))
    stall = time.monotonic() - begun
    method.wait()
    cpu = time.process_time() - cpu
    dist.barrier()
    committed = time.monotonic() - begun
    begun = time.monotonic()
    method.load(model, adam)
    dist.barrier()
    return {
        "stall_s": stall,
        "commit_s": committed,
        "rank0_cpu_s": cpu,
        "load_s": time.monotonic() - begun,
    }


def sockets() -> int:
    return sum(
        str(p.readlink()).startswith("socket:")
        for p in Path("/proc/self/fd").iterdir()
        if p.is_symlink()
    )


def run(world: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        arguments = (world, port, args, Path(folder), answers)
        processes = [
            context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        by_rank = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return {
        method: summary([by_rank[rank][method] for rank in range(world)]) for method in by_rank[0]
    }


def summary(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Rank 0's medians; the longest stall of any rank, since all wait for it; bytes of all ranks of
    the node.
    """
    median: Callable[[str], float] = lambda column: statistics.median(ranks[0][column])  # noqa: E731
    return {
        "stall_s": max(statistics.median(rank["stall_s"]) for rank in ranks),
        "commit_s": median("commit_s"),
        "rank0_cpu_s": median("rank0_cpu_s"),
        "staged_mb": sum(rank["staged_mb"][0] for rank in ranks),
        "load_s": median("load_s"),
        "rank0_sockets": ranks[0]["sockets"][0],
        "rank1_sockets": ranks[1]["sockets"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_ti")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--shard", type=int, help="ranks that share one copy of the state (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoints are written (default: the temporary folder)",
    )
    args = parser.parse_args()
    print(
        f"{hardware(torch.device('cpu'))} · torch {torch.__version__} · {commit()} · "
        f"{args.model}, shard {args.shard}"
    )
    print("| ranks | method | " + " | ".join(COLUMNS) + " |")
    print("|---:|---|" + "---:|" * len(COLUMNS))
    rows = []
    for world in args.ranks:
        for method, values in run(world, args).items():
            rows.append({"ranks": world, "method": method, **values})
            print(
                f"| {world} | {method} | "
                + " | ".join(f"{values[column]:.4g}" for column in COLUMNS)
                + " |",
                flush=True,
            )
    print(json.dumps({"hardware": hardware(torch.device("cpu")), "commit": commit(), "rows": rows}))


if __name__ == "__main__":
    main()
