"""Decide whether a trial may run again after a failure, and with which micro-batch.

In: a trial's attempts and the sweep's `retries`. Out: its config with the same recipe, or why it
may not run again. Used by the job itself, by the local queue and by `submit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import JepaError
from jepa_cluster.launch.cluster.job_name import JobName
from jepa_cluster.launch.scheduler import array_records
from jepa_cluster.records import AttemptRecord
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.training.dist_env import micro_batch
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import (
    ILLEGAL_ACCESS,
    ON_OTHER_NODE,
    RULES,
    Failure,
    classify_attempt,
    exhausted_budget,
)
from jepa_cluster.trial.file_facts import attempts_of

# Restarts of a job by Slurm up to which it is requeued although its attempts cannot be read.
UNCOUNTED_RESTARTS = 100


def halve_micro_batch(config: TrialConfig, attempts: Iterable[AttemptRecord]) -> TrialConfig:
    """Halve the micro-batch, down to 1, once per attempt that filled the GPU's memory.

    The result divides the images of a rank. The global batch and the identity of the trial stay.
    With `objective.target=views` the micro-batch stays, because the loss depends on it.
    """
    recipe, runtime = config.recipe, config.runtime
    if recipe.objective.target == "views":
        return config
    for attempt in attempts:
        if classify_attempt(attempt).cause != "gpu_oom":
            continue
        images = micro_batch(recipe, runtime, runtime.world_size)
        if images > 1:
            runtime = replace(runtime, micro_batch=images // 2)
            images = micro_batch(recipe, runtime, runtime.world_size)
            runtime = replace(runtime, micro_batch=images)
    return replace(config, runtime=runtime)


def apply_retry(trial: TrialDir, retries: Mapping[str, int]) -> Failure | None:
    """Remove FAILED.json and return the failure when another attempt may succeed, else None.

    That holds for a full GPU memory, for which the micro-batch is halved once per attempt, and for
    a broken node (see node_exclusion.py), while the retry budget allows it.
    """
    attempts = trial.attempts()
    if not attempts:
        return None
    *earlier, last = attempts
    failure = classify_attempt(last)
    if failure.cause not in ("gpu_oom", "node") or _is_program_fault(trial, attempts):
        return None
    if failure.cause == "node" and failure.rule.budget not in retries:
        return None
    config = smaller = trial.read_config()
    if failure.cause == "gpu_oom" and "halved" not in last:
        smaller = halve_micro_batch(config, [last])
        images = smaller.runtime.micro_batch
        if not images or images == config.runtime.micro_batch:
            return None
        last["halved"] = images  # which may make it free of charge
    if exhausted_budget([*earlier, last], retries)[0]:
        return None
    if smaller is not config:
        trial.amend(last["attempt"], {"halved": smaller.runtime.micro_batch})
        trial.create(smaller)
    trial.failed.unlink(missing_ok=True)
    return failure


def _is_program_fault(trial: TrialDir, attempts: Sequence[AttemptRecord]) -> bool:
    """Whether the last attempt made the same illegal access as one on another node; record that.

    Two broken GPUs are less probable than a fault of the program.
    """
    *earlier, last = attempts
    error = last.get("error", "")
    for attempt in earlier:
        same = all(ILLEGAL_ACCESS in text for text in (error, attempt.get("error", "")))
        if same and attempt.get("node") != last.get("node"):
            where = f"{ON_OTHER_NODE} {attempt.get('node')}"
            line = next(line for line in error.splitlines() if ILLEGAL_ACCESS in line)
            trial.amend(last["attempt"], {"error": f"{line}; {where}"})
            return True
    return False


def lost_starts(
    trial: TrialDir,
    env: Mapping[str, str],
    undecided: str = "",
) -> int:
    """Return how often the trial was started without an attempt, this start included.

    A start that ended by preemption does not count, nor one on a bad node that is excluded now.
    undecided: a launch whose node may still be excluded.
    Slurm counts the starts of this job, because files may not be writable. Those of other jobs
    count since the last `jepa resume`; they are not known while the records of arrays cannot be
    read. Raises OSError if attempts cannot be read.
    """
    job = env.get("SLURM_JOB_ID", "")
    array_job = env.get("SLURM_ARRAY_JOB_ID", job)
    free = trial.attempts()
    opened = {attempt.get("launch") for attempt in free}
    for start in trial.ended_starts():
        launch, cause = start.get("launch"), start.get("cause")
        is_free = cause == "preempted" or start.get("excluded")
        is_free = is_free or (cause == "node" and launch == undecided)
        if is_free and launch not in opened:
            free.append(start)
    starts = _restarts(env) + 1 - sum(record.get("job_id") == job for record in free)
    with contextlib.suppress(JepaError, OSError):
        others = 0
        for array in array_records.arrays_of(array_records.read(trial.root), {trial.name}):
            if array.get("resumed"):
                others = 0
            others += array["job"] != array_job and not attempts_of(array, free)
        starts += others
    return starts


def _restarts(env: Mapping[str, str]) -> int:
    return int(env.get("SLURM_RESTART_COUNT", "0"))


def exhausted_starts(
    trial: TrialDir,
    env: Mapping[str, str],
    undecided: str = "",
) -> str:
    """Return why a job whose start opened no attempt may not start again, or ''.

    Where attempts cannot be read, good starts are not known from lost ones. The job then starts
    again until Slurm has restarted it `UNCOUNTED_RESTARTS` times. undecided: as in `lost_starts`.
    """
    budget = RULES["infrastructure"].budget
    allowed = RETRIES[budget]
    with contextlib.suppress(JepaError, OSError):
        allowed = retries(trial.root, env.get("SLURM_JOB_NAME", "")).get(budget, allowed)
    try:
        starts = lost_starts(trial, env, undecided)
    except OSError as e:
        if _restarts(env) < UNCOUNTED_RESTARTS:
            return ""
        return f"{_restarts(env)} restarts, and attempts cannot be read: {e.strerror}"
    if starts <= allowed:
        return ""
    return f"{starts} starts without an attempt, retries.{budget} allows {allowed}"


def fail_start(
    trial: TrialDir,
    end: Mapping[str, Any],
    exhausted: str,
) -> None:
    """Write FAILED.json after a start without an attempt. end: its cause and error."""
    trial.write_failed(end["cause"], f"{end['error']}; {exhausted}", attempt=0)


def forgive_failure(trial: TrialDir) -> None:
    """Remove FAILED.json; attempts up to now no longer count against the sweep's `retries`."""
    trial.failed.unlink(missing_ok=True)
    newest = trial.newest_attempt()
    if newest:
        trial.amend(newest, {"forgiven": True})


def retries(root: Root, job_name: str) -> dict[str, int]:
    """Return the retry budget of a Slurm job's sweep; {} for a job that is none of ours."""
    name = JobName.parse(job_name)
    plan = root.sweep(name.sweep).read_plan() if name else None
    return plan["retries"] if plan else {}
