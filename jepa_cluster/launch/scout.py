"""A scout: one small job that tells what only a node can tell, and what Slurm does to a job there.

In: a profile and a root. Out: a `Report`. It asks for one task and five minutes, is signalled and requeued as a trial
would be, and is gone when the report is made. All that it and this side share is a folder below the root.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_cluster.errors import JepaError
from jepa_cluster.launch import slurm
from jepa_cluster.launch.resources import Profile
from jepa_cluster.trial.layout import Root

NAME = "jepa.doctor"
PATIENCE = 120.0  # s that the job may wait in the queue
ANSWER = 20.0  # s in which its first word must be seen once it runs
HEARS = 10.0  # s in which it must have heard a signal
SCRIPT = """\
#!/bin/bash
read -r -d '' step <<'STEP'
{setup}
cd {folder} || exit 1
trap 'touch usr2' USR2
date +%s >clock
command -v scontrol >scontrol
{python} -c "import importlib.util as u; print(*[m for m in ('torch', 'timm', 'webdataset') if not u.find_spec(m)])" \\
  >lacks 2>&1 || echo "no Python" >lacks
echo "$SLURMD_NODENAME" >node.new && mv node.new node
for i in $(seq 300); do sleep 0.2; done
STEP
srun --ntasks=1 bash -c "$step"
"""


@dataclass(frozen=True)
class Report:
    """waits: why no node was found in time, the rest then means nothing. sees: the root, from the node.

    skew: seconds by which its clock is ahead of the filesystem's. lacks: packages that its Python cannot find.
    """

    waits: str = ""
    node: str = ""
    sees: bool = False
    skew: float = 0.0
    lacks: str = ""
    scontrol: bool = False
    usr2: bool = False
    requeue: str = ""  # why Slurm refused it; '' when it did not


def send(profile: Profile, root: Root) -> Report:
    """Raises LaunchError when Slurm does not take the job."""
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root.path))
    job = ""
    try:
        script = folder / "job.sh"
        python = shlex.quote(profile.python or sys.executable)
        script.write_text(SCRIPT.format(setup="\n".join(profile.setup), folder=shlex.quote(str(folder)), python=python))
        job = slurm.call("sbatch", *_options(profile), str(script)).strip().partition(";")[0]
        return _follow(job, folder)
    finally:
        if job:
            slurm.signal([job])
        shutil.rmtree(folder, ignore_errors=True)


def _follow(job: str, folder: Path) -> Report:
    if not _soon(lambda: _state(job)[0] not in ("PENDING", "CONFIGURING"), PATIENCE):
        reason = _state(job)[1]
        return Report(waits=slurm.REASONS.get(reason, reason))
    if not _soon(lambda: _shown(folder, "node") or _state(job)[0] != "RUNNING", ANSWER) or not _shown(folder, "node"):
        return Report(node=_state(job)[2])
    clock = folder / "clock"
    skew = float(clock.read_text()) - clock.stat().st_mtime
    slurm.signal([job], "USR2")
    usr2 = _soon(lambda: _shown(folder, "usr2"), HEARS)
    try:
        slurm.call("scontrol", "requeue", job)
        refused = ""
    except JepaError as e:
        refused = e.what
    node, lacks, scontrol = ((folder / name).read_text().strip() for name in ("node", "lacks", "scontrol"))
    return Report("", node, True, skew, lacks, bool(scontrol), usr2, refused)


def _options(profile: Profile) -> list[str]:
    values: dict[str, Any] = {"partition": profile.partition, "account": profile.account, "qos": profile.qos}
    values |= {"constraint": profile.constraint, "exclude": profile.exclude, **profile.sbatch}
    if profile.gpus_per_node:
        values["gpus-per-node"] = 1
    options = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not None]
    fixed = (f"--job-name={NAME}", "--nodes=1", "--ntasks=1", "--time=5", "--output=/dev/null", "--chdir=/")
    return [*options, *fixed, "--parsable", "--requeue"]


def _state(job: str) -> tuple[str, str, str]:
    """Slurm's word for its state, the reason, and the node."""
    rows = slurm.call("squeue", "-h", "-t", "all", f"--jobs={job}", "-o", "%T|%r|%N").split("\n")
    state, reason, node = [*rows[0].split("|"), "", "", ""][:3]
    return state, reason, node


def _shown(folder: Path, name: str) -> bool:
    """Whether the file is there. A network filesystem lists a folder afresh to those who have just changed it."""
    (folder / "look").touch()
    return any(p.name == name for p in folder.iterdir())


def _soon(ready: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
