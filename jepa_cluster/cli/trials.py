"""The verbs that act on trials of a submitted sweep: requeue, cancel, resume, retry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_cluster_argument,
    add_flag,
    add_trials_arguments,
    add_yes_argument,
    command,
    confirm,
    finish,
    info,
    root_of,
    sweep_name,
    trial_line,
)
from jepa_cluster.cli.sweeps import make_plan
from jepa_cluster.errors import plural

if TYPE_CHECKING:
    from jepa_cluster.sweep.select_trials import Row


def add(verbs: Verbs) -> None:
    parsers = [command(verbs, requeue)]

    parser = command(verbs, cancel)
    text = "kill the processes without waiting for a checkpoint"
    add_flag(parser, "--now", text)
    parsers.append(parser)

    parsers.append(command(verbs, resume))
    parsers.append(command(verbs, retry))
    for parser in parsers:
        add_trials_arguments(parser)
        add_yes_argument(parser)
    for parser in parsers[2:]:
        add_cluster_argument(parser)


def requeue(args: Args) -> int:
    """Send running trials back to the queue after a checkpoint."""
    from jepa_cluster.launch.ops import control

    rows = _select(args, "requeue", "interrupt {}? each saves a checkpoint first")
    if not rows:
        return 1
    names = control.requeue(root_of(args), rows)
    return _report(args, names, "will save a checkpoint, stop and return to the queue")


def cancel(args: Args) -> int:
    """Stop trials until `jepa resume`; a running trial saves a checkpoint first."""
    from jepa_cluster.launch.ops import control

    rows = _select(args, "cancel", "stop {} until `jepa resume`?")
    if not rows:
        return 1
    control.cancel(root_of(args), sweep_name(args), rows, args.now)
    return _report(
        args, [row["name"] for row in rows], "stopped, or will stop after the next checkpoint"
    )


def resume(args: Args) -> int:
    """Start stopped or interrupted trials again from their newest checkpoint."""
    return _start(args, _select(args, "resume", "start {} again?"))


def retry(args: Args) -> int:
    """Start failed trials again after you fixed the cause."""
    from jepa_cluster.launch.ops import control

    rows = _select(args, "retry", "forget the failure of {} and start again?")
    some_held = control.forgive(root_of(args), rows)
    return _start(args, rows, with_canary=some_held)


def _start(args: Args, rows: list[Row], with_canary: bool = False) -> int:
    from jepa_cluster.launch.submit.submit import submit

    if not rows:
        return 1
    names = [row["name"] for row in rows]
    done = submit(make_plan(args), only=names, with_canary=with_canary)
    return _report(args, list(done.actions.start), "started")


def _select(args: Args, verb: str, question: str) -> list[Row]:
    """Return the selected trials on which the verb acts; none if the user does not confirm it."""
    from jepa_cluster.launch.ops import control
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.sweep.select_trials import select
    from jepa_cluster.trial.files import require_writable

    root = root_of(args)
    document = documents.status_document(root, sweep_name(args))
    selected = select(document["trials"], args.selection)
    rows = control.actionable(verb, selected, document["canaries"])
    if verb != "requeue":  # which only sends signals
        require_writable(root.trial(row["name"]).path for row in rows)
    width = max(len(row["label"]) for row in rows)
    for row in rows:
        info(args, f"  {trial_line(row, width)}")
    return rows if confirm(args, question.format(plural(len(rows), "trial"))) else []


def _report(args: Args, names: list[str], text: str) -> int:
    return finish(args, {"trials": names}, f"{plural(len(names), 'trial')}: {text}")
