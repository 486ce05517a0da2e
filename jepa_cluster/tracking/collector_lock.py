"""One collector a root: a lock of the kernel on this host, a dated lease for the others.

The lock dies with its process, so a killed collector's successor starts at once. Where the filesystem does not
carry locks between hosts, the lease's date does: another host's lease younger than `TTL` is respected.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from jepa_cluster.errors import TrackingError
from jepa_cluster.trial.layout import Root

TTL = 60.0  # s


def lease_path(root: Root) -> Path:
    return root.path / "collector.lease"


def holder(root: Root) -> dict[str, Any] | None:
    """Who holds the lease, or held it last: {host, pid, t, uri}. None when nobody does."""
    try:
        value: object = json.loads(lease_path(root).read_text() or "{}")
    except (FileNotFoundError, ValueError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) and value else None


@contextmanager
def hold(root: Root, uri: str, patience: float = 5.0) -> Generator[Callable[[], None]]:
    """Be the only collector of this root; yields `renew`, to be called at least once a TTL and cheap to call often.

    Raises TrackingError when another one is still at work after `patience` seconds, and from `renew` when another
    host took over because we stood still for longer than a TTL.
    """
    root.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lease_path(root), timeout=0, fallback_to_soft=False)  # a soft one would overwrite the lease
    deadline = time.monotonic() + patience
    while not _free(root, lock):
        if time.monotonic() > deadline:
            other = holder(root) or {}
            raise TrackingError(
                f"another collector is running: pid {other.get('pid', '?')} on {other.get('host', '?')}",
                where=str(lease_path(root)),
                hint="let it work ('jepa ui' and 'jepa sync --follow' collect by themselves) or stop it",
            )
        time.sleep(0.1)
    try:
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        written = 0.0

        def renew() -> None:
            nonlocal written
            if time.monotonic() - written < TTL / 10 and written:
                return
            other = holder(root) if written else None
            if other and {k: other.get(k) for k in me} != me:
                raise TrackingError(
                    f"another collector took over: pid {other.get('pid', '?')} on {other.get('host', '?')}",
                    where=str(lease_path(root)),
                    hint="this one stood still too long; it waits for its turn",
                )
            _write(root, {**me, "t": time.time(), "uri": uri})
            written = time.monotonic()

        renew()
        yield renew
        _write(root, {})
    finally:
        lock.release()


def _free(root: Root, lock: FileLock) -> bool:
    """Take the lock, unless a process of this host has it or another host's lease is younger than `TTL`."""
    try:
        lock.acquire()
    except Timeout:
        return False
    other = holder(root)
    if other and other.get("host") != socket.gethostname() and time.time() - float(other.get("t", 0)) < TTL:
        lock.release()
        return False
    return True


def _write(root: Root, value: dict[str, Any]) -> None:
    """Overwrite the lease in place: a new file would have another lock."""
    with lease_path(root).open("r+") as f:
        f.write(json.dumps(value) if value else "")
        f.truncate()
