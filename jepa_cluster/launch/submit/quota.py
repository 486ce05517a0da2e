"""The bytes that the user's disk quota leaves below a folder.

In: a folder. Out: bytes, or None where no tool answers. A quota of a project or folder needs no
tool: there the filesystem itself reports the free space (`trial.files.free_bytes`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

TIMEOUT = 5  # s; a file server may not answer
# A path, then kilobytes: used (with * above the soft limit), soft and hard limit
USAGE = re.compile(r"^\s*\S*/\S*\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", re.MULTILINE)


def bytes_left(folder: Path) -> int | None:
    """Return what the quota of the user leaves; None without a quota or without an answer."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    mount = folder
    while not mount.is_mount():
        mount = mount.parent
    left = _ask(("lfs", "quota", "-q", "-u", str(os.getuid()), str(folder)))
    if left is None:
        left = _ask(("quota", "-w", "-p", "-f", str(mount)))
    return left


def _ask(command: Iterable[str]) -> int | None:
    """Return what is left by the output. The exit code of `quota` is 1 above a limit."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = USAGE.search(done.stdout)
    if not found:
        return None
    used, soft, hard = map(int, found.groups())
    limit = soft or hard
    return max(limit - used, 0) * 1024 if limit else None
