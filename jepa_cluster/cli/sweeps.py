"""The verbs of a sweep's day: plan, submit, status, watch, logs, cancel, requeue, resume, retry.

Each handler finds the sweep, asks a lower floor, and prints a document: as a table, or with --json as it is.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    selected,
    tell,
    verb,
)  # fmt: skip
from jepa_cluster.errors import LaunchError, plural

if TYPE_CHECKING:
    from jepa_cluster.launch.submit.plan import Plan
    from jepa_cluster.trial.directory import Root

WORK = 3  # exit code of `plan` when submit would start something
REFRESH = 0.5  # s between looks of `watch` on a terminal
BALANCE = 30.0  # s between two times that `watch` deals the GPUs in flight


def add(verbs: Verbs) -> None:
    p = verb(verbs, "plan", plan, "what submit would do and cost; changes nothing; exit code 3 when there is work")
    ask_sweep(p, "sweep file, or name of a submitted sweep")
    ask_cluster(p)
    p.add_argument("--points", action="store_true", help="list every trial")
    p = verb(verbs, "submit", submit, "show the plan, ask, then start what is missing; twice changes nothing")
    ask_sweep(p, "sweep file, or name of a submitted sweep")
    ask_cluster(p)
    p.add_argument(
        "--canary", action="store_true", help="start one short trial per class; the class waits until it succeeds"
    )
    p.add_argument("--yes", "-y", action="store_true", help="do not ask")
    p.add_argument(
        "--dry-run", action="store_true", help="print the exact sbatch scripts (Slurm) or commands, start nothing"
    )
    p = verb(verbs, "status", status, "where every trial stands, by its files and the scheduler")
    ask_sweep(p, "name of a submitted sweep; without it, one line a sweep", optional=True)
    ask_selection(p)
    p.add_argument(
        "--billed", action="store_true", help="cost of all attempts by `sacct -D` instead of our own records"
    )
    p = verb(verbs, "watch", watch, "a live table; a line a change when not on a terminal")
    ask_sweep(p, "name of a submitted sweep")
    p.add_argument(
        "--until-done", action="store_true", help="end when nothing is queued or running; code 1 if any failed"
    )
    p.add_argument("--until-half", action="store_true", help="end when a running trial has passed half of its steps")
    p.add_argument("--sync", action="store_true", help="bring MLflow up to date meanwhile, as `jepa sync --follow`")
    p = verb(verbs, "logs", logs, "a trial's output, newest attempt, rank 0")
    ask_sweep(p, "name of a submitted sweep")
    ask_selection(p)
    p.add_argument("-f", "--follow", action="store_true", help="go on printing until the trial stops running")
    p.add_argument("--rank", type=int, default=0, help="which rank (default 0)")
    p.add_argument("--attempt", type=int, help="which attempt (default the newest)")
    p.add_argument("--lines", "-n", type=int, default=40, help="last lines of each file (default 40; 0: all)")
    for name, handler, told in (
        ("requeue", requeue, "ask running trials to save a checkpoint and go back into the queue"),
        ("cancel", cancel, "stop trials: a running one saves a checkpoint first; they stay stopped until `resume`"),
        ("resume", resume, "start stopped or interrupted trials again, from their newest checkpoint"),
        ("retry", retry, "start failed trials again, after you mended the cause"),
    ):
        p = verb(verbs, name, handler, told)
        ask_sweep(p, "name of a submitted sweep")
        ask_selection(p)
        p.add_argument("--yes", "-y", action="store_true", help="do not ask")
        if name in ("resume", "retry"):
            ask_cluster(p)
        if name == "cancel":
            p.add_argument("--now", action="store_true", help="do not wait for a checkpoint: end the processes")


def plan(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents as describe

    proposal = _propose(a)
    document = describe.plan_document(proposal)
    if not print_json(a, document):
        terminal.console().print(terminal.plan(document))
        if a.points:
            terminal.console().print(terminal.points(document))
    return WORK if proposal.actions.start else 0


def submit(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents as describe
    from jepa_cluster.launch.submit import plan as propose
    from jepa_cluster.launch.submit import submit as launch
    from jepa_cluster.launch.worker import gpu_throttle

    proposal = _propose(a)
    document = describe.plan_document(proposal)
    if not a.json:
        terminal.console().print(terminal.plan(document))
    propose.check(proposal)
    if a.dry_run:
        return _dry_run(a, proposal)
    count = len(proposal.actions.start)
    if not count:
        gpu_throttle.try_rebalance(proposal.root, proposal.sweep.name)
        return finish(a, document, "nothing to do: every trial is done, queued, running or left alone")
    ahead = ", a canary of each class first" if a.canary else ""
    if not agreed(
        a, f"start {plural(count, 'trial')}, {terminal.number(proposal.start_cost)} {proposal.profile.unit}{ahead}?"
    ):
        return 1
    done = launch.submit(proposal, with_canary=a.canary)
    held = "; all but the canaries wait until these succeed" if a.canary else ""
    text = f"started {len(done.actions.start)}{held}: jepa watch {proposal.sweep.name}"
    return finish(a, describe.plan_document(done), text)


def status(a: argparse.Namespace) -> int:
    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents as describe

    root = root_of(a)
    if not a.sweep:
        documents = [describe.status_document(root, s) for s in root.sweeps()]
        if not print_json(a, documents):
            terminal.console().print(
                terminal.overview(documents) if documents else f"no sweep was submitted in {root.path}"
            )
        return 0
    document = selected(a, describe.status_document(root, name_of(a), a.billed))
    if not print_json(a, document):
        terminal.console().print(terminal.status(document))
        if a.billed and document["cost_by"] != "sacct":
            print("sacct does not answer here: cost by our own attempt records")
    return 0


def watch(a: argparse.Namespace) -> int:
    from rich.live import Live

    from jepa_cluster.cli import terminal
    from jepa_cluster.launch.submit import documents as describe

    root, sweep = root_of(a), name_of(a)
    if a.sync:
        from jepa_cluster.cli import results

        a.sync = False
        with results.collecting(root, sweep):
            return watch(a)
    document = describe.status_document(root, sweep)
    if sys.stdout.isatty() and not a.json:
        balanced = time.monotonic()
        with Live(terminal.status(document, live=True), console=terminal.console(), auto_refresh=False) as live:
            while not _over(a, document):
                time.sleep(REFRESH)
                document = describe.status_document(root, sweep)
                live.update(terminal.status(document, live=True), refresh=True)
                balanced = _balanced(root, sweep, balanced)
    else:
        before: Mapping[str, Any] | None = None
        balanced = time.monotonic()
        while True:
            for line in [json.dumps(document)] if a.json else terminal.changes(before, document):
                print(line, flush=True)
            if _over(a, document):
                break
            time.sleep(REFRESH if a.until_half else 2 * REFRESH)
            before, document = document, describe.status_document(root, sweep)
            balanced = _balanced(root, sweep, balanced)
    return 1 if a.until_done and document["counts"]["failed"] else 0


def _balanced(root: Root, sweep: str, last: float) -> float:
    """Now and then, deal the GPUs in flight again over the sweep's arrays -> when that was done last."""
    if time.monotonic() - last < BALANCE:
        return last
    from jepa_cluster.launch.worker import gpu_throttle

    gpu_throttle.try_rebalance(root, sweep)
    return time.monotonic()


def logs(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler import facts
    from jepa_cluster.trial import progress

    if a.json and a.follow:
        raise LaunchError("--follow has no end, so there is no document", hint="leave out --follow or --json")
    root = root_of(a)
    (row,) = rows_of(a, "logs")
    trial = root.trial(row["name"])
    number = a.attempt or trial.newest_attempt()
    files = [trial.logs(number) / f"rank{a.rank}.{end}" for end in ("out", "err")]
    early = root.local / "logs" / trial.name / f"rank{a.rank}.log"
    files += [early] if early.exists() else []
    texts = {path: path.read_bytes() if path.exists() else b"" for path in files}
    lines = {path: data.decode(errors="replace").splitlines() for path, data in texts.items()}
    last = {path: found[-a.lines :] if a.lines else found for path, found in lines.items() if found}
    document = {"trial": trial.name, "attempt": number, "rank": a.rank, "files": {str(p): x for p, x in last.items()}}
    if not print_json(a, document):
        for path, found in last.items():
            print(f"==> {path} <==", *found, sep="\n", flush=True)
        if not last:
            told = progress.latest_metrics(trial)
            far = f"step {told['step']}, loss {told.get('loss', '?')}" if told else "no step yet"
            print(f"rank {a.rank} of attempt {number} wrote nothing; {trial.metrics(number)}: {far}", flush=True)
    read = {path: len(data) for path, data in texts.items()}
    while a.follow and facts.query_status(root, [trial.name]).states[trial.name] == "running":
        time.sleep(REFRESH)
        for path in (p for p in files if p.exists()):
            with path.open("rb") as f:
                f.seek(read[path])
                data = f.read()
            read[path] += len(data)
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
    return 0


def requeue(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler import local, slurm

    root, rows = _chosen(a, "running")
    if not agreed(a, f"interrupt {plural(len(rows), 'running trial')}? each saves a checkpoint first"):
        return 1
    here = local.signal_trials(root, (r["name"] for r in rows), signal.SIGUSR2)
    slurm.signal((r["job"] for r in rows if r["job"]), "USR2")
    return _done(a, [*here, *(r["name"] for r in rows if r["job"])], "will save, stop and go back into the queue")


def cancel(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler import local, slurm
    from jepa_cluster.trial.files import write_atomic

    root, rows = _chosen(a, "queued", "cooling", "running", "interrupted", "new", "unknown")
    if not agreed(a, f"stop {plural(len(rows), 'trial')}? stopped means until `jepa resume`"):
        return 1
    for row in rows:
        trial = root.trial(row["name"])
        if trial.path.exists():
            write_atomic(trial.stop, "stopped by jepa cancel\n")
    names = [r["name"] for r in rows]
    local.dequeue(root, names)
    slurm.signal(r["job"] for r in rows if r["job"] and (a.now or r["state"] != "running"))
    _stop_idle_canaries(a, root)
    if a.now:
        local.signal_trials(root, names, signal.SIGKILL)
    return _done(a, names, "stopped, or will be after the next checkpoint")


def _stop_idle_canaries(a: argparse.Namespace, root: Root) -> None:
    """Stop canaries that no trial waits for any more."""
    from jepa_cluster.launch.scheduler import local, slurm
    from jepa_cluster.launch.submit import documents as describe
    from jepa_cluster.trial.files import write_atomic

    document = describe.status_document(root, name_of(a))
    awaited = {t["canary"] for t in document["trials"]}
    for c in document["canaries"]:
        if c["state"] in ("queued", "cooling", "running") and c["name"] not in awaited:
            write_atomic(root.trial(c["name"]).stop, "stopped by jepa cancel\n")
            local.dequeue(root, [c["name"]])
            slurm.signal([c["job"]] if c["job"] else [])


def resume(a: argparse.Namespace) -> int:
    root, rows = _chosen(a, "stopped", "interrupted", "new")
    if not agreed(a, f"start {plural(len(rows), 'trial')} again?"):
        return 1
    return _start(a, root, rows)


def retry(a: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler import local, retry_policy, slurm

    root, rows = _chosen(a, "failed", "held")
    held = [r for r in rows if r["state"] != "failed"]
    if not agreed(a, f"forget the failure of {plural(len(rows), 'trial')} and start again?"):
        return 1
    local.dequeue(root, (r["name"] for r in held))
    slurm.signal(r["job"] for r in held if r["job"])
    for row in rows:
        retry_policy.forgive_failure(root.trial(row["name"]))
    return _start(a, root, rows, with_canary=bool(held))


def _start(a: argparse.Namespace, root: Root, rows: list[dict[str, Any]], with_canary: bool = False) -> int:
    from jepa_cluster.launch.submit import submit as launch

    names = [r["name"] for r in rows]
    for name in names:
        root.trial(name).stop.unlink(missing_ok=True)
    done = launch.submit(_propose(a), only=names, with_canary=with_canary)
    return _done(a, list(done.actions.start), "started")


def _dry_run(a: argparse.Namespace, p: Plan) -> int:
    """What would be handed over, in turn: scripts for Slurm, commands for this machine."""
    from jepa_cluster.launch.submit import canary, code_snapshot, submissions

    if p.profile.kind == "slurm":
        found = submissions.scripts(p, a.canary)
        if not print_json(a, found):
            for number, turn in enumerate(found, 1):
                print(f"# script {number} of {len(found)}: {turn['title']}", turn["script"], sep="\n")
        return 0
    command = "python -m jepa_cluster.launch.worker.main"
    canaries = canary.required(p, code_snapshot.read()[0]) if a.canary else {}
    names = [(cls, canaries[letter]) for cls, letter in p.class_letters.items() if letter in canaries]
    names += [(p.classes[name], name) for name in p.actions.start]
    found = [{"processes": c.world, "command": f"{command} {p.root.trial(name).path}"} for c, name in names]
    return finish(a, found, "\n".join(f"{f['processes']} × {f['command']}" for f in found))


def _over(a: argparse.Namespace, document: Mapping[str, Any]) -> bool:
    counts = document["counts"]
    if not any(counts[s] for s in ("queued", "cooling", "running", "unknown")):
        return True
    halves = (t for t in document["trials"] if t["state"] == "running")
    return bool(a.until_half) and any(2 * t["step"] >= t["steps"] for t in halves)


def _propose(a: argparse.Namespace) -> Plan:
    from jepa_cluster.launch.cluster import profile
    from jepa_cluster.launch.submit import documents as describe
    from jepa_cluster.launch.submit import plan as propose

    root = root_of(a)
    sweep = describe.find_sweep(root, a.sweep)
    given = Path(a.cluster) if a.cluster else None
    if given is None and sweep.name == a.sweep:  # a submitted sweep remembers its cluster
        known = root.sweep(sweep.name).read_plan()
        given = Path(known["profile"]) if known and Path(known["profile"]).is_file() else None
    return propose.make_plan(sweep, profile.load_profile(given), root)


def _chosen(a: argparse.Namespace, *states: str) -> tuple[Root, list[dict[str, Any]]]:
    """The trials that a verb may act on: selected, and in one of these states. Shown before anybody is asked."""
    from jepa_cluster.launch.submit import documents as describe

    root = root_of(a)
    document = selected(a, describe.status_document(root, name_of(a)))
    lost = {c["name"] for c in document["canaries"] if c["state"] in ("failed", "stopped", "interrupted")}
    rows = [t for t in document["trials"] if t["state"] in states or ("held" in states and t["canary"] in lost)]
    if not rows:
        found = ", ".join(sorted({t["state"] for t in document["trials"]}))
        raise LaunchError(f"none of these trials is {' or '.join(states)}: they are {found}", hint="jepa status")
    width = max(len(t["label"]) for t in rows)
    for t in rows:
        tell(a, f"  {t['index']:>3} {t['label']:<{width}} {t['state']:<11} {t['step']}/{t['steps']}")
    return root, rows


def _done(a: argparse.Namespace, names: list[str], text: str) -> int:
    return finish(a, {"trials": names}, f"{plural(len(names), 'trial')}: {text}")
