"""The verbs for nights that go wrong: why, throttle, doctor, nodes; and for days after: export, repro, gc."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.verb import (
    agreed,
    ask_cluster,
    ask_selection,
    ask_sweep,
    finish,
    name_of,
    print_json,
    root_of,
    rows_of,
    tell,
    trials_of,
    verb,
)  # fmt: skip
from jepa_cluster.errors import JepaError, LaunchError, plural

WANTED = ("new", "queued", "cooling", "running", "interrupted", "unknown")  # states of trials that need GPUs yet


def add(verbs: Verbs) -> None:
    p = verb(verbs, "why", why, "why trials stand where they stand: cause, evidence, last log lines, what to type next")
    ask_sweep(p, "name of a submitted sweep")
    ask_selection(p)
    p = verb(verbs, "throttle", throttle, "change how many GPUs a sweep's live arrays may use together")
    ask_sweep(p, "name of a submitted sweep")
    p.add_argument("gpus", type=int, help="most GPUs in flight, over all arrays of the sweep")
    p = verb(verbs, "doctor", doctor, "is this cluster as its profile says? names what is missing")
    ask_cluster(p)
    told = "ask a node too, by one short job: shared root, clock, Python, GPUs, USR2, requeue"
    p.add_argument("--node", action="store_true", help=told)
    verb(verbs, "nodes", nodes, "what each node did to us; bad ones are left out by submit")
    p = verb(verbs, "export", export, "a sweep as a tidy table: one row a trial, a point or a logged step")
    ask_sweep(p, "name of a submitted sweep")
    ask_selection(p)
    told = "gpu_hours of all attempts by `sacct -D` where it answers, instead of our own records"
    p.add_argument("--billed", action="store_true", help=told)
    table = p.add_mutually_exclusive_group()
    table.add_argument("--curves", action="store_true", help="one row a settled, logged step")
    table.add_argument(
        "--points", action="store_true", help="one row a point: mean over its seeds, with its 90%% interval"
    )
    p.add_argument("--out", type=Path, help="file to write (.csv, .parquet; default CSV on the terminal)")
    p = verb(verbs, "repro", repro, "the exact commands, snapshot and versions that repeat a trial by hand")
    ask_sweep(p, "a trial directory, or the name of a submitted sweep")
    ask_selection(p)
    p = verb(verbs, "gc", gc, "remove unused snapshots, leftovers, and all but the last checkpoint of finished trials")
    p.add_argument("--yes", "-y", action="store_true", help="do not ask")


def why(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.scheduler import diagnosis

    root, sweep = root_of(a), name_of(a)
    rows = rows_of(a)
    if not a.selection:
        rows = [r for r in rows if r["state"] not in ("done", "running")] or rows
    documents = [diagnosis.explain_trial(root, sweep, r) for r in rows]
    if not print_json(a, documents):
        for alike in terminal.alike(documents, sweep):
            terminal.console().print(terminal.why(alike))
    return 0


def throttle(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.submit import documents as describe
    from jepa_cluster.launch.worker import gpu_throttle

    root, sweep = root_of(a), name_of(a)
    widest = max(
        (t["world"] for t in describe.status_document(root, sweep)["trials"] if t["state"] in WANTED), default=1
    )
    if a.gpus < widest:
        raise LaunchError(f"a trial of {sweep} takes {plural(widest, 'GPU')}: never in {a.gpus}", hint="jepa cancel")
    gpu_throttle.store_cap(root, sweep, a.gpus)
    shares = gpu_throttle.rebalance(root, sweep)
    if not shares:
        raise LaunchError(f"{sweep} has no live array", hint="the local queue's cap is `slots` in its profile")
    told = ", ".join(f"{name.split('.')[2]}: {n}" for name, n in shares.items())
    return finish(a, {"gpus_in_flight": a.gpus, "tasks": shares}, f"tasks at a time: {told}")


def doctor(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.cluster import profile as resources
    from jepa_cluster.launch.ops import doctor as examiner

    profile = resources.load_profile(Path(a.cluster) if a.cluster else None)
    checks = [asdict(c) for c in examiner.run_checks(profile, root_of(a), a.node)]
    if not print_json(a, checks):
        terminal.console().print(terminal.checks(checks))
    return 0 if all(c["ok"] for c in checks) else 1


def nodes(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.scheduler import node_health

    ledger = node_health.node_failures(root_of(a))
    if not print_json(a, ledger):
        terminal.console().print(terminal.nodes(ledger, node_health.BAD_NODE))
    return 0


def export(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler import facts
    from jepa_cluster.results import tables

    if a.out and a.out.suffix not in (".csv", ".parquet"):
        raise JepaError(f"a table is no '{a.out.suffix}' file", where=str(a.out), hint="name it .csv or .parquet")
    root, names = root_of(a), [r["name"] for r in rows_of(a)]
    bill = facts.billed_seconds(root, names) if a.billed else None
    if a.billed and bill is None:
        print("sacct does not answer here: cost by our own attempt records", file=sys.stderr)
    sweep = tables.load(root, name_of(a), bill)
    rows = [r for r in (tables.step_table(sweep) if a.curves else tables.trial_table(sweep)) if r["trial"] in names]
    if a.points:
        from jepa_cluster.report import analysis

        rows = analysis.point_table(rows)
    if a.out and a.out.suffix == ".parquet":
        try:
            import pandas
        except ImportError as e:
            raise JepaError(
                "Parquet needs pandas and pyarrow", hint="pip install 'jepa-cluster[track]', or .csv"
            ) from e
        pandas.DataFrame(rows).to_parquet(a.out)
    elif a.out:
        a.out.write_text(tables.to_csv(rows))
    return finish(a, rows, f"{plural(len(rows), 'row')} -> {a.out}" if a.out else tables.to_csv(rows).rstrip("\n"))


def repro(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.ops import cleanup

    documents = [cleanup.repro_script(trial) for trial in trials_of(a)]
    if not print_json(a, documents):
        for d in documents:
            versions = " ".join(f"{k}=={v}" for k, v in d["versions"].items())
            print(
                f"# {d['trial']}, code {d['code']}",
                f"# {versions}",
                *(f"{c} &" for c in d["commands"]),
                "wait",
                sep="\n",
            )
    return 0


def gc(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.ops import cleanup

    found = cleanup.garbage(root_of(a))
    total = sum(cleanup.size(p) for p, _ in found) / 1e6
    for path, reason in found:
        tell(a, f"  {path}   {reason}")
    if found and not agreed(a, f"remove {plural(len(found), 'thing')}, {total:,.1f} MB?"):
        return 1
    for path, _ in found:
        cleanup.remove(path)
    return finish(
        a, {"removed": [str(p) for p, _ in found], "megabytes": total}, f"removed {len(found)}, {total:,.1f} MB"
    )
