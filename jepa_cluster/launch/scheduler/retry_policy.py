"""What can be changed so that a trial may run again: a smaller micro-batch where the GPU's memory was full; and how
often each cause has been forgiven already.

In: a trial's attempts and the sweep's `retries`. Out: its config with the same recipe, or nothing when the budget is
spent. Used by the job itself, by the local queue and by `submit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from jepa_cluster.config import TrialConfig
from jepa_cluster.launch.scheduler import failures
from jepa_cluster.launch.scheduler.failures import Failure
from jepa_cluster.records import AttemptRecord, JobName
from jepa_cluster.trial.directory import Root, TrialDir


def halve_micro_batch(config: TrialConfig, attempts: Iterable[AttemptRecord]) -> TrialConfig:
    """The micro-batch halved for each attempt that filled the GPU's memory; the global batch, and the trial, stay."""
    full = sum(failures.classify_attempt(a).cause == "gpu_oom" for a in attempts)
    runtime = config.runtime
    micro = runtime.micro_batch or config.recipe.optim.batch // (runtime.nodes * runtime.procs_per_node)
    for _ in range(full):
        micro = micro // 2 if micro % 2 == 0 else micro
    return replace(config, runtime=replace(runtime, micro_batch=micro)) if full else config


def apply_retry(trial: TrialDir, retries: Mapping[str, int]) -> Failure | None:
    """After an error that the budget forgives: forget the failure, and say which it was; None for any other.

    Where memory was full the micro-batch is halved, once an attempt, whichever of its ranks comes first. A broken
    machine is left to others (node_exclusion.py).
    """
    attempts = trial.attempts()
    verdict = failures.classify_attempt(attempts[-1]) if attempts else None
    if verdict is None or verdict.cause not in ("gpu_oom", "node") or exhausted_budget(attempts, retries):
        return None
    if verdict.cause == "gpu_oom" and "halved" not in attempts[-1]:
        config = trial.read_config()
        smaller = halve_micro_batch(config, attempts[-1:])
        if smaller.runtime.micro_batch == config.runtime.micro_batch:
            return None
        trial.amend(attempts[-1]["attempt"], {"halved": smaller.runtime.micro_batch})
        trial.create(smaller)
    elif verdict.rule.budget not in retries:  # nobody has said how often
        return None
    trial.failed.unlink(missing_ok=True)
    return verdict


def forgive_failure(trial: TrialDir) -> None:
    """Remove the failure of a trial; its attempts up to now no longer count against the sweep's `retries`."""
    trial.failed.unlink(missing_ok=True)
    newest = trial.newest_attempt()
    if newest:
        trial.amend(newest, {"forgiven": True})


def exhausted_budget(attempts: Sequence[AttemptRecord], retries: Mapping[str, int], word: str = "") -> str:
    """'' while the last end may be forgiven, else why not. word: Slurm's, of the newest attempt.

    Attempts up to the last `retry` of a person do not count, nor do those that Slurm itself brought back.
    """
    from_here = max((i + 1 for i, a in enumerate(attempts) if a.get("forgiven")), default=0)
    counted: dict[str, int] = {}
    budget, cause = "", ""
    for i, a in enumerate(attempts[from_here:], from_here):
        newest = i == len(attempts) - 1
        if not newest and "ended" not in a and _same_job(a, attempts[i + 1]):
            continue
        verdict = failures.classify_attempt(a, word if newest else "")
        budget, cause = verdict.rule.budget, verdict.cause
        counted[budget] = counted.get(budget, 0) + 1
    allowed = retries.get(budget)
    if not budget or allowed is None or counted[budget] <= allowed:
        return ""
    return f"{cause} {counted[budget]} times, retries.{budget} allows {allowed}"


def retries(root: Root, job_name: str) -> dict[str, int]:
    """The budget of the sweep that a Slurm job belongs to; {} for a job that is none of ours."""
    name = JobName.parse(job_name)
    plan = root.sweep(name.sweep).read_plan() if name else None
    return plan["retries"] if plan else {}


def _same_job(a: AttemptRecord, b: AttemptRecord) -> bool:
    return bool(a.get("job_id")) and a.get("job_id") == b.get("job_id")
