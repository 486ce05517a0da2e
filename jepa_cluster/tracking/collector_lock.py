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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict, cast

from filelock import AcquireReturnProxy, FileLock, Timeout

from jepa_cluster.errors import TrackingError
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import SHARE_HINT

TTL = 60.0  # s


class Lease(TypedDict, total=False):
    """Contents of the lease file. t: Unix seconds of the last renewal."""

    host: str
    pid: int
    t: float
    uri: str


def lease_path(root: Root) -> Path:
    return root.path / "collector.lease"


def holder(root: Root) -> Lease | None:
    """Return the newest lease; None when it was given back."""
    with suppress(FileNotFoundError, ValueError):  # an empty file, too
        value: object = json.loads(lease_path(root).read_text())
        if isinstance(value, dict):
            return cast("Lease", value)
    return None


@contextmanager
def hold(root: Root, uri: str, patience: float = 5.0) -> Generator[Callable[[], None]]:
    """Be the only collector of this root; yields `renew`, which must be called once per TTL.

    Raises TrackingError when another collector of this host still runs after `patience` seconds, or
    when another host's lease is younger than `TTL`. `renew` raises it when another host took over
    because this process was suspended for longer than a TTL.
    """
    path = lease_path(root)
    host = socket.gethostname()
    written = 0.0  # monotonic seconds

    def renew() -> None:
        """Write the lease at most ten times per TTL."""
        nonlocal written
        if written and time.monotonic() - written < TTL / 10:
            return
        other = holder(root) if written else None
        if other and (other.get("host"), other.get("pid")) != (host, os.getpid()):
            raise TrackingError(
                f"another collector took over: {_describe(other)}",
                where=str(path),
                hint="this process was suspended; it collects again when the other ends",
            )
        _write(root, {"host": host, "pid": os.getpid(), "t": time.time(), "uri": uri})
        written = time.monotonic()

    root.path.mkdir(parents=True, exist_ok=True)
    with _acquire(root, patience):
        other = holder(root)
        if other and other.get("host") != host and time.time() - other.get("t", 0.0) < TTL:
            raise _refusal(root)
        renew()
        yield renew
        _write(root, None)


def _acquire(root: Root, patience: float) -> AcquireReturnProxy[FileLock]:
    path = lease_path(root)
    try:
        return file_lock.acquire(path, timeout=patience)
    except Timeout as e:
        raise _refusal(root) from e
    except PermissionError as e:
        what = "you may not collect for this root: only a user who can write to it"
        raise TrackingError(what, where=str(path), hint=SHARE_HINT) from e


def _refusal(root: Root) -> TrackingError:
    return TrackingError(
        f"another collector is running: {_describe(holder(root))}",
        where=str(lease_path(root)),
        hint="it collects for this root, so nothing is missing; or stop it",
    )


def _describe(lease: Lease | None) -> str:
    known: Lease = lease or {}
    return f"pid {known.get('pid', '?')} on {known.get('host', '?')}"


def _write(root: Root, lease: Lease | None) -> None:
    """Overwrite the lease in place: a new file would have another lock."""
    with lease_path(root).open("r+") as f:
        f.write(json.dumps(lease) if lease else "")
        f.truncate()
