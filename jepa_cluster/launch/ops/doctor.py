"""Is this place as the profile says? A list of checks, each with what was found and what to do.

In: a profile and a root. Out: `Check`s. It asks the scheduler and the filesystem, changes nothing but a temporary
file below the root, and queues nothing (`sbatch --test-only`), unless `node` asks for a job on one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jepa_cluster.config import Runtime
from jepa_cluster.data import manifest
from jepa_cluster.errors import DataError, JepaError, SchedulerDown
from jepa_cluster.launch.cluster.profile import Profile, ResourceClass, visible_gpus
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options
from jepa_cluster.launch.ops import node_check
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.sweep.sweep_file import parse_minutes
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_atomic

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
LOCAL_ONLY = {"tmpfs", "overlay", "ext4", "xfs", "btrfs", "ramfs"}  # filesystems that nodes do not share
LEAST_GB = 20


@dataclass(frozen=True)
class Check:
    """now: what to do. Of a check that is ok: what is lost as it stands, or what could be better."""

    what: str
    ok: bool
    found: str
    now: str = ""


def run_checks(profile: Profile, root: Root, node: bool = False) -> list[Check]:
    """Every check that applies, in order; a check that cannot be made is one that fails. node: ask one, by a job."""
    checks = [_root(root, profile, node), _disk(root), _data(profile), *_packages()]
    if profile.kind == "local":
        gpus = len(visible_gpus())
        fits = profile.procs_per_node <= profile.slots
        found = f"{profile.slots} ({gpus} GPUs, {os.cpu_count()} cores); a trial takes {profile.procs_per_node}"
        return [*checks, _check("slots", fits, found, "lower procs_per_node, or raise slots in the profile")]
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    found = f"missing: {', '.join(missing)}" if missing else "all there"
    checks.append(_check("Slurm's programs", not missing, found, "load their module, or go to a login node"))
    if missing:
        return checks
    questions: list[Callable[[], list[Check]]] = [
        lambda: _config(profile), lambda: _partition(profile), lambda: _would_run(profile),
    ]  # fmt: skip
    if node:
        questions.append(lambda: _node(profile, root))
    for question in questions:
        try:
            checks += question()
        except SchedulerDown as e:
            return [*checks, Check("Slurm answers", False, e.what, e.hint or "scontrol ping; then try again")]
        except JepaError as e:
            checks.append(Check("Slurm answers", False, e.what, e.hint or "correct the profile"))
    return checks


def _check(what: str, ok: bool, found: str, now: str) -> Check:
    """One whose advice is needed only when it fails."""
    return Check(what, ok, found, "" if ok else now)


def _root(root: Root, profile: Profile, node: bool) -> Check:
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
    shared = profile.kind == "local" or node or kind not in LOCAL_ONLY
    now = "JEPA_ROOT must lie on what the nodes share; if it does, --node asks one of them"
    return _check("root", shared, f"{root.path} on {kind}", now)


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
    return _check("free disk", free > LEAST_GB, f"{free:,.0f} GB", f"checkpoints need room: free {LEAST_GB} GB")


def _data(profile: Profile) -> Check:
    """The set that a sweep reads unless it names another."""
    folder = Path(profile.runtime.get("data_root") or os.environ.get("JEPA_DATA", "data")).absolute()
    try:
        return Check("data", True, f"{folder}: {manifest.read(folder / 'train').images} images")
    except DataError as e:
        return Check("data", True, f"{folder}: missing", f"export JEPA_DATA=<where the shards are>, or {e.hint}")


def _packages() -> list[Check]:
    lost = [m for m in ("torch", "timm", "webdataset") if importlib.util.find_spec(m) is None]
    told = f"not here: {', '.join(lost)}" if lost else "torch, timm, webdataset are installed"
    return [Check("environment", True, told, "the nodes need them: set `python` in the profile" if lost else "")]


def _config(profile: Profile) -> list[Check]:
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", slurm.run_program("scontrol", "show", "config"), re.MULTILINE))
    longest = slurm.max_array_size()
    asked = config.get("JobRequeue", "1") == "1"
    return [
        _check("MaxArraySize", longest > 1, f"{longest}: longer arrays are cut",
               "have it raised: each trial becomes a job of its own"),
        Check("requeue", True, f"JobRequeue={config.get('JobRequeue')}",
              "" if asked else "our jobs ask for it themselves; --node tells whether they may"),
        *_signals(profile, config),
        _accounting(config),
    ]  # fmt: skip


def _signals(profile: Profile, config: Mapping[str, str]) -> list[Check]:
    """The lead time before the limit and the time from preemption to KILL, against what a trial counts on."""
    grace = float(profile.runtime.get("grace_seconds", Runtime.grace_seconds))
    lines = slurm.run_program("scontrol", "show", "partition", "-o").splitlines()
    mine = [x for x in lines if not profile.partition or x.startswith(f"PartitionName={profile.partition} ")]
    graces = [int(n) for n in re.findall(r"\bGraceTime=(\d+)", " ".join(mine))]
    given = max(min(graces, default=0), int(re.sub(r"\D.*", "", config.get("KillWait", "")) or 30))
    user = "send_user_signal" in config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    sent = f"preemption sends {'USR2' if user else 'TERM'}, and KILL {given} s later"
    pushed = config.get("PreemptType", "preempt/none") != "preempt/none"
    return [
        _check("time limit", profile.signal_seconds >= max(grace, 30),
               f"USR2 {profile.signal_seconds} s before it; a trial counts on {grace:g} s",
               f"signal_seconds: {max(grace, 30):g}"),
        Check("preemption", True, sent if pushed else "there is none",
              f"runtime: {{grace_seconds: {given}}}, or work since the last checkpoint is lost"
              if pushed and given < grace else ""),
    ]  # fmt: skip


def _partition(profile: Profile) -> list[Check]:
    words = ("-p", profile.partition) if profile.partition else ()
    lines = [x.split("|") for x in slurm.run_program("sinfo", "-h", *words, "-o", "%P|%l|%D|%G|%c").splitlines()]
    if not lines:
        known = slurm.run_program("sinfo", "-h", "-o", "%R").split()
        return [Check("partition", False, f"{profile.partition} does not exist", f"known: {', '.join(known)}")]
    limits = [_slurm_minutes(x[1]) for x in lines]
    gpus = max(sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", x[3])) for x in lines)
    cpus = max(int(re.sub(r"\D", "", x[4]) or 0) for x in lines)
    need = profile.cpus_per_proc * profile.procs_per_node
    return [
        _check("time", any(m is None or m >= profile.minutes for m in limits),
               f"the partition gives {lines[0][1]}, the profile asks for {profile.time}", "lower `time`"),
        _check("GPUs of a node", gpus >= profile.gpus_per_node, f"{gpus}, the profile says {profile.gpus_per_node}",
               "set gpus_per_node"),
        _check("CPUs of a node", cpus >= need, f"{cpus}, a trial takes {need}", "lower cpus_per_proc"),
    ]  # fmt: skip


def _accounting(config: Mapping[str, str]) -> Check:
    if not shutil.which("sacct") or not config.get("AccountingStorageType", "").endswith("slurmdbd"):
        now = "costs come from our own records; what Slurm forgets after MinJobAge counts as interrupted"
        return Check("accounting", True, "no sacct", now)
    known = slurm.sacct([node_check.NAME], time.strftime("%Y-%m-%d")) is not None
    found = "sacct answers" if known else "this cluster has it, but sacct does not answer"
    return _check("accounting", known, found, "is slurmdbd down? until it is back, costs come from our own records")


def _node(profile: Profile, root: Root) -> list[Check]:
    """What a job on one of its nodes finds."""
    r = node_check.check_node(profile, root)
    if r.pending_reason:
        found = f"none within {node_check.PENDING_TIMEOUT:.0f} s: {r.pending_reason}"
        return [Check("a node", False, found, "try again later")]
    if not r.sees_root:
        found = f"{r.node or 'the node'} does not see {root.path}"
        return [Check("shared filesystem", False, found, "JEPA_ROOT must lie on what the nodes share")]
    python = profile.python or sys.executable
    python += f": {r.python_error}" if r.python_error else " has what trials need"
    tools = "" if r.has_scontrol else "no scontrol there: a trial cannot requeue itself"
    checks = [
        Check("shared filesystem", True, f"{r.node} sees {root.path}"),
        _check("clock of a node", abs(r.clock_skew) < 5, f"{round(r.clock_skew):+d} s from the filesystem's",
               "have the clocks set"),
        _check("Python of a node", not r.python_error, python, "set `python` in the profile"),
        _check("USR2 of a node", r.usr2_delivered, "reaches a task" if r.usr2_delivered else "does not reach a task",
               "ask who catches it; a trial is then killed at its time limit"),
        Check("requeue of a node", not r.requeue_refused, r.requeue_refused or "Slurm takes a running job back",
              "ask for requeues to be allowed" if r.requeue_refused else tools),
    ]  # fmt: skip
    needed = min(profile.procs_per_node, profile.gpus_per_node)
    if needed and not r.python_error and profile.runtime.get("device") != "cpu":
        found = f"{r.gpus}, a trial takes {needed}"
        checks.append(_check("GPUs torch sees", r.gpus >= needed, found, "install torch for the driver of that node"))
    return checks


def _would_run(profile: Profile) -> list[Check]:
    options = sbatch_options(profile, ResourceClass(profile.nodes, profile.procs_per_node, profile.minutes))
    try:
        slurm.run_program("sbatch", "--test-only", *to_cli_options(options), "--wrap", "true")
    except JepaError as e:
        return [Check("a trial would start", False, e.what, "correct the profile")]
    return [Check("a trial would start", True, "sbatch --test-only accepts the profile's request")]


def _slurm_minutes(text: str) -> int | None:
    """'1-12:00:00' -> 2160; None for infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return parse_minutes(text)
    days, hours, mins, _ = (int(g or 0) for g in found.groups())
    return days * 1440 + hours * 60 + mins
