"""An array as Slurm takes it: its batch script, and its hand-over through submitit.

In: a profile, an array, the id of a code snapshot. Out: the script's text, or the job that sbatch made of it. It knows
no plan and no price, and records nothing.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, setup_lines
from jepa_cluster.launch.scheduler.clean_env import clean_own_environment
from jepa_cluster.trial.directory import Root


def executor(
    root: Root,
    sweep: str,
    profile: Profile,
    array: Array,
    name: str,
    code: str,
    *,
    dependency: str = "",
    held: bool = False,
    bad_nodes: Iterable[str] = (),
) -> Any:
    """submitit's executor with the options of this array.

    name: of the job, unique for ever. code: id of the snapshot that it runs. bad_nodes: excluded besides the profile's.
    Raises SchedulerDown when srun is missing.
    """
    from submitit.slurm.slurm import SlurmExecutor

    source, jobs = root.code / code, root.sweep(sweep).jobs
    python = f"env --block-signal=USR2,TERM {shlex.quote(profile.python or sys.executable)}"
    try:
        found = SlurmExecutor(jobs / "%j", max_num_timeout=1_000_000, python=python)
    except RuntimeError as e:
        raise SchedulerDown("srun is not installed here", hint="submit from a login node of the cluster") from e
    # submitit makes a job's folder after sbatch, and Slurm may be faster: a job whose output has no folder is lost
    log = f"{jobs}/%j.log"
    make = f"mkdir -p {shlex.quote(str(jobs))}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}"
    make += "${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    options: dict[str, Any] = {"chdir": str(source), "output": log, "error": log}
    options |= sbatch_options(profile, array.cls, bad_nodes)
    if dependency:  # a failed canary leaves the others pending, for a person to decide
        options |= {"dependency": dependency, "kill-on-invalid-dep": "no"}
    if held:
        options["hold"] = True
    found.update_parameters(
        job_name=name,
        array_parallelism=max(array.parallel, 1),
        setup=[make, *setup_lines(profile, PYTHONPATH=str(source))],
        srun_args=["--kill-on-bad-exit=1"],
        wckey=None,  # submitit's own is refused by clusters that keep a list; the profile may set one under `sbatch`
        additional_parameters=options,
    )
    return found


def script_text(executor: Any, tasks: int) -> str:
    """The script that `submit` hands to sbatch, to the letter."""
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(executor: Any, trials: list[str]) -> str:
    """Hand an array over -> its job id. trials: paths, by array index. Raises SchedulerDown, LaunchError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from jepa_cluster.launch.worker.main import run

    try:
        with clean_own_environment():
            jobs = executor.map_array(run, trials)
    except (FailedJobError, FailedSubmissionError) as e:
        said = " ".join(str(e).split())
        kind = SchedulerDown if "ontact" in said else LaunchError
        raise kind(f"sbatch refused: {said[:400]}", hint="jepa doctor checks the profile; jepa submit --dry-run") from e
    return str(jobs[0].job_id).partition("_")[0]


def restore_submitit_pickles(root: Root, sweep: str, intent: Mapping[str, Any], job: str) -> None:
    """submitit moves its pickles after sbatch: write those that a crash kept from their place."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    from jepa_cluster.launch.worker.main import run

    for i, trial in enumerate(intent["trials"]):
        ident = f"{job}_{i}" if len(intent["trials"]) > 1 else job
        path = Path(JobPaths(root.sweep(sweep).jobs / "%j", job_id=ident).submitted_pickle)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            DelayedSubmission(run, str(root.trial(trial).path)).dump(path)
