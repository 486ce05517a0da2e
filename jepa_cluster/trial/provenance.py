"""Where an attempt ran and with what: the facts that make a result repeatable. Torch-free, never fails."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "numpy", "webdataset", "Pillow", "simplejpeg", "hydra-core", "submitit", "mlflow")


def commit(folder: Path) -> str:
    """'3f9c2ab' or '3f9c2ab+2' with two changed files; '' outside a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = len(git("status", "--porcelain").splitlines()) if head else 0
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{head}+{changed}" if changed else head


def versions() -> dict[str, str]:
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def node_name() -> str:
    """This machine as Slurm names it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def here() -> dict[str, Any]:
    """Host, process, command line, versions and the scheduler's job id when there is one."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "argv": sys.argv,
        "versions": versions(),
        "package": str(Path(__file__).parents[1]),
    }
    for key in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_JOB_NODELIST",
        "SLURM_JOB_PARTITION",
    ):
        if key in os.environ:
            facts[key.removeprefix("SLURM_").lower()] = os.environ[key]
    return facts
