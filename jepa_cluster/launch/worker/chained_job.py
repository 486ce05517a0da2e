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
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.trial.directory import TrialDir, read_json, write_json
from jepa_cluster.trial.spool import now_ms


def submit(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Hand the successor over. Always False: the job that calls shall end by itself, and not well."""
    name, job = env.get("SLURM_JOB_NAME", ""), slurm.own_job(env)
    sweep = name.split(".")[1] if name.count(".") >= 3 else ""
    folder = trial.root.sweep(sweep)
    record = read_json(folder / "arrays" / f"{name}.json") if sweep else None
    if record is None:
        print(f"successor: no record of {name or 'this job'}, so none is submitted", file=sys.stderr)
        return False
    fresh = f"{name.rpartition('.')[0]}.{uuid.uuid4().hex[:8]}"
    after = {k: record[k] for k in ("class", "nodes", "procs_per_node", "minutes", "code", "retries") if k in record}
    intent = {**after, "name": fresh, "trials": [trial.name], "parallel": 1, "submitted": now_ms(), "succeeds": job}
    script = folder / "jobs" / f"{fresh}.sh"
    try:
        ours = _script(folder, env)
        excluded = node_exclusion.exclude_failed_node(trial, job, chained=True)
        script.write_text(text(ours, fresh, job, trial.path, excluded))
        write_json(folder / "intents" / f"{fresh}.json", intent)
        ident = slurm.call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
        (folder / "jobs" / ident).mkdir(exist_ok=True)  # for its output; it cannot start before we have ended
        write_json(folder / "arrays" / f"{fresh}.json", {**intent, "job": ident})
    except (JepaError, OSError) as e:
        print(f"successor: {e}", file=sys.stderr)
        return False
    if cancelled(job):  # a person's scancel came between: nothing may rise from it
        slurm.signal([ident])
    print(f"successor: job {ident} follows {job}", file=sys.stderr)
    return False


def text(script: str, name: str, job: str, trial: Path, excluded: Sequence[str] = ()) -> str:
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
        return slurm.call(*words).strip().startswith("CANCELLED")
    except (JepaError, subprocess.SubprocessError):
        return False


def orphaned(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Whether we follow a job that was cancelled in the moment it submitted us: then the trial stays stopped."""
    name = env.get("SLURM_JOB_NAME", "")
    sweep = name.split(".")[1] if name.count(".") >= 3 else ""
    record = read_json(trial.root.sweep(sweep) / "arrays" / f"{name}.json") if sweep else None
    return bool(record and record.get("succeeds")) and cancelled(str((record or {})["succeeds"]))


def _script(folder: Path, env: Mapping[str, str]) -> str:
    """The batch script we run from: submitit's, or that of the successor that we are."""
    own = folder / "jobs" / f"{env['SLURM_JOB_NAME']}.sh"
    job = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"])
    return (own if own.exists() else folder / "jobs" / job / f"{job}_submission.sh").read_text()
