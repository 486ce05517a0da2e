"""The verbs that run and show a sweep: plan, submit, status, watch, logs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_cluster_argument,
    add_flag,
    add_sweep_argument,
    add_trials_arguments,
    add_yes_argument,
    command,
    confirm,
    finish,
    print_json,
    root_of,
    select_rows,
    sweep_name,
)
from jepa_cluster.errors import LaunchError, TrialError, plural, printable

if TYPE_CHECKING:
    from jepa_cluster.launch.submit.plan import Plan
    from jepa_cluster.records import StatusDocument
    from jepa_cluster.trial.directory import Root

EXIT_WORK_TO_DO = 3  # of `plan`, when submit would start trials
REFRESH_SECONDS = 1.0
LINES_BELOW_ROWS = 5  # of a live table: heads, counts, a note
REBALANCE_SECONDS = 30.0
SWEEP_OR_FILE = "sweep file, or name of a submitted or an included sweep"


def add(verbs: Verbs) -> None:
    _add_plan_and_submit(verbs)
    _add_status_and_watch(verbs)
    _add_logs(verbs)


def _add_plan_and_submit(verbs: Verbs) -> None:
    parser = command(verbs, plan)
    add_trials_arguments(parser, SWEEP_OR_FILE)
    add_cluster_argument(parser)
    add_flag(parser, "--points", "list every trial")

    parser = command(verbs, submit)
    add_trials_arguments(parser, SWEEP_OR_FILE)
    add_cluster_argument(parser)
    add_flag(
        parser,
        "--canary",
        "run one short trial per class first; the class starts when that trial succeeds",
    )
    add_yes_argument(parser)
    add_flag(
        parser,
        "--dry-run",
        "print the sbatch scripts (Slurm) or the commands (local) and start nothing",
    )


def _add_status_and_watch(verbs: Verbs) -> None:
    parser = command(verbs, status)
    add_trials_arguments(
        parser, "name of a submitted sweep (default: one line per sweep)", nargs="?"
    )
    add_flag(
        parser,
        "--billed",
        "take the cost of all attempts from `sacct -D` instead of the attempt records",
    )

    parser = command(verbs, watch)
    add_sweep_argument(parser)
    add_flag(
        parser,
        "--until-done",
        "exit when no trial is queued or running, but for those that wait for you (held); "
        "exit code 1 if a trial failed or is held",
    )
    add_flag(
        parser,
        "--until-half",
        "exit when a running trial has finished half of its steps",
    )
    add_flag(parser, "--sync", "update MLflow at the same time, as `jepa sync --follow` does")


def _add_logs(verbs: Verbs) -> None:
    parser = command(verbs, logs)
    add_trials_arguments(parser)
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="print new lines until the trial stops running",
    )
    parser.add_argument("--rank", type=int, default=0, help="rank (default: 0)")
    parser.add_argument("--attempt", type=int, help="number of the attempt (default: the newest)")
    parser.add_argument(
        "--lines",
        "-n",
        type=int,
        default=40,
        help="number of last lines per file (default: 40; 0: all)",
    )


# ---- plan and submit


def plan(args: Args) -> int:
    """Show what submit would do and cost, without any change; exit code 3 if there is work."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents

    proposed = _plan_selected(args)
    document = documents.plan_document(proposed)
    if not print_json(args, document):
        terminal.show(terminal.plan(document))
        if args.points:
            terminal.show(terminal.plan_points(document))
    return EXIT_WORK_TO_DO if proposed.actions.start else 0


def submit(args: Args) -> int:
    """Show the plan, ask for confirmation and start the trials that are not yet started."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.scheduler import local
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.launch.submit import plan as plans
    from jepa_cluster.launch.submit import submit as submission
    from jepa_cluster.launch.worker import gpu_throttle

    proposed = _plan_selected(args)
    document = documents.plan_document(proposed)
    if not args.json:
        terminal.show(terminal.plan(document))
    plans.check(proposed)
    if args.dry_run:
        return _dry_run(args, proposed)
    count = len(proposed.actions.start)
    if not count:
        done = submission.submit(proposed, only=())
        gpu_throttle.try_rebalance(proposed.root, proposed.sweep.name)
        local.start_if_waiting(proposed.root)
        text = "nothing to do: no trial is new or interrupted"
        return finish(args, document, text + _lost_note(done))
    cost = f"{terminal.number(proposed.start_cost)} {proposed.profile.unit}"
    question = f"start {plural(count, 'trial')}, {cost}"
    if args.canary:
        question += ", after a canary of each class"
    if not confirm(args, f"{question}?"):
        return 1
    done = submission.submit(proposed, with_canary=args.canary)
    text = f"started {plural(len(done.actions.start), 'trial')}"
    if waiting := len(done.actions.trials("wait")):
        text += f"; {plural(waiting, 'trial')} more than Slurm accepts in the queue, submit again"
        text += " when some have ended"
    if args.canary:
        text += ", which wait until the canary of their class succeeds"
    text += f": jepa watch {done.sweep.name}{_lost_note(done)}"
    if args.json:
        document = documents.plan_document(done)
    return finish(args, document, text)


def _lost_note(done: Plan) -> str:
    """Name the trials whose jobs left the queue before they began, which `submit` leaves alone."""
    from jepa_cluster.trial.status import LEFT_QUEUE

    notes = [done.status.trials[name].note for name in done.trials]
    count = sum(note.startswith(LEFT_QUEUE) for note in notes)
    if not count:
        return ""
    return f"\n{plural(count, 'trial')} {LEFT_QUEUE}: jepa resume {done.sweep.name} state=stopped"


def make_plan(args: Args) -> Plan:
    """Plan a sweep file or a submitted sweep.

    Without --cluster, a submitted sweep keeps its cluster profile. $JEPA_CLUSTER is for new sweeps
    and for a sweep that is named by its file.
    """
    from jepa_cluster.launch.cluster.profile import load_profile
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.launch.submit import plan as plans

    root = root_of(args)
    sweep = documents.find_sweep(root, args.sweep)
    cluster = args.cluster
    if cluster is None and (sweep.name == args.sweep or "JEPA_CLUSTER" not in os.environ):
        submitted = root.sweep(sweep.name).read_plan()
        if submitted:
            cluster = Path(submitted["profile"])
            if not cluster.is_file():
                what = f"the cluster profile of {sweep.name} is gone"
                raise LaunchError(what, where=str(cluster), hint="name it by --cluster")
    return plans.make_plan(sweep, load_profile(cluster), root)


def _plan_selected(args: Args) -> Plan:
    """Plan a sweep, of which only the selected trials start."""
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.sweep.select_trials import select

    proposed = make_plan(args)
    if not args.selection:
        return proposed
    rows = select(documents.plan_rows(proposed), args.selection)
    return proposed.select([row["name"] for row in rows])


def _dry_run(args: Args, proposed: Plan) -> int:
    from jepa_cluster.launch.submit import submissions

    if proposed.profile.kind == "slurm":
        longest, assumed = submissions.longest_array()
        scripts = submissions.scripts(proposed, longest, args.canary)
        lines: list[str] = []
        if assumed:
            print(f"# assumed: {assumed}", file=sys.stderr)
        for number, script in enumerate(scripts, 1):
            title = f"# script {number} of {len(scripts)}: {script['title']}"
            lines += [title, script["script"]]
        return finish(args, scripts, "\n".join(lines))
    commands = submissions.local_commands(proposed, args.canary)
    lines = [f"{each['processes']} × {each['command']}" for each in commands]
    return finish(args, commands, "\n".join(lines))


# ---- status, watch and logs


def status(args: Args) -> int:
    """Show the state of every trial."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.sweep.select_trials import select

    root = root_of(args)
    if not args.sweep:
        sweeps: list[StatusDocument] = []
        errors: list[str] = []
        for name in root.sweeps():
            try:
                sweeps.append(documents.status_document(root, name))
            except TrialError as e:  # a torn file of one sweep
                errors.append(f"jepa: {name}: {e}")
        if not print_json(args, sweeps):
            terminal.show(terminal.overview(sweeps, root.path))
        for error in errors:
            print(error, file=sys.stderr)
        return int(bool(errors))
    document = documents.status_document(root, sweep_name(args), args.billed)
    shown = {**document, "trials": select(document["trials"], args.selection)}
    if not print_json(args, shown):
        terminal.show(terminal.status(shown))
        if args.billed and document["cost_by"] != "sacct":
            print("sacct does not answer here: cost by our own attempt records")
    return 0


def watch(args: Args) -> int:
    """Show a live table of the trials; without a terminal, print one line per change."""
    from jepa_cluster.cli import results, terminal

    root, sweep = root_of(args), sweep_name(args)
    unsuccessful = False
    with results.collecting(root, sweep) if args.sync else nullcontext():
        if sys.stdout.isatty() and not args.json:
            with terminal.live() as live:
                most_rows = max(live.console.height - LINES_BELOW_ROWS, 1)
                for document in _snapshots(args, root, sweep):
                    live.update(terminal.status(document, most_rows), refresh=True)
                    unsuccessful = _is_unsuccessful(document)
        else:
            before: Mapping[str, Any] = {"trials": []}
            for document in _snapshots(args, root, sweep):
                lines = [json.dumps(document)] if args.json else terminal.changes(before, document)
                for line in lines:
                    print(printable(line), flush=True)
                before = document
                unsuccessful = _is_unsuccessful(document)
    return int(args.until_done and unsuccessful)


def _is_unsuccessful(document: StatusDocument) -> bool:
    held = any(row["held"] for row in document["trials"])
    return held or document["counts"]["failed"] > 0


def _snapshots(args: Args, root: Root, sweep: str) -> Iterator[StatusDocument]:
    """Yield the status document until the sweep is finished.

    Every 30 s, and at the end, write the markers of trials that ended in Slurm, and rebalance.
    """
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.launch.submit.end_recorder import EndRecorder
    from jepa_cluster.launch.worker import gpu_throttle

    last = -REBALANCE_SECONDS
    recorder = EndRecorder(root)
    while True:
        document = documents.status_document(root, sweep)
        yield document
        finished = _finished(args, document)
        if finished or time.monotonic() - last > REBALANCE_SECONDS:
            recorder.record([sweep])
            gpu_throttle.try_rebalance(root, sweep)
            last = time.monotonic()
        if finished:
            return
        time.sleep(REFRESH_SECONDS)


def _finished(args: Args, document: StatusDocument) -> bool:
    from jepa_cluster.trial.status import IN_PROGRESS

    active = (*IN_PROGRESS, "unknown")
    rows = document["trials"]
    if not any(row["state"] in active and not row["held"] for row in rows):
        return True
    if not args.until_half:
        return False
    running = [row for row in rows if row["state"] == "running"]
    return any(2 * row["step"] >= row["steps"] for row in running)


def logs(args: Args) -> int:
    """Print the last lines that one rank of a trial wrote."""
    from jepa_cluster.launch.scheduler import facts
    from jepa_cluster.trial import progress
    from jepa_cluster.trial.log_files import LogFiles

    if args.json and args.follow:
        what = "--follow has no end, so there is no document"
        raise LaunchError(what, hint="leave out --follow or --json")
    root = root_of(args)
    (row,) = select_rows(args, "logs")
    trial = root.trial(row["name"])
    attempt = args.attempt or trial.newest_attempt()
    log_files = LogFiles(trial, attempt, args.rank)
    texts = log_files.read_new()
    tails = {str(path): text.splitlines()[-args.lines :] for path, text in texts.items()}
    found = {"trial": trial.name, "attempt": attempt, "rank": args.rank, "files": tails}
    if print_json(args, found):
        return 0
    for path, lines in tails.items():
        print(printable("\n".join([f"==> {path} <==", *lines])), flush=True)
    if not tails:
        step = progress.latest_metrics(trial).get("step", "none")
        text = f"rank {args.rank} of attempt {attempt} wrote nothing; newest step: {step}, by"
        print(f"{text} {trial.metrics(attempt)}", flush=True)
    while args.follow and facts.query_status(root, [trial.name]).states[trial.name] == "running":
        time.sleep(REFRESH_SECONDS)
        for text in log_files.read_new().values():
            print(printable(text), end="", flush=True)
    return 0
