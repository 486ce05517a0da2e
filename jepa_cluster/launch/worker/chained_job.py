"""Where a job cannot requeue itself: another job that runs after it, unless it was cancelled.

In: the environment of a job that has saved and must go. Out: the same batch script for this one trial, submitted with
`afternotok` on us, and its record, so that `status` and `cancel` know it. Used on nodes without scontrol and on
clusters that refuse requeues; needs sbatch on the node, and says so when that is missing too.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.records import ArrayIntent, JobName
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import now_ms


def submit(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Hand the successor over. Always False: the job that calls shall end by itself, and not well."""
    name, job = JobName.of_this_job(env), slurm.own_job(env)
    folder = trial.root.sweep(name.sweep) if name else None
    record = folder.read_array(str(name)) if folder else None
    if name is None or folder is None or record is None:
        print(f"successor: no record of {name or 'this job'}, so none is submitted", file=sys.stderr)
        return False
    fresh = str(JobName.new(name.sweep, name.letter))
    intent: ArrayIntent = {
        "name": fresh,
        "class": record["class"],
        "nodes": record["nodes"],
        "procs_per_node": record["procs_per_node"],
        "minutes": record["minutes"],
        "trials": [trial.name],
        "parallel": 1,
        "code": record["code"],
        "submitted": now_ms(),
        "succeeds": job,
    }
    script = folder.jobs / f"{fresh}.sh"
    try:
        ours = _script(folder.jobs, env)
        excluded = node_exclusion.exclude_failed_node(trial, job, chained=True)
        script.write_text(script_text(ours, fresh, job, trial.path, excluded))
        write_json(folder.intent(fresh), intent)
        ident = slurm.run_program("sbatch", "--parsable", str(script)).strip().partition(";")[0]
        (folder.jobs / ident).mkdir(exist_ok=True)  # for its output; it cannot start before we have ended
        write_json(folder.array(fresh), {**intent, "job": ident})
    except (JepaError, OSError) as e:
        print(f"successor: {e}", file=sys.stderr)
        return False
    if cancelled(job):  # a person's scancel came between: nothing may rise from it
        slurm.signal([ident])
    print(f"successor: job {ident} follows {job}", file=sys.stderr)
    return False


def script_text(script: str, name: str, job: str, trial: Path, excluded: Sequence[str] = ()) -> str:
    """The batch script of an array, made one for a single trial that starts after `job` has ended without success.

    excluded: replaces the script's list of excluded nodes, unless it is empty.
    """
    replaced = "array|dependency|hold|job-name" + ("|exclude" if excluded else "")
    lines = [line for line in script.splitlines() if not re.match(rf"#SBATCH --({replaced})\b", line)]
    head = [f"#SBATCH --job-name={name}", f"#SBATCH --dependency=afternotok:{job}", "#SBATCH --kill-on-invalid-dep=yes"]
    if excluded:
        head.append(f"#SBATCH --exclude={','.join(excluded)}")
    lines = [lines[0], *head, *lines[1:]]
    command = f"-m jepa_cluster.launch.worker.main {shlex.quote(str(trial))}"
    body = re.sub(r"-m submitit\.core\._submit .*", command.replace("\\", r"\\"), "\n".join(lines))
    body = re.sub(r"-m jepa_cluster\.launch\.job .*", command.replace("\\", r"\\"), body)
    return body.replace("%A_%a", "%j") + "\n"


def cancelled(job: str) -> bool:
    """Whether Slurm says that somebody cancelled this job; False when it cannot be asked."""
    words = ("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
    try:
        return slurm.run_program(*words).strip().startswith("CANCELLED")
    except (JepaError, subprocess.SubprocessError):
        return False


def orphaned(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Whether we follow a job that was cancelled in the moment it submitted us: then the trial stays stopped."""
    name = JobName.of_this_job(env)
    record = trial.root.sweep(name.sweep).read_array(str(name)) if name else None
    earlier = record.get("succeeds") if record else None
    return bool(earlier) and cancelled(str(earlier))


def _script(jobs: Path, env: Mapping[str, str]) -> str:
    """The batch script we run from: submitit's, or that of the successor that we are."""
    own = jobs / f"{env['SLURM_JOB_NAME']}.sh"
    job = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"])
    return (own if own.exists() else jobs / job / f"{job}_submission.sh").read_text()
