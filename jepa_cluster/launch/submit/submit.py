"""Submit a plan: write an intent, call sbatch, record the job.

A crash between these steps loses nothing. The next submit looks up an intent without a record by
its unique job name, and records the job if Slurm knows it. Trials that are queued, running or done
are not submitted again. One submitter at a time holds the lock of the root, and queries the status
again once it has it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from filelock import Timeout

from jepa_cluster.errors import LaunchError, SchedulerDown, SubmitLimit
from jepa_cluster.launch.cluster.job_name import JobName
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.scheduler import array_records, facts, local, slurm
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import (
    canary,
    code_snapshot,
    end_recorder,
    lost_attempts,
    sbatch,
    submissions,
    trial_writer,
)
from jepa_cluster.launch.submit.plan import Plan, check, class_record
from jepa_cluster.launch.submit.sbatch import Submission
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.records import ArrayIntent, ClaimRecord, QueueEntry, SweepPlan
from jepa_cluster.sweep import sweep_file
from jepa_cluster.sweep.claims import is_of, values_of
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, SweepDir
from jepa_cluster.trial.files import (
    SHARE_HINT,
    read_json,
    require_writable,
    revalidate_folder,
    write_atomic,
    write_json,
)
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.status import STARTABLE

RECENT_MS = 600_000  # time in which a job that submits its successor has called sbatch
LOCK_SECONDS = 120


def submit(plan: Plan, only: Iterable[str] | None = None, with_canary: bool = False) -> Plan:
    """Start what the plan would start, and return the plan as it was under the lock.

    only: start these trials alone, also if the user stopped them. with_canary: let the trials of
    each class depend on a short trial that must succeed first.
    """
    with locked(plan.root):
        if plan.profile.kind == "slurm" and (plan.actions.start or only):
            _refuse_federation()
        adopt_orphans(plan.root)
        plan = _refresh(plan, only)
        check(plan)
        require_writable(_folders_to_write(plan))
        code = code_snapshot.take(plan.root) if plan.actions.start else ""
        if _write_sweep(plan, code):
            trial_writer.write_trials(plan)
        if not plan.actions.start:
            return plan
        canaries = canary.required(plan, code) if with_canary else {}
        if plan.profile.kind == "local":
            _submit_locally(plan, code, canaries)
        else:
            return _submit_to_slurm(plan, code, canaries)
    return plan


@contextmanager
def locked(root: Root) -> Generator[None]:
    """Hold the lock of the root. Raises LaunchError."""
    try:
        root.path.mkdir(parents=True, exist_ok=True)
        lock = file_lock.acquire(root.submit_lock, LOCK_SECONDS)
    except PermissionError as e:
        raise LaunchError(
            "you may not write below this root",
            where=str(e.filename),
            hint=SHARE_HINT,
        ) from e
    except Timeout as e:
        raise LaunchError(
            "another `jepa submit` holds the lock of this root",
            where=e.lock_file,
            hint="wait until it has ended, then try again",
        ) from e
    with lock:
        yield


def _refresh(plan: Plan, only: Iterable[str] | None) -> Plan:
    """Query the status again, and decide by it what to start."""
    revalidate_folder(plan.root.trials)
    names = plan.root.names_by_id()
    for trial in plan.trials.values():
        other = names.get(trial.config.id, trial.name)
        if other != trial.name:
            raise LaunchError(
                f"another submit has just made the directory of '{trial.label}'",
                where=str(plan.root.trial(other).path),
                hint="submit again; the two sweeps will share it",
            )
    status = facts.query_status(plan.root, plan.status.trials)
    if status.problem:
        raise SchedulerDown(f"nothing was submitted: {status.problem}", hint=status.hint)
    selected = set(only or ())
    for name in status.trials.keys() - selected:
        end_recorder.write_marker(plan.root.trial(name), status.trials[name])
    lost_attempts.write_ends(plan.root, status.trials)
    actions = plan.allowed(reconcile(plan.trials, status.states))
    if only is not None:
        start = _resumable(plan, status, selected)
        _report_dropped(plan, selected, bool(start))
        actions = actions.changed(actions.start, "leave").changed(start, "resume")
    return replace(
        plan,
        status=status,
        actions=actions,
        resumed=only is not None,
    )


def _refuse_federation() -> None:
    federation = slurm.federation()
    if federation:
        raise LaunchError(
            f"this cluster is in the federation {federation}: a job may run on another cluster,"
            " where squeue and sacct of this one do not show it",
            hint="log in to a cluster outside the federation, and submit there",
        )


def _resumable(plan: Plan, status: StatusSnapshot, selected: set[str]) -> list[str]:
    """Return the selected trials to start. One whose job still waits only loses its STOP."""
    start: list[str] = []
    for name in filter(selected.__contains__, plan.trials):
        found = status.trials[name]
        if found.state == "stopped" and found.waits:
            plan.root.trial(name).stop.unlink(missing_ok=True)
        elif found.state in (*STARTABLE, "stopped") or found.marker == "FAILED":
            start.append(name)
    return start


def _report_dropped(plan: Plan, selected: set[str], others_start: bool) -> None:
    """Name selected trials that the sweep file no longer has. Raises LaunchError if none starts."""
    dropped = sorted(selected - plan.trials.keys())
    if not dropped:
        return
    what = f"no longer in the sweep, so not started: {', '.join(dropped)}"
    if not others_start:
        hint = "put its point back into the sweep file and submit it"
        raise LaunchError(what, where=plan.sweep.source.file, hint=hint)
    print(f"submit: {what}", file=sys.stderr)


def _claims(plan: Plan, before: SweepPlan | None) -> list[ClaimRecord]:
    """Return the claims, each with how many of its trials had finished when it was written."""
    if not plan.sweep.claims:
        return []
    known = before["claims"] if before else []
    finished: list[dict[str, Any]] = []
    for name, trial in plan.trials.items():
        if plan.root.trial(name).done.exists():
            finished.append(values_of(trial.point, trial.config.recipe))
    records: list[ClaimRecord] = []
    for claim in plan.sweep.claims:
        own = [is_of(claim.lower, found) or is_of(claim.than, found) for found in finished]
        record = ClaimRecord(**asdict(claim), finished=sum(own))
        same = [old for old in known if {**old, "finished": record["finished"]} == record]
        records.append(same[0] if same else record)
    return records


def _folders_to_write(plan: Plan) -> list[Path]:
    """Return the folders that this submission writes to."""
    root = plan.root
    folders = [root.sweep(plan.sweep.name), *map(root.trial, plan.trials)]
    paths = list(map(attrgetter("path"), folders))
    if plan.profile.kind == "local":
        paths.insert(0, root.local)
    return paths


def _write_sweep(plan: Plan, code: str) -> bool:
    """Write the sweep's file and plan.json. Returns False if they hold all of this already.

    code: '' if nothing starts, so the code stays.
    """
    folder = plan.root.sweep(plan.sweep.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    source = Path(plan.sweep.source.file)
    content = source.read_bytes() if source.is_file() else sweep_file.to_yaml(plan.sweep)
    before = folder.read_plan()
    dropped = [trial for trial in folder.planned() if trial["name"] in plan.actions.dropped]
    submitted = now_ms()
    if before and not code:
        code = before["code"]
        submitted = before["submitted"]
    record: SweepPlan = {
        "sweep": plan.sweep.name,
        "question": plan.sweep.question,
        "expect": plan.sweep.expect,
        "expect_best": dict(plan.sweep.expect_best),
        "claims": _claims(plan, before),
        "axes": list(plan.sweep.axes),
        "code": code,
        "profile": plan.profile.file,
        "kind": plan.profile.kind,
        "unit": plan.profile.unit,
        "submitted": submitted,
        "limits": asdict(plan.sweep.limits),
        "retries": dict(plan.sweep.retries),
        "classes": plan.class_records(),
        "trials": list(plan.planned.values()),
        "dropped": dropped,
    }
    if before and json.loads(json.dumps(record)) == before:
        return False
    if plan.calibration:  # the rates of this sweep stay, whatever is calibrated later
        plan.calibration.write(folder.calibration)
    write_atomic(folder.sweep_file, content)
    write_json(folder.plan, record)
    return True


def _submit_locally(plan: Plan, code: str, canaries: dict[str, str]) -> None:
    """Put the trials into the local queue. canaries: class -> name of its canary."""
    environment = {key: str(value) for key, value in plan.profile.environment.items()}

    def new_entry(name: str, cls: ResourceClass) -> QueueEntry:
        return {
            "trial": name,
            "world": cls.world,
            "code": code,
            "python": plan.profile.python or sys.executable,
            "environment": environment,
            "retries": dict(plan.sweep.retries),
        }

    entries: list[QueueEntry] = []
    in_progress = canary.in_progress(plan.root, canaries)
    for cls, letter in plan.class_letters.items():
        if letter in canaries and letter not in in_progress:
            canary.create(plan, letter, canaries[letter])
            entries.append(new_entry(canaries[letter], cls))
    for name in plan.actions.start:
        trial = plan.trials[name]
        entry = new_entry(name, plan.classes[name])
        if trial.trunk:
            entry["trunk"] = trial.trunk
            entry["begins"] = trial.begins
        if plan.letter(name) in canaries:
            entry["after"] = canaries[plan.letter(name)]
        entries.append(entry)
    local.enqueue(plan.root, entries, plan.profile.slots)


def _submit_to_slurm(plan: Plan, code: str, canaries: dict[str, str]) -> Plan:
    """Submit the arrays, as far as Slurm accepts them. canaries: class -> name of its canary."""
    folder = plan.root.sweep(plan.sweep.name)
    for part in (folder.intents, folder.arrays, folder.jobs):
        part.mkdir(exist_ok=True)
    longest = slurm.max_array_size()
    submitted: set[str] = set()

    def submit_one(submission: Submission) -> str:
        job = _submit_one(plan, code, submission)
        submitted.update(submission.array.trials)
        return job

    try:
        submissions.submit_in_order(plan, longest, canaries, submit_one)
    except SubmitLimit as e:
        if not submitted:
            hint = "submit again when some of your jobs have ended"
            raise SubmitLimit(f"nothing was submitted: {e.what}", hint=hint) from e
    gpu_throttle.try_rebalance(plan.root, plan.sweep.name)
    return replace(plan, actions=plan.actions.limited_to(submitted))


def _submit_one(plan: Plan, code: str, submission: Submission) -> str:
    """Write the intent, call sbatch, record the job. Returns its id."""
    array = submission.array
    sweep = plan.sweep.name
    name = str(JobName.new(sweep, array.letter))
    if submission.is_canary:
        canary.create(plan, array.letter, array.trials[0])
    intent: ArrayIntent = {
        **class_record(array.letter, array.cls),
        "name": name,
        "trials": list(array.trials),
        "parallel": array.parallel,
        "submitted": now_ms(),
        "code": code,
    }
    if submission.canary:
        intent["canary"] = submission.canary
    if plan.resumed or submission.is_canary:
        intent["resumed"] = True
    if submission.branches:  # sbatch holds the whole array; `rebalance` releases what need not wait
        intent["branches"] = submission.branches
        intent["held"] = list(array.trials)
    folder = plan.root.sweep(sweep)
    write_json(folder.intent(name), intent)
    try:
        job = sbatch.submit(plan, submission, name, code)
    except SchedulerDown:  # Slurm may have the job
        raise
    except LaunchError:
        folder.intent(name).unlink()
        raise
    _record(folder, intent, job)
    return job


def _record(folder: SweepDir, intent: ArrayIntent, job: str) -> None:
    write_json(folder.array(intent["name"]), {**intent, "job": job})


def adopt_orphans(root: Root) -> None:
    """Record the jobs of intents that a crash left without a record that can be read.

    An intent whose name Slurm does not know was never submitted, or Slurm has forgotten it: its
    file gets the ending .void, unless a job has just written it to submit its successor, or Slurm
    hides it from this user.
    """
    recorded = {array["name"] for array in array_records.read(root)}
    open_intents: dict[Path, ArrayIntent] = {}
    for path in (root.path / "sweeps").glob("*/intents/*.json"):
        if path.stem not in recorded:
            intent = cast("ArrayIntent | None", read_json(path))
            if intent:  # else it was removed meanwhile
                open_intents[path] = intent
    if not open_intents:
        return
    names = {path.stem for path in open_intents}
    tasks = slurm.squeue(names)
    tasks += slurm.sacct(names, array_records.before_submission(open_intents.values())) or []
    jobs = {task.name: task.job for task in tasks}
    for path, intent in open_intents.items():
        folder = SweepDir(path.parents[1])
        if path.stem in jobs:
            _record(folder, intent, jobs[path.stem])
            continue
        is_recent = intent["submitted"] > now_ms() - RECENT_MS
        if path.stat().st_uid == os.getuid() and not ("succeeds" in intent and is_recent):
            path.rename(path.with_suffix(".void"))
            folder.array(path.stem).unlink(missing_ok=True)
