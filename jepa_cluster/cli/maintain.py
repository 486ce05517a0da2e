"""The verbs that maintain sweeps and the root: throttle, export, archive, repro, gc."""

from __future__ import annotations

from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    TRIAL_HELP,
    Args,
    add_flag,
    add_sweep_argument,
    add_trials_arguments,
    add_yes_argument,
    command,
    complete_sweeps,
    confirm,
    finish,
    info,
    load_results,
    print_json,
    root_of,
    select_trials,
    sweep_name,
)
from jepa_cluster.errors import JepaError, plural


def add(verbs: Verbs) -> None:
    parser = command(verbs, throttle)
    add_sweep_argument(parser)
    parser.add_argument(
        "gpus", type=int, help="maximum number of GPUs in flight over all arrays of the sweep"
    )

    parser = command(verbs, export)
    add_trials_arguments(parser)
    add_flag(
        parser,
        "--billed",
        "take gpu_hours of all attempts from `sacct -D` instead of the attempt records",
    )
    table = parser.add_mutually_exclusive_group()
    text = "one row per settled, logged step"
    table.add_argument("--curves", action="store_true", help=text)
    text = "one row per point: the mean over its seeds and the 90%% interval"
    table.add_argument("--points", action="store_true", help=text)
    parser.add_argument(
        "--out", type=Path, help="file to write, .csv or .parquet (default: CSV to stdout)"
    )

    parser = command(verbs, archive)
    parser.add_argument("file", type=Path, help="file to write, such as study.tar.xz")
    action = parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="submitted sweeps")
    complete_sweeps(action)

    parser = command(verbs, repro)
    add_trials_arguments(parser, TRIAL_HELP)

    add_yes_argument(command(verbs, gc))


def throttle(args: Args) -> int:
    """Change how many GPUs the live arrays of a sweep may use together."""
    from jepa_cluster.launch.ops import control

    tasks = control.throttle(root_of(args), sweep_name(args), args.gpus)
    shown = [f"{array}: {count}" for array, count in tasks.items()]
    document = {"gpus_in_flight": args.gpus, "tasks": tasks}
    return finish(args, document, f"tasks at a time: {', '.join(shown)}")


def export(args: Args) -> int:
    """Export a sweep as a tidy table with one row per trial, point or logged step."""
    from jepa_cluster.report import rates
    from jepa_cluster.results import table_files, tables
    from jepa_cluster.sweep.select_trials import select

    if args.out and args.out.suffix not in (".csv", ".parquet"):
        what = f"a table is no '{args.out.suffix}' file"
        raise JepaError(what, where=str(args.out), hint="name it .csv or .parquet")
    root = root_of(args)
    sweep = load_results(root, sweep_name(args), args.billed)
    if not args.points:
        sweep = sweep.with_dropped()
    names = [row["name"] for row in select(tables.selectable_rows(sweep), args.selection)]
    if args.curves:
        rows = tables.step_table(sweep)
    else:
        rows = rates.with_rates(sweep, tables.trial_table(sweep))
    rows = [row for row in rows if row["trial"] in names]
    if args.points:
        from jepa_cluster.report import points

        rows = points.point_table(rows)
    rows = table_files.with_numbers(sweep, rows)
    if not args.out:
        return finish(args, rows, table_files.to_csv(rows).rstrip("\n"))
    table_files.write(rows, args.out)
    return finish(args, rows, f"{plural(len(rows), 'row')} -> {args.out}")


def archive(args: Args) -> int:
    """Write the results of sweeps into one small file, which --root of the other verbs takes."""
    from jepa_cluster.launch.submit.end_recorder import EndRecorder
    from jepa_cluster.results import archive as archives

    root = root_of(args)
    EndRecorder(root).record(args.sweeps)
    trials = archives.write(root, args.sweeps, args.file)
    megabytes = args.file.stat().st_size / 1e6
    document = {"file": str(args.file), "trials": trials, "megabytes": megabytes}
    return finish(args, document, f"{plural(trials, 'trial')} -> {args.file}, {megabytes:.1f} MB")


def repro(args: Args) -> int:
    """Print the commands, code snapshot and versions that repeat a trial by hand."""
    from jepa_cluster.launch.ops import cleanup

    documents = [cleanup.repro_script(trial) for trial in select_trials(args)]
    if not print_json(args, documents):
        for document in documents:
            versions = [f"{name}=={version}" for name, version in document["versions"].items()]
            lines = [f"# {document['trial']}, code {document['code']}", " ".join(["#", *versions])]
            lines += [f"{command} &" for command in document["commands"]]
            info(args, "\n".join([*lines, "wait"]))
    return 0


def gc(args: Args) -> int:
    """Remove unused snapshots, leftovers, and old checkpoints of finished trials."""
    from jepa_cluster.launch.ops import cleanup

    paths: list[Path] = []
    megabytes = 0.0
    for path, reason in cleanup.garbage(root_of(args)):
        paths.append(path)
        megabytes += cleanup.size(path) / 1e6
        info(args, f"  {path}   {reason}")
    amount = f"{plural(len(paths), 'item')}, {megabytes:,.1f} MB"
    if paths and not confirm(args, f"remove {amount}?"):
        return 1
    for path in paths:
        cleanup.remove(path)
    document = {"removed": list(map(str, paths)), "megabytes": megabytes}
    return finish(args, document, f"removed {amount}")
