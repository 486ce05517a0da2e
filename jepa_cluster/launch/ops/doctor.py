"""Check that this machine and the cluster are as the profile says.

In: a profile and a root. Out: `Check`s, each with what was found and what to do. Asks the scheduler
and the filesystem. Changes nothing but a temporary file below the root, and submits no job
(`sbatch --test-only`). With `node` it makes the code snapshot of a trial and submits one job.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jepa_cluster.config import Runtime
from jepa_cluster.data import manifest
from jepa_cluster.errors import DataError, FilesystemFault, JepaError, SchedulerDown
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster.profile import Profile, ResourceClass, visible_gpus
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options
from jepa_cluster.launch.ops import node_check
from jepa_cluster.launch.ops.node_check import MAX_CLOCK_SKEW, PACKAGES, Check, required
from jepa_cluster.launch.scheduler import kill_delay, node_health, slurm
from jepa_cluster.launch.submit import quota
from jepa_cluster.launch.worker import node_exclusion
from jepa_cluster.sweep.time_limit import parse_minutes
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import free_bytes
from jepa_cluster.trial.provenance import available_cores

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
LOCAL_FILESYSTEMS = {"tmpfs", "overlay", "ext4", "xfs", "btrfs", "ramfs"}  # not shared by nodes
MIN_FREE_GB = 20


def run_checks(profile: Profile, root: Root, node: bool = False) -> list[Check]:
    """Return the result of every check that applies, in order.

    A check that cannot be made fails. node: also check a node, by a job.
    """
    checks = [_root(root, profile, node), _disk(root), _data(profile)]
    if checks[0].ok:
        checks.insert(1, _locks(root))
    if profile.kind == "local":
        return [*checks, _packages(), _slots(profile)]
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        problem = f"missing: {', '.join(missing)}"
        hint = "load their module, or go to a login node"
        return [*checks, Check("Slurm's programs", False, problem, hint)]
    checks.append(Check("Slurm's programs", True, "all there"))
    for group in (_config(profile, root), _partition(profile), _request(profile, root, node)):
        try:
            checks.extend(group)
        except JepaError as e:
            checks.append(Check("Slurm answers", False, e.what, e.hint or "correct the profile"))
            if isinstance(e, SchedulerDown):
                break
    return checks


# ---- this machine


def _root(root: Root, profile: Profile, node: bool) -> Check:
    try:
        root.path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root.path, prefix=".doctor-") as probe:
            skew = abs(Path(probe.name).stat().st_mtime - time.time())
    except OSError as e:
        problem = f"{root.path}: {e.strerror}"
        return Check("root", False, problem, "set JEPA_ROOT to a folder you can write")
    if skew > MAX_CLOCK_SKEW:
        problem = f"{skew:.0f} s between this machine and {root.path}"
        return Check("clock", False, problem, "have the clocks set")
    kind = _filesystem(root.path)
    return required(
        "root",
        profile.kind == "local" or node or kind not in LOCAL_FILESYSTEMS,
        f"{root.path} on {kind}",
        "JEPA_ROOT must lie on what the nodes share; if it does, --node asks one of them",
    )


def _locks(root: Root) -> Check:
    try:
        with (
            tempfile.TemporaryDirectory(dir=root.path, prefix=".doctor-") as folder,
            file_lock.acquire(Path(folder, "lock")),
        ):
            return Check("file locks", True, "the filesystem of the root has them")
    except FilesystemFault as e:
        return Check("file locks", False, e.what, e.hint)


def _filesystem(path: Path) -> str:
    """Return the type of the filesystem that holds a path."""
    mount = kind = ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, name, *_ = line.split()
        if path.is_relative_to(folder) and len(folder) >= len(mount):
            mount, kind = folder, name
    return kind


def _disk(root: Root) -> Check:
    free, left = free_bytes(root.path), quota.bytes_left(root.path)
    found = f"{free / 1e9:,.0f} GB"
    if left is not None:
        free = min(free, left)
        found += f", the quota leaves {left / 1e9:,.0f} GB"
    hint = f"checkpoints need room: free {MIN_FREE_GB} GB"
    return required("free disk", free / 1e9 > MIN_FREE_GB, found, hint)


def _data(profile: Profile) -> Check:
    """Check the data set that a sweep reads unless it names another."""
    folder = profile.runtime.get("data_root") or os.environ.get("JEPA_DATA", "data")
    folder = Path(folder).absolute()
    try:
        return Check("data", True, f"{folder}: {manifest.read(folder / 'train').images} images")
    except DataError as e:
        hint = f"export JEPA_DATA=<where the shards are>, or {e.hint}"
        return Check("data", False, f"{folder}: missing", hint)


def _packages() -> Check:
    """Check what trials on this machine import. Of a cluster, --node checks it on a node."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = f"not here: {', '.join(missing)}" if missing else f"imports {', '.join(PACKAGES)}"
    return required("environment", not missing, found, "pip install 'jepa-cluster[train]'")


def _slots(profile: Profile) -> Check:
    cores, gpus, needed = available_cores(), len(visible_gpus()), profile.procs_per_node
    return required(
        "slots",
        needed <= profile.slots,
        f"{profile.slots} ({gpus} GPUs, {cores} cores); a trial takes {needed}",
        "lower procs_per_node, or raise slots in the profile",
    )


# ---- the cluster


def _config(profile: Profile, root: Root) -> Iterator[Check]:
    config = slurm.config()
    federation = slurm.federation()
    hint = "submit on another cluster: squeue here does not show jobs that run elsewhere"
    yield required("federation", not federation, federation or "none", hint)
    longest = slurm.max_array_size()
    yield required(
        "MaxArraySize",
        longest > 1,
        f"{longest}: longer arrays are cut",
        "have it raised: each trial becomes a job of its own",
    )
    yield from _signals(profile, root, config)
    yield _accounting(config)
    if "limits" in config.get("AccountingStorageEnforce", ""):
        yield _submit_limit(profile, config)


def _signals(profile: Profile, root: Root, config: Mapping[str, str]) -> Iterator[Check]:
    """Compare the times from a signal to KILL with what a trial counts on, and with its saves."""
    grace = float(profile.runtime.get("grace_seconds", Runtime.grace_seconds))
    lead = max(grace, 30)
    yield required(
        "time limit",
        profile.signal_seconds >= lead,
        f"USR2 {profile.signal_seconds} s before it; a trial counts on {grace:g} s",
        f"signal_seconds: {lead:g}",
    )
    delay = kill_delay.read(profile, config)
    if delay:
        yield required(
            "preemption",
            delay.seconds >= grace,
            f"PreemptMode={delay.mode}: {delay.signal}, and KILL {delay.seconds} s later "
            f"({delay.source}); a trial counts on {grace:g} s",
            f"under `runtime` of the profile: grace_seconds: {delay.seconds}",
        )
    seconds, trial = cost.longest_save(root)
    longest = f"the longest took {seconds:g} s, of {trial}" if seconds else "none was measured yet"
    yield required(
        "a save",
        seconds <= kill_delay.usable(delay, grace),
        f"{longest}; {kill_delay.describe(delay, grace)}",
        "lower runtime.checkpoint_minutes: unsaved work is lost at a preemption",
    )


def _accounting(config: Mapping[str, str]) -> Check:
    storage = config.get("AccountingStorageType", "")
    if not shutil.which("sacct") or not storage.endswith("slurmdbd"):
        hint = "costs come from our own records; "
        hint += "what Slurm forgets after MinJobAge counts as interrupted"
        return Check("accounting", True, "no sacct", hint)
    if slurm.sacct([node_check.NAME], time.strftime("%Y-%m-%d")) is None:
        hint = "is slurmdbd down? until it is back, costs come from our own records"
        return Check("accounting", False, "this cluster has it, but sacct does not answer", hint)
    return Check("accounting", True, "sacct answers")


def _submit_limit(profile: Profile, config: Mapping[str, str]) -> Check:
    """Find the smallest limit on jobs in the queue: of the user, the account or the QOS."""
    words = [f"users={getpass.getuser()}"]
    flags = "flags=assoc"
    with contextlib.suppress(JepaError):  # without sacctmgr the QOS is not known
        words.append(f"qos={kill_delay.qos_of(profile, config)}")
        flags = "flags=assoc,qos"
    words += [f"accounts={profile.account}"] if profile.account else []
    limits = slurm.run_program("scontrol", "show", "assoc_mgr", flags, *words)
    found = re.findall(r"\b(?:Max|Grp)SubmitJobs(?:PU|PA)?=(\d+)\((\d+)\)", limits)
    if not found:
        return Check("MaxSubmitJobs", True, "no limit")
    limit, used = min(
        ((int(limit), int(used)) for limit, used in found), key=lambda row: row[0] - row[1]
    )
    hint = "each trial counts; submit again when some have ended"
    return Check("MaxSubmitJobs", limit > used, f"{limit}, {used} of them used", hint)


def _partition(profile: Profile) -> Iterator[Check]:
    command = ["sinfo", "-h", "-o", "%l|%G|%c"]
    if profile.partition:
        command += ["-p", profile.partition]
    rows = slurm.run_program(*command).splitlines()
    if not rows:
        known = ", ".join(slurm.run_program("sinfo", "-h", "-o", "%R").split())
        problem = f"{profile.partition} does not exist"
        yield Check("partition", False, problem, f"known: {known}")
        return
    limit, minutes, gpus, cpus = "", 0.0, 0, 0
    kind = f":{re.escape(profile.gpu_type)}" if profile.gpu_type else "(?::[^:,(]+)?"
    for row in rows:
        row_limit, resources, cores = row.split("|")
        row_minutes = parse_minutes(row_limit) or math.inf
        if row_minutes > minutes:
            limit, minutes = row_limit, row_minutes
        gpus = max(gpus, sum(map(int, re.findall(rf"gpu{kind}:(\d+)", resources))))
        cpus = max(cpus, int(cores.rstrip("+")))
    yield required(
        "time",
        minutes >= profile.minutes,
        f"the partition gives {limit}, the profile asks for {profile.time}",
        "lower `time`",
    )
    yield required(
        "GPUs of a node",
        gpus >= profile.gpus_per_node,
        f"{gpus} {profile.gpu_type or ''}".strip() + f", the profile says {profile.gpus_per_node}",
        "set gpus_per_node",
    )
    needed = profile.cpus_per_proc * profile.procs_per_node
    yield required(
        "CPUs of a node", cpus >= needed, f"{cpus}, a trial takes {needed}", "lower cpus_per_proc"
    )


def _request(profile: Profile, root: Root, node: bool) -> Iterator[Check]:
    """Ask for what a trial asks for, without the nodes that `submit` excludes by their record."""
    bad = node_health.bad_nodes(root)
    excluded = node_exclusion.bad_nodes_to_exclude(bad, profile, profile.nodes)
    yield _test_only(profile, excluded)
    if node:
        yield from node_check.check_node(profile, root, excluded)


def _test_only(profile: Profile, excluded: Sequence[str]) -> Check:
    cls = ResourceClass(profile.nodes, profile.procs_per_node, profile.minutes)
    options = to_cli_options(sbatch_options(profile, cls, excluded))
    try:
        slurm.run_program("sbatch", "--test-only", *options, "--wrap", "true")
    except JepaError as e:
        return Check("a trial would start", False, e.what, "correct the profile")
    found = "sbatch --test-only accepts the profile's request"
    if excluded:
        found += f" without {', '.join(excluded)}, see jepa nodes"
    return Check("a trial would start", True, found)
