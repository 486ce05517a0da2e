"""The trainer's own step beside the plain one of `plain.py`, interleaved, on one device.

    python benchmarks/step.py --size vit_l --batch 128
    python benchmarks/step.py --size vit_ti --batch 4 --device cpu

`train()` runs as in a job, on one rank: FSDP2, AdamW, EMA, reduction of metrics, its logs. Only its
input is replaced: every step gets the same batch, from (pinned) host memory. Probes are skipped.
So a step is everything between two requests for a batch. The plain step has the same images and
masks, and torch's fused AdamW.

ms: wall time of a step in blocks of steps, median over rounds. host_ms: time until the host asks
for the next batch when the device was idle before the step. device_ms: sum of kernel times.
launches, host_ops: kernels (and copies, graphs) that a step launches, and ATen operators that it
calls. mfu: by the FLOPs of `ijepa.flops` and the dense bf16 peak of the device.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

import objective as bench  # noqa: E402

from jepa_cluster.config import Recipe, Runtime, TrialConfig  # noqa: E402
from jepa_cluster.data import pipeline  # noqa: E402
from jepa_cluster.ijepa import masks as m  # noqa: E402
from jepa_cluster.ijepa.flops import step_flops  # noqa: E402
from jepa_cluster.launch.worker.main import claim  # noqa: E402
from jepa_cluster.training import train as trainer  # noqa: E402
from jepa_cluster.training.dist_env import from_environment  # noqa: E402
from jepa_cluster.training.forced_exit import ForcedExit  # noqa: E402
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler  # noqa: E402
from jepa_cluster.training.watchdog import PhaseTimer  # noqa: E402
from jepa_cluster.trial.directory import Root  # noqa: E402

WARM_UP = 5  # steps that compile, fill caches and allocate
PROFILED = 3  # steps
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")


class Enough(Exception):
    """All is measured: ends the training loop."""


class Measurement:
    """What the input of the trainer measures between two requests for a batch."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe) -> None:
        self.args, self.recipe = args, recipe
        self.device = torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.batch = new_batch(recipe, args.masks, self.on_gpu)
        self.plain = plain_step(recipe, self.batch, args)
        self.trainer_seconds: list[float] = []
        self.plain_seconds: list[float] = []
        self.host_seconds: list[float] = []
        self.profiles: dict[str, dict[str, float]] = {}

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def batches(self) -> Iterator[pipeline.Batch]:
        """Yield the batch again and again. When a `yield` returns, the host has done that step."""
        for _ in range(WARM_UP):
            yield self.batch
            self.plain()
        for _ in range(self.args.rounds):
            self.wait()
            began = time.perf_counter()
            for _ in range(self.args.block):
                yield self.batch
            self.wait()
            self.trainer_seconds.append((time.perf_counter() - began) / self.args.block)
            began = time.perf_counter()
            for _ in range(self.args.block):
                self.plain()
            self.wait()
            self.plain_seconds.append((time.perf_counter() - began) / self.args.block)
        for _ in range(self.args.block):
            self.wait()
            began = time.perf_counter()
            yield self.batch
            self.host_seconds.append(time.perf_counter() - began)
        with new_profile(self.on_gpu) as profiled:
            for _ in range(PROFILED):
                yield self.batch
            self.wait()
        self.profiles["trainer"] = counts(profiled)
        with new_profile(self.on_gpu) as profiled:
            for _ in range(PROFILED):
                self.plain()
            self.wait()
        self.profiles["plain"] = counts(profiled)
        raise Enough

    def report(self) -> dict[str, Any]:
        flops = step_flops(self.recipe, *m.lengths(bench.host(self.batch.masks))).total
        peak = bench.peak_flops(self.device)
        rows: dict[str, Any] = {}
        seconds = {"trainer": self.trainer_seconds, "plain": self.plain_seconds}
        for name, values in seconds.items():
            middle = statistics.median(values)
            rate = flops * self.args.batch / middle
            rows[name] = {
                "ms": round(middle * 1e3, 3),
                "images_per_s": round(self.args.batch / middle, 1),
                "tflops": round(rate / 1e12, 3),
                "mfu": round(rate / peak, 4) if peak else None,
                **self.profiles[name],
            }
        rows["trainer"]["host_ms"] = round(statistics.median(self.host_seconds) * 1e3, 3)
        pairs = zip(self.plain_seconds, self.trainer_seconds, strict=True)
        ratio = statistics.median(plain / ours for plain, ours in pairs)
        return {
            "size": self.args.size,
            "batch": self.args.batch,
            "masks": self.args.masks,
            "precision": self.args.precision,
            "compiled": self.args.compile,
            "ratio": round(ratio, 3),
            "peak_gib": peak_memory(self.on_gpu),
            **rows,
        }


def new_batch(recipe: Recipe, mode: str, on_gpu: bool) -> pipeline.Batch:
    size, batch = recipe.model.image, recipe.optim.batch
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    drawn = bench.draw(recipe, mode, batch, torch.device("cpu"))
    if on_gpu:
        images = images.pin_memory()
        drawn = m.Masks(*(None if field is None else field.pin_memory() for field in drawn))
    index = torch.arange(batch)
    return pipeline.Batch(images, drawn, torch.zeros_like(index), index, 0)


def plain_step(
    recipe: Recipe, batch: pipeline.Batch, args: argparse.Namespace
) -> Callable[[], torch.Tensor]:
    """The plain step on the same images and masks, which are on the device already."""
    device = torch.device(args.device)
    images = pipeline.normalise(batch.images.to(device), recipe.data)
    drawn = m.Masks(*(None if field is None else field.to(device) for field in batch.masks))
    return bench.plain(recipe, images, drawn, args)


def new_profile(on_gpu: bool) -> Any:
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, acc_events=True)


def counts(profiled: profile) -> dict[str, float]:
    """Return launches, operators and device time of one step."""
    launches = operators = 0
    device_us = 0.0
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            device_us += event.self_device_time_total
        elif event.name.startswith(LAUNCHES):
            launches += 1
        elif event.name.startswith("aten::"):
            operators += 1
    return {
        "launches": launches // PROFILED,
        "host_ops": operators // PROFILED,
        "device_ms": round(device_us / 1e3 / PROFILED, 3),
    }


def peak_memory(on_gpu: bool) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None


def run(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Train until the measurement has ended."""
    loaded = bench.load(args.size, args.batch)
    optim = replace(loaded.optim, steps=10**6, epochs=None, warmup_steps=10, warmup_epochs=None)
    recipe = replace(loaded, optim=replace(optim, precision=args.precision))
    runtime = Runtime(
        str(root / "data"), device=args.device, compile=args.compile, checkpoint_minutes=1e6
    )
    config = TrialConfig(recipe, runtime)
    trial = Root(root).trial_of(config)
    trial.create(config)
    handler, timer = PreemptionHandler(), PhaseTimer()
    claimed = claim(trial, from_environment(os.environ), handler)
    assert claimed
    attempt, env = claimed
    measured = Measurement(args, recipe)
    trainer.pipeline.stream = lambda *_: measured.batches()
    trainer.run_probe = lambda *_: True
    try:
        trainer.train(ForcedExit(trial, env, timer, handler, JobHooks(), attempt))
    except Enough:
        return measured.report()
    raise AssertionError("the training ended before the measurement")


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--size", default="vit_l" if cuda else "vit_ti")
    p.add_argument("--batch", type=int, default=128 if cuda else 4, help="images a step")
    p.add_argument("--masks", default="reference", choices=("reference",), help="mask mode")
    p.add_argument("--rounds", type=int, default=5, help="timed blocks of each of the two steps")
    p.add_argument("--block", type=int, default=10 if cuda else 2, help="steps in a block")
    p.add_argument(
        "--precision", choices=("bf16", "autocast", "fp32"), default="bf16" if cuda else "fp32"
    )
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    args = p.parse_args()
    args.cuda_graph = False  # of objective.py's stepper
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, Path(folder))
    print(json.dumps(report), flush=True)
    os._exit(0)  # nobody waits for the process group


if __name__ == "__main__":
    main()
