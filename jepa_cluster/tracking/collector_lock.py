"""One collector per root: a file lock on this host, a dated lease for other hosts.

The kernel drops the lock when its process dies, so the next collector starts at once. Where the
filesystem does not carry locks between hosts, another host's lease younger than `TTL` is respected.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, cast

from filelock import AcquireReturnProxy, FileLock, Timeout

from jepa_cluster.errors import TrackingError
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import SHARE_HINT

TTL = 60.0  # s


class Lease(TypedDict):
    """Contents of the lease file. t: Unix seconds of the last renewal."""

    host: str
    pid: int
    t: float
    uri: str


def lease_path(root: Root) -> Path:
    return root.path / "collector.lease"


def holder(root: Root) -> Lease | None:
    """Return the newest lease; None when it was given back."""
    try:
        value: object = json.loads(lease_path(root).read_text() or "{}")
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(value, dict) or not value:
        return None
    return cast("Lease", value)


@contextmanager
def hold(root: Root, uri: str, patience: float = 5.0) -> Generator[Callable[[], None]]:
    """Be the only collector of this root; yields `renew`, which must be called once per TTL.

    Raises TrackingError when another collector still runs after `patience` seconds. `renew` raises
    it when another host took over because this process was suspended for longer than a TTL.
    """
    root.path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    while (lock := _acquire(root)) is None:
        if time.monotonic() > deadline:
            raise TrackingError(
                f"another collector is running: {_describe(holder(root))}",
                where=str(lease_path(root)),
                hint="it collects for this root, so nothing is missing; or stop it",
            )
        time.sleep(0.1)
    with lock:
        renew = _Renewal(root, uri)
        renew()
        yield renew
        _write(root, None)


class _Renewal:
    """Writes the lease at most ten times per TTL."""

    def __init__(self, root: Root, uri: str) -> None:
        self.root = root
        self.uri = uri
        self.host = socket.gethostname()
        self.pid = os.getpid()
        self.written = 0.0  # monotonic seconds

    def __call__(self) -> None:
        now = time.monotonic()
        if self.written and now - self.written < TTL / 10:
            return
        other = holder(self.root) if self.written else None
        if other and (other.get("host"), other.get("pid")) != (self.host, self.pid):
            raise TrackingError(
                f"another collector took over: {_describe(other)}",
                where=str(lease_path(self.root)),
                hint="this process was suspended; it collects again when the other ends",
            )
        _write(self.root, {"host": self.host, "pid": self.pid, "t": time.time(), "uri": self.uri})
        self.written = time.monotonic()


def _describe(lease: Lease | None) -> str:
    if lease is None:
        return "pid ? on ?"
    return f"pid {lease.get('pid', '?')} on {lease.get('host', '?')}"


def _acquire(root: Root) -> AcquireReturnProxy[FileLock] | None:
    """Take the lock, unless this host has it or another host's lease is younger than `TTL`."""
    path = lease_path(root)
    try:
        held = file_lock.acquire(path, timeout=0)
    except Timeout:
        return None
    except PermissionError as e:
        what = "you may not collect for this root: only a user who can write to it"
        raise TrackingError(what, where=str(path), hint=SHARE_HINT) from e
    other = holder(root)
    if other and other.get("host") != socket.gethostname():
        age = time.time() - float(other.get("t", 0))
        if age < TTL:
            held.lock.release()
            return None
    return held


def _write(root: Root, lease: Lease | None) -> None:
    """Overwrite the lease in place: a new file would have another lock."""
    with lease_path(root).open("r+") as f:
        f.write(json.dumps(lease) if lease else "")
        f.truncate()
