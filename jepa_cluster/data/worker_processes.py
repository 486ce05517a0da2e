"""Worker processes that end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager

from jepa_cluster.errors import DataError
from jepa_cluster.trial.provenance import available_cores


@contextmanager
def processes(workers: int | None) -> Generator[ProcessPoolExecutor]:
    """Yield a pool whose processes die with their parent; one per core unless `workers` says.

    Raises DataError when a process of the pool is killed.
    """
    count = workers or available_cores()
    try:
        with ProcessPoolExecutor(count, initializer=die_with_parent) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenExecutor as error:
        raise DataError(
            "a worker process was killed, most often for memory",
            hint="the same command again, with fewer --workers",
        ) from error


def ignore_sigterm_of_others() -> None:
    """Make SIGTERM end this process only if its parent sent it, as Python does at its exit.

    Slurm sends SIGTERM to every process of a job step. To be called before any thread is started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def die_with_parent() -> None:
    """Make this process end when its parent ends, whatever it waits for; its parent gets SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
