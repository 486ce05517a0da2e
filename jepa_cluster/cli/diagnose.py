"""The verbs that explain: why, nodes, doctor."""

from __future__ import annotations

from dataclasses import asdict

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_cluster_argument,
    add_flag,
    add_trials_arguments,
    command,
    print_json,
    root_of,
    select_rows,
    sweep_name,
)


def add(verbs: Verbs) -> None:
    parser = command(verbs, why)
    add_trials_arguments(parser)

    command(verbs, nodes)

    parser = command(verbs, doctor)
    add_cluster_argument(parser)
    text = "also run a short job with the nodes and processes of a trial, and check what each has: "
    text += "root, clock, Python, signals, requeue, cores, memory, network, GPUs"
    add_flag(parser, "--node", text)


def why(args: Args) -> int:
    """Explain the current state of each trial and what to do next."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.scheduler import array_records, diagnosis

    root, sweep = root_of(args), sweep_name(args)
    rows = select_rows(args)
    if not args.selection:
        rows = [row for row in rows if row["state"] not in ("done", "running")] or rows
    arrays = array_records.read(root)
    documents = [diagnosis.explain_trial(root, sweep, row, arrays) for row in rows]
    if not print_json(args, documents):
        for document in terminal.merge_alike(documents, sweep):
            terminal.show(terminal.why(document))
    return 0


def nodes(args: Args) -> int:
    """Show the failure history per node; nodes above the threshold are excluded at submit."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.scheduler import node_health

    failures = node_health.node_failures(root_of(args))
    if not print_json(args, failures):
        terminal.show(terminal.nodes(failures, node_health.BAD_NODE))
    return 0


def doctor(args: Args) -> int:
    """Check that this cluster matches its profile and name what is missing."""
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.cluster.profile import load_profile
    from jepa_cluster.launch.ops.doctor import run_checks

    profile = load_profile(args.cluster)
    checks = run_checks(profile, root_of(args), args.node)
    documents = [asdict(check) for check in checks]
    if not print_json(args, documents):
        terminal.show(terminal.checks(documents))
    return int(not all(check.ok for check in checks))
