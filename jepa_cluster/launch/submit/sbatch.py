"""Make the batch script of an array, and submit it through submitit.

In: a plan and a `Submission`. Out: the text of the script, or the id of the job. Records nothing.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_cluster.errors import JepaError, LaunchError, SchedulerDown, plural
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, setup_lines
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.scheduler.clean_env import clean_own_environment
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.trial.directory import Root, SweepDir

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


def executor(plan: Plan, submission: Submission, name: str, code: str) -> Any:
    """Return submitit's executor for a submission.

    name: of the job, unique. code: id of the snapshot that it runs. Raises SchedulerDown without
    srun.
    """
    from submitit.slurm.slurm import SlurmExecutor

    profile = plan.profile
    array = submission.array
    source = plan.root.code / code
    jobs = plan.root.sweep(plan.sweep.name).jobs
    python = f"env --block-signal=USR2,TERM {shlex.quote(profile.python or sys.executable)}"
    try:
        made = SlurmExecutor(jobs / "%j", max_num_timeout=1_000_000, python=python)
    except RuntimeError as e:
        raise SchedulerDown(
            "srun is not installed here", hint="submit from a login node of the cluster"
        ) from e
    # submitit makes the folder of a job after sbatch. Slurm may start the job before that, and a
    # job whose output has no folder is lost. So the script makes the folder too.
    log = f"{jobs}/%j.log"
    make_folder = f"mkdir -p {shlex.quote(str(jobs))}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}"
    make_folder += "${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    bad_nodes = node_exclusion.bad_nodes_to_exclude(plan.root, profile, array.cls.nodes)
    options: dict[str, Any] = {"chdir": str(source), "output": log, "error": log}
    options |= sbatch_options(profile, array.cls, bad_nodes)
    if submission.dependency:  # after a failed canary its class stays pending for the user
        options |= {"dependency": submission.dependency, "kill-on-invalid-dep": "no"}
    if submission.branches:
        options["hold"] = True
    made.update_parameters(
        job_name=name,
        array_parallelism=max(array.parallel, 1),
        setup=[make_folder, *setup_lines(profile, PYTHONPATH=str(source), **_kill_wait())],
        # The second ends a job in which one task is stopped and the others have finished.
        srun_args=["--kill-on-bad-exit=1", "--wait=300"],
        # Clusters with a list of keys refuse submitit's. A profile may set one under `sbatch`.
        wckey=None,
        additional_parameters=options,
    )
    return made


def _kill_wait() -> dict[str, str]:
    """Return the variable that gives a job the KillWait of Slurm; {} where it is unknown."""
    with contextlib.suppress(JepaError):
        return {"JEPA_KILL_WAIT": str(slurm.kill_wait(slurm.config()))}
    return {}


def script_text(plan: Plan, submission: Submission, name: str, code: str) -> str:
    """Return exactly the script that `submit` passes to sbatch."""
    made = executor(plan, submission, name, code)
    tasks = len(submission.array.trials)
    if tasks > 1:
        made.parameters["map_count"] = tasks
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(plan: Plan, submission: Submission, name: str, code: str) -> str:
    """Call sbatch, and return the id of the job. Raises SchedulerDown, LaunchError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from jepa_cluster.launch.worker.main import run

    trials = [str(plan.root.trial(trial).path) for trial in submission.array.trials]
    try:
        with clean_own_environment():
            jobs = executor(plan, submission, name, code).map_array(run, trials)
    except (FailedJobError, FailedSubmissionError) as e:
        message = " ".join(str(e).split())
        kind = SchedulerDown if "ontact" in message else LaunchError
        raise kind(
            f"sbatch refused: {message[:400]}",
            hint="jepa doctor checks the profile; jepa submit --dry-run",
        ) from e
    return str(jobs[0].job_id).partition("_")[0]


def restore_submitit_pickles(root: Root, folder: SweepDir, trials: list[str], job: str) -> None:
    """Write the pickles of a job that was submitted just before a crash.

    submitit moves them to their place after sbatch. trials: names by array index.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    from jepa_cluster.launch.worker.main import run

    for index, trial in enumerate(trials):
        task = f"{job}_{index}" if len(trials) > 1 else job
        path = Path(JobPaths(folder.jobs / "%j", job_id=task).submitted_pickle)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            DelayedSubmission(run, str(root.trial(trial).path)).dump(path)
