"""What must hold on a GPU, then how fast it is: one command for a new device, at most 8 minutes.

    make gpu              # on the GPU of this machine
    make gpu DEVICE=cpu   # the same code path with small shapes

Needs torch, torchvision, timm, numpy, Pillow and PyYAML; no installation of this package. In turn:

1. checks: tests/support/device_checks.py (the trainer's FSDP2 step against the plain one in fp32,
   bf16 and under autocast, flash attention by lengths, steps without a wait of the host, a captured
   step, pinned batches).
2. resume: a trial of two attempts through the job's entry point, with NCCL on one device. The save
   is staged from the GPU. The second attempt continues the history of an uninterrupted trial.
3. drill: two copies of that trial, one of them killed, compared tensor by tensor.
4. steps: benchmarks/step.py for each size.

No part begins without the time that it needs, and none takes longer than what is left. Each part
writes results.json and results.md into --out, with what is known by then. Exit code 1 when a check,
resume or drill failed or was not run, or a step failed. A size for which no time was left is none.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
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
from jepa_cluster.trial.files import write_atomic  # noqa: E402

STEPS, STOP_AFTER = 12, 5  # of the trial of two attempts
SAME_TO_ROUNDING = 1e-2  # relative difference of losses; on a CPU they are equal
# Seconds that must be left when a part begins. The first size has this, a later one what the size
# before took, and half of that besides.
NEEDED = {"check": 20.0, "resume": 60.0, "drill": 60.0, "step": 45.0}
PART_MARGIN = 30.0  # seconds after the end of the run at which a part that hangs ends the process
NOT_RUN = "not run"
COLUMNS = ("ms", "images_per_s", "host_ms", "device_ms", "launches", "host_ops", "mfu")
SIZES = {
    "cuda": [("vit_s", 128), ("vit_b", 128), ("vit_l", 128), ("vit_h", 64)],
    "cpu": [("vit_ti", 1)],
}
SIZE_NAMES = {size for sizes in SIZES.values() for size, _ in sizes}
QUICK = ("--rounds", "1", "--block", "1")  # of step.py on a CPU


class Run:
    """The parts of a run, in their order, and the time that is left. results: of parts by name."""

    def __init__(self, device: str, out: Path, minutes: float) -> None:
        self.device, self.out = device, out
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.facts = {
            "device": bench.hardware(torch.device(device)),
            "driver": driver(),
            "torch": torch.__version__,
            "commit": bench.commit(),
        }
        self.results: dict[str, Any] = {}

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def part(self, name: str, needed: float, work: Callable[[], Any]) -> float:
        """Run a part if there is time for it, and write the results. Returns its seconds.

        A part in this process that hangs ends the process; the results then say so.
        """
        began = time.monotonic()
        if self.left < needed:
            result = f"{NOT_RUN}: {self.left:.0f} s were left, and it may need {needed:.0f} s"
        else:
            self.results[name] = "FAILED: it did not end"
            self.write()
            faulthandler.dump_traceback_later(self.left + PART_MARGIN, exit=True)
            result = guarded(work)
            faulthandler.cancel_dump_traceback_later()
        self.results[name] = result
        self.write()
        return time.monotonic() - began

    def write(self) -> None:
        """Replace both files: whenever the run is ended, they are whole."""
        seconds = round(time.monotonic() - self.began, 1)
        document = {**self.facts, "seconds": seconds, **self.results}
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "results.json", json.dumps(document, indent=1) + "\n")
        write_atomic(self.out / "results.md", markdown(document, self.results))

    def problems(self) -> list[str]:
        """Return what failed, and what was not run although it is no size."""
        found: list[str] = []
        for name, result in self.results.items():
            text = str(result)
            if text.startswith("FAILED") or (text.startswith(NOT_RUN) and name not in SIZE_NAMES):
                found.append(f"{name}: {text}")
        return found


def guarded(part: Callable[[], Any]) -> Any:
    """Return what the part returns; what it raises becomes a text."""
    try:
        return part()
    except subprocess.TimeoutExpired as e:
        return f"FAILED: no end within {e.timeout:.0f} s"
    except Exception as e:  # the other parts run all the same
        traceback.print_exc()
        return f"FAILED: {type(e).__name__}: {e}"


def checks(run: Run, folder: Path) -> None:
    for check in CHECKS:
        if run.device == "cpu" and check in CUDA_ONLY:
            continue
        name = check.__name__.removeprefix("check_")
        place = folder / name
        place.mkdir()
        run.part(
            name,
            NEEDED["check"],
            lambda check=check, place=place: check(run.device, place) or "holds",
        )


# ---- a trial of two attempts


def run_attempt(run: Run, trial: TrialDir, kill_after: int | None = None) -> list[int]:
    """Run one attempt of a trial by the job's entry point. Returns the exit code of its rank."""
    command = resume_drill.rank_command(trial)
    environment = {**os.environ, **resume_drill.rank_environment(trial, 0, kill_after)}
    done = subprocess.run(command, env=environment, timeout=run.left, check=False)
    return [done.returncode]


def resume(run: Run, folder: Path) -> dict[str, Any]:
    shards = write_shards(folder / "data")
    config = small_trial(shards, run.device, STEPS)
    whole, parted = (Root(folder / name).trial_of(config) for name in ("whole", "parted"))
    whole.create(config)
    parted.create(replace(config, runtime=replace(config.runtime, stop_after=STOP_AFTER)))
    codes = run_attempt(run, whole) + run_attempt(run, parted)
    parted.create(config)
    codes += run_attempt(run, parted)
    assert codes == [0, 0, 0], f"exit codes {codes}, see the output above"
    record = parted.attempts()[-1]
    assert record.get("start_step") == STOP_AFTER, f"the second attempt began elsewhere: {record}"
    expected, found = losses(whole), losses(parted)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    difference = max(abs(found[step] / expected[step] - 1) for step in expected)
    limit = SAME_TO_ROUNDING if run.device == "cuda" else 0.0
    assert difference <= limit, f"losses differ by {difference:.1e} after the resume"
    return {"attempts": 2, "largest relative difference of a loss": difference}


def losses(trial: TrialDir) -> dict[int, float]:
    found: dict[int, float] = {}
    for row in spool.read(trial).rows:
        if "loss" in row.values:
            found[row.step] = row.values["loss"]
    return found


def drill(run: Run, folder: Path) -> dict[str, Any]:
    """Drill the trial of `resume`, with as many steps again."""
    (trial,) = (Root(folder / "parted").trials).iterdir()
    config = TrialDir(trial).read_config()
    unfinished = replace(config.recipe.optim, steps=2 * STEPS)
    config = replace(config, recipe=replace(config.recipe, optim=unfinished))
    longer = Root(folder / "drilled").trial_of(config)
    longer.create(config)
    attempt = functools.partial(run_attempt, run)
    _, verdict = resume_drill.drill(longer, 8, 1, attempt, print)
    assert verdict["passed"] is not None, verdict["problem"]
    differ = verdict["differ"]
    largest = max(differ.values(), default=0.0)
    if run.device == "cpu":
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


def steps(run: Run) -> None:
    needed = NEEDED["step"]
    for size, batch in SIZES[run.device]:
        command = [sys.executable, str(REPO / "benchmarks/step.py"), "--size", size]
        command += ["--batch", str(batch), "--device", run.device]
        if run.device == "cpu":
            command += QUICK
        print(" ".join(command[1:]), flush=True)
        took = run.part(size, needed, lambda command=command: measured(run, command))
        needed = max(needed, 1.5 * took)


def measured(run: Run, command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=run.left, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    for name in ("ms", "host_ms", "host_ops"):
        assert row["trainer"][name] > 0, f"{name} was not measured: {row}"
    return row


# ---- results


def markdown(document: dict[str, Any], parts: dict[str, Any]) -> str:
    lines = [
        f"{document['device']}, driver {document['driver']}, torch {document['torch']}, "
        f"commit {document['commit']}, {document['seconds']:.0f} s.",
        "",
        f"| part | result | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for name, result in parts.items():
        if name in SIZE_NAMES and isinstance(result, dict):
            for whose in ("trainer", "plain"):
                numbers = [str(result[whose].get(column) or "-") for column in COLUMNS]
                text = f"{whose}, batch {result['batch']}"
                if whose == "trainer":
                    text += f", {result['ratio']:.2f} times as fast as the plain one"
                lines.append(f"| {name} | {text} | {' | '.join(numbers)} |")
            continue
        text = str(result)
        if isinstance(result, dict):
            text = "; ".join(f"{key}: {value}" for key, value in result.items())
        lines.append(f"| {name} | {' '.join(text.split())} |{' |' * len(COLUMNS)}")
    return "\n".join(lines) + "\n"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return found.stdout.strip() or "none"


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--out", type=Path, default=Path("gpu-results"))
    p.add_argument("--minutes", type=float, default=8.0, help="that all parts may take")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; try `make gpu DEVICE=cpu`", file=sys.stderr)
        return 2
    if args.device == "cpu":  # threads that wait for each other are slow on a busy machine
        os.environ["OMP_NUM_THREADS"] = "1"
    run = Run(args.device, args.out, args.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks(run, folder)
        run.part("resume", NEEDED["resume"], lambda: resume(run, folder / "resume"))
        run.part("drill", NEEDED["drill"], lambda: drill(run, folder / "resume"))
    steps(run)
    print((args.out / "results.md").read_text())
    problems = run.problems()
    print("\n".join(problems) or "everything holds")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
