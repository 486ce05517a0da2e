"""Check nodes by one job: root, clock, Python, what each task has, signals and requeue.

In: a profile and a root. Out: a `NodeReport`. The job asks for exactly what a trial asks for, but
for ten minutes. Every task of it runs node_task.py from the code snapshot that a trial would use.
Then one task is signalled and requeued as a trial would be, and the job is cancelled once the
report is made. The job and `jepa doctor` share a temporary folder below the root.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.cluster.profile import Profile, ResourceClass
from jepa_cluster.launch.cluster.sbatch_options import (
    BLOCKED,
    SETUP_FAILED,
    block_signals,
    sbatch_options,
    setup_lines,
    srun_options,
    to_cli_options,
)
from jepa_cluster.launch.ops.node_task import TaskReport
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit import code_snapshot
from jepa_cluster.trial.directory import Root

NAME = "jepa.doctor"
MINUTES = 10  # time limit of the job
PENDING_TIMEOUT = 120.0  # s that the job may wait in the queue
START_TIMEOUT = 300.0  # s in which it must have measured, imported torch and written its report
SIGNAL_TIMEOUT = 10.0  # s in which it must have received a signal
SCRIPT = """\
#!/bin/bash
read -r -d '' measure <<'MEASURE'
{setup}
cd {folder} || exit 1
{block}
exec {blocked} timeout -s KILL 200 {python} -m jepa_cluster.launch.ops.node_task .
MEASURE
srun {options} bash -c "$measure"
read -r -d '' step <<'STEP'
exec 2>{folder}/errors
{setup}
cd {folder} || exit 1
trap 'touch usr2' USR2
date +%s >clock
command -v scontrol >scontrol
{python} -c "import torch, timm, webdataset; print(torch.cuda.device_count())" >python 2>&1
echo "$SLURMD_NODENAME" >node.new && mv node.new node
for i in $(seq 300); do sleep 0.2; done
STEP
srun --nodes=1 --ntasks=1 bash -c "$step"
"""


@dataclass(frozen=True)
class NodeReport:
    """What the job found.

    pending_reason: why no node was granted in time; the rest is then void.
    setup_error: the line of `setup` that failed, else ''; the rest is then void.
    sees_root: the node sees the root. clock_skew: s by which its clock is ahead of the
    filesystem's. python_error: why Python could not import torch, timm and webdataset; '' if it
    could. gpus: that torch sees. has_scontrol: scontrol is installed there. usr2_delivered: USR2
    reached the task. requeue_refused: why Slurm refused to requeue the job; '' if it did not.
    tasks: what the tasks measured; fewer than a trial has when some did not end.
    """

    pending_reason: str = ""
    setup_error: str = ""
    node: str = ""
    sees_root: bool = False
    clock_skew: float = 0.0
    python_error: str = ""
    gpus: int = 0
    has_scontrol: bool = False
    usr2_delivered: bool = False
    requeue_refused: str = ""
    tasks: tuple[TaskReport, ...] = ()


def check_node(profile: Profile, root: Root, excluded: Sequence[str]) -> NodeReport:
    """Run the job. Raises LaunchError when Slurm does not accept it.

    excluded: nodes on which it does not run, besides those of the profile.
    """
    source = root.code / code_snapshot.take(root)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root.path))
    job = ""
    try:
        job = _submit(profile, folder, source, excluded)
        return _report(job, folder)
    finally:
        if job:
            slurm.signal([job])
        shutil.rmtree(folder, ignore_errors=True)


def _submit(profile: Profile, folder: Path, source: Path, excluded: Sequence[str]) -> str:
    script = folder / "job.sh"
    cls = ResourceClass(profile.nodes, profile.procs_per_node, MINUTES)
    options = sbatch_options(profile, cls, excluded)
    python = shlex.quote(profile.python or sys.executable)
    text = SCRIPT.format(
        setup="\n".join(setup_lines(profile, PYTHONPATH=str(source))),
        folder=shlex.quote(str(folder)),
        python=python,
        block=block_signals(python),
        blocked=BLOCKED,
        options=" ".join(srun_options(options)),
    )
    script.write_text(text)
    options |= {"job-name": NAME, "output": "/dev/null", "chdir": "/"}
    answer = slurm.run_program("sbatch", "--parsable", *to_cli_options(options), str(script))
    return answer.strip().partition(";")[0]


def _report(job: str, folder: Path) -> NodeReport:
    if not _wait(lambda: _state(job)[0] not in ("PENDING", "CONFIGURING"), PENDING_TIMEOUT):
        reason = _state(job)[1]
        return NodeReport(pending_reason=slurm.explain_reason(reason).text.format(job=job))
    _wait(lambda: _exists(folder, "node") or _state(job)[0] != "RUNNING", START_TIMEOUT)
    if not _exists(folder, "node"):
        error = _last_line(folder / "errors") if _exists(folder, "errors") else ""
        return NodeReport(
            setup_error=error if error.startswith(SETUP_FAILED) else "", node=_state(job)[2]
        )
    slurm.signal([job], "USR2")
    usr2_delivered = _wait(lambda: _exists(folder, "usr2"), SIGNAL_TIMEOUT)
    clock = folder / "clock"
    python = _last_line(folder / "python")
    return NodeReport(
        node=_last_line(folder / "node"),
        sees_root=True,
        clock_skew=float(clock.read_text()) - clock.stat().st_mtime,
        python_error="" if python.isdigit() else python or "it does not start",
        gpus=int(python) if python.isdigit() else 0,
        has_scontrol=bool(_last_line(folder / "scontrol")),
        usr2_delivered=usr2_delivered,
        requeue_refused=_requeue(job),
        tasks=tuple(json.loads(path.read_text()) for path in sorted(folder.glob("task.*.json"))),
    )


def _requeue(job: str) -> str:
    """Requeue the job -> why Slurm refused; '' if it did not."""
    try:
        slurm.run_program("scontrol", "requeue", job)
    except JepaError as e:
        return e.what
    return ""


def _state(job: str) -> tuple[str, str, str]:
    """The job's state, the reason why it waits, and its node, by squeue."""
    rows = slurm.run_program("squeue", "-h", "-t", "all", f"--jobs={job}", "-o", "%T|%r|%N").split(
        "\n"
    )
    state, reason, node = [*rows[0].split("|"), "", "", ""][:3]
    return state, reason, node


def _last_line(file: Path) -> str:
    return file.read_text().strip().rpartition("\n")[2]


def _exists(folder: Path, name: str) -> bool:
    """Return whether the file exists. The write makes an NFS client list the folder again."""
    (folder / "look").touch()
    return any(p.name == name for p in folder.iterdir())


def _wait(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
