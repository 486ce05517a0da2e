"""Is this place as the profile says? A list of checks, each with what was found and what to do.

In: a profile and a root. Out: `Check`s. It asks the scheduler and the filesystem; it changes nothing but a
temporary file below the root, and queues nothing (`sbatch --test-only`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jepa_cluster.errors import JepaError
from jepa_cluster.launch import slurm
from jepa_cluster.launch.resources import Profile, ResourceClass, options, visible_gpus
from jepa_cluster.sweep.definition import minutes
from jepa_cluster.trial.layout import Root, write_atomic

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
LOCAL_ONLY = {"tmpfs", "overlay", "ext4", "xfs", "btrfs", "ramfs"}  # filesystems that nodes do not share
LEAST_GB = 20


@dataclass(frozen=True)
class Check:
    what: str
    ok: bool
    found: str
    now: str = ""


def examine(profile: Profile, root: Root) -> list[Check]:
    """Every check that applies, in order; a check that cannot be made is one that fails."""
    checks = [_root(root, profile), _disk(root), *_packages()]
    if profile.kind == "local":
        gpus = len(visible_gpus())
        fits = profile.procs_per_node <= profile.slots
        found = f"{profile.slots} ({gpus} GPUs, {os.cpu_count()} cores); a trial takes {profile.procs_per_node}"
        return [*checks, Check("slots", fits, found, "lower procs_per_node, or raise slots in the profile")]
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    checks.append(Check("Slurm's programs", not missing, f"missing: {', '.join(missing)}" if missing else "all there"))
    if missing:
        return checks
    questions: list[Callable[[], list[Check]]] = [
        lambda: _config(profile), lambda: _partition(profile), _accounting, lambda: _would_run(profile),
    ]  # fmt: skip
    for question in questions:
        try:
            checks += question()
        except JepaError as e:
            checks.append(Check("Slurm answers", False, e.what, e.now))
    return checks


def _root(root: Root, profile: Profile) -> Check:
    try:
        root.path.mkdir(parents=True, exist_ok=True)
        probe = root.path / f".doctor-{os.getpid()}"
        write_atomic(probe, "x")
        drift = abs(probe.stat().st_mtime - time.time())
        probe.unlink()
    except OSError as e:
        return Check("root", False, f"{root.path}: {e.strerror}", "set JEPA_ROOT to a folder you can write")
    kind = _filesystem(root.path)
    if drift > 5:
        return Check("clock", False, f"{drift:.0f} s between this machine and {root.path}", "have the clocks set")
    shared = profile.kind == "local" or kind not in LOCAL_ONLY
    return Check(
        "root", shared, f"{root.path} on {kind}", "" if shared else "JEPA_ROOT must lie on what the nodes share"
    )


def _filesystem(path: Path) -> str:
    """Its type by /proc/mounts; 'unknown' where that does not exist."""
    best, kind = "", "unknown"
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return kind
    for where, what in mounts:
        if Path(where) in (path, *path.parents) and len(where) >= len(best):
            best, kind = where, what
    return kind


def _disk(root: Root) -> Check:
    free = shutil.disk_usage(root.path if root.path.exists() else "/").free / 1e9
    return Check("free disk", free > LEAST_GB, f"{free:,.0f} GB", f"checkpoints need room: free {LEAST_GB} GB")


def _packages() -> list[Check]:
    lost = [m for m in ("torch", "timm", "webdataset") if importlib.util.find_spec(m) is None]
    told = f"not here: {', '.join(lost)}" if lost else "torch, timm, webdataset are installed"
    return [Check("environment", True, told, "the nodes need them: set `python` in the profile" if lost else "")]


def _config(profile: Profile) -> list[Check]:
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", slurm.call("scontrol", "show", "config"), re.MULTILINE))
    wait = int(re.sub(r"\D.*", "", config.get("KillWait", "")) or 30)
    user = "send_user_signal" in config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    return [
        Check("MaxArraySize", True, f"{config.get('MaxArraySize', '?')}: longer arrays are cut"),
        Check("requeue", config.get("JobRequeue", "1") == "1", f"JobRequeue={config.get('JobRequeue')}",
              "ask for JobRequeue=1; without it a lost node ends its trial until the next jepa submit"),
        Check("signals", profile.signal_seconds >= 30,
              f"USR2 {profile.signal_seconds} s before the limit; preemption sends {'USR2' if user else 'TERM'}; "
              f"KillWait {wait} s", "signal_seconds: 120"),
    ]  # fmt: skip


def _partition(profile: Profile) -> list[Check]:
    words = ("-p", profile.partition) if profile.partition else ()
    lines = [x.split("|") for x in slurm.call("sinfo", "-h", *words, "-o", "%P|%l|%D|%G|%c").splitlines()]
    if not lines:
        known = slurm.call("sinfo", "-h", "-o", "%R").split()
        return [Check("partition", False, f"{profile.partition} does not exist", f"known: {', '.join(known)}")]
    limits = [_slurm_minutes(x[1]) for x in lines]
    gpus = max(sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", x[3])) for x in lines)
    cpus = max(int(re.sub(r"\D", "", x[4]) or 0) for x in lines)
    need = profile.cpus_per_proc * profile.procs_per_node
    return [
        Check("time", any(m is None or m >= profile.minutes for m in limits),
              f"the partition gives {lines[0][1]}, the profile asks for {profile.time}", "lower `time`"),
        Check("GPUs of a node", gpus >= profile.gpus_per_node, f"{gpus}, the profile says {profile.gpus_per_node}",
              "set gpus_per_node"),
        Check("CPUs of a node", cpus >= need, f"{cpus}, a trial takes {need}", "lower cpus_per_proc"),
    ]  # fmt: skip


def _accounting() -> list[Check]:
    known = slurm.sacct(["jepa.doctor"], time.strftime("%Y-%m-%d")) is not None
    return [Check("accounting", True, "sacct answers" if known else "no sacct: costs come from our own records")]


def _would_run(profile: Profile) -> list[Check]:
    words = slurm.words(options(profile, ResourceClass(profile.nodes, profile.procs_per_node, profile.minutes)))
    try:
        slurm.call("sbatch", "--test-only", *words, "--wrap", "true")
    except JepaError as e:
        return [Check("a trial would start", False, e.what, "correct the profile")]
    return [Check("a trial would start", True, "sbatch --test-only accepts the profile's request")]


def _slurm_minutes(text: str) -> int | None:
    """'1-12:00:00' -> 2160; None for infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return minutes(text)
    days, hours, mins, _ = (int(g or 0) for g in found.groups())
    return days * 1440 + hours * 60 + mins
