"""Make the batch script of an array with submitit, and submit it.

In: a plan and a `Submission`. Out: the text of the script, or the id of the job. Records nothing.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any

from jepa_cluster.errors import JepaError, LaunchError, SchedulerDown, SubmitLimit, plural
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.cluster.sbatch_options import (
    BLOCKED,
    block_signals,
    sbatch_options,
    setup_lines,
    srun_options,
)
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.trial.files import write_atomic

SUBMIT_LIMIT = "SubmitJob"  # in Slurm's words for the limits on jobs in the queue
# Trial -> its trunk and the step that the trunk must commit first.
Branches = dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Submission:
    """One call of sbatch.

    canary: name of the canary that must succeed first, in the job `canary_job` (afterok).
    throttle_jobs: jobs that must end first, because the GPU cap has no room (afterany).
    branches: trials that wait for their trunks; with branches the array is submitted held.
    """

    array: Array
    canary: str = ""
    canary_job: str = ""
    throttle_jobs: tuple[str, ...] = ()
    branches: Branches = field(default_factory=Branches)

    @property
    def is_canary(self) -> bool:
        return self.array.trials[0].startswith("canary.")

    @property
    def title(self) -> str:
        """'class A, 12 trials' or 'the canary of class A, 1 trial'."""
        text = f"class {self.array.letter}, {plural(len(self.array.trials), 'trial')}"
        return f"the canary of {text}" if self.is_canary else text

    @property
    def dependency(self) -> str:
        """The value of --dependency; '' without one."""
        conditions: list[str] = []
        if self.canary_job:
            conditions.append(f"afterok:{self.canary_job}")
        if self.throttle_jobs:
            conditions.append(f"afterany:{':'.join(self.throttle_jobs)}")
        return ",".join(conditions)


def _kill_wait() -> dict[str, str]:
    """Return the variable that gives a job the KillWait of Slurm; {} where it is unknown."""
    with contextlib.suppress(JepaError):
        return {"JEPA_KILL_WAIT": str(slurm.kill_wait(slurm.config()))}
    return {}


def script_text(plan: Plan, submission: Submission, name: str, code: str) -> str:
    """Return exactly the script that `submit` passes to sbatch.

    Each task reads the name of its trial from the intent of the array.

    name: of the job, unique. code: id of the snapshot that it runs.
    """
    # Not the executor: it refuses to be made where srun is not installed, as for --dry-run.
    from submitit.slurm.slurm import _make_sbatch_string  # pyright: ignore[reportPrivateUsage]

    profile = plan.profile
    array = submission.array
    source = plan.root.code / code
    folder = plan.root.sweep(plan.sweep.name)
    jobs = folder.jobs
    python = shlex.quote(profile.python or sys.executable)
    is_array = len(array.trials) > 1
    log = f"{jobs}/{'%A_%a' if is_array else '%j'}.log"
    bad_nodes = node_exclusion.bad_nodes_to_exclude(plan.bad_nodes, profile, array.cls.nodes)
    options: dict[str, Any] = {"chdir": str(source), "output": log, "error": log}
    options |= sbatch_options(profile, array.cls, bad_nodes)
    if submission.dependency:  # after a failed canary its class stays pending for the user
        options |= {"dependency": submission.dependency, "kill-on-invalid-dep": "no"}
    if submission.branches:
        options["hold"] = True
    # The folder of the output of the tasks, which srun does not make.
    make_folder = f"mkdir -p {shlex.quote(str(jobs))}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}"
    make_folder += "${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    intent = shlex.quote(str(folder.intent(name)))
    return _make_sbatch_string(
        f"{BLOCKED} {python} -u -m jepa_cluster.launch.worker.main {intent}",
        jobs / "%j",
        job_name=name,
        array_parallelism=max(array.parallel, 1),
        map_count=len(array.trials) if is_array else None,
        setup=[
            make_folder,
            *setup_lines(profile, PYTHONPATH=str(source), **_kill_wait()),
            block_signals(python),
        ],
        # --wait ends a job in which one task is stopped and the others have finished.
        srun_args=["--kill-on-bad-exit=1", "--wait=300", *srun_options(options)],
        # Clusters with a list of keys refuse submitit's. A profile may set one under `sbatch`.
        wckey=None,  # pyright: ignore[reportArgumentType]
        additional_parameters=options,
    )


def submit(plan: Plan, submission: Submission, name: str, code: str) -> str:
    """Call sbatch, and return the id of the job.

    Raises SchedulerDown, SubmitLimit when the user may not have so many jobs, else LaunchError.
    """
    script = plan.root.sweep(plan.sweep.name).script(name)
    write_atomic(script, script_text(plan, submission, name, code))
    try:
        return slurm.sbatch(str(script))
    except SchedulerDown:
        raise
    except LaunchError as e:
        script.unlink()
        kind = SubmitLimit if SUBMIT_LIMIT in e.what else LaunchError
        hint = "jepa doctor checks the profile; jepa submit --dry-run"
        raise kind(e.what, where=e.where, hint=hint) from e
