"""Thin wrappers around squeue, sacct, scontrol, sinfo, scancel and sbatch.

One function per question. Each returns plain values, or raises LaunchError when Slurm refuses and
SchedulerDown when it does not answer in time. This module knows no trial.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from jepa_cluster.errors import JepaError, LaunchError, NotInstalled, QueueFull, SchedulerDown
from jepa_cluster.launch.scheduler.clean_env import clean_environment

TIMEOUT = 30  # s; when slurmctld is down a program gives up by itself after 9 to 18
NAMES_AT_ONCE = 400  # of jobs, in one argument
TEST_ONLY_TIMEOUT = 5  # s for an estimate that nothing depends on
SQUEUE_FORMAT = "%i|%j|%T|%r|%N|%S|%e|%E"
SACCT_FORMAT = "JobID,JobName,State,Reason,NodeList,Start,End,ElapsedRaw"
FIELDS = 8  # of a row of either
NO_ANSWER = r"[Uu]nable to contact|[Cc]onnection|timed out|configuration source"
# Words of an sbatch that waits until slurmctld, which holds MaxJobCount jobs, forgets some
QUEUE_FULL = re.compile(rb"job queue full|unable to accept job")
NO_ACCOUNTING = "storage is disabled"
USABLE_STATES = ("idle", "mixed", "allocated", "completing", "planned", "reserved")  # of nodes


class Reason(NamedTuple):
    """What a reason of squeue means, and what to type when anything can be done.

    {job}: id of the task. held: time cannot cure it.
    """

    text: str
    held: bool = False


REASONS: Mapping[str, Reason] = {  # how Slurm's words begin -> what they mean
    "Priority": Reason("waits for its turn"),
    "Resources": Reason("waits for free nodes"),
    "BeginTime": Reason("waits until its start time"),
    "JobArrayTaskLimit": Reason("held back by the throttle: jepa throttle"),
    "DependencyNeverSatisfied": Reason(
        "what it waits for has failed: jepa cancel, then jepa resume", held=True
    ),
    "Dependency": Reason("waits for another job"),
    "JobHeldUser": Reason("held by a user: scontrol release {job}", held=True),
    "JobHeldAdmin": Reason("held by an administrator: ask them, or jepa cancel", held=True),
    "ReqNodeNotAvail, Reserved for maintenance": Reason("maintenance"),
    "ReqNodeNotAvail": Reason("its nodes are down or reserved: jepa nodes"),
    "PartitionDown": Reason("the partition is down"),
    "PartitionTimeLimit": Reason(
        "asks for more time than the partition gives: jepa cancel, lower time, jepa resume",
        held=True,
    ),
    "BadConstraints": Reason(
        "no node has what it asks for: jepa cancel, correct the profile, jepa resume", held=True
    ),
    "InvalidQOS": Reason("its QOS is invalid: correct the profile, jepa cancel and resume", True),
    "InvalidAccount": Reason(
        "its account is invalid: correct the profile, jepa cancel and resume", held=True
    ),
    "QOSMaxGRESPerUser": Reason("your GPU quota is in use"),
    "QOSGrpGRES": Reason("the group's GPU quota is in use"),
    "AssocGrpGRES": Reason("the account's GPU quota is in use"),
    "AssocMaxJobsLimit": Reason("your job limit is reached"),
    "launch failed requeued held": Reason(
        "the launch failed and Slurm holds it: jepa why, then scontrol release {job}", held=True
    ),
    "job requeued in held state": Reason(
        "requeued and held by a user: scontrol release {job}", held=True
    ),
}
SPENT = Reason("the budget of the account is spent: ask for more, or jepa cancel", held=True)


@dataclass(frozen=True)
class TaskPlacement:
    """Where a job or array task may run. excluded: 'n[1-2],n7'. nodes: how many it asks for."""

    excluded: str
    partition: str
    nodes: int


@dataclass(frozen=True)
class Task:
    """One row of squeue or sacct.

    index: within the array; None for a job that is no array, and for all tasks of an array that
    have no row of their own. dependency: what it still waits for, by squeue only. seconds: its wall
    time, by sacct only.
    """

    job: str
    index: int | None
    name: str
    state: str
    reason: str = ""
    node: str = ""
    start: str = ""
    end: str = ""
    dependency: str = ""
    seconds: int = 0

    @property
    def id(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def explain_reason(reason: str) -> Reason:
    """Return what squeue's reason means; the reason itself when it is unknown."""
    word = reason.strip("()")
    if "Minutes" in word:  # such as AssocGrpGRESMinutes
        return SPENT
    found = (meaning for known, meaning in REASONS.items() if word.startswith(known))
    return next(found, Reason(reason))


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

    Raises LaunchError when it refuses, SchedulerDown when it does not answer, NotInstalled.
    """
    if not shutil.which(words[0]):
        hint = "run it on a login node of the cluster"
        raise NotInstalled(f"{words[0]} is not installed here", hint=hint)
    try:
        done = _run(words, TIMEOUT)
    except subprocess.TimeoutExpired as e:
        if QUEUE_FULL.search(e.stderr or b""):
            raise QueueFull("Slurm holds as many jobs as it can (MaxJobCount)") from e
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
        # Bit strings of array tasks are not cut off at 64 characters.
        env={**clean_environment(os.environ), "SLURM_BITSTR_LEN": "0"},
    )


def _batches(names: Iterable[str]) -> list[list[str]]:
    """Divide names into groups that fit into one argument of a program, which holds 128 KiB."""
    names = list(names)
    starts = range(0, len(names), NAMES_AT_ONCE)
    return [names[start : start + NAMES_AT_ONCE] for start in starts]


def sbatch(*words: str) -> str:
    """Submit a job, and return its id."""
    answer = run_program("sbatch", "--parsable", *words)
    return answer.strip().partition(";")[0]


def squeue(names: Iterable[str]) -> list[Task]:
    """Return all tasks of the jobs with these names, in one query per `NAMES_AT_ONCE`.

    slurmctld also remembers those that ended some minutes ago.
    """
    options = ("-h", "-r", "-a", "-t", "all", "-o", SQUEUE_FORMAT)
    tasks: list[Task] = []
    for some in _batches(names):
        for line in run_program("squeue", *options, "--name", ",".join(some)).splitlines():
            tasks += _parse_tasks(line)
    return tasks


def sacct(names: Iterable[str], since: str) -> list[Task] | None:
    """Return every run of the tasks of these jobs, also of other users, the newest last.

    None without accounting. since: as sacct takes it. Raises LaunchError, SchedulerDown.
    """
    batches = _batches(names)
    if not batches or not shutil.which("sacct"):
        return None
    options = ("-a", "-n", "-P", "-D", "-X", "-S", since, "-o", SACCT_FORMAT)
    lines: list[str] = []
    try:
        for some in batches:
            lines += run_program("sacct", *options, "--name", ",".join(some)).splitlines()
    except LaunchError as e:
        if NO_ACCOUNTING in e.what:
            return None
        raise
    tasks: list[Task] = []
    for line in lines:
        row, _, seconds = line.rpartition("|")
        if seconds.isdigit():
            tasks += [replace(task, seconds=int(seconds)) for task in _parse_tasks(f"{row}|")]
    return tasks


def end_state(job: str, state: str = "") -> str:
    """Return Slurm's word for the end of a job, 'CANCELLED by ...' if a user cancelled it.

    Returns '' if Slurm does not answer. state: of the job by squeue, if it is known. While a job is
    completing only accounting knows its end, some seconds later; until then it says RUNNING.
    """
    try:
        state = state or run_program("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()
        if state != "COMPLETING" or not shutil.which("sacct"):
            return state.replace("CANCELLED", "CANCELLED by a user")
        options = ("-n", "-P", "-D", "-X", "-S", "now-1days", "-o", "State")
        *_, last = ["", *run_program("sacct", *options, "-j", job).splitlines()]
        return last
    except JepaError:
        return ""


def hides_jobs() -> bool:
    """Return whether users see no jobs of others (PrivateData)."""
    return "jobs" in config().get("PrivateData", "")


def federation() -> str:
    """Return the federation that this cluster belongs to, or ''."""
    try:
        answer = run_program("scontrol", "show", "federation")
    except LaunchError:  # a cluster without accounting may refuse
        return ""
    found = re.search(r"Federation:\s*(\S+)", answer)
    return found[1] if found else ""


def maintenance() -> str:
    """Return when the next maintenance is, for the user: 'maintenance until 20:24'."""
    rows: list[tuple[str, str]] = []
    for line in run_program("scontrol", "show", "reservation", "-o").splitlines():
        times = re.search(r"StartTime=(\S+) EndTime=(\S+)", line)
        if times and re.search(r"Flags=\S*MAINT", line):
            rows.append((times[1], times[2]))
    if not rows:
        return REASONS["ReqNodeNotAvail, Reserved for maintenance"].text
    start, end = min(rows)
    text = f"maintenance until {clock_time(end)}"
    if start > time.strftime("%Y-%m-%dT%H:%M:%S"):
        text += f", from {clock_time(start)}; a shorter time would start now"
    return text


def clock_time(stamp: str) -> str:
    """Return a time of Slurm for the user: '20:09', with the day unless it is today; '' for N/A."""
    seconds = timestamp(stamp)
    if seconds is None:
        return ""
    is_today = stamp.startswith(time.strftime("%Y-%m-%d"))
    return time.strftime("%H:%M" if is_today else "%d %b %H:%M", time.localtime(seconds))


def timestamp(stamp: str) -> float | None:
    """Return a time of Slurm, which is local time, in Unix seconds; None for N/A or Unknown."""
    try:
        return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def signal(ids: Iterable[str], name: str = "") -> None:
    """Cancel these tasks, or send them the signal of this name."""
    options = ("-s", name) if name else ()
    for some in _batches(ids):
        run_program("scancel", *options, *some)


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


def _parse_tasks(line: str) -> list[Task]:
    """Return the tasks of a row of squeue, or of sacct without the seconds; [] for a torn row.

    '7_[0-1,4%2]' is three tasks. A list that Slurm has cut off means all tasks.
    """
    if line.count("|") < FIELDS - 1:
        return []
    job_id, name, state, reason, node, start, end, dependency = line.split("|", FIELDS - 1)
    job, _, index = job_id.partition("_")
    indices: list[int | None] = []
    for part in index.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            indices += range(int(first), int(last or first) + 1)
    if not indices or "..." in index:
        indices = [None]
    rest = (name, state, reason, node, start, end, dependency)
    return [Task(job, number, *rest) for number in indices]
