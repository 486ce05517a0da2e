"""Thin wrappers around squeue, sacct, scontrol, sinfo, scancel and sbatch.

One function per question. Each returns plain values, or raises LaunchError when Slurm refuses and
SchedulerDown when it does not answer in time. This module knows no trial.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.scheduler.clean_env import clean_environment

TIMEOUT = 30  # s; when slurmctld is down a program gives up by itself after 9 to 18
TEST_ONLY_TIMEOUT = 5  # s for an estimate that nothing depends on
SQUEUE_FORMAT = "%i|%j|%T|%r|%N|%S|%E"
SACCT_FORMAT = "JobID,JobName,State,Reason,NodeList,Start,ElapsedRaw"
NO_ANSWER = r"[Uu]nable to contact|[Cc]onnection|timed out|configuration source"
USABLE_STATES = ("idle", "mixed", "allocated", "completing", "planned", "reserved")  # of nodes

REASONS = {  # Slurm's word -> what it means, and what to do when anything can be done
    "Priority": "waits for its turn",
    "Resources": "waits for free nodes",
    "BeginTime": "cools down after a requeue (about two minutes)",
    "JobArrayTaskLimit": "held back by the throttle: jepa throttle",
    "DependencyNeverSatisfied": "held: what it waits for has failed",
    "Dependency": "waits for another job",
    "JobHeldUser": "held by the user: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "its nodes are down or reserved: jepa nodes",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "QOSMaxGRESPerUser": "your GPU quota is in use",
    "QOSGrpGRES": "the group's GPU quota is in use",
    "AssocGrpGRES": "the account's GPU quota is in use",
    "AssocMaxJobsLimit": "your job limit is reached",
    "launch failed requeued held": "the launch failed and Slurm holds it: jepa why",
}


@dataclass(frozen=True)
class TaskPlacement:
    """Where a job or array task may run. excluded: 'n[1-2],n7'. nodes: how many it asks for."""

    excluded: str
    partition: str
    nodes: int


@dataclass(frozen=True)
class Task:
    """One row of squeue or sacct.

    index: within the array; None for a job that is no array. dependency: what it still waits for,
    by squeue only. seconds: its wall time, by sacct only.
    """

    job: str
    index: int | None
    name: str
    state: str
    reason: str = ""
    node: str = ""
    start: str = ""
    dependency: str = ""
    seconds: int = 0

    @property
    def id(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def explain_reason(reason: str) -> str:
    """Return what squeue's reason means; the reason itself when it is unknown."""
    word = reason.strip("()")
    return next((text for known, text in REASONS.items() if word.startswith(known)), reason)


def own_job(env: Mapping[str, str]) -> str:
    """Return the id of the job or array task of this process, as Slurm's programs take it.

    Not SLURM_JOB_ID: in one task of each array this is the array's own number, and a requeue of
    that number requeues every task of the array.
    """
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def run_program(*words: str) -> str:
    """Run a program of Slurm and return its output.

    Raises LaunchError when it refuses, SchedulerDown when it is missing or does not answer.
    """
    if not shutil.which(words[0]):
        hint = "run it on a login node of the cluster"
        raise SchedulerDown(f"{words[0]} is not installed here", hint=hint)
    try:
        done = _run(words, TIMEOUT)
    except subprocess.TimeoutExpired as e:
        what = f"{words[0]} did not answer within {TIMEOUT} s"
        raise SchedulerDown(what, hint="try again later") from e
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        error = SchedulerDown if re.search(NO_ANSWER, message) else LaunchError
        raise error(f"{words[0]}: {message}", where=" ".join(words)[:200])
    return done.stdout


def _run(words: Iterable[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(words),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=clean_environment(os.environ),
    )


def squeue(names: Iterable[str]) -> list[Task]:
    """Return all tasks of the jobs with these names, in one query.

    slurmctld also remembers those that ended some minutes ago.
    """
    wanted = ",".join(names)
    if not wanted:
        return []
    options = ("-h", "-r", "-a", "-t", "all", "--name", wanted, "-o", SQUEUE_FORMAT)
    lines = run_program("squeue", *options).splitlines()
    return [_parse_task(line) for line in lines if line.count("|") >= 5]


def sacct(names: Iterable[str], since: str) -> list[Task] | None:
    """Return every run of the tasks of these jobs, also ended ones, oldest first.

    None without accounting. since: as sacct takes it.
    """
    wanted = ",".join(names)
    if not wanted or not shutil.which("sacct"):
        return None
    options = ("-n", "-P", "-D", "-X", "--name", wanted, "-S", since, "-o", SACCT_FORMAT)
    try:
        lines = run_program("sacct", *options).splitlines()
    except LaunchError:
        return None
    tasks: list[Task] = []
    for line in lines:
        row, _, seconds = line.rpartition("|")
        if row.count("|") >= 5 and seconds.isdigit() and "_[" not in row:
            tasks.append(replace(_parse_task(row), seconds=int(seconds)))
    return tasks


def signal(ids: Iterable[str], name: str = "") -> None:
    """Cancel these tasks, or send them the signal of this name."""
    ids = list(ids)
    if ids:
        options = ("-s", name) if name else ()
        run_program("scancel", *options, *ids)


def placement(job: str) -> TaskPlacement:
    """Return where a job or array task may run. Raises LaunchError when squeue does not show it."""
    out = run_program("squeue", "-h", "-r", "-a", "-j", job, "-o", "%x|%P|%D")
    excluded, *rest = out.strip().split("|")
    if len(rest) != 2:
        raise LaunchError(f"squeue does not show job {job}")
    partition, nodes = rest
    if excluded in ("(null)", "N/A"):
        excluded = ""
    return TaskPlacement(excluded, partition, int(nodes) if nodes.isdigit() else 1)


def exclude(job: str, nodes: Iterable[str]) -> None:
    """Set the ExcNodeList of a pending job or array task. Raises LaunchError when Slurm refuses."""
    run_program("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def usable_nodes(partition: str) -> set[str]:
    """Return the nodes of a partition ('': of all) that run jobs or can: not down, not drained."""
    options = ("-p", partition) if partition else ()
    usable: set[str] = set()
    for line in run_program("sinfo", "-h", "-N", *options, "-o", "%N|%T").splitlines():
        node, _, state = line.partition("|")
        if state.rstrip("~#%@^-+$!") in USABLE_STATES:
            usable.add(node)
    return usable


def estimated_start(options: Iterable[str]) -> str:
    """Return when a job with these options would start, by `sbatch --test-only`.

    As '2026-03-01T03:40:00'; '' when it is unknown.
    """
    try:
        done = _run(["sbatch", "--test-only", *options, "--wrap", "true"], TEST_ONLY_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"to start at (\S+)", done.stderr)
    return found[1] if found else ""


def max_array_size() -> int:
    """Return the most tasks of one array. MaxArraySize limits the index, which begins at 0."""
    return max(number(config(), "MaxArraySize", 1001), 1)


def kill_wait(settings: Mapping[str, str]) -> int:
    """Return the seconds from TERM to KILL, for the settings of `config`."""
    return number(settings, "KillWait", 30)


def config() -> dict[str, str]:
    """Return the settings that slurmctld runs with, by name."""
    text = run_program("scontrol", "show", "config")
    return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))


def number(settings: Mapping[str, str], name: str, default: int) -> int:
    """Return the number that a setting begins with: 'KillWait = 30 sec' -> 30."""
    found = re.match(r"\d+", settings.get(name, ""))
    return int(found[0]) if found else default


def _parse_task(line: str) -> Task:
    """Parse a row of squeue, which ends with the dependency, or of sacct without the seconds."""
    job_id, name, state, reason, node, start, *more = line.split("|")
    job, _, index = job_id.partition("_")
    number = int(index) if index.isdigit() else None
    return Task(job, number, name, state, reason, node, start, more[0] if more else "")
