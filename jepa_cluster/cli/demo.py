"""`jepa demo`: all steps from images to a scaling figure on this machine.

Each step is a real `jepa` command in its own process, and is printed before it runs. A second run
shows that each command finds its work done.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import Args, command
from jepa_cluster.errors import JepaError

SWEEP = "demo"  # a shipped sweep
NEEDED = ("torch", "timm", "webdataset", "mlflow", "plotly", "matplotlib")
IMAGES = "data/demo-images"
SHARDS = "data/demo"


def add(verbs: Verbs) -> None:
    command(verbs, demo, root=False, document=False)


def demo(_args: Args) -> int:
    """Run all steps on this machine: images, shards, sweep, MLflow, scaling figure."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        what = f"the demo trains and draws, which needs {', '.join(missing)}"
        raise JepaError(what, hint="pip install 'jepa-cluster[all]'")
    start = time.monotonic()
    print_title("1/6  Draw a small image data set")
    jepa("shards", "synthetic", IMAGES, "--val", "1000")
    print_title("2/6  Pack it into shards and verify them, as for ImageNet")
    jepa("shards", "build", IMAGES, SHARDS)
    jepa("shards", "verify", SHARDS)
    print_title("3/6  Show what the sweep costs, and submit it")
    jepa("plan", SWEEP, allowed=(0, 3))
    jepa("submit", SWEEP, "--yes")
    print_title("4/6  Train; one trial is interrupted on purpose and resumes")
    if not is_done(SWEEP):
        jepa("watch", SWEEP, "--until-half")
        jepa("requeue", SWEEP, "state=running", "--yes")
    jepa("watch", SWEEP, "--until-done")
    jepa("status", SWEEP)
    print_title("5/6  Write every settled step to MLflow")
    jepa("sync", SWEEP)
    print_title("6/6  Compare the models at equal compute")
    jepa("scaling", SWEEP)
    seconds = time.monotonic() - start
    print(f"\nDone in {seconds:.0f} s. Open the results in MLflow: run\n\n    {program()} ui\n")
    print("and open the address that it prints, which has a token for you alone.")
    return 0


def is_done(sweep: str) -> bool:
    from jepa_cluster.trial.directory import default_root

    root = default_root()
    return all(root.trial(trial["name"]).done.exists() for trial in root.sweep(sweep).planned())


def print_title(title: str) -> None:
    print(f"\n{title}", flush=True)


def program() -> str:
    """Return what the user types to run jepa: its name if it is on the PATH, else its path."""
    if shutil.which("jepa"):
        return "jepa"
    return os.path.relpath(Path(sys.executable).with_name("jepa"))


def jepa(*words: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Print a command and run it. Raises JepaError for another exit code than the allowed ones."""
    line = f"jepa {shlex.join(words)}"
    print(f"$ {line}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "JEPA_DATA"}
    code = subprocess.call([sys.executable, "-m", "jepa_cluster", *words], env=environment)
    if code not in allowed:
        hint = "fix the cause and run the demo again; finished steps are not repeated"
        raise JepaError(f"`{line}` ended with code {code}", hint=hint)
