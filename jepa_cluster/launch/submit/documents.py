"""Proposals and sweeps as plain documents: what `--json` prints and what the tables show."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_cluster.errors import LaunchError, suggest
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options
from jepa_cluster.launch.scheduler import facts, slurm
from jepa_cluster.launch.submit import canary, code_snapshot
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.sweep.sweep_file import load
from jepa_cluster.trial import progress
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.provenance import commit
from jepa_cluster.trial.status import STATES, TrialStatus

_WORDS = {"submit": "new", "keep": "keep", "resume": "resume", "leave": "left alone", "done": "done"}


def find_sweep(root: Root, sweep: str) -> Sweep:
    """A sweep file by its path, or a submitted sweep by its name."""
    path = Path(sweep)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load(path)
    stored = root.sweep(sweep).sweep_file
    if stored.exists():
        return replace(load(stored), name=sweep)
    raise no_such_sweep(root, sweep)


def no_such_sweep(root: Root, sweep: str) -> LaunchError:
    return LaunchError(
        f"no sweep '{sweep}' was submitted here",
        where=str(root.path),
        hint=suggest(sweep, root.sweeps()) or "jepa submit",
    )


def plan_document(p: Plan, longest: int = 1_000_000) -> dict[str, Any]:
    """The document of `plan`."""
    letters, classes = p.letters, p.classes
    index = {name: i for i, name in enumerate(p.trials)}
    rows = [
        {
            "index": i,
            "name": name,
            "id": t.config.id,
            "label": t.label,
            "point": dict(t.point),
            "seed": t.seed,
            "class": letters[classes[name]],
            "state": p.seen.trials[name].state,
            "action": p.plan.action(name),
            "hours": p.prices[name].hours,
            "trunk": index.get(t.trunk or ""),
            "begins": t.begins,
        }
        for i, (name, t) in enumerate(p.trials.items())
    ]
    return {
        "sweep": p.sweep.name,
        "question": p.sweep.question,
        "expect": p.sweep.expect,
        "kind": p.profile.kind,
        "unit": p.profile.unit,
        "actions": {word: len(getattr(p.plan, action)) for action, word in _WORDS.items()},
        "classes": [_class(p, letter, [n for n, c in classes.items() if c == cls]) for cls, letter in letters.items()],
        "gpu_hours": p.gpu_hours,
        "at_work": p.committed - p.gpu_hours,
        "spent": p.spent,
        "limit": p.sweep.limits.gpu_hours,
        "arrays": len(p.arrays(longest)),
        "starts": estimated_starts(p),
        "code": commit(code_snapshot.source()) or "as installed",
        "problem": p.seen.problem,
        "dropped": list(p.plan.dropped),
        "trials": rows,
    }


def estimated_starts(p: Plan) -> dict[str, str]:
    """Class -> when Slurm would begin a trial of it, were it submitted now: '2026-03-01T03:40:00'. {} without Slurm."""
    if p.profile.kind != "slurm" or p.seen.problem or not shutil.which("sbatch"):
        return {}
    wanted = {p.letters[c]: c for c in {p.classes[n] for n in p.plan.start}}
    options = [to_cli_options(sbatch_options(p.profile, cls)) for cls in wanted.values()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(slurm.estimated_start, options)
    return {letter: when for letter, when in sorted(zip(wanted, found, strict=True)) if when}


def _class(p: Plan, letter: str, names: list[str]) -> dict[str, Any]:
    prices = [p.prices[n] for n in names]
    cls = p.classes[names[0]]
    hours = sum(c.hours for c in prices) / len(prices)
    return {
        "class": letter,
        "nodes": cls.nodes,
        "procs_per_node": cls.procs_per_node,
        "minutes": cls.minutes,
        "models": sorted({p.trials[n].config.recipe.model.name for n in names}),
        "trials": len(names),
        "hours": hours,
        "spread": max(max(abs(c.hours - hours) + c.spread for c in prices), 0.0),
        "gpu_hours": sum(c.gpu_hours for c in prices),
        "gpu_spread": sum(c.spread * c.world for c in prices),
        "basis": "; ".join(sorted({c.basis for c in prices})),
    }


def status_document(root: Root, sweep: str, billed: bool = False) -> dict[str, Any]:
    """The document of `status`: every trial of a submitted sweep, as it stands now. billed: cost by `sacct -D`."""
    plan = root.sweep(sweep).read_plan()
    if plan is None:
        raise no_such_sweep(root, sweep)
    trials = plan["trials"]
    ahead = canary.newest(root, sweep)
    seen = facts.query_status(root, [*(t["name"] for t in trials), *(c.name for c in ahead.values())])
    rows = [_row(root, i, t, seen.trials[t["name"]]) for i, t in enumerate(trials)]
    left = reconcile((t["name"] for t in trials), seen.states)
    unfinished = {*left.start, *left.keep}
    canaries = [canary.document(c, seen.trials[c.name]) for c in ahead.values()]
    for c in canaries:
        c["holds"] = sum(r["canary"] == c["name"] for r in rows)
    bill = facts.billed_gpu_hours(root, (r["name"] for r in [*rows, *canaries])) if billed else None
    for row in [*rows, *canaries] if bill is not None else []:
        row["gpu_hours"] = (bill or {})[row["name"]] / 3600
    slower = {c["class"]: c["measured_hours"] / c["hours"] for c in canaries if c["measured_hours"] and c["hours"]}
    rest = {t["name"]: _rest(t, r) * slower.get(t["class"], 1.0) for t, r in zip(trials, rows, strict=True)}
    return {
        "sweep": sweep,
        "question": plan["question"],
        "counts": {s: sum(r["state"] == s for r in rows) for s in STATES},
        "gpu_hours": sum(r["gpu_hours"] for r in [*rows, *canaries]),
        "cost_by": "attempt records" if bill is None else "sacct",
        "unit": plan.get("unit", "GPU-h"),
        "remaining": sum(rest[n] for n in unfinished),
        "put_by": sum(rest[r["name"]] for r in rows if r["state"] == "stopped"),
        "limit": plan.get("limits", {}).get("gpu_hours"),
        "problem": seen.problem,
        "canaries": canaries,
        "trials": rows,
    }


def _row(root: Root, index: int, t: Mapping[str, Any], s: TrialStatus) -> dict[str, Any]:
    trial = root.trial(t["name"])
    newest = progress.latest_metrics(trial) if s.attempts else {}
    done = read_json(trial.done) or {} if s.state == "done" else {}
    begins = int(t.get("begins") or 0)
    probe = {**newest, **done.get("metrics", {})}
    note = s.note or (f"from step {begins} of its trunk" if begins else "")
    if s.state == "running" and (overdue := progress.overdue_checkpoint(trial)):
        note = f"{note}; {overdue}" if note else overdue
    return {
        "index": index,
        "name": t["name"],
        "id": t["id"],
        "label": t["label"],
        "point": t["point"],
        "seed": t["seed"],
        "class": t["class"],
        "world": t.get("world", 1),
        "state": s.state,
        "note": note,
        "job": s.job,
        "attempts": s.attempts,
        "canary": s.canary,
        "step": int(done.get("step", newest.get("step", 0))),
        "steps": t["steps"],
        "trunk": t.get("trunk"),
        "loss": newest.get("loss"),
        "probe": next((v for k, v in sorted(probe.items()) if k.startswith("probe/") and k.endswith("_error")), None),
        "gpu_hours": progress.seconds_used(trial, running=s.state == "running") / 3600 if s.attempts else 0.0,
    }


def _rest(t: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    begins = int(t.get("begins") or 0)
    made = max(row["step"] - begins, 0) / max(row["steps"] - begins, 1)
    return float(t["hours"]) * t["world"] * (1 - made)
