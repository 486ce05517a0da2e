"""The verbs for results: sync, ui, scaling, report.

mlflow and plotly are imported when a handler runs.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_flag,
    add_sweep_argument,
    command,
    complete_sweeps,
    finish,
    info,
    load_results,
    new_sweep_file,
    print_json,
    root_of,
)
from jepa_cluster.errors import ExitCode, JepaError, TrackingError
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.usage import modified

if TYPE_CHECKING:
    from jepa_cluster.report.analysis import Analysis

METRIC_HELP = "error to show (default: that of the class probe)"
STORE_HELP = "MLflow store, as for sync"
NEXT_COMMAND = "jepa scaling next S --gpu-hours H"
PRINT_LINE = partial(print, flush=True)
RECORD_SECONDS = 60.0  # between two questions to Slurm for trials that have ended


def add(verbs: Verbs) -> None:
    _add_sync(verbs)
    _add_ui(verbs)
    _add_scaling(verbs)
    _add_report(verbs)


def _add_sync(verbs: Verbs) -> None:
    parser = command(verbs, sync)
    action = parser.add_argument(
        "sweeps", nargs="*", metavar="SWEEP", help="sweeps to sync (default: all below the root)"
    )
    complete_sweeps(action)
    add_flag(parser, "--follow", "continue until interrupted")
    parser.add_argument(
        "--uri",
        help="MLflow store (default: $MLFLOW_TRACKING_URI, else a SQLite file below the root)",
    )
    _add_interval(parser)
    add_flag(
        parser,
        "--rebuild",
        "archive the experiments of the sweeps and recreate them from the trial directories",
    )


def _add_ui(verbs: Verbs) -> None:
    parser = command(verbs, ui, document=False)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    add_flag(
        parser,
        "--no-token",
        "let every user of this machine in (default: a random token, or $JEPA_UI_TOKEN)",
    )
    parser.add_argument(
        "--uri", help=f"{STORE_HELP}; for the address of a server, sync to it and print its links"
    )
    _add_interval(parser)


def _add_interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between two reads of the trial directories (default: 1)",
    )


def _add_scaling(verbs: Verbs) -> None:
    parser = command(verbs, scaling)
    add_sweep_argument(
        parser,
        "name of the sweep, or `next` and a name (default after `next`: the newest sweep)",
        nargs="+",
    )
    parser.add_argument("--metric", help=METRIC_HELP)
    parser.add_argument(
        "--compute",
        default="flops_total",
        help="x-axis: flops_total, flops_encoder or images_seen (default: flops_total)",
    )
    parser.add_argument(
        "--gpu-hours",
        type=float,
        metavar="H",
        help="next: maximum cost of the proposed trials together, in the unit of the sweep",
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="C",
        help="next: largest compute to propose (default: 10 x the largest of the sweep)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="next: sweep file to write (default: sweeps/<sweep>_next.yaml)",
    )
    add_flag(parser, "--offline", "write the files without sending them to MLflow")
    parser.add_argument("--uri", help=STORE_HELP)


def _add_report(verbs: Verbs) -> None:
    parser = command(verbs, report)
    add_sweep_argument(parser)
    parser.add_argument("--metric", help=METRIC_HELP)
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="folder to write to (default: the folder of the sweep below the root)",
    )


# ---- tracking


def sync(args: Args) -> int:
    """Write the settled steps of all trials to MLflow, each exactly once."""
    from jepa_cluster.launch.submit.end_recorder import EndRecorder
    from jepa_cluster.tracking import mlflow_client, sync

    root = root_of(args)
    names = args.sweeps or None
    if args.follow:
        if args.json:
            what = "--follow has no end, so there is no document"
            raise TrackingError(what, hint="leave out --follow or --json")
        with recording_ends(root, names):
            sync.follow(root, args.uri, args.every, threading.Event(), PRINT_LINE, names)
        return ExitCode.DONE
    EndRecorder(root).record(names or root.sweeps())
    done = sync.sync(root, names, args.uri, args.rebuild)
    document = {**asdict(done), "uri": mlflow_client.redacted(done.uri)}
    return finish(args, document, str(done))


@contextmanager
def recording_ends(root: Root, sweeps: Sequence[str] | None = None) -> Generator[None]:
    """Write the markers of trials whose end only Slurm knows, in a thread. None: all sweeps."""
    from jepa_cluster.launch.submit.end_recorder import EndRecorder

    stop = threading.Event()
    recorder = EndRecorder(root)

    def run() -> None:
        while True:
            recorder.record(sweeps or root.sweeps())
            if stop.wait(RECORD_SECONDS):
                return

    threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


@contextmanager
def collecting(root: Root, sweep: str) -> Generator[None]:
    """Run the collector in a thread, and sync what is left at the end. It prints to stderr."""
    from jepa_cluster.tracking import sync

    log = partial(print, file=sys.stderr, flush=True)
    stop = threading.Event()
    collector = threading.Thread(target=sync.follow, args=(root, None, 1.0, stop, log, [sweep]))
    collector.start()
    try:
        yield
    finally:
        stop.set()
        collector.join()
    try:
        log(sync.sync(root, [sweep]))
    except JepaError as e:
        log(f"jepa: {e}")


def ui(args: Args) -> int:
    """Open MLflow on this machine with the collector and the Scaling page."""
    from jepa_cluster.report import ui_server

    token = os.environ.get("JEPA_UI_TOKEN") or secrets.token_urlsafe(24)
    if args.no_token:
        token = ""
    root = root_of(args)
    with recording_ends(root):
        ui_server.serve(root, args.uri, args.host, args.port, args.every, PRINT_LINE, token)
    return ExitCode.DONE


# ---- reports


def scaling(args: Args) -> int:
    """Show the scaling figure of a sweep and its law; `scaling next` proposes further trials."""
    from jepa_cluster.report import analysis, html

    if args.sweep[0] == "next" or len(args.sweep) > 1:
        return propose(args)
    root = root_of(args)
    (name,) = args.sweep
    found = analysis.analyse(load_results(root, name), args.metric, args.compute)
    folder = html.write(root, found)
    files = {"page": str(folder / "scaling.html"), "picture": str(folder / "scaling.png")}
    document = read_json(folder / "scaling.json") or {}
    if not print_json(args, {**document, "files": files}):
        show_analysis(found)
        for kind, path in files.items():
            print(f"{kind + ':':8} {path}")
    if not args.offline:
        from jepa_cluster.tracking import sync

        info(args, str(sync.sync(root, [name], args.uri)))
    return ExitCode.DONE


def show_analysis(found: Analysis) -> None:
    """Print the trials of a sweep and the findings of its analysis."""
    from jepa_cluster.cli.console import console
    from jepa_cluster.report import findings, markdown

    if len(found.trials) <= markdown.MAX_TRIAL_LINES:
        _show_trials(found)
    else:
        print(f"{len(found.trials)} trials: jepa export {found.sweep.name} lists them")
    for line in findings.summary(found):
        console().print(line, soft_wrap=not sys.stdout.isatty())


def _show_trials(found: Analysis) -> None:
    from jepa_cluster.cli.console import console
    from jepa_cluster.cli.table import one_line_table
    from jepa_cluster.report import html

    print(f"{found.sweep.name}: {found.error}, before training (random) and after (trained)")
    lines = [html.trial_cells(found, row) for row in found.trials]
    heads: list[str] = []
    for name in lines[0]:
        heads.append(name if name in ("trial", "state") else f">{name}")  # noqa: PERF401
    rows = list(map(list, map(dict[str, str].values, lines)))
    optional = (">parameters", ">loss", f">{found.sweep.unit}", ">FLOP", ">random")
    console().print(one_line_table(heads, rows, "trial", optional))


def propose(args: Args) -> int:
    """Write a sweep file with the trials to run next, and their predicted results."""
    from jepa_cluster.report import analysis, next_trials
    from jepa_cluster.report.power_law import NotEnoughData

    root = root_of(args)
    name = _source_sweep(args, root)
    path = new_sweep_file(f"{name}_next", args.out)
    _check_free(root, path)
    found = analysis.analyse(load_results(root, name), args.metric, args.compute)
    proposed = next_trials.design(found, args.gpu_hours, args.target)
    if isinstance(proposed, NotEnoughData):
        raise TrackingError(f"nothing can be proposed from {name}: {proposed.reason}")
    next_trials.write(proposed, root, path, args.gpu_hours)
    lines = next_trials.describe(proposed)
    lines += [f"written: {path}", f"next: jepa plan {path}"]
    lines.append(f"when it is done: jepa scaling {path.stem}")
    return finish(args, {**asdict(proposed), "file": str(path)}, "\n".join(lines))


def _check_free(root: Root, path: Path) -> None:
    """Raise an error where the proposed sweep cannot be written or named so."""
    from jepa_cluster.sweep import sweep_file

    if path.suffix not in (".yaml", ".yml"):
        raise TrackingError(f"'{path}' is no sweep file", where="--out", hint=f"{path.stem}.yaml")
    sweep_file.check_name(path.stem, str(path))
    if path.exists() or root.sweep(path.stem).path.exists():
        hint = "--out another name: predictions are made once"
        raise TrackingError(f"a sweep {path.stem} exists", where=str(path), hint=hint)
    if not path.parent.is_dir():
        raise TrackingError(f"there is no folder {path.parent}", where="--out", hint="make it")


def _source_sweep(args: Args, root: Root) -> str:
    """Return the sweep to continue: the named one, else the newest."""
    first, *names = args.sweep
    words = f"jepa scaling {' '.join(args.sweep)}"
    if first != "next" or len(names) > 1:
        raise TrackingError(f"not understood: {words}", hint=NEXT_COMMAND)
    if args.gpu_hours is None:
        what = f"{words} wants --gpu-hours: what may the trials cost, in the unit of the sweep?"
        raise TrackingError(what, hint=NEXT_COMMAND)
    if names:
        return names[0]
    return max(root.sweeps(), key=lambda name: modified(root.sweep(name).plan), default="?")


def report(args: Args) -> int:
    """Write a Markdown page with question, answer, figure and numbers of a sweep."""
    from jepa_cluster.report import analysis, markdown

    root = root_of(args)
    sweep = load_results(root, args.sweep)
    found = analysis.analyse(sweep, args.metric)
    path = markdown.write(found, args.into or root.sweep(sweep.name).path)
    files = {"page": path, "picture": path.with_suffix(".png"), "table": path.with_suffix(".csv")}
    names = {kind: str(file) for kind, file in files.items()}
    return finish(args, {"sweep": sweep.name, "files": names}, f"written: {path}")
