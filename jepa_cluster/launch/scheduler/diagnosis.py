"""Why a trial stands where it stands, and what each node did to us. Derived from attempts, markers and log tails.

In: a root and a row of `describe.status`. Out: plain documents. It changes nothing and stores nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_cluster.launch.scheduler import failures
from jepa_cluster.launch.scheduler.failures import Failure
from jepa_cluster.records import AttemptRecord
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import now_ms

LAST = 12  # lines of a log that are shown
HALF_LIFE = 7 * 86_400_000  # ms after which a node's fault counts half
BAD_NODE = 1.5  # score from which submit leaves a node out


def explain_trial(root: Root, sweep: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Cause, evidence, last log lines, the rule that fired, and what to type next."""
    trial = root.trial(row["name"])
    attempts = trial.attempts()
    log = log_tail(root, trial)
    verdict = last_failure(trial, attempts, log, row["note"])
    state, here = row["state"], f"{sweep} {row['index']}"
    if state == "stopped":  # whatever its last attempt died of
        verdict = Failure("stopped", row["note"])
    now = {
        "done": f"jepa scaling {sweep}",
        "running": f"jepa logs -f {here}",
        "failed": verdict.rule.now.replace("jepa retry", f"jepa retry {here}") or f"jepa retry {here}",
        "stopped": f"jepa resume {here}",
        "unknown": "jepa status again when Slurm answers",
    }.get(state, f"jepa submit {sweep}" if state in ("new", "interrupted") else f"jepa watch {sweep}")
    if row.get("canary"):
        return _held(root, sweep, row)
    ended = bool(attempts or trial.failed.exists() or state == "stopped") and state in (
        "failed",
        "interrupted",
        "stopped",
        "queued",
        "cooling",
    )
    return {
        **row,
        "cause": verdict.cause if ended else "",
        "means": verdict.means if ended else row["note"],
        "evidence": verdict.evidence if ended else "",
        "rule": _rule(verdict, state, attempts[-1] if attempts else {}) if ended else "",
        "tries": [_try(a) for a in attempts],
        "log": log if ended and verdict.cause not in ("done", "preempted", "stopped") else [],
        "now": now,
    }


def _held(root: Root, sweep: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The explanation of a trial that waits for its canary: what became of the canary."""
    trial = root.trial(str(row["canary"]))
    attempts, log = trial.attempts(), log_tail(root, trial)
    verdict = last_failure(trial, attempts, log)
    over = row["note"].startswith("held")
    repair = f"repair the cause, then jepa retry {sweep}"
    return {
        **row,
        "cause": f"its canary: {verdict.cause}" if over else "",
        "means": row["note"],
        "evidence": verdict.evidence if over else "",
        "rule": "held until a canary of its class succeeds" if over else "",
        "tries": [],
        "log": log if over else [],
        "now": f"{repair}; without a canary: jepa cancel {sweep}, jepa resume {sweep}"
        if over
        else f"jepa watch {sweep}",
    }


def last_failure(trial: TrialDir, attempts: Sequence[AttemptRecord], log: list[str], word: str = "") -> Failure:
    """Why the newest attempt ended, FAILED.json included."""
    record = dict(attempts[-1]) if attempts else {}
    marker = read_json(trial.failed) or {}
    if marker:
        record |= {"cause": marker.get("cause"), "error": marker.get("error")}
    return failures.classify_attempt(
        record, word.removeprefix("Slurm: ") if word.startswith("Slurm: ") else "", "\n".join(log)
    )


def log_tail(root: Root, trial: TrialDir, lines: int = LAST) -> list[str]:
    """The end of the rank's log that says most: the newest with a traceback, else rank 0's; else the launcher's own."""
    folders = [trial.logs(trial.newest_attempt()), root.local / "logs" / trial.name]
    files = [p for folder in folders for end in ("*.err", "*.out", "*.log") for p in sorted(folder.glob(end))]
    texts = [(p, _end(p)) for p in files]
    chosen = next((t for _, t in texts if "Traceback" in t), None) or next((t for _, t in texts if t.strip()), "")
    return [line for line in chosen.splitlines() if line.strip()][-lines:]


def node_failures(root: Root) -> dict[str, dict[str, Any]]:
    """Host -> {score, faults, attempts, slow}. A fault counts 1 over the accused nodes, half as much each week.
    slow: its ranks' pulses over those of their attempts' median ranks, None where nobody measured."""
    paces: dict[str, list[float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for path in root.trials.glob("*/attempts/[0-9]*.json"):
        record = read_json(path) or {}
        to_blame = accused_node(record)
        for host in hosts(record):
            node = found.setdefault(host, {"score": 0.0, "faults": [], "attempts": 0})
            node["attempts"] += 1
            if host in to_blame:
                age, cause = now_ms() - record["ended"], failures.classify_attempt(record).cause
                node["score"] += math.pow(0.5, age / HALF_LIFE) / len(to_blame)
                node["faults"].append({"trial": path.parents[1].name, "attempt": int(path.stem), "cause": cause})
        pace = record.get("pace") or {"hosts": [], "slow": []}
        for host, slow in zip(pace["hosts"], pace["slow"], strict=True):
            paces.setdefault(host, []).append(slow)
    for host, node in found.items():
        node["slow"] = sum(paces[host]) / len(paces[host]) if host in paces else None
    return dict(sorted(found.items(), key=lambda item: -item[1]["score"]))


def hosts(record: Mapping[str, Any]) -> list[str]:
    """The nodes of an attempt, as Slurm names them."""
    return expand_node_list(str(record.get("job_nodelist") or record.get("host") or ""))


def accused_node(record: Mapping[str, Any]) -> list[str]:
    """Nodes that the end of an attempt speaks against: that of the rank whose machine failed it, else all of them."""
    cause = failures.classify_attempt(record).cause if "ended" in record else "unknown"
    if not failures.RULES[cause].elsewhere and cause != "lost":
        return []
    found = hosts(record)
    return [record["node"]] if cause == "node" and record.get("node") in found else found


def bad_nodes(root: Root) -> list[str]:
    return [host for host, node in node_failures(root).items() if node["score"] >= BAD_NODE]


def expand_node_list(nodelist: str) -> list[str]:
    """'n[01-03,7],login' -> ['n01', 'n02', 'n03', 'n7', 'login']."""
    out: list[str] = []
    for prefix, ranges in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?", nodelist):
        for part in ranges.split(",") if ranges else [""]:
            low, _, high = part.partition("-")
            out += [f"{prefix}{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] if high else [prefix + low]
    return out


def _rule(verdict: Failure, state: str, last: Mapping[str, Any]) -> str:
    if verdict.rule.again and state == "failed":
        return f"retries.{verdict.rule.budget} is used up"
    if state == "stopped":
        return "stays stopped until jepa resume"
    if not verdict.rule.again:
        return "not run again by itself"
    rule = f"runs again within retries.{verdict.rule.budget}" if verdict.rule.budget else "runs again, free of charge"
    rule += f", without {', '.join(last['excluded'])}" if last.get("excluded") else ""
    return rule + (f"; could not leave out {last['exclude_refused']}" if last.get("exclude_refused") else "")


def _try(a: Mapping[str, Any]) -> dict[str, Any]:
    end = a.get("ended")
    keys = ("attempt", "kind", "host", "start_step", "end_step", "cause", "exit", "error", "excluded")
    return {
        **{k: a.get(k) for k in keys},
        "job": _task(a),
        "minutes": (end - a["started"]) / 60_000 if end and a.get("started") else None,
    }


def _task(a: Mapping[str, Any]) -> str:
    """The job of an attempt as Slurm's programs name it: its number within an array changes from run to run."""
    return f"{a['array_job_id']}_{a['array_task_id']}" if "array_task_id" in a else str(a.get("job") or "")


def _end(path: Path) -> str:
    with path.open("rb") as f:
        f.seek(max(0, f.seek(0, 2) - 16_384))
        return f.read().decode(errors="replace")
