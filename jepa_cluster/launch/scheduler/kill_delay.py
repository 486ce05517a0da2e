"""How long Slurm leaves a job that it preempts, from the first signal to KILL.

In: a partition and a QOS. Out: a `KillDelay`, by GraceTime and KillWait. It knows no trial.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jepa_cluster.errors import JepaError
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


def read(partition: str | None, qos: str | None, config: Mapping[str, str]) -> KillDelay | None:
    """Return the shortest delay of these partitions or this QOS.

    None if their jobs are not preempted, or are suspended. partition: names, None for the default
    one. config: of `slurm.config`. Raises LaunchError, SchedulerDown.
    """
    kind = config.get("PreemptType", "preempt/none")
    if kind == "preempt/none":
        return None
    if kind == "preempt/qos":
        rules = _of_qos(qos or "normal", config.get("PreemptMode", "OFF"))
    else:
        rules = _of_partitions(partition)
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


def _of_qos(name: str, default_mode: str) -> list[_Rule]:
    """Return the rule of a QOS that another one may preempt; [] if sacctmgr does not answer."""
    columns = "format=name,gracetime,preemptmode,preempt"
    try:
        rows = slurm.run_program("sacctmgr", "-n", "-P", "show", "qos", columns).splitlines()
    except JepaError:
        return []
    rules: list[_Rule] = []
    preempted: set[str] = set()
    for row in rows:
        own, grace, mode, victims = row.split("|")
        preempted.update(victims.split(","))
        if own == name:
            mode = mode.replace("cluster", default_mode).upper()
            rules.append(_Rule(_seconds(grace), mode, f"QOS {name}"))
    if name not in preempted:
        return []
    return rules


def _seconds(time: str) -> int:
    """Return the seconds of '00:02:00' or '1-00:00:00'; 0 of ''."""
    days, _, clock = time.rpartition("-")
    seconds = 0
    for part in filter(None, clock.split(":")):
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 86400 + seconds
