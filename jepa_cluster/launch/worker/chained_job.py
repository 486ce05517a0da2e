"""Submit a job that follows this one, where a job cannot requeue itself.

In: the environment of a job that has saved and must end. Out: a job with the same batch script for
this one trial, which depends on this job (`afternotok`), and its record, so that `status` and
`cancel` know it. Used on nodes without scontrol, on clusters that refuse requeues, and where a
preemption has cancelled the job. Needs sbatch on the node.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.cluster.job_name import JobName
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.launch.worker.slurm_rank import launch_of
from jepa_cluster.records import ArrayIntent, ArrayRecord
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import now_ms


def submit(trial: TrialDir, env: Mapping[str, str]) -> None:
    """Submit the chained job. An error is printed; then the trial stays interrupted.

    This job must then end without success, because the chained job waits for that.
    """
    try:
        job = slurm.own_job(env)
        chained = _submit(trial, env)
        if is_cancelled(job):  # by the user, while the other was being submitted
            slurm.signal([chained])
        print(f"chained job: {chained} follows {job}", file=sys.stderr)
    except (JepaError, OSError) as e:
        print(f"chained job: {e}", file=sys.stderr)


def _submit(trial: TrialDir, env: Mapping[str, str]) -> str:
    """Write the intent, call sbatch, record the job. Returns its id."""
    name = JobName.of_this_job(env)
    job = slurm.own_job(env)
    record = _own_record(trial, name)
    if name is None or record is None:
        raise JepaError(f"no record of {name or 'this job'}")
    folder = trial.root.sweep(name.sweep)
    new_name = str(JobName.new(name.sweep, name.letter))
    intent: ArrayIntent = {
        "name": new_name,
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
    exclusion = node_exclusion.plan(trial, job, launch_of(env))
    script = folder.script(new_name)
    own_script = folder.script(str(name)).read_text()
    script.write_text(script_text(own_script, new_name, job, exclusion.nodes))
    write_json(folder.intent(new_name), intent)
    chained = slurm.sbatch(str(script))
    write_json(folder.array(new_name), {**intent, "job": chained})
    exclusion.save(trial, launch_of(env))
    return chained


def script_text(script: str, name: str, job: str, excluded: Sequence[str] = ()) -> str:
    """Return the batch script of an array, changed for a job that starts after `job` failed.

    script: of an array, or of a chained job. name: of the new job. excluded: replaces the excluded
    nodes of the script, unless it is empty.
    """
    options = {
        "job-name": name,
        "dependency": f"afternotok:{job}",
        "kill-on-invalid-dep": "yes",
    }
    if excluded:
        options["exclude"] = ",".join(excluded)
    replaced = "|".join(["array", "hold", *options])
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items()]
    body = re.sub(rf"^#SBATCH --({replaced})\b.*\n", "", script.rstrip() + "\n", flags=re.MULTILINE)
    body = re.sub(r"/intents/[^/]+\.json", lambda _: f"/intents/{name}.json", body)
    shebang, rest = body.split("\n", 1)
    return "\n".join([shebang, *lines, rest.replace("%A_%a", "%j")])


def is_cancelled(job: str) -> bool:
    """Return whether Slurm says that the user cancelled a job; False if Slurm does not answer."""
    return slurm.end_state(job).startswith("CANCELLED by")


def follows_cancelled_job(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Return whether the job that submitted this one was cancelled in that moment."""
    record = _own_record(trial, JobName.of_this_job(env))
    earlier = record.get("succeeds") if record else None
    return bool(earlier) and is_cancelled(str(earlier))


def _own_record(trial: TrialDir, name: JobName | None) -> ArrayRecord | None:
    return trial.root.sweep(name.sweep).read_array(str(name)) if name else None
