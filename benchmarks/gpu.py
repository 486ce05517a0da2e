"""What must hold on a GPU, then how fast it is: one command for a new device, at most 8 minutes.

    make gpu              # on the GPU of this machine
    make gpu DEVICE=cpu   # the same code path with small shapes

Needs torch, torchvision, timm, numpy, Pillow and PyYAML; no installation of this package. In turn:

1. checks: tests/support/device_checks.py (the step against the plain one in fp32 and bf16, flash
   attention by lengths, steps without a wait of the host, a captured step, pinned batches).
2. resume: a trial of two attempts through the job's entry point, with NCCL on one device. The save
   is staged from the GPU. The second attempt continues the history of an uninterrupted trial.
3. drill: two copies of that trial, one of them killed, compared tensor by tensor.
4. steps: benchmarks/step.py for each size.

Writes results.json and results.md into --out. Exit code 1 when a part failed; the others ran.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks"), str(REPO / "tests")]

import objective as bench  # noqa: E402
import resume_drill  # noqa: E402
from support.device_checks import CHECKS, CUDA_ONLY, small_trial, write_shards  # noqa: E402

from jepa_cluster.trial import spool  # noqa: E402
from jepa_cluster.trial.directory import Root, TrialDir  # noqa: E402

STEPS, STOP_AFTER = 12, 5  # of the trial of two attempts
SAME_TO_ROUNDING = 1e-2  # relative difference of losses; on a CPU they are equal
ATTEMPT_SECONDS, SIZE_SECONDS = 120, 240  # that a part may take
SIZES = {
    "cuda": [("vit_s", 128), ("vit_b", 128), ("vit_l", 128), ("vit_h", 64)],
    "cpu": [("vit_ti", 2)],
}
QUICK = ("--rounds", "2", "--block", "1")  # of step.py on a CPU


def checks(device: str, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for check in CHECKS:
        if device == "cpu" and check in CUDA_ONLY:
            continue
        name = check.__name__.removeprefix("check_")
        place = folder / name
        place.mkdir()
        results[name] = guarded(lambda check=check, place=place: check(device, place) or "holds")
    return results


def guarded(part: Callable[[], Any]) -> Any:
    """Return what the part returns; what it raises becomes a text that begins with FAILED."""
    try:
        return part()
    except Exception as e:  # the other parts run all the same
        traceback.print_exc()
        return f"FAILED: {type(e).__name__}: {e}"


# ---- a trial of two attempts


def run_attempt(trial: TrialDir, kill_after: int | None = None) -> list[int]:
    """Run one attempt of a trial by the job's entry point. Returns the exit code of its rank."""
    command = resume_drill.rank_command(trial)
    environment = {**os.environ, **resume_drill.rank_environment(trial, 0, kill_after)}
    done = subprocess.run(command, env=environment, timeout=ATTEMPT_SECONDS, check=False)
    return [done.returncode]


def resume(device: str, folder: Path) -> dict[str, Any]:
    shards = write_shards(folder / "data")
    config = small_trial(shards, device, STEPS)
    whole, parted = (Root(folder / name).trial_of(config) for name in ("whole", "parted"))
    whole.create(config)
    parted.create(replace(config, runtime=replace(config.runtime, stop_after=STOP_AFTER)))
    codes = run_attempt(whole) + run_attempt(parted)
    parted.create(config)
    codes += run_attempt(parted)
    assert codes == [0, 0, 0], f"exit codes {codes}, see the output above"
    record = parted.attempts()[-1]
    assert record.get("start_step") == STOP_AFTER, f"the second attempt began elsewhere: {record}"
    expected, found = losses(whole), losses(parted)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    difference = max(abs(found[step] / expected[step] - 1) for step in expected)
    limit = SAME_TO_ROUNDING if device == "cuda" else 0.0
    assert difference <= limit, f"losses differ by {difference:.1e} after the resume"
    drilled = guarded(lambda: drill(parted, device))
    return {"attempts": 2, "largest relative difference of a loss": difference, "drill": drilled}


def losses(trial: TrialDir) -> dict[int, float]:
    found: dict[int, float] = {}
    for row in spool.read(trial).rows:
        if "loss" in row.values:
            found[row.step] = row.values["loss"]
    return found


def drill(trial: TrialDir, device: str) -> dict[str, Any]:
    unfinished = replace(trial.read_config().recipe.optim, steps=2 * STEPS)
    config = trial.read_config()
    config = replace(config, recipe=replace(config.recipe, optim=unfinished))
    longer = Root(trial.root.path.with_name("drilled")).trial_of(config)
    longer.create(config)
    _, verdict = resume_drill.drill(longer, 8, 1, run_attempt, print)
    assert verdict["passed"] is not None, verdict["problem"]
    differ = verdict["differ"]
    largest = max(differ.values(), default=0.0)
    if device == "cpu":
        assert verdict["passed"], f"{len(differ)} tensors differ, by up to {largest:.1e}"
    assert math.isfinite(largest)
    return {
        "tensors": verdict["tensors"],
        "tensors that differ": len(differ),
        "largest difference": largest,
        "metric rows": verdict["rows"],
        "same bits": bool(verdict["passed"]),
    }


# ---- steps


def steps(args: argparse.Namespace, until: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for size, batch in SIZES[args.device]:
        if time.monotonic() > until:
            results[size] = "not measured: no time was left"
            continue
        command = [sys.executable, str(REPO / "benchmarks/step.py"), "--size", size]
        command += ["--batch", str(batch), "--device", args.device]
        if args.device == "cpu":
            command += QUICK
        print(" ".join(command[1:]), flush=True)
        results[size] = guarded(lambda command=command: measured(command))
    return results


def measured(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=SIZE_SECONDS, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- results


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{results['device']}, driver {results['driver']}, torch {results['torch']}, "
        f"commit {results['commit']}, {results['seconds']:.0f} s.",
        "",
        "| check | result |",
        "|---|---|",
    ]
    for name, result in {**results["checks"], "resume": results["resume"]}.items():
        text = result
        if isinstance(result, dict):
            text = "; ".join(f"{key}: {value}" for key, value in result.items())
        lines.append(f"| {name} | {text} |")
    lines += [
        "",
        "| size, batch | step | ms | images/s | host ms | device ms | launches | host ops | MFU |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, row in results["steps"].items():
        if isinstance(row, str):
            lines.append(f"| {size} | {row} |||||||")
            continue
        for name in ("trainer", "plain"):
            found = row[name]
            ratio = f" ({row['ratio']:.2f}x the plain one)" if name == "trainer" else ""
            mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
            lines.append(
                f"| {size}, {row['batch']} | {name}{ratio} | {found['ms']:.1f} "
                f"| {found['images_per_s']:.0f} | {found.get('host_ms', '-')} "
                f"| {found['device_ms']} | {found['launches']} | {found['host_ops']} | {mfu} |"
            )
    return "\n".join(lines) + "\n"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return found.stdout.strip() or "none"


def failures(value: Any) -> list[str]:
    """Return every text in the results that begins with FAILED."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in failures(item)]
    return [value] if str(value).startswith("FAILED") else []


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--out", type=Path, default=Path("gpu-results"))
    p.add_argument("--minutes", type=float, default=7.0, help="no size begins after this time")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; try `make gpu DEVICE=cpu`", file=sys.stderr)
        return 2
    began = time.monotonic()
    results: dict[str, Any] = {
        "device": bench.hardware(torch.device(args.device)),
        "driver": driver(),
        "torch": torch.__version__,
        "commit": bench.commit(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["checks"] = checks(args.device, folder)
        results["resume"] = guarded(lambda: resume(args.device, folder / "resume"))
    results["steps"] = steps(args, began + 60 * args.minutes)
    results["seconds"] = time.monotonic() - began
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (args.out / "results.md").write_text(text)
    print(text)
    failed = failures(results)
    print(f"{len(failed)} parts failed" if failed else "everything holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
