"""One collector a root: a lock of the kernel on this host, a dated lease for the others.

The lock dies with its process, so a killed collector's successor starts at once. Where the filesystem does not
carry locks between hosts, the lease's date does: another host's lease younger than `TTL` is respected.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

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
    fd = os.open(lease_path(root), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + patience
        while not _free(root, fd):
            if time.monotonic() > deadline:
                other = holder(root) or {}
                raise TrackingError(
                    f"another collector is at work: pid {other.get('pid', '?')} on {other.get('host', '?')}",
                    where=str(lease_path(root)),
                    now="let it work ('jepa ui' and 'jepa sync --follow' collect by themselves) or stop it",
                )
            time.sleep(0.1)

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
                    now="this one stood still too long; it waits for its turn",
                )
            _write(fd, {**me, "t": time.time(), "uri": uri})
            written = time.monotonic()

        renew()
        yield renew
        _write(fd, {})
    finally:
        os.close(fd)  # which also drops the lock


def _free(root: Root, fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    other = holder(root)
    if other and other.get("host") != socket.gethostname() and time.time() - float(other.get("t", 0)) < TTL:
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    return True


def _write(fd: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode() if value else b""
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))
