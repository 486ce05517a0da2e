"""How long Slurm leaves a job that it preempts, from the first signal to KILL.

In: a profile. Out: a `KillDelay`, by GraceTime and KillWait. It knows no trial.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from typing import NamedTuple

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.scheduler import slurm


class KillDelay(NamedTuple):
    """mode: PreemptMode. signal: the first one. source: the setting that gives the seconds."""

    mode: str
    signal: str
    seconds: int
    source: str


class _Rule(NamedTuple):
    """What a partition or QOS says. grace: GraceTime in seconds."""

    grace: int
    mode: str
    owner: str


def read(profile: Profile, config: Mapping[str, str]) -> KillDelay | None:
    """Return the shortest delay of the profile's partitions or QOS.

    None if their jobs are not preempted, or are suspended. config: of `slurm.config`. Raises
    LaunchError, SchedulerDown.
    """
    kind = config.get("PreemptType", "preempt/none")
    if kind == "preempt/none":
        return None
    by_qos = kind == "preempt/qos"
    rules = _of_qos(profile, config) if by_qos else _of_partitions(profile.partition)
    rules = [rule for rule in rules if "REQUEUE" in rule.mode or "CANCEL" in rule.mode]
    if not rules:
        return None
    grace, mode, owner = min(rules)
    kill_wait = slurm.kill_wait(config)
    parameters = config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    signal = "USR2" if "send_user_signal" in parameters else "TERM"
    seconds, source = max((kill_wait, "KillWait"), (grace, f"GraceTime of {owner}"))
    return KillDelay(mode, signal, seconds, source)


def usable(delay: KillDelay | None, grace_seconds: float) -> float:
    """Return the seconds for a last save. grace_seconds: that a trial counts on."""
    if delay:
        return min(delay.seconds, grace_seconds)
    return grace_seconds


def describe(delay: KillDelay | None, grace_seconds: float) -> str:
    """Say what limits the time for a last save, and what to set."""
    text = f"a preempted job has {usable(delay, grace_seconds):g} s"
    if not delay:
        return f"{text} (runtime.grace_seconds)"
    if delay.seconds > grace_seconds:
        return f"{text} (raise runtime.grace_seconds: Slurm gives {delay.seconds})"
    return f"{text} ({delay.source})"


def qos_of(profile: Profile, config: Mapping[str, str]) -> str:
    """Return the QOS of a job: of the profile, else the default of the user in its account.

    Without a default it is the only QOS that is allowed there, else `normal`. What an account says
    of the partition precedes what it says of all.

    Raises LaunchError, SchedulerDown if sacctmgr does not answer.
    """
    if profile.qos:
        return profile.qos
    columns = "format=cluster,account,defaultaccount,defaultqos,qos,partition"
    rows = _sacctmgr("user", getpass.getuser(), "withassoc", columns)
    found = ""
    for cluster, account, default, qos, allowed, partition in rows:
        is_own = cluster == config.get("ClusterName") and account == (profile.account or default)
        if not is_own or partition not in ("", profile.partition):
            continue
        if not qos and "," not in allowed:
            qos = allowed
        if partition or not found:
            found = qos or found
    return found or "normal"


def _of_partitions(names: str | None) -> list[_Rule]:
    rules: list[_Rule] = []
    for line in slurm.run_program("scontrol", "show", "partition", "-o").splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        name = facts.get("PartitionName", "")
        asked = not names and facts.get("Default") == "YES"
        asked = asked or name in (names or "").split(",")
        if asked and facts.get("GraceTime", "").isdigit():
            mode = facts.get("PreemptMode", "OFF")
            rules.append(_Rule(int(facts["GraceTime"]), mode, f"partition {name}"))
    return rules


def _of_qos(profile: Profile, config: Mapping[str, str]) -> list[_Rule]:
    """Return the rule of a QOS that another one may preempt; [] if sacctmgr does not answer."""
    try:
        name = qos_of(profile, config)
        rows = _sacctmgr("qos", "format=name,gracetime,preemptmode,preempt")
    except JepaError:
        return []
    rules: list[_Rule] = []
    preempted: set[str] = set()
    for own, grace, mode, victims in rows:
        preempted.update(victims.split(","))
        if own == name:
            mode = mode.replace("cluster", config.get("PreemptMode", "OFF")).upper()
            rules.append(_Rule(_seconds(grace), mode, f"QOS {name}"))
    if name not in preempted:
        return []
    return rules


def _sacctmgr(*words: str) -> list[list[str]]:
    rows = slurm.run_program("sacctmgr", "-n", "-P", "show", *words).splitlines()
    return [row.split("|") for row in rows]


def _seconds(time: str) -> int:
    """Return the seconds of '00:02:00' or '1-00:00:00'; 0 of ''."""
    days, _, clock = time.rpartition("-")
    seconds = 0
    for part in filter(None, clock.split(":")):
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 86400 + seconds
