"""Find what can be removed below a root (gc), and how to repeat a trial by hand (repro)."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.records import RankCommands, SweepPlan
from jepa_cluster.training.dist_env import local_environment
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

MIN_AGE = 3600  # seconds: what is younger may be in use


def repro_script(trial: TrialDir) -> RankCommands:
    """Return the commands, code snapshot and versions that repeat the newest attempt."""
    last = next(reversed(trial.attempts()), {})
    code = last.get("code", "")
    if not code:
        for plan in sorted(_plans(trial.root), key=lambda plan: plan["submitted"]):
            code = plan["code"]
    folder = shlex.quote(str(trial.root.code / code))
    command = f"python -m jepa_cluster.launch.worker.main {shlex.quote(str(trial.path))}"
    world = last.get("world", 1)
    commands: list[str] = []
    for rank in range(world):
        variables = {"PYTHONPATH": folder, **local_environment(rank, world, "by-hand")}
        assignments = " ".join(f"{name}={value}" for name, value in variables.items())
        commands.append(f"cd {folder} && {assignments} {command}")
    versions = last.get("versions", {})
    return {"trial": trial.name, "code": code, "versions": versions, "commands": commands}


def garbage(root: Root) -> list[tuple[Path, str]]:
    """Return what nothing refers to any more and this user may remove, each with the reason.

    Never includes a checkpoint of an unfinished trial.
    """
    now = time.time()
    found: list[tuple[Path, str]] = []
    for path, reason in _unused(root):
        removable = os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)
        if removable and now - path.stat().st_mtime > MIN_AGE:
            found.append((path, reason))
    return found


def _unused(root: Root) -> Iterator[tuple[Path, str]]:
    plans = _plans(root)
    trials = [TrialDir(path) for path in root.trials.glob("[!.]*")]
    used_code = _used_code(root, plans, trials)
    for path in root.code.glob("[!.]*"):
        if path.name not in used_code:
            yield path, "a snapshot that no sweep or attempt uses"
    for path in root.path.glob("compiled/*/*"):
        if path.name not in used_code:
            yield path, "compiled from a snapshot that no sweep or attempt uses"
    for folder in (root.trials, root.code):
        for path in folder.glob(".*"):
            yield path, "left by a submission that died"
    for path in root.path.glob("sweeps/*/intents/*.void"):
        yield path, "an intent that Slurm never saw"
    for trial in trials:
        if trial.done.exists():
            for step in trial.committed()[:-1]:
                if not _keeps(trial, step):
                    text = "neither the last checkpoint nor a milestone of a finished trial"
                    yield trial.checkpoint(step), text
    for canary in map(TrialDir, root.canaries.glob("canary.*")):
        if canary.succeeded() or canary.failed.exists():
            for step in canary.committed():
                yield canary.checkpoint(step), "of a canary that has ended"


def _plans(root: Root) -> list[SweepPlan]:
    plans = [root.sweep(name).read_plan() for name in root.sweeps()]
    return [plan for plan in plans if plan]


def _used_code(root: Root, plans: list[SweepPlan], trials: list[TrialDir]) -> set[str | None]:
    """Return the ids of the snapshots that a sweep, an array, an entry or an attempt uses."""
    used: set[str | None] = {plan["code"] for plan in plans}
    for trial in trials:
        for last in trial.attempts()[-1:]:
            used.add(last.get("code"))
    for pattern in ("sweeps/*/arrays/*.json", "local/*/*.json"):
        for path in root.path.glob(pattern):
            used.add((read_json(path) or {}).get("code"))
    return used


def _keeps(trial: TrialDir, step: int) -> bool:
    """Return whether a checkpoint is a milestone. If the config is unreadable, it may be one."""
    try:
        return trial.read_config(older=True).runtime.keeps(step)
    except JepaError:
        return True


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
