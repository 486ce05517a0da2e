"""Looking after a root: what can go (gc), how to repeat a trial by hand (repro)."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from jepa_cluster.training.dist_env import local_environment
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

YOUNG = 3600  # s: what is younger may belong to somebody at work


def repro_script(trial: TrialDir) -> dict[str, Any]:
    """The exact command, snapshot and environment of the newest attempt, one process a rank."""
    attempts = trial.attempts()
    last = attempts[-1] if attempts else {}
    code = last.get("code") or _newest_code(trial.root)
    folder = trial.root.code / code
    python = (last.get("argv") or ["python"])[0] if str((last.get("argv") or [""])[0]).endswith("python") else "python"
    world = int(last.get("world", 1))
    start = f"cd {shlex.quote(str(folder))} && PYTHONPATH={shlex.quote(str(folder))}"
    command = f"{python} -m jepa_cluster.launch.worker.main {shlex.quote(str(trial.path))}"
    return {
        "trial": trial.name,
        "code": code,
        "versions": last.get("versions", {}),
        "commands": [f"{start} {_assignments(rank, world)} {command}" for rank in range(world)],
    }


def _assignments(rank: int, world: int) -> str:
    """RANK=0 WORLD_SIZE=2 ..., as a shell takes them before a command."""
    variables = local_environment(rank, world, "by-hand")
    return " ".join(f"{name}={value}" for name, value in variables.items())


def garbage(root: Root) -> list[tuple[Path, str]]:
    """What nothing refers to any more, and why it may go. Checkpoints of unfinished trials are never among it."""
    plans = [plan for s in root.sweeps() if (plan := root.sweep(s).read_plan())]
    trials = [TrialDir(p) for p in root.trials.glob("[!.]*")]
    used = {p["code"] for p in plans} | {a.get("code") for t in trials for a in t.attempts()[-1:]}
    used |= {(read_json(p) or {}).get("code") for p in root.path.glob("sweeps/*/arrays/*.json")}
    used |= {(read_json(p) or {}).get("code") for p in root.path.glob("local/*/*.json")}
    found = [(p, "a snapshot that no sweep or attempt uses") for p in root.code.glob("[!.]*") if p.name not in used]
    found += [(p, "left by a submission that died") for p in [*root.trials.glob(".*"), *root.code.glob(".*")]]
    found += [(p, "an intent that Slurm never saw") for p in root.path.glob("sweeps/*/intents/*.void")]
    branches = [t for p in plans for t in p["trials"] if t.get("trunk") and not root.trial(t["name"]).done.exists()]
    awaited = {(t["trunk"], t["begins"]) for t in branches}
    for trial in trials:
        if trial.done.exists():
            old = [s for s in trial.committed()[:-1] if (trial.name, s) not in awaited]
            found += [(trial.checkpoint(s), "not the last checkpoint of a finished trial") for s in old]
    for canary in (TrialDir(p) for p in root.canaries.glob("canary.*")):
        if canary.succeeded() or canary.failed.exists():
            found += [(canary.checkpoint(s), "of a canary that has ended") for s in canary.committed()]
    return [(p, reason) for p, reason in found if time.time() - p.stat().st_mtime > YOUNG]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes below a path."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def _newest_code(root: Root) -> str:
    plans = [plan for s in root.sweeps() if (plan := root.sweep(s).read_plan())]
    return max(plans, key=lambda p: p["submitted"])["code"] if plans else ""
