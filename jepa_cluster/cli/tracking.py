"""The verbs of looking: sync, ui, scaling. mlflow, plotly and scipy are imported when a handler runs."""

from __future__ import annotations

import argparse
import time

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import ExitCode, TrackingError
from jepa_cluster.trial.layout import default_root


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("sync", help="bring MLflow up to date with the spools: settled steps, each exactly once")
    p.add_argument("sweeps", nargs="*", metavar="SWEEP", help="sweeps to ship (default: all below $JEPA_ROOT)")
    p.add_argument("--follow", action="store_true", help="go on until stopped")
    p.add_argument("--uri", help="the store (default: $MLFLOW_TRACKING_URI, else a SQLite file below $JEPA_ROOT)")
    p.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between rounds of --follow")
    p.set_defaults(run=sync)


def sync(a: argparse.Namespace) -> int:
    from jepa_cluster.tracking import collect, lease, store

    root = default_root()
    if not a.follow:
        print(collect.sync(root, a.sweeps or None, a.uri))
        return ExitCode.DONE
    client, uri = store.connect(root, a.uri)
    with lease.hold(root, uri) as renew:
        collector = collect.Collector(root, client, uri)
        while True:
            try:
                report = collector.round(a.sweeps or None)
                if report.points or report.created:
                    print(report, flush=True)
            except TrackingError as e:
                print(f"jepa: {e}\n  next:  trying again", flush=True)
                time.sleep(5)
            renew()
            time.sleep(a.every)
