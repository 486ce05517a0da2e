"""Processes by pid, never by name: which live, which belong to a node, how they end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def birth(pid: int) -> int:
    """Return when the process started, in kernel ticks; 0 when it is gone.

    A recycled pid has another birth.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    if state == "Z":
        return 0
    return int(rest[18])


def read_proc(pid: int, file: str) -> list[bytes]:
    """Return the words of /proc/<pid>/cmdline, environ or comm; none when the process has gone."""
    try:
        return (Path("/proc") / str(pid) / file).read_bytes().split(b"\0")
    except OSError:
        return []


def signal_all(number: int, pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill(pids: list[int]) -> None:
    """KILL, and wait until they are gone."""
    signal_all(signal.SIGKILL, pids)
    while any(birth(p) for p in pids):
        time.sleep(0.01)


def inside(init: int) -> list[int]:
    """Return all pids of the process namespace that `init` made; none when init is dead."""
    try:
        space = Path(f"/proc/{init}/ns/pid_for_children").readlink()
    except OSError:
        return []
    found: list[int] = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if (proc / "ns/pid").readlink() == space and birth(int(proc.name)):
                found.append(int(proc.name))
        except OSError:
            continue
    return found


def marked(*marks: set[str]) -> list[int]:
    """Return all pids whose environment at exec holds all words of one of these sets."""
    found: list[int] = []
    for proc in Path("/proc").glob("[0-9]*"):
        pid = int(proc.name)
        words = {os.fsdecode(word) for word in read_proc(pid, "environ")}
        if any(mark <= words for mark in marks) and birth(pid):
            found.append(pid)
    return found
