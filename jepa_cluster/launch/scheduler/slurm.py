"""Slurm's programs, called with patience and read without trust.

One function a question; each returns plain values, or raises SchedulerDown when nobody answers. It knows no trial.
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

TIMEOUT = 30  # s; with slurmctld down a call gives up by itself after 9 to 18
SACCT = "JobID,JobName,State,Reason,NodeList,Start,ElapsedRaw"
QUICK = 5  # s for an answer that is only nice to have

REASONS = {  # Slurm's word -> what it means, and what to do when anything can be done
    "Priority": "waits for its turn",
    "Resources": "waits for free nodes",
    "BeginTime": "cools down after a requeue (about two minutes)",
    "JobArrayTaskLimit": "held back by the throttle: jepa throttle",
    "DependencyNeverSatisfied": "held: what it waits for has failed",
    "Dependency": "waits for another job",
    "JobHeldUser": "held by a person: scontrol release",
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


AT_WORK = ("idle", "mixed", "allocated", "completing", "planned", "reserved")  # states of nodes that may be had


@dataclass(frozen=True)
class TaskPlacement:
    """Where a job or array task may run. excluded: 'n[1-2],n7'. nodes: how many it asks for."""

    excluded: str
    partition: str
    nodes: int


@dataclass(frozen=True)
class Task:
    """One line of squeue or sacct. index: None for a job that is no array. seconds: its wall time, by sacct only."""

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


def own_job(env: Mapping[str, str]) -> str:
    """Return the id of the job or array task that this process belongs to, as Slurm's programs take it.

    Not SLURM_JOB_ID: in one task of each array this is the array's own number, and a requeue of that number requeues
    every task of the array.
    """
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def run_program(*words: str) -> str:
    """Run a Slurm program -> its output. LaunchError when it refuses, SchedulerDown when nobody answers."""
    if not shutil.which(words[0]):
        raise SchedulerDown(f"{words[0]} is not installed here", hint="run it on a login node of the cluster")
    try:
        clean = clean_environment(os.environ)
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=clean)
    except subprocess.TimeoutExpired as e:
        raise SchedulerDown(f"{words[0]} did not answer within {TIMEOUT} s", hint="try again later") from e
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        kind = (
            SchedulerDown
            if re.search(r"[Uu]nable to contact|[Cc]onnection|timed out|configuration source", said)
            else LaunchError
        )
        raise kind(f"{words[0]}: {said}", where=" ".join(words)[:200])
    return done.stdout


def squeue(names: Iterable[str]) -> list[Task]:
    """Every task of the jobs with these names that slurmctld remembers, for some minutes ended ones too. One query."""
    wanted = ",".join(names)
    if not wanted:
        return []
    out = run_program("squeue", "-h", "-r", "-a", "-t", "all", "--name", wanted, "-o", "%i|%j|%T|%r|%N|%S|%E")
    return [_task(line) for line in out.splitlines() if line.count("|") >= 5]


def sacct(names: Iterable[str], since: str) -> list[Task] | None:
    """Every attempt of these jobs, ended ones too, oldest first; None where there is no accounting."""
    wanted = ",".join(names)
    if not wanted or not shutil.which("sacct"):
        return None
    words = ("-n", "-P", "-D", "-X", "--name", wanted, "-S", since, "-o", SACCT)
    try:
        lines = run_program("sacct", *words).splitlines()
    except LaunchError:
        return None
    rows = [line.rpartition("|") for line in lines if line.count("|") >= 6]
    return [replace(_task(row), seconds=int(n)) for row, _, n in rows if n.isdigit() and "_[" not in row]


def signal(ids: Iterable[str], what: str = "") -> None:
    """scancel these tasks, or send them a signal."""
    ids = list(ids)
    if ids:
        run_program("scancel", *(("-s", what) if what else ()), *ids)


def placement(job: str) -> TaskPlacement:
    """Ask squeue where a job or array task may run. Raises LaunchError when squeue does not show it."""
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
    """Nodes of a partition ('': of all) that are at work or wait for some: neither down nor drained nor silent."""
    out = run_program("sinfo", "-h", "-N", *(("-p", partition) if partition else ()), "-o", "%N|%T")
    rows = (line.partition("|") for line in out.splitlines())
    return {node for node, _, state in rows if state.rstrip("~#%@^-+$!") in AT_WORK}


def estimated_start(options: Iterable[str]) -> str:
    """When a job with these options would start (`sbatch --test-only`): '2026-03-01T03:40:00'; '' when unknown."""
    command = ["sbatch", "--test-only", *options, "--wrap", "true"]
    environment = clean_environment(os.environ)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUICK, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"to start at (\S+)", done.stderr)
    return found[1] if found else ""


def max_array_size() -> int:
    """Most tasks of one array: MaxArraySize limits the index, which begins at 0."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_program("scontrol", "show", "config"), re.MULTILINE)
    return max(int(found[1]) if found else 1001, 1)


def _task(line: str) -> Task:
    ident, name, state, reason, node, start, *more = line.split("|")  # squeue: and what it still waits for
    job, _, index = ident.partition("_")
    waits = more[0] if more else ""
    return Task(job, int(index) if index.isdigit() else None, name, state, reason, node, start, waits)
