"""The verbs of looking: sync, ui, scaling. mlflow, plotly and scipy are imported when a handler runs."""

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
from jepa_cluster.trial.layout import Root, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from jepa_cluster.report.analysis import Study


def add(verbs: Verbs) -> None:
    p = verb(verbs, "sync", sync, "bring MLflow up to date with the spools: settled steps, each exactly once")
    p.add_argument("sweeps", nargs="*", metavar="SWEEP", help="sweeps to ship (default: all below $JEPA_ROOT)")
    p.add_argument("--follow", action="store_true", help="go on until stopped")
    p.add_argument("--uri", help="the store (default: $MLFLOW_TRACKING_URI, else a SQLite file below $JEPA_ROOT)")
    p.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between rounds of --follow")
    p.add_argument("--rebuild", action="store_true", help="make the sweeps' experiments again from the trial folders")

    told = "open MLflow on this machine, with the collector and the Scaling page inside"
    p = verb(verbs, "ui", ui, told, document=False)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    p.add_argument("--uri", help="the store, as for sync; a server's address: collect into it and print its links")
    p.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks at the spools")

    p = verb(verbs, "scaling", scaling, "the scaling figure of a sweep and its law; `scaling next`: what to run next")
    told = "[next] and the sweep's name (next: default the newest)"
    attach(p.add_argument("sweep", nargs="+", help=told), sweeps)
    p.add_argument("--metric", help="the error to show (default: the class probe's)")
    p.add_argument("--compute", default="flops_total", help="the x-axis: flops_total, flops_encoder, images_seen")
    p.add_argument("--gpu-hours", type=float, metavar="H", help="next: what the proposed trials may cost together")
    p.add_argument(
        "--target", type=float, metavar="C", help="next: the largest compute to propose (default: 10 x the largest)"
    )
    p.add_argument("--out", metavar="FILE", help="next: the sweep file to write (default: sweeps/<sweep>_next.yaml)")
    p.add_argument("--offline", action="store_true", help="write the files, do not send them to MLflow")
    p.add_argument("--uri", help="the store, as for sync")

    p = verb(verbs, "report", report, "a sweep's question and answer as a Markdown page with figure and numbers")
    attach(p.add_argument("sweep", help="the sweep's name"), sweeps)
    p.add_argument("--metric", help="the error to show (default: the class probe's)")
    told = "where to write (default: the sweep's folder below the root; ours lie in docs/results)"
    p.add_argument("--into", type=Path, metavar="FOLDER", help=told)


def sync(a: argparse.Namespace) -> int:
    from dataclasses import asdict

    from jepa_cluster.tracking import mlflow_client, sync

    root = root_of(a)
    if a.follow:
        if a.json:
            raise TrackingError("--follow has no end, so there is no document", hint="leave out --follow or --json")
        sync.follow(root, a.uri or mlflow_client.default_uri(root), a.every, threading.Event(), say, a.sweeps or None)
        return ExitCode.DONE
    done = sync.sync(root, a.sweeps or None, a.uri, a.rebuild)
    return finish(a, {**asdict(done), "uri": mlflow_client.public(done.uri)}, str(done))


@contextmanager
def collecting(root: Root, sweep: str) -> Generator[None]:
    """The collector beside something else; at the end it ships what is left. Its words go to stderr."""
    from jepa_cluster.errors import JepaError
    from jepa_cluster.tracking import mlflow_client, sync

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    stop = threading.Event()
    work = threading.Thread(target=sync.follow, args=(root, mlflow_client.default_uri(root), 1.0, stop, tell, [sweep]))
    work.start()
    try:
        yield
    finally:
        stop.set()
        work.join()
    try:
        tell(str(sync.sync(root, [sweep])))
    except JepaError as e:
        tell(f"jepa: {e}")


def say(line: str) -> None:
    print(line, flush=True)


def ui(a: argparse.Namespace) -> int:
    from jepa_cluster.report import ui_server

    ui_server.ui(root_of(a), a.uri, a.host, a.port, a.every, say)
    return ExitCode.DONE


def scaling(a: argparse.Namespace) -> int:
    from jepa_cluster.report import analysis as report
    from jepa_cluster.report import html
    from jepa_cluster.results import tables

    root = root_of(a)
    if a.sweep[0] == "next" or len(a.sweep) > 1:
        return propose(a)
    sweep = tables.load(root, a.sweep[0])
    study = report.study(sweep, a.metric, a.compute)
    folder = html.write(root, sweep, study)
    files = {"page": str(folder / "scaling.html"), "picture": str(folder / "scaling.png")}
    if not print_json(a, {**(read_json(folder / "scaling.json") or {}), "files": files}):
        _show(study)
        say("\n".join(f"{name + ':':8} {path}" for name, path in files.items()))
    if not a.offline:
        from jepa_cluster.tracking import sync

        tell(a, str(sync.sync(root, [sweep.name], a.uri)))
    return ExitCode.DONE


def _show(study: Study) -> None:
    """The table of trials and the findings."""
    from rich.console import Console
    from rich.table import Table

    from jepa_cluster.report import analysis as report
    from jepa_cluster.report import html

    console = Console(width=max(Console().width, 110))
    table = Table(title=f"{study.sweep.name}: {study.error}, of the randomly initialised and of the trained encoder")
    for column in html.columns(study):
        table.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for row in study.finals:
        table.add_row(*html.cells(study, row))
    console.print(table)
    for line in report.summary(study):
        console.print(line, markup=False, highlight=False)


def propose(a: argparse.Namespace) -> int:
    """Write a sweep file of what to run next, its cost, and its results as predicted beforehand."""
    from dataclasses import asdict

    from jepa_cluster.report import analysis as studies
    from jepa_cluster.report import next_trials
    from jepa_cluster.report.power_law import NotEnoughData
    from jepa_cluster.results import tables
    from jepa_cluster.sweep import sweep_file

    root = root_of(a)
    first, *names = a.sweep
    if first != "next" or len(names) > 1 or a.gpu_hours is None:
        asked = f"jepa scaling {' '.join(a.sweep)}"
        lacks = first == "next" and len(names) < 2
        what = f"{asked} wants --gpu-hours: what may the trials cost?" if lacks else f"not understood: {asked}"
        raise TrackingError(what, hint="jepa scaling next S --gpu-hours H")
    submitted = {n: tables.plan_of(root, n).get("submitted") or 0 for n in names or root.sweeps()}
    sweep = tables.load(root, max(submitted, key=lambda n: submitted[n], default="?"))
    found = next_trials.design(studies.study(sweep, a.metric, a.compute), a.gpu_hours, a.target)
    if isinstance(found, NotEnoughData):
        raise TrackingError(f"nothing can be proposed from {sweep.name}: {found.reason}")
    path = Path(a.out or Path("sweeps" if Path("sweeps").is_dir() else ".") / f"{sweep.name}_next.yaml")
    if path.exists() or root.sweep(path.stem).exists():
        raise TrackingError(
            f"a sweep {path.stem} exists", where=str(path), hint="--out another name: predictions are made once"
        )
    source = sweep_file.load(root.sweep(sweep.name) / "sweep.yaml")
    text = sweep_file.to_yaml(next_trials.sweep_file(found, source, path.stem))
    cost = f"about {found.cost:.3g} GPU-hours by what {sweep.name} took; jepa plan says what they will take here"
    write_atomic(path, f"# Proposed by jepa scaling next.\ncost: {cost}\n{text}")
    root.sweep(path.stem).mkdir(parents=True, exist_ok=True)
    write_json(root.sweep(path.stem) / "predicted.json", asdict(found))
    if not print_json(a, {**asdict(found), "file": str(path)}):
        for line in next_trials.lines(found):
            say(line)
        say(f"written: {path}; next: jepa plan {path}; when it is done: jepa scaling {path.stem}")
    return ExitCode.DONE


def report(a: argparse.Namespace) -> int:
    from jepa_cluster.report import analysis as studies
    from jepa_cluster.report import markdown
    from jepa_cluster.results import tables

    root = root_of(a)
    sweep = tables.load(root, a.sweep)
    path = markdown.write(sweep, studies.study(sweep, a.metric), a.into or root.sweep(sweep.name))
    files = {"page": str(path), "picture": str(path.with_suffix(".png")), "table": str(path.with_suffix(".csv"))}
    return finish(a, {"sweep": sweep.name, "files": files}, f"written: {path}")
