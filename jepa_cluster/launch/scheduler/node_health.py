"""Which nodes failed our attempts: the ledger of `jepa nodes`, derived from the attempt records.

In: a root, or the record of an attempt. Out: names of nodes and their records. It stores nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, TypedDict

from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import RULES, classify_attempt
from jepa_cluster.trial.spool import now_ms

HALF_LIFE = 7 * 86_400_000  # ms after which a fault counts half
BAD_NODE = 1.5  # score from which `submit` excludes a node


class NodeFault(TypedDict):
    """One attempt that the node may have ended. attempt: 0 for a test of the node before one."""

    trial: str
    attempt: int
    cause: str


class NodeRecord(TypedDict):
    """What our attempts say about one node.

    score: 1 per fault, divided among the accused nodes and halved per week of age.
    slow: mean time of its ranks over that of the median rank; None when no attempt measured it.
    """

    score: float
    faults: list[NodeFault]
    attempts: int
    slow: float | None


def node_failures(root: Root) -> dict[str, NodeRecord]:
    """Return the record of each node that ran an attempt, the highest score first."""
    found: dict[str, NodeRecord] = {}
    slow: dict[str, list[float]] = {}
    for trial, record in _attempts(root):
        accused = accused_node(record)
        for host in _hosts(record):
            node = found.setdefault(host, NodeRecord(score=0.0, faults=[], attempts=0, slow=None))
            node["attempts"] += 1
            if host in accused:
                age = now_ms() - record["ended"]
                node["score"] += 0.5 ** (age / HALF_LIFE) / len(accused)
                cause = classify_attempt(record).cause
                fault = NodeFault(trial=trial.name, attempt=record["attempt"], cause=cause)
                node["faults"].append(fault)
        pace = record.get("pace")
        if pace:
            for host, factor in zip(pace["hosts"], pace["slow"], strict=True):
                slow.setdefault(host, []).append(factor)
    for host in found.keys() & slow.keys():
        found[host]["slow"] = fmean(slow[host])
    return dict(sorted(found.items(), key=lambda item: -item[1]["score"]))


def _attempts(root: Root) -> Iterator[tuple[TrialDir, Mapping[str, Any]]]:
    for folder in root.trials.glob("[!.]*/logs"):
        trial = TrialDir(folder.parent)
        for record in trial.attempts_and_bad_starts():
            yield trial, record


def bad_nodes(root: Root) -> list[str]:
    """Return the nodes that `submit` excludes, the worst first."""
    return [host for host, node in node_failures(root).items() if node["score"] >= BAD_NODE]


def accused_node(record: Mapping[str, Any]) -> list[str]:
    """Return the nodes that may be at fault for the end of an attempt.

    The node of the rank that reported a hardware error, else all nodes of the attempt; [] when the
    cause does not speak against any node or the attempt has no end.
    """
    if "ended" not in record:
        return []
    cause = classify_attempt(record).cause
    if not RULES[cause].exclude_node and cause != "lost":
        return []
    hosts = _hosts(record)
    reported = record.get("node")
    return [reported] if cause == "node" and reported in hosts else hosts


def expand_node_list(nodelist: str) -> list[str]:
    """Return the names in a node list of Slurm: 'r[1-2]i[0-1],n07' -> r1i0, r1i1, r2i0, r2i1, n07.

    A name may have several brackets, and text after them.
    """
    names: list[str] = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        fixed, *more = re.split(r"\[([^\]]*)\]", pattern)
        expanded = [fixed]
        for ranges, text in zip(more[::2], more[1::2], strict=True):
            expanded = [f"{name}{n}{text}" for name in expanded for n in _numbers(ranges)]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """Return the numbers in the brackets of a node list: '01-03,7' -> 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        numbers += [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    return numbers


def _hosts(record: Mapping[str, Any]) -> list[str]:
    """Return the nodes of an attempt as Slurm names them."""
    return expand_node_list(str(record.get("job_nodelist") or record.get("host") or ""))
