"""The verbs for nights that go wrong, and for looking after things: why, throttle, doctor, nodes, export, repro, gc."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.sweeps import (
    agreed,
    ask_cluster,
    ask_selection,
    ask_sweep,
    finish,
    name_of,
    print_json,
    root_of,
    selected,
    verb,
)  # fmt: skip
from jepa_cluster.errors import JepaError, LaunchError


def add(verbs: Verbs) -> None:
    p = verb(verbs, "why", why, "why trials stand where they stand: cause, evidence, last log lines, what to type next")
    ask_sweep(p, "name of a submitted sweep")
    ask_selection(p)
    p = verb(verbs, "throttle", throttle, "change how many GPUs a sweep's live arrays may use together")
    ask_sweep(p, "name of a submitted sweep")
    p.add_argument("gpus", type=int, help="most GPUs in flight, over all arrays of the sweep")
    p = verb(verbs, "doctor", doctor, "is this cluster as its profile says? names what is missing")
    ask_cluster(p)
    told = "ask a node too, by one small job: shared root, clock, Python, USR2, requeue"
    p.add_argument("--node", action="store_true", help=told)
    verb(verbs, "nodes", nodes, "what each node did to us; bad ones are left out by submit")
    p = verb(verbs, "export", export, "a sweep as a tidy table: one row a trial, or a logged step")
    ask_sweep(p, "name of a submitted sweep")
    p.add_argument("--curves", action="store_true", help="one row a settled, logged step")
    p.add_argument("--out", type=Path, help="file to write (.csv, .parquet; default CSV on the terminal)")
    p = verb(verbs, "repro", repro, "the exact commands, snapshot and versions that repeat a trial by hand")
    ask_sweep(p, "name of a submitted sweep")
    ask_selection(p)
    p = verb(verbs, "gc", gc, "remove unused snapshots, leftovers, and all but the last checkpoint of finished trials")
    p.add_argument("--yes", "-y", action="store_true", help="do not ask")


def why(a: argparse.Namespace) -> int:
    from jepa_cluster.launch import describe, explain
    from jepa_cluster.report import tables

    root, sweep = root_of(a), name_of(a)
    rows = selected(a, describe.status(root, sweep))["trials"]
    if not a.selection:
        rows = [r for r in rows if r["state"] not in ("done", "running")] or rows
    documents = [explain.why(root, sweep, r) for r in rows]
    if not print_json(a, documents):
        for document in documents:
            tables.console().print(tables.why(document))
    return 0


def throttle(a: argparse.Namespace) -> int:
    from jepa_cluster.launch import describe, queue, slurm
    from jepa_cluster.launch.arrays import share

    root, sweep = root_of(a), name_of(a)
    seen = queue.see(root, (t["name"] for t in describe.status(root, sweep)["trials"]))
    left: dict[str, int] = {}
    for task in seen.tasks:
        left[task.job] = left.get(task.job, 0) + (task.index is not None)
    arrays = [r for r in queue.array_records(root) if r["sweep"] == sweep and left.get(r["job"])]
    if not arrays:
        raise LaunchError(
            f"{sweep} has no live array", where=seen.problem, now="the local queue's cap is `slots` in its profile"
        )
    shares = share([(r["nodes"] * r["procs_per_node"], left[r["job"]]) for r in arrays], a.gpus)
    for record, tasks in zip(arrays, shares, strict=True):
        slurm.throttle(record["job"], tasks)
    told = ", ".join(f"{r['class']}: {n}" for r, n in zip(arrays, shares, strict=True))
    return finish(a, {r["job"]: n for r, n in zip(arrays, shares, strict=True)}, f"tasks at a time: {told}")


def doctor(a: argparse.Namespace) -> int:
    from jepa_cluster.launch import doctor as examiner
    from jepa_cluster.launch import resources
    from jepa_cluster.report import tables

    profile = resources.profile(Path(a.cluster) if a.cluster else None)
    checks = [asdict(c) for c in examiner.examine(profile, root_of(a), a.node)]
    if not print_json(a, checks):
        tables.console().print(tables.checks(checks))
    return 0 if all(c["ok"] for c in checks) else 1


def nodes(a: argparse.Namespace) -> int:
    from jepa_cluster.launch import explain
    from jepa_cluster.report import tables

    ledger = explain.nodes(root_of(a))
    if not print_json(a, ledger):
        tables.console().print(tables.nodes(ledger, explain.BAD_NODE))
    return 0


def export(a: argparse.Namespace) -> int:
    from jepa_cluster.tracking import curves

    sweep = curves.load(root_of(a), name_of(a))
    rows = curves.rows(sweep) if a.curves else curves.finals(sweep)
    if print_json(a, rows):
        return 0
    if a.out and a.out.suffix == ".parquet":
        try:
            import pandas
        except ImportError as e:
            raise JepaError("Parquet needs pandas and pyarrow", now="pip install 'jepa-cluster[track]', or .csv") from e
        pandas.DataFrame(rows).to_parquet(a.out)
    elif a.out:
        a.out.write_text(curves.to_csv(rows))
    else:
        print(curves.to_csv(rows), end="")
    return 0


def repro(a: argparse.Namespace) -> int:
    from jepa_cluster.launch import describe, upkeep

    root = root_of(a)
    rows = selected(a, describe.status(root, name_of(a)))["trials"]
    documents = [upkeep.repro(root.trial(r["name"])) for r in rows]
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
    from jepa_cluster.launch import upkeep

    found = upkeep.garbage(root_of(a))
    total = sum(upkeep.size(p) for p, _ in found) / 1e6
    if not a.json:
        for path, reason in found:
            print(f"  {path}   {reason}")
    if found and not agreed(a, f"remove {len(found)} things, {total:,.1f} MB?"):
        return 1
    for path, _ in found:
        upkeep.remove(path)
    return finish(
        a, {"removed": [str(p) for p, _ in found], "megabytes": total}, f"removed {len(found)}, {total:,.1f} MB"
    )
