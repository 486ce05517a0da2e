"""`jepa demo`: the whole path on this machine, as the commands a person would type.

Each step is a real `jepa` command in a process of its own, shown before it runs. Nothing here knows how the
steps work; running it again shows that every one of them finds its work done.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import JepaError

if TYPE_CHECKING:
    from jepa_cluster.trial.directory import TrialDir

SWEEP = "sweeps/demo.yaml"
IMAGES, SHARDS = "data/demo-images", "data/demo"


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("demo", help="the whole path on this machine: images, shards, sweep, MLflow, scaling figure")
    p.add_argument("--sweep", default=SWEEP, help=f"sweep file to run (default {SWEEP})")
    p.set_defaults(run=demo)


def demo(arguments: argparse.Namespace) -> int:
    sweep = Path(arguments.sweep)
    if not sweep.exists():
        raise JepaError(f"no sweep file {sweep}", where=str(Path.cwd()), hint="run it in a clone of the repository")
    began = time.monotonic()
    step("1/6  A small ImageNet of real JPEG files, rendered from a seed")
    jepa("shards", "synthetic", IMAGES)
    step("2/6  The same command that serves ImageNet packs and verifies it")
    jepa("shards", "build", IMAGES, SHARDS)
    jepa("shards", "verify", SHARDS)
    step("3/6  What the sweep would cost, then go")
    jepa("plan", str(sweep), ok=(0, 3))
    jepa("submit", str(sweep), "--yes")
    step("4/6  Training; one trial is interrupted on purpose and must resume")
    interrupt(sweep.stem)
    jepa("watch", sweep.stem, "--until-done")
    tell_interruptions(sweep.stem)
    step("5/6  Every settled step into MLflow")
    jepa("sync", sweep.stem)
    step("6/6  The scaling comparison")
    jepa("scaling", sweep.stem)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Browse it in MLflow with:\n\n    {program()} ui\n")
    return 0


def interrupt(sweep: str) -> None:
    """Wait until the first unfinished trial is half-way, then send it back to the queue."""
    trials = trials_of(sweep)
    if any(a.get("cause") == "preempted" for t in trials for a in t.attempts()):
        print("  one trial was interrupted and resumed in an earlier demo: not again")
        return
    waiting = [t for t in trials if not t.done.exists()]
    if not waiting:
        return
    jepa("watch", sweep, "--until-half")
    jepa("requeue", sweep, "state=running", "--yes")


def tell_interruptions(sweep: str) -> None:
    """One line a trial that needed more than one attempt, from the attempts' own records."""
    for trial in trials_of(sweep):
        attempts = trial.attempts()
        if len(attempts) > 1:
            story = "; ".join(
                f"attempt {a['attempt']} from step {a.get('start_step')}: {a.get('cause')} at step {a.get('end_step')}"
                for a in attempts
            )
            print(f"  {trial.name}: {story}")


def trials_of(sweep: str) -> list[TrialDir]:
    from jepa_cluster.trial.directory import default_root

    root = default_root()
    plan = root.sweep(sweep).read_plan()
    return [root.trial(t["name"]) for t in plan["trials"]] if plan else []


def step(title: str) -> None:
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}", flush=True)


def program() -> str:
    """How a person types `jepa` here: by name when it is on the PATH, else by its path."""
    found = Path(sys.executable).with_name("jepa")
    on_path = any(Path(p or ".").resolve() == found.parent for p in os.environ.get("PATH", "").split(os.pathsep))
    return "jepa" if on_path or not found.exists() else os.path.relpath(found)


def jepa(*words: str, ok: tuple[int, ...] = (0,)) -> None:
    """Show the command, run it here, stop the demo when it fails."""
    print(f"$ jepa {shlex.join(words)}", flush=True)
    code = subprocess.call([sys.executable, "-m", "jepa_cluster", *words])
    if code not in ok:
        raise JepaError(
            f"`jepa {shlex.join(words)}` ended with code {code}",
            hint="mend what it says above and run the demo again: finished steps are not repeated",
        )
