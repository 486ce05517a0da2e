"""The verbs of looking: sync, ui, scaling. mlflow, plotly and scipy are imported when a handler runs."""

from __future__ import annotations

import argparse
import threading

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.layout import default_root


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("sync", help="bring MLflow up to date with the spools: settled steps, each exactly once")
    p.add_argument("sweeps", nargs="*", metavar="SWEEP", help="sweeps to ship (default: all below $JEPA_ROOT)")
    p.add_argument("--follow", action="store_true", help="go on until stopped")
    p.add_argument("--uri", help="the store (default: $MLFLOW_TRACKING_URI, else a SQLite file below $JEPA_ROOT)")
    p.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between rounds of --follow")
    p.add_argument("--rebuild", action="store_true", help="make the sweeps' experiments again from the trial folders")
    p.set_defaults(run=sync)

    p = verbs.add_parser("ui", help="open MLflow on this machine, with the collector and the Scaling page inside")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    p.add_argument("--uri", help="the store, as for sync; a server's address: collect into it and print its links")
    p.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks at the spools")
    p.set_defaults(run=ui)

    p = verbs.add_parser("scaling", help="the scaling figure of a sweep: probe and loss against FLOPs, and its law")
    p.add_argument("sweep", help="the sweep's name")
    p.add_argument("--metric", help="the error to show (default: the class probe's)")
    p.add_argument("--compute", default="flops_total", help="the x-axis: flops_total, flops_encoder, images_seen")
    p.add_argument("--offline", action="store_true", help="write the files, do not send them to MLflow")
    p.add_argument("--uri", help="the store, as for sync")
    p.set_defaults(run=scaling)

    p = verbs.add_parser("report", help="a sweep's question and answer as a Markdown page with figure and numbers")
    p.add_argument("sweep", help="the sweep's name")
    p.add_argument("--metric", help="the error to show (default: the class probe's)")
    p.add_argument("--into", default="docs/results", metavar="FOLDER", help="where to write (default: docs/results)")
    p.set_defaults(run=report)


def sync(a: argparse.Namespace) -> int:
    from jepa_cluster.tracking import collect, store

    root = default_root()
    if a.follow:
        collect.follow(root, a.uri or store.default_uri(root), a.every, threading.Event(), say, a.sweeps or None)
    else:
        say(str(collect.sync(root, a.sweeps or None, a.uri, a.rebuild)))
    return ExitCode.DONE


def say(line: str) -> None:
    print(line, flush=True)


def ui(a: argparse.Namespace) -> int:
    from jepa_cluster.report import serve

    serve.ui(default_root(), a.uri, a.host, a.port, a.every, say)
    return ExitCode.DONE


def scaling(a: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from jepa_cluster.report import page
    from jepa_cluster.report import scaling as report
    from jepa_cluster.tracking import curves

    root = default_root()
    sweep = curves.load(root, a.sweep)
    study = report.study(sweep, a.metric, a.compute)
    folder = page.write(root, sweep, study)
    console = Console(width=max(Console().width, 110))
    table = Table(title=f"{a.sweep}: {study.error}, of the randomly initialised and of the trained encoder")
    for column in page.columns(study):
        table.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for row in study.finals:
        table.add_row(*page.cells(study, row))
    console.print(table)
    for line in report.summary(study):
        console.print(line, markup=False, highlight=False)
    console.print(f"page:    {folder / 'scaling.html'}\npicture: {folder / 'scaling.png'}", highlight=False)
    if not a.offline:
        from jepa_cluster.tracking import collect

        say(str(collect.sync(root, [a.sweep], a.uri)))
    return ExitCode.DONE


def report(a: argparse.Namespace) -> int:
    from pathlib import Path

    from jepa_cluster.report import results
    from jepa_cluster.report import scaling as studies
    from jepa_cluster.tracking import curves

    sweep = curves.load(default_root(), a.sweep)
    say(f"written: {results.write(sweep, studies.study(sweep, a.metric), Path(a.into))}")
    return ExitCode.DONE
