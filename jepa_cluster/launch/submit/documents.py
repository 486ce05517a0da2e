"""Make the documents of `jepa plan` and `jepa status`: what --json prints and the tables show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from jepa_cluster.data.sample_order import lane_count
from jepa_cluster.errors import JepaError, LaunchError, suggest
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster.cost import CostEstimate
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options
from jepa_cluster.launch.scheduler import billing, facts, kill_delay, slurm
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.scheduler.kill_delay import KillDelay
from jepa_cluster.launch.submit import canary, code_snapshot, quota
from jepa_cluster.launch.submit.plan import Plan, class_record, remaining_gpu_hours
from jepa_cluster.records import (
    AttemptRecord,
    CanaryRow,
    PlanClass,
    PlanData,
    PlanDocument,
    PlannedTrial,
    PlanRow,
    StatusDocument,
    StatusRow,
)
from jepa_cluster.results.tables import CLASS_ERROR, ONLINE_ERROR
from jepa_cluster.sweep import data_set
from jepa_cluster.sweep.compose import shipped_sweeps
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.sweep.sweep_file import load
from jepa_cluster.trial import progress
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import free_bytes, read_json
from jepa_cluster.trial.provenance import code_versions, commit
from jepa_cluster.trial.status import IN_PROGRESS, OVER, STATES, TrialStatus
from jepa_cluster.trial.usage import process_seconds


def find_sweep(root: Root, sweep: str) -> Sweep:
    """Return a sweep by the path of its file, or by the name of a submitted or shipped one."""
    path = Path(sweep)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load(path)
    stored = root.sweep(sweep).sweep_file
    if stored.exists():
        return replace(load(stored), name=sweep)
    shipped = shipped_sweeps()
    if sweep in shipped:
        return load(shipped[sweep])
    raise no_such_sweep(root, sweep, shipped)


def no_such_sweep(root: Root, sweep: str, shipped: Iterable[str] = ()) -> LaunchError:
    return LaunchError(
        f"no sweep '{sweep}' was submitted here",
        where=str(root.path),
        hint=suggest(sweep, {*root.sweeps(), *shipped}),
    )


# ---- plan


def plan_document(plan: Plan) -> PlanDocument:
    """Return the document of `jepa plan`."""
    actions, delay = plan.actions, _kill_delay(plan)
    sizes: dict[str, int] = {}
    for name, trial in plan.trials.items():
        sizes[name] = cost.checkpoint_bytes(trial.config.recipe)
    return {
        "sweep": plan.sweep.name,
        "question": plan.sweep.question,
        "expect": plan.sweep.expect,
        "kind": plan.profile.kind,
        "unit": plan.profile.unit,
        "actions": {
            "new": len(actions.trials("submit")),
            "keep": len(actions.trials("keep")),
            "resume": len(actions.trials("resume")),
            "wait": len(actions.trials("wait")),
            "left alone": len(actions.trials("leave")),
            "done": len(actions.trials("done")),
        },
        "classes": [_plan_class(plan, cls, delay) for cls in plan.class_letters],
        "data": _plan_data(plan),
        "gpu_hours": plan.start_cost,
        "in_progress_cost": plan.in_progress_cost,
        "spent": plan.used_cost,
        "finished": plan.finished,
        "limit": plan.sweep.limits.gpu_hours,
        "arrays": len(plan.arrays()),
        "starts": estimated_starts(plan),
        "code": commit(code_snapshot.source()) or "as installed",
        "problem": plan.status.problem,
        "dropped": list(actions.dropped),
        "checkpoint_bytes": max(sizes.values()),
        "kept_bytes": sum(sizes[name] * cost.kept_checkpoints(plan.trials[name]) for name in sizes),
        "free_bytes": free_bytes(plan.root.path),
        "quota_bytes": quota.bytes_left(plan.root.path),
        "trials": plan_rows(plan),
    }


def plan_rows(plan: Plan) -> list[PlanRow]:
    indices = {name: index for index, name in enumerate(plan.trials)}
    rows: list[PlanRow] = []
    for name, trial in plan.trials.items():
        row: PlanRow = {
            **plan.planned[name],
            "index": indices[name],
            "state": plan.status.trials[name].state,
            "action": plan.actions.by_name[name],
            "trunk": indices[trial.trunk] if trial.trunk else None,
        }
        rows.append(row)
    return rows


def _plan_data(plan: Plan) -> list[PlanData]:
    """Return the data sets that the trials read, and what they probe there."""
    probes: dict[str, dict[str, None]] = {}
    for trial in plan.trials.values():
        labels = probes.setdefault(trial.config.runtime.data_root, {})
        labels.update(dict.fromkeys(trial.config.recipe.probe.labels))
    found: list[PlanData] = []
    for root, labels in probes.items():
        made = data_set.read(Path(root))
        row: PlanData = {
            "root": root,
            "digest": made.train.digest,
            "train": made.train.images,
            "val": made.val.images,
            "labels": list(made.train.labels),
            "classes": len(made.train.classes),
            "probes": list(labels),
        }
        found.append(row)
    return found


def _kill_delay(plan: Plan) -> KillDelay | None:
    """Return the time that Slurm leaves a preempted job; None if it does not answer."""
    if plan.profile.kind != "slurm" or plan.status.problem:
        return None
    try:
        return kill_delay.read(plan.profile, slurm.config())
    except JepaError:
        return None


def _plan_class(plan: Plan, cls: ResourceClass, delay: KillDelay | None) -> PlanClass:
    estimates: list[CostEstimate] = []
    graces: list[float] = []
    kept = 0
    lanes: list[int] = []
    models: set[str] = set()
    bases: set[str] = set()
    for name, trial in plan.trials.items():
        if plan.classes[name] == cls:
            estimates.append(plan.estimates[name])
            bases.add(plan.estimates[name].basis)
            graces.append(trial.config.runtime.grace_seconds)
            kept += cost.kept_checkpoints(trial)
            models.add(trial.config.recipe.model.name)
            data = trial.config.recipe.data
            if data.order == "block" and data.images:
                lanes.append(lane_count(data.images, data.shuffle_block, data.shuffle_window))
    hours = statistics.fmean(estimate.hours for estimate in estimates)
    spread = gpu_spread = 0.0
    for estimate in estimates:
        spread = max(spread, abs(estimate.hours - hours) + estimate.spread)
        gpu_spread += estimate.spread * cls.world
    return {
        **class_record(plan.class_letters[cls], cls),
        "models": sorted(models),
        "trials": len(estimates),
        "hours": hours,
        "spread": spread,
        "gpu_hours": hours * len(estimates) * cls.world,
        "gpu_spread": gpu_spread,
        "basis": "; ".join(sorted(bases)),
        "save_seconds": max(estimate.save_seconds for estimate in estimates),
        "grace_seconds": kill_delay.usable(delay, min(graces)),
        "grace": kill_delay.describe(delay, min(graces)),
        "kept": kept,
        "lanes": min(lanes, default=None),
    }


def estimated_starts(plan: Plan) -> dict[str, str]:
    """Ask Slurm when one more trial of each class would start, by `sbatch --test-only`.

    Returns letter of the class -> local time, '2026-03-01T03:40:00', for the classes that the plan
    starts and of which Slurm gives a time; {} without Slurm, or while it does not answer.
    """
    if plan.profile.kind != "slurm" or plan.status.problem:
        return {}
    options_by_letter: dict[str, list[str]] = {}
    for cls in {plan.classes[trial] for trial in plan.actions.start}:
        options = sbatch_options(plan.profile, cls)
        options_by_letter[plan.class_letters[cls]] = to_cli_options(options)
    with ThreadPoolExecutor() as pool:
        times = pool.map(slurm.estimated_start, options_by_letter.values())
        starts = zip(options_by_letter, times, strict=True)
        return {letter: start for letter, start in sorted(starts) if start}


# ---- status


def status_document(root: Root, sweep: str, billed: bool = False) -> StatusDocument:
    """Return the document of `jepa status`. billed: the cost of all attempts by `sacct -D`.

    Raises LaunchError for a sweep that was not submitted.
    """
    plan = root.sweep(sweep).read_plan()
    if plan is None:
        raise no_such_sweep(root, sweep)
    canary_names = canary.newest(root, sweep)
    entries = root.sweep(sweep).planned()
    names = map(itemgetter("name"), entries)
    snapshot = facts.query_status(root, [*names, *canary_names])
    rows: list[StatusRow] = []
    counts: dict[str, int] = dict.fromkeys(STATES, 0)
    for index, planned in enumerate(entries):
        status = snapshot.trials[planned["name"]]
        counts[status.state] += 1
        if index >= len(plan["trials"]):
            notes = [status.note, "no longer asked for"]
            if status.state in IN_PROGRESS:
                notes[1] += ": jepa cancel"
            status = replace(status, note="; ".join(filter(None, notes)))
        rows.append(_status_row(root, index, planned, status))
    canaries = [_canary_row(root.trial(name), snapshot) for name in canary_names]
    is_billed = billed and _set_billed_hours(root, [*rows, *canaries])
    remaining, stopped_cost = _remaining(rows, canaries)
    gpu_hours = sum(row["gpu_hours"] for row in [*rows, *canaries])
    for trial in root.canaries_of(sweep):
        if trial.name not in canary_names:  # of earlier submits
            gpu_hours += process_seconds(trial, trial.attempts()) / 3600
    return {
        "sweep": sweep,
        "question": plan["question"],
        "counts": counts,
        "gpu_hours": gpu_hours,
        "cost_by": "sacct" if is_billed else "attempt records",
        "unit": plan["unit"],
        "remaining": remaining,
        "stopped_cost": stopped_cost,
        "limit": plan["limits"].get("gpu_hours"),
        "problem": snapshot.problem,
        "canaries": canaries,
        "trials": rows,
    }


def _status_row(root: Root, index: int, planned: PlannedTrial, status: TrialStatus) -> StatusRow:
    trial = root.trial(planned["name"])
    attempts = _attempts(trial, status)
    metrics, gpu_hours = _progress(trial, status, attempts)
    step = metrics.get("step", 0)
    if status.state == "done":
        done = read_json(trial.done) or {}
        step = done.get("step", step)
        metrics = {**metrics, **done.get("metrics", {})}
    notes = [status.note]
    if planned["begins"] and not status.note:
        notes = [f"from step {planned['begins']} of its trunk"]
    if status.state == "running":
        notes.append(progress.overdue_checkpoint(trial))
    return {
        **planned,
        "index": index,
        "state": status.state,
        "held": status.held,
        "cause": status.cause,
        "note": "; ".join(filter(None, notes)),
        "slurm_state": status.slurm_state,
        "job": status.job,
        "attempts": status.attempts,
        "code": code_versions(attempts),
        "canary": status.canary,
        "step": int(step),
        "loss": metrics.get("loss"),
        "probe": _probe_error(metrics),
        "gpu_hours": gpu_hours,
    }


def _canary_row(trial: TrialDir, snapshot: StatusSnapshot) -> CanaryRow:
    status = snapshot.trials[trial.name]
    metrics, gpu_hours = _progress(trial, status, _attempts(trial, status))
    return {
        **canary.read_request(trial),
        "name": trial.name,
        "state": status.state,
        "job": status.job,
        "step": int(metrics.get("step", 0)),
        "steps": canary.STEPS,
        "measured_hours": cost.measured_hours(trial) if status.state == "done" else None,
        "gpu_hours": gpu_hours,
        "holds": sum(other.canary == trial.name for other in snapshot.trials.values()),
    }


def _attempts(trial: TrialDir, status: TrialStatus) -> list[AttemptRecord]:
    return trial.attempts() if status.attempts else []


def _progress(
    trial: TrialDir, status: TrialStatus, attempts: Sequence[AttemptRecord]
) -> tuple[dict[str, Any], float]:
    """Return the newest metrics of a trial, and the GPU-hours of all its attempts."""
    if not attempts:
        return {}, 0.0
    seconds = process_seconds(trial, attempts, running=status.state == "running")
    return progress.latest_metrics(trial), seconds / 3600


def _probe_error(metrics: Mapping[str, Any]) -> float | None:
    """Return the error of the class probe, else of the first by name; None without a probe."""
    is_frozen = metrics.get("target_initial_share") == 1.0
    first = [ONLINE_ERROR, CLASS_ERROR] if is_frozen else [CLASS_ERROR]
    for key in (*first, *sorted(metrics)):
        if key.startswith("probe/") and key.endswith("_error") and key in metrics:
            return metrics[key]
    return None


def _set_billed_hours(root: Root, rows: list[StatusRow | CanaryRow]) -> bool:
    """Replace the GPU-hours of all rows by those of sacct. Returns False if there is no sacct."""
    seconds = billing.billed_seconds(root, [row["name"] for row in rows])
    if seconds is None:
        return False
    for row in rows:
        row["gpu_hours"] = seconds[row["name"]] / 3600
    return True


def _remaining(rows: list[StatusRow], canaries: list[CanaryRow]) -> tuple[float, float]:
    """Return the GPU-hours that unfinished trials need, and those that stopped ones would need.

    The estimate of a class is corrected by what its canary measured.
    """
    factors: dict[str, float] = {}
    for row in canaries:
        if row["measured_hours"] and row["hours"]:
            factors[row["class"]] = row["measured_hours"] / row["hours"]
    remaining = stopped = 0.0
    for row in rows:
        hours = remaining_gpu_hours(row, row["step"]) * factors.get(row["class"], 1.0)
        if row["state"] == "stopped":
            stopped += hours
        elif row["state"] not in OVER:
            remaining += hours
    return remaining, stopped
