"""The verbs for results: sync, ui, scaling, report.

mlflow and plotly are imported when a handler runs.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.completers import attach, sweeps
from jepa_cluster.cli.verb import finish, print_json, root_of, tell, verb
from jepa_cluster.errors import ExitCode, TrackingError
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from jepa_cluster.report.analysis import Analysis
    from jepa_cluster.report.next_trials import NextTrials

METRIC_HELP = "the error to show (default: the class probe's)"


def add(verbs: Verbs) -> None:
    _add_sync(verbs)
    _add_ui(verbs)
    _add_scaling(verbs)
    _add_report(verbs)


def _add_sync(verbs: Verbs) -> None:
    text = "bring MLflow up to date with the spools: settled steps, each exactly once"
    p = verb(verbs, "sync", sync, text)
    text = "sweeps to ship (default: all below $JEPA_ROOT)"
    p.add_argument("sweeps", nargs="*", metavar="SWEEP", help=text)
    p.add_argument("--follow", action="store_true", help="continue until interrupted")
    text = "the store (default: $MLFLOW_TRACKING_URI, else a SQLite file below $JEPA_ROOT)"
    p.add_argument("--uri", help=text)
    _add_every(p, "seconds between rounds of --follow")
    text = "archive the sweeps' experiments and create them again from the trial directories"
    p.add_argument("--rebuild", action="store_true", help=text)


def _add_ui(verbs: Verbs) -> None:
    text = "open MLflow on this machine, with the collector and the Scaling page inside"
    p = verb(verbs, "ui", ui, text, document=False)
    text = "address to listen on (default: this machine only)"
    p.add_argument("--host", default="127.0.0.1", help=text)
    p.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    text = "the store, as for sync; a server's address: collect into it and print its links"
    p.add_argument("--uri", help=text)
    _add_every(p, "seconds between two reads of the spools")


def _add_scaling(verbs: Verbs) -> None:
    text = "the scaling figure of a sweep and its law; `scaling next`: what to run next"
    p = verb(verbs, "scaling", scaling, text)
    text = "[next] and the sweep's name (next: default the newest)"
    attach(p.add_argument("sweep", nargs="+", help=text), sweeps)
    p.add_argument("--metric", help=METRIC_HELP)
    text = "the x-axis: flops_total, flops_encoder, images_seen"
    p.add_argument("--compute", default="flops_total", help=text)
    text = "next: what the proposed trials may cost together"
    p.add_argument("--gpu-hours", type=float, metavar="H", help=text)
    text = "next: the largest compute to propose (default: 10 x the largest)"
    p.add_argument("--target", type=float, metavar="C", help=text)
    text = "next: the sweep file to write (default: sweeps/<sweep>_next.yaml)"
    p.add_argument("--out", metavar="FILE", help=text)
    text = "write the files, do not send them to MLflow"
    p.add_argument("--offline", action="store_true", help=text)
    p.add_argument("--uri", help="the store, as for sync")


def _add_report(verbs: Verbs) -> None:
    text = "a sweep's question and answer as a Markdown page with figure and numbers"
    p = verb(verbs, "report", report, text)
    attach(p.add_argument("sweep", help="the sweep's name"), sweeps)
    p.add_argument("--metric", help=METRIC_HELP)
    text = "where to write (default: the sweep's folder below the root; ours lie in docs/results)"
    p.add_argument("--into", type=Path, metavar="FOLDER", help=text)


def _add_every(p: argparse.ArgumentParser, text: str) -> None:
    p.add_argument("--every", type=float, default=1.0, metavar="S", help=text)


# ---- tracking


def sync(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from jepa_cluster.tracking import mlflow_client, sync

    root = root_of(args)
    names = args.sweeps or None
    if args.follow:
        if args.json:
            what = "--follow has no end, so there is no document"
            raise TrackingError(what, hint="leave out --follow or --json")
        uri = args.uri or mlflow_client.default_uri(root)
        sync.follow(root, uri, args.every, threading.Event(), print_line, names)
        return ExitCode.DONE
    done = sync.sync(root, names, args.uri, args.rebuild)
    document = {**asdict(done), "uri": mlflow_client.redacted(done.uri)}
    return finish(args, document, str(done))


@contextmanager
def collecting(root: Root, sweep: str) -> Generator[None]:
    """Run the collector beside another command, and ship what is left at the end.

    It prints to stderr.
    """
    from jepa_cluster.errors import JepaError
    from jepa_cluster.tracking import mlflow_client, sync

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    stop = threading.Event()
    uri = mlflow_client.default_uri(root)
    collector = threading.Thread(target=sync.follow, args=(root, uri, 1.0, stop, log, [sweep]))
    collector.start()
    try:
        yield
    finally:
        stop.set()
        collector.join()
    try:
        log(str(sync.sync(root, [sweep])))
    except JepaError as e:
        log(f"jepa: {e}")


def print_line(line: str) -> None:
    print(line, flush=True)


def ui(args: argparse.Namespace) -> int:
    from jepa_cluster.report import ui_server

    ui_server.serve(root_of(args), args.uri, args.host, args.port, args.every, print_line)
    return ExitCode.DONE


# ---- reports


def scaling(args: argparse.Namespace) -> int:
    from jepa_cluster.report import analysis, html
    from jepa_cluster.results import tables

    root = root_of(args)
    if args.sweep[0] == "next" or len(args.sweep) > 1:
        return propose(args)
    found = analysis.analyse(tables.load(root, args.sweep[0]), args.metric, args.compute)
    folder = html.write(root, found)
    files = {"page": str(folder / "scaling.html"), "picture": str(folder / "scaling.png")}
    document = read_json(folder / "scaling.json") or {}
    if not print_json(args, {**document, "files": files}):
        _show(found)
        for name, path in files.items():
            print_line(f"{name + ':':8} {path}")
    if not args.offline:
        from jepa_cluster.tracking import sync

        tell(args, str(sync.sync(root, [found.sweep.name], args.uri)))
    return ExitCode.DONE


def _show(found: Analysis) -> None:
    """Print the table of trials and the findings."""
    from rich.console import Console
    from rich.table import Table

    from jepa_cluster.report import analysis, html

    console = Console(width=max(Console().width, 110))
    title = f"{found.error}, of the randomly initialised and of the trained encoder"
    table = Table(title=f"{found.sweep.name}: {title}")
    for column in html.trial_columns(found):
        justify = "left" if column in ("trial", "state") else "right"
        table.add_column(column, justify=justify)
    for row in found.trials:
        table.add_row(*html.trial_cells(found, row))
    console.print(table)
    for line in analysis.summary(found):
        console.print(line, markup=False, highlight=False)


def propose(args: argparse.Namespace) -> int:
    """Write a sweep file of what to run next, its cost and its predicted results."""
    from dataclasses import asdict

    from jepa_cluster.report import analysis, next_trials
    from jepa_cluster.report.power_law import NotEnoughData
    from jepa_cluster.results import tables

    root = root_of(args)
    sweep = tables.load(root, _source_sweep(args, root))
    found = analysis.analyse(sweep, args.metric, args.compute)
    proposed = next_trials.design(found, args.gpu_hours, args.target)
    if isinstance(proposed, NotEnoughData):
        raise TrackingError(f"nothing can be proposed from {sweep.name}: {proposed.reason}")
    folder = Path("sweeps") if Path("sweeps").is_dir() else Path()
    path = Path(args.out or folder / f"{sweep.name}_next.yaml")
    if path.exists() or root.sweep(path.stem).path.exists():
        hint = "--out another name: predictions are made once"
        raise TrackingError(f"a sweep {path.stem} exists", where=str(path), hint=hint)
    _write_proposal(root, proposed, path)
    if not print_json(args, {**asdict(proposed), "file": str(path)}):
        for line in next_trials.describe(proposed):
            print_line(line)
        after = f"when it is done: jepa scaling {path.stem}"
        print_line(f"written: {path}; next: jepa plan {path}; {after}")
    return ExitCode.DONE


def _source_sweep(args: argparse.Namespace, root: Root) -> str:
    """Return the sweep to continue: the named one, else the newest."""
    from jepa_cluster.results import tables

    verb_, *names = args.sweep
    command = f"jepa scaling {' '.join(args.sweep)}"
    hint = "jepa scaling next S --gpu-hours H"
    if verb_ != "next" or len(names) > 1:
        raise TrackingError(f"not understood: {command}", hint=hint)
    if args.gpu_hours is None:
        raise TrackingError(f"{command} wants --gpu-hours: what may the trials cost?", hint=hint)
    submitted: dict[str, int] = {}
    for name in names or root.sweeps():
        submitted[name] = tables.read_plan(root, name).get("submitted") or 0
    return max(submitted, key=lambda name: submitted[name], default="?")


def _write_proposal(root: Root, proposed: NextTrials, path: Path) -> None:
    """Write the sweep file, and predicted.json below the root."""
    from dataclasses import asdict

    from jepa_cluster.report import next_trials
    from jepa_cluster.sweep import sweep_file

    source = sweep_file.load(root.sweep(proposed.source).sweep_file)
    text = sweep_file.to_yaml(next_trials.to_sweep(proposed, source, path.stem))
    hours = f"about {proposed.cost:.3g} GPU-hours by what {proposed.source} took"
    cost = f"{hours}; jepa plan says what they will take here"
    write_atomic(path, f"# Proposed by jepa scaling next.\ncost: {cost}\n{text}")
    folder = root.sweep(path.stem)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.predicted, asdict(proposed))


def report(args: argparse.Namespace) -> int:
    from jepa_cluster.report import analysis, markdown
    from jepa_cluster.results import tables

    root = root_of(args)
    sweep = tables.load(root, args.sweep)
    found = analysis.analyse(sweep, args.metric)
    path = markdown.write(found, args.into or root.sweep(sweep.name).path)
    files = {
        "page": str(path),
        "picture": str(path.with_suffix(".png")),
        "table": str(path.with_suffix(".csv")),
    }
    return finish(args, {"sweep": sweep.name, "files": files}, f"written: {path}")
