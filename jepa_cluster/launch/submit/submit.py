"""From a proposal to the queue: intent -> sbatch -> record.

Crash-safe in that order: an intent without a record is looked up by its unique job name, and adopted when the
scheduler knows it. Idempotent: what is queued, running or done is not handed over again. One submitter at a time
holds the root's lock, and looks again once it has it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from filelock import Timeout

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.cluster.profile import class_of
from jepa_cluster.launch.scheduler import facts, local, retry_policy, slurm
from jepa_cluster.launch.submit import canary, code_snapshot, sbatch, submissions
from jepa_cluster.launch.submit.plan import Plan, check
from jepa_cluster.launch.submit.submissions import Submission
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.records import JobName, QueueEntry
from jepa_cluster.sweep import sweep_file
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_atomic, write_json
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.status import ACTIVE, State

LOCK_SECONDS = 120
THREADS = 16  # that create trial directories


def submit(p: Plan, only: Iterable[str] | None = None, wake: Iterable[str] = (), with_canary: bool = False) -> Plan:
    """Make it so, and return what was done (the proposal as it stood under the lock).

    only: start none but these. wake: start these although somebody stopped them. with_canary: the trials of each class
    depend on a short trial that must succeed first.
    """
    with locked(p.root):
        adopt_orphans(p.root)
        p = _refresh(p, only, set(wake))
        check(p)
        code = code_snapshot.take(p.root)
        _write_sweep(p, code)
        with ThreadPoolExecutor(THREADS) as pool:  # their syncs to disk overlap
            list(pool.map(functools.partial(_write_trial, p, set(p.plan.start)), p.trials))
        if p.plan.start:
            _to_local(p, code, with_canary) if p.profile.kind == "local" else _to_slurm(p, code, with_canary)
    return p


def _write_trial(p: Plan, start: set[str], name: str) -> None:
    directory, trial = p.root.trial(name), p.trials[name]
    if name in start:
        directory.stop.unlink(missing_ok=True)
        directory.create(retry_policy.halve_micro_batch(trial.config, directory.attempts()))
    if directory.path.exists():
        directory.add_point(p.sweep.name, {**trial.point, "seed": trial.seed})


def _refresh(p: Plan, only: Iterable[str] | None, wake: set[str]) -> Plan:
    seen = facts.query_status(p.root, p.seen.trials)
    if seen.problem:
        raise SchedulerDown(f"nothing was submitted: {seen.problem}", hint="try again when Slurm answers")
    states: dict[str, State] = {n: "interrupted" if n in wake and s == "stopped" else s for n, s in seen.states.items()}
    plan = reconcile(p.trials, states)
    if only is not None:
        keep = set(only)
        start = {"submit": plan.submit, "resume": plan.resume}
        plan = replace(plan, **{k: tuple(n for n in v if n in keep) for k, v in start.items()})
    return replace(p, seen=seen, plan=plan)


@contextmanager
def locked(root: Root) -> Generator[None]:
    """One submitter at a time below a root."""
    try:
        root.path.mkdir(parents=True, exist_ok=True)
        lock = file_lock.acquire(root.path / ".submit.lock", LOCK_SECONDS)
    except PermissionError as e:
        raise LaunchError(
            "you may not write below this root",
            where=str(e.filename),
            hint="share it in a group (chgrp, chmod -R g+ws, umask 002 for all of you), or --root with one of your own",
        ) from e
    except Timeout as e:
        raise LaunchError("somebody else is submitting", where=e.lock_file, hint="wait for them, then try again") from e
    with lock:
        yield


def _write_sweep(p: Plan, code: str) -> None:
    folder = p.root.sweep(p.sweep.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    source = Path(p.sweep.source.file)
    write_atomic(folder.sweep_file, source.read_bytes() if source.is_file() else sweep_file.to_yaml(p.sweep).encode())
    names = p.letters
    write_json(
        folder.plan,
        {
            "sweep": p.sweep.name,
            "question": p.sweep.question,
            "expect": p.sweep.expect,
            "axes": list(p.sweep.axes),
            "code": code,
            "profile": p.profile.file,
            "kind": p.profile.kind,
            "unit": p.profile.unit,
            "submitted": now_ms(),
            "limits": asdict(p.sweep.limits),
            "retries": dict(p.sweep.retries),
            "classes": [{"class": names[c], **asdict(c)} for c in sorted(names)],
            "trials": [
                {
                    "name": name,
                    "id": t.config.id,
                    "label": t.label,
                    "point": dict(t.point),
                    "seed": t.seed,
                    "class": names[class_of(t)],
                    "world": class_of(t).world,
                    "steps": t.config.recipe.optim.steps,
                    "hours": round(p.prices[name].hours, 4),
                    "trunk": t.trunk,
                    "begins": t.begins,
                }
                for name, t in p.trials.items()
            ],
        },
    )


def _to_local(p: Plan, code: str, with_canary: bool) -> None:
    shared = {
        "code": code,
        "python": p.profile.python or sys.executable,
        "environment": {k: str(v) for k, v in p.profile.environment.items()},
        "retries": dict(p.sweep.retries),
        "sweep": p.sweep.name,
    }
    entries: list[QueueEntry] = []
    canaries = canary.required(p, code) if with_canary else {}
    states = canary.states(p.root, canaries)
    for cls, letter in p.letters.items():
        if letter in canaries and states[letter].state not in ACTIVE:
            canary.create(p, letter, canaries[letter])
            entry = {**shared, "trial": canaries[letter], "world": cls.world}
            entries.append(cast("QueueEntry", entry))
    for name in p.plan.start:
        cls = p.classes[name]
        after = canaries.get(p.letters[cls])
        entry = {**shared, **_trunk(p, name), "trial": name, "world": cls.world}
        entries.append(cast("QueueEntry", {**entry, "after": after} if after else entry))
    local.enqueue(p.root, entries, p.profile.slots)


def _to_slurm(p: Plan, code: str, with_canary: bool) -> None:
    folder = p.root.sweep(p.sweep.name)
    for part in (folder.intents, folder.arrays, folder.jobs):
        part.mkdir(exist_ok=True)
    jobs: list[str] = []
    canaries = canary.required(p, code) if with_canary else {}
    for turn in submissions.submissions(p, canaries):
        (first, *_) = turn.array.trials
        if first in canaries.values():
            canary.create(p, turn.array.letter, first)
        jobs.append(_submit_one(p, turn, code, jobs))
    gpu_throttle.try_rebalance(p.root, p.sweep.name)


def _submit_one(p: Plan, turn: Submission, code: str, jobs: Sequence[str]) -> str:
    """intent -> sbatch -> record. jobs: of the turns before it."""
    array, name = turn.array, str(JobName.new(p.sweep.name, turn.array.letter))
    intent = {"name": name, "trials": list(array.trials), "class": array.letter, **asdict(array.cls)}
    intent |= {"canary": turn.canary} if turn.canary else {}
    if turn.branches:  # sbatch holds all of the array; `balance` releases those that need not wait
        intent |= {"branches": turn.branches, "held": list(array.trials)}
    intent |= {"code": code, "parallel": array.parallel, "submitted": now_ms()}
    write_json(p.root.sweep(p.sweep.name).intent(name), intent)
    executor = turn.executor(p, name, code, jobs)
    job = sbatch.submit(executor, [str(p.root.trial(t).path) for t in array.trials])
    _record(p.root, p.sweep.name, intent, job)
    return job


def _trunk(p: Plan, name: str) -> dict[str, Any]:
    """Where a branch begins; nothing for other trials."""
    trial = p.trials[name]
    return {"trunk": trial.trunk, "begins": trial.begins} if trial.trunk else {}


def _record(root: Root, sweep: str, intent: Mapping[str, Any], job: str) -> None:
    write_json(root.sweep(sweep).array(intent["name"]), {**intent, "job": job})


def adopt_orphans(root: Root) -> list[str]:
    """Intents that a crash left without a record: recorded when Slurm knows their name, else void. -> adopted names.

    A void intent stays as a file ending in .void, for whoever wants to know.
    """
    open_ = [p for p in (root.path / "sweeps").glob("*/intents/*.json") if not _recorded(p)]
    if not open_:
        return []
    intents = {p: read_json(p) or {} for p in open_}
    names = [p.stem for p in open_]
    oldest = min(i.get("submitted", 0) for i in intents.values()) / 1000 - 60
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(oldest))
    tasks = [*slurm.squeue(names), *(slurm.sacct(names, since) or [])]
    jobs = {t.name: t.job for t in tasks}
    for path, intent in intents.items():
        if path.stem in jobs:
            sweep = path.parents[1].name
            sbatch.restore_submitit_pickles(root, sweep, intent, jobs[path.stem])
            _record(root, sweep, intent, jobs[path.stem])
        else:
            path.rename(path.with_suffix(".void"))
    return sorted(jobs)


def _recorded(intent: Path) -> bool:
    return (intent.parents[1] / "arrays" / intent.name).exists()
