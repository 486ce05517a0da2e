"""Check nodes by one job: root, clock, Python, what each task has, signals and requeue.

In: a profile and a root. Out: `Check`s. The job asks for exactly what a trial asks for, but
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from jepa_cluster.errors import JepaError, plural
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
PACKAGES = ("torch", "timm", "webdataset")
IMPORTED = f"imports {', '.join(PACKAGES)}"
MAX_CLOCK_SKEW = 5  # seconds
MINUTES = 10  # time limit of the job
PENDING_TIMEOUT = 120.0  # s that the job may wait in the queue
START_TIMEOUT = 300.0  # s in which it must have measured, imported torch and written its report
SLOWEST_GB_PER_S = 0.01  # of an all-reduce: 100 Mbit/s, which is no network of a cluster
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
{python} -c "import {packages}" >python 2>&1 && echo "{imported}" >>python
echo "$SLURMD_NODENAME" >node.new && mv node.new node
for i in $(seq 300); do sleep 0.2; done
STEP
srun --nodes=1 --ntasks=1 bash -c "$step"
"""


@dataclass(frozen=True)
class Check:
    """hint: what to do. If the check is ok: what is lost as it is, or what could be better."""

    what: str
    ok: bool
    found: str
    hint: str = ""


def required(what: str, ok: bool, found: str, hint: str) -> Check:
    """Return a check with a hint only if it fails."""
    return Check(what, ok, found, "" if ok else hint)


def check_node(profile: Profile, root: Root, excluded: Sequence[str]) -> Iterator[Check]:
    """Run the job, and yield a check of each thing that it reports.

    excluded: nodes on which it does not run, besides those of the profile. Raises LaunchError when
    Slurm does not accept it.
    """
    source = root.code / code_snapshot.take(root)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root.path))
    job = ""
    try:
        job = _submit(profile, folder, source, excluded)
        yield from _check_start(profile, root, job, folder)
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
        packages=", ".join(PACKAGES),
        imported=IMPORTED,
        python=python,
        block=block_signals(python),
        blocked=BLOCKED,
        options=" ".join(srun_options(options)),
    )
    script.write_text(text)
    options |= {"job-name": NAME, "output": "/dev/null", "chdir": "/"}
    return slurm.sbatch(*to_cli_options(options), str(script))


def _check_start(profile: Profile, root: Root, job: str, folder: Path) -> Iterator[Check]:
    """Wait for the job, and check whether it could begin; then check the rest."""
    if not _wait(lambda: _state(job)[0] not in ("PENDING", "CONFIGURING"), PENDING_TIMEOUT):
        reason = slurm.explain_reason(_state(job)[1]).text.format(job=job)
        problem = f"none within {PENDING_TIMEOUT:.0f} s: {reason}"
        yield Check("a node", False, problem, "try again later")
        return
    _wait(lambda: _exists(folder, "node") or _state(job)[0] != "RUNNING", START_TIMEOUT)
    if _exists(folder, "node"):
        yield from _check_node(profile, root, job, folder)
        return
    node = _state(job)[2] or "the node"
    error = _last_line(folder / "errors") if _exists(folder, "errors") else ""
    if error.startswith(SETUP_FAILED):
        problem = f"{node}: {error}"
        yield Check("setup of a node", False, problem, "correct `setup` in the profile")
        return
    hint = "JEPA_ROOT must lie on what the nodes share"
    yield Check("shared filesystem", False, f"{node} does not see {root.path}", hint)


def _check_node(profile: Profile, root: Root, job: str, folder: Path) -> Iterator[Check]:
    """Signal and requeue a step that has begun, and compare what it found with the profile."""
    slurm.signal([job], "USR2")
    usr2_delivered = _wait(lambda: _exists(folder, "usr2"), SIGNAL_TIMEOUT)
    refusal = _requeue(job)
    tasks = [json.loads(path.read_text()) for path in sorted(folder.glob("task.*.json"))]
    yield Check("shared filesystem", True, f"{_last_line(folder / 'node')} sees {root.path}")
    clock = folder / "clock"
    skew = float(clock.read_text()) - clock.stat().st_mtime
    yield required(
        "clock of a node",
        abs(skew) < MAX_CLOCK_SKEW,
        f"{round(skew):+d} s from the filesystem's",
        "have the clocks set",
    )
    result = _last_line(folder / "python") or "it does not start"
    yield required(
        "Python of a node",
        result == IMPORTED,
        f"{profile.python or sys.executable}: {result}",
        "set `python` in the profile",
    )
    yield required(
        "USR2 of a node",
        usr2_delivered,
        "reaches a task" if usr2_delivered else "does not reach a task",
        "find out what catches it; a trial is then killed at its time limit",
    )
    hint = ""
    if refusal:
        hint = "ask for requeues to be allowed"
    elif not _last_line(folder / "scontrol"):
        hint = "no scontrol there: a trial submits a job that continues it"
    found = refusal or "Slurm requeues a running job"
    yield Check("requeue of a node", not refusal, found, hint)
    if result == IMPORTED:
        yield from _check_tasks(profile, tasks)


def _requeue(job: str) -> str:
    """Requeue the job -> why Slurm refused; '' if it did not."""
    try:
        slurm.run_program("scontrol", "requeue", job)
    except JepaError as e:
        return e.what
    return ""


def _state(job: str) -> tuple[str, str, str]:
    """The job's state, the reason why it waits, and its node, by squeue."""
    row = slurm.run_program("squeue", "-h", "-t", "all", f"--jobs={job}", "-o", "%T|%r|%N")
    state, reason, node = [*row.strip().split("|"), "", ""][:3]
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


def _check_tasks(profile: Profile, tasks: Sequence[TaskReport]) -> Iterator[Check]:
    """Compare what each task of a trial has with what the profile asks for."""
    world = profile.nodes * profile.procs_per_node
    nodes = sorted(set(map(itemgetter("node"), tasks)))
    found = f"{len(tasks)} of {world} on {', '.join(nodes)}"
    yield required("tasks", len(tasks) == world, found, "ask why srun starts fewer there")
    if not tasks:
        return
    cores = min(map(itemgetter("cores"), tasks))
    yield required(
        "cores of a task",
        cores >= profile.cpus_per_proc,
        f"{cores}, the profile asks for {profile.cpus_per_proc}",
        "lower cpus_per_proc, or ask why Slurm binds a task to fewer",
    )
    memory = min(map(itemgetter("memory_gb"), tasks))
    yield required(
        "memory of a node",
        memory >= (profile.mem_gb or 0),
        f"{memory:.0f} GB, the profile asks for {profile.mem_gb or 'no number'}",
        "lower mem_gb",
    )
    yield required(
        "signals at the start",
        all(map(itemgetter("blocked"), tasks)),
        "USR2 and TERM wait while Python starts",
        "without env --block-signal (coreutils 8.31) bash must start there",
    )
    lost = sorted({task["node"] for task in tasks if not task["interface"]})
    found = "; ".join(sorted({task["interface"] for task in tasks}))
    if lost:
        found = f"no route to rank 0 from {', '.join(lost)}"
    yield required("interface", not lost, found, "ask for a network between the nodes")
    errors = list(filter(None, map(itemgetter("error"), tasks)))
    speed = min(map(itemgetter("gb_per_s"), tasks))
    measured = f"{world} tasks on {plural(len(nodes), 'node')}"
    is_slow = world > 1 and speed < SLOWEST_GB_PER_S
    if world > 1:
        measured += f": {speed:.3g} GB/s"
    hint = "under `environment` of the profile: NCCL_DEBUG: INFO, then see the log of a trial"
    found = "; ".join(errors[:1]) or measured
    yield required("all-reduce", not (errors or is_slow), found, hint)
    gpus = min(map(itemgetter("gpus"), tasks))
    needed = min(profile.procs_per_node, profile.gpus_per_node)
    if needed and profile.runtime.get("device") != "cpu":
        yield required(
            "GPUs torch sees",
            gpus >= needed,
            f"{gpus}, a trial takes {needed}",
            "install torch for the driver of that node",
        )
