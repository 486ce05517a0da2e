"""Bring MLflow up to date with the spools of a root, once or until stopped.

In: a root and the URI of a store. Out: what was sent. One process per root collects at a time.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from jepa_cluster.errors import JepaError, TrackingError
from jepa_cluster.tracking import collector_lock, mlflow_client, mlflow_runs
from jepa_cluster.tracking.collector import Collector, SyncReport
from jepa_cluster.trial.directory import Root

Log = Callable[[str], None]

RETRIES = 3  # further rounds of `sync` for what failed


def sync(
    root: Root,
    sweeps: Sequence[str] | None = None,
    uri: str | None = None,
    rebuild: bool = False,
) -> SyncReport:
    """Bring the store up to date once, as the root's only writer. Raises TrackingError.

    rebuild: archive the sweeps' experiments and create them again from the trial directories.
    """
    with _collector(root, uri) as collector:
        if rebuild:
            with mlflow_client.translate_errors(collector.uri):
                for sweep in sweeps or root.sweeps():
                    mlflow_runs.archive_experiment(collector.client, root, sweep)
        report = collector.sync_once(sweeps)
        for _ in range(RETRIES):
            if report.lost:
                report = collector.sync_once(sweeps).added_to(report)
    if sweeps and report.skipped:
        name, reason = next(iter(report.skipped.items()))
        raise TrackingError(reason, where=name)
    if report.lost:
        name, reason = next(iter(report.lost.items()))
        runs = report.trials + len(report.lost)
        raise TrackingError(
            f"{len(report.lost)} of {runs} runs were not brought up to date: {reason}",
            where=name,
            hint="nothing is lost, the spools stay; run 'jepa sync' again",
        )
    return report


@contextmanager
def _collector(root: Root, uri: str | None) -> Generator[Collector]:
    """Be the only collector of a root. Raises TrackingError."""
    client, uri = mlflow_client.connect(root, uri)
    with collector_lock.hold(root, uri) as renew:
        yield Collector(root, client, uri, renew)


def follow(
    root: Root,
    uri: str | None,
    every: float,
    stop: threading.Event,
    log: Log,
    sweeps: Sequence[str] | None = None,
) -> None:
    """Collect every `every` seconds until `stop` is set. An error is logged once and retried."""
    last_error = ""
    while not stop.is_set():
        try:
            with _collector(root, uri) as collector:
                gc.freeze()  # keeps mlflow's half a million objects out of each collection
                failed: set[str] = set()
                while not stop.is_set():
                    report = collector.sync_once(sweeps)
                    left = {*report.lost, *report.skipped}
                    if report.points or report.created or left - failed:
                        log(str(report))
                    last_error = ""
                    failed = left
                    stop.wait(every)
        except JepaError as e:
            if str(e) != last_error:
                last_error = str(e)
                log(f"jepa: {last_error}\n  next:  trying again every few seconds")
            stop.wait(2)
