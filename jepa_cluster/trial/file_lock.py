"""Exclusive locks of files, which end with the process that holds them.

A filesystem without flock is an error: a marker file would survive a process that was killed.
"""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock

from jepa_cluster.errors import FilesystemFault

# How a filesystem refuses flock: Lustre without the mount option, NFS without its lock service.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def acquire(path: Path, timeout: float = -1) -> AcquireReturnProxy[FileLock]:
    """Lock a file; use the result in a `with` statement, which releases it.

    timeout: seconds to wait, -1: for as long as it takes. Raises filelock.Timeout, which is an
    OSError, and FilesystemFault where the filesystem has no locks.
    """
    try:
        return FileLock(path, timeout=timeout, fallback_to_soft=False).acquire()
    except (NotImplementedError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in NO_LOCKS:
            raise
        raise FilesystemFault(
            "the filesystem has no file locks (flock)",
            where=str(path),
            hint="ask for a mount with flock, or use another folder",
        ) from e
