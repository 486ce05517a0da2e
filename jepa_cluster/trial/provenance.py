"""Where an attempt ran and with what: the facts that make a result repeatable.

Does not import torch. Never fails.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jepa_cluster.errors import plural
from jepa_cluster.records import AttemptRecord

PACKAGES = (
    "torch",
    "timm",
    "numpy",
    "webdataset",
    "Pillow",
    "simplejpeg",
    "hydra-core",
    "submitit",
    "mlflow",
)
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
)


def commit(folder: Path) -> str:
    """'3f9c2ab' or '3f9c2ab+2' with two changed files; '' outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=20)

    try:
        head = git("rev-parse", "--short", "HEAD").strip()
        changed = len(git("status", "--porcelain").splitlines())
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+{changed}" if changed else head


def code_versions(attempts: Iterable[AttemptRecord]) -> str:
    """Return the code of all attempts, each once, in their order: '0e5c21 9f31aa'."""
    return " ".join(dict.fromkeys(filter(None, (record.get("code") for record in attempts))))


def mixed_code(codes: Iterable[str]) -> str:
    """Return a sentence when trials ran different code, else ''. codes: of `code_versions`."""
    count: Counter[str] = Counter()
    for code in codes:
        count.update(code.split())
    if len(count) < 2:
        return ""
    listed = [f"{code} ({plural(trials, 'trial')})" for code, trials in count.most_common()]
    return f"the finished trials ran {len(count)} versions of the code: {', '.join(listed)}"


def available_cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def node_name() -> str:
    """This machine as Slurm names it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def here() -> dict[str, Any]:
    """Host, process, command line, versions and the scheduler's job id when there is one."""
    job = {
        name.removeprefix("SLURM_").lower(): os.environ[name]
        for name in SLURM_VARIABLES
        if name in os.environ
    }
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "argv": sys.argv,
        "versions": versions(),
        "package": str(Path(__file__).parents[1]),
        **job,
    }
