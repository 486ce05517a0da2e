"""A canary: a short trial that goes ahead of a resource class, while the rest of the class is held.

It is a trial directory below <root>/canaries, run by the same job as any trial: it boots the snapshot, reads data,
trains a few steps, is told to make room once, comes back from its checkpoint, and trains a few more. Then rank 0
writes DONE.json with what was measured, or FAILED.json when the class would cost more than the sweep may. Slurm lets
the others go by itself (`afterok`), the local queue by its runner: nobody needs to be at the keyboard.

    canary.json    what is asked: {sweep, class, trial, steps, hours, price, others, limit}
    DONE.json      {step, t, metrics: {step_seconds, spread, images_per_s, startup_seconds, ...}}
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ExitCode
from jepa_cluster.launch import local, price, queue, slurm
from jepa_cluster.sweep.reconcile import ACTIVE
from jepa_cluster.training.health import Clock
from jepa_cluster.training.preemption import Guard
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import Root, TrialDir, read_json, write_json

if TYPE_CHECKING:
    from jepa_cluster.launch.arrays import Array

STEPS = 20  # of each of its two attempts
MINUTES = 60  # longest time limit of a canary's job
PATIENCE = 60.0  # s that the other ranks wait for rank 0's verdict


def steps(horizon: int) -> int:
    return max(1, min(STEPS, horizon // 3))


def all_of(root: Root, sweep: str) -> list[TrialDir]:
    """The canaries of a sweep, oldest first."""
    folders = root.canaries.glob(f"canary.{sweep}.*.*") if root.canaries.is_dir() else iter(list[Path]())
    found = [TrialDir(p) for p in folders if (p / "canary.json").exists()]
    return sorted(found, key=lambda t: (read_json(t.canary) or {}).get("t", 0))


def newest(root: Root, sweep: str) -> dict[str, TrialDir]:
    """Class letter -> its last canary."""
    return {(read_json(t.canary) or {}).get("class", ""): t for t in all_of(root, sweep)}


def usable(root: Root, sweep: str, letter: str, code: str, trials: Container[str]) -> TrialDir | None:
    """The last canary of a class, while it may still pass or has passed: with this code, for one of these trials."""
    last = newest(root, sweep).get(letter)
    if last is None:
        return None
    asked = read_json(last.canary) or {}
    state = queue.see(root, [last.name]).trials[last.name].state
    same = asked.get("code") == code and asked.get("trial", "") in trials
    return last if same and state in (*ACTIVE, "done") else None


def create(root: Root, config: TrialConfig, asked: Mapping[str, Any]) -> TrialDir:
    """A new canary with a trial's config. asked: what canary.json says, but for its steps and its time."""
    trial = root.trial(f"canary.{asked['sweep']}.{asked['class']}.{uuid.uuid4().hex[:8]}")
    runtime = replace(config.runtime, log_every=1, stop_after=0, milestones=(), fork_from=None)
    trial.create(replace(config, runtime=runtime))
    write_json(trial.canary, {**asked, "steps": steps(config.recipe.optim.steps or 0), "t": spool.now_ms()})
    return trial


def alone(array: Array, name: str) -> Array:
    """A job for one canary, in the shape of its class; a short limit lets it slip in early."""
    cls = replace(array.cls, minutes=min(array.cls.minutes, MINUTES))
    return replace(array, trials=(name,), parallel=1, cls=cls)


def document(trial: TrialDir, seen: queue.Sighting) -> dict[str, Any]:
    """One canary for `status`, `canary` and `why`: a row like a trial's, with what was asked and measured."""
    asked, done = read_json(trial.canary) or {}, read_json(trial.done) or {}
    state = {"done": "passed"}.get(seen.state, seen.state)
    return {
        **asked,
        "name": trial.name,
        "label": f"canary {asked.get('class', '')}",
        "state": state,
        "note": seen.note,
        "job": seen.job,
        "attempts": seen.attempts,
        "step": int(queue.newest_row(trial).get("step", 0)) if seen.attempts else 0,
        "measured": done.get("metrics", {}),
        "gpu_hours": queue.seconds_used(trial, running=state == "running") / 3600 if seen.attempts else 0.0,
    }


def let_go(root: Root, sweep: str) -> list[str]:
    """Start what waits for canaries of this sweep without them -> its trials."""
    waits = all_of(root, sweep)
    gone = local.let_go(root, (c.name for c in waits))
    records = [r for r in queue.array_records(root, sweep) if r.get("canary")]
    tasks = slurm.squeue(r["name"] for r in records)
    held = {t.name for t in tasks if t.reason.startswith("Dependency") and queue.state_of(t)}
    for record in (r for r in records if r["name"] in held):
        slurm.call("scontrol", "update", f"JobId={record['job']}", "Dependency=")
        gone += record["trials"]
    return gone


# ---- on the node


class Lookout:
    """Watches one attempt of a canary: raises the flag once it has trained enough, and judges at its end."""

    def __init__(self, trial: TrialDir, clock: Clock, guard: Guard, first: bool) -> None:
        """Before the trainer starts, so that no checkpoint of this attempt is there yet."""
        self.trial, self.clock, self.first = trial, clock, first
        self.asked: dict[str, Any] = read_json(trial.canary) or {}
        self.before = max(trial.committed(), default=0)
        self.goal = self.before + int(self.asked["steps"])
        if first:
            threading.Thread(target=self._watch, args=(guard,), name="canary", daemon=True).start()

    def _watch(self, guard: Guard) -> None:
        while self.clock.step < self.goal:
            time.sleep(0.02)
        guard.raise_flag("canary")

    def judge(self, attempt: int, code: ExitCode) -> ExitCode:
        """An attempt's end -> what its job says. The first one makes room as a preempted trial does."""
        back = self.before > 0 and code == ExitCode.PREEMPTED
        if not back and code != ExitCode.DONE:
            return code
        if not self.first:
            return self._told(code)
        if back and self.clock.step < self.goal:
            return code  # somebody else wanted its place
        facts = measure(self.trial) | memory()
        problem = too_dear(self.asked, facts)
        if problem:
            write_json(self.trial.failed, {"cause": "error", "error": problem, "attempt": attempt, "t": spool.now_ms()})
            return ExitCode.ERROR
        self.trial.amend(attempt, {"cause": "done", "exit": 0, "error": ""})
        write_json(self.trial.done, {"step": self.clock.step, "t": spool.now_ms(), "metrics": facts})
        return ExitCode.DONE

    def _told(self, code: ExitCode) -> ExitCode:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.trial.done.exists() or self.trial.failed.exists():
                return ExitCode.DONE if self.trial.done.exists() else ExitCode.ERROR
            time.sleep(0.1)
        return code


def measure(trial: TrialDir) -> dict[str, float]:
    """What the two attempts say of the whole trial: pace from the spool, everything around it from the records."""
    config, attempts, rows = trial.read_config(), trial.attempts(), spool.read(trial).rows
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a.attempt == b.attempt and b.step > a.step > 0]
    paces = [(b.t - a.t) / 1000 / (b.step - a.step) for a, b in pairs]
    pace = statistics.median(paces) if paces else 0.0
    spread = statistics.stdev(paces) / pace / len(paces) ** 0.5 if len(paces) > 1 and pace else 0.5
    spent: dict[str, float] = defaultdict(float)
    for phase, seconds in (item for a in attempts for item in a.get("seconds", {}).items()):
        spent[phase] += seconds
    first = {r.attempt: r.t for r in reversed(rows) if r.step > 0}
    boots = [(first[a["attempt"]] - a["started"]) / 1000 for a in attempts if a["attempt"] in first]
    gaps = [(b["started"] - a["ended"]) / 1000 for a, b in itertools.pairwise(attempts) if a.get("ended")]
    moving = spent["data"] + spent["train"]
    found = {
        "step_seconds": pace,
        "spread": min(spread, 0.5),
        "images_per_s": config.recipe.optim.batch / pace if pace else 0.0,
        "data_wait": spent["data"] / moving if moving else 0.0,
        "probe_seconds": spent["probe"],
        "startup_seconds": max(boots, default=0.0),
        "requeue_seconds": max(gaps, default=0.0),
    }
    return {k: round(v, 5) for k, v in {**found, "hours": hours(config, found)}.items()}


def hours(config: TrialConfig, facts: Mapping[str, float]) -> float:
    """Wall time of a whole trial at this pace: steps, start, and a probe as often as the runtime says."""
    horizon = config.recipe.optim.steps or 0
    probing = price.probes(config, 0, horizon) * facts["probe_seconds"]
    return (horizon * facts["step_seconds"] + facts["startup_seconds"] + probing) / 3600


def memory() -> dict[str, float]:
    """Peak of this rank, in GB; of its GPU too when the trainer had one."""
    found = {"host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)}
    torch: Any = sys.modules.get("torch")  # the job has gone through the door to torch; here nobody opens it
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        found |= {"gpu_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3), "gpu_total_gb": round(total / 1e9, 3)}
    return found


def too_dear(asked: Mapping[str, Any], facts: Mapping[str, float]) -> str:
    """'' , or why the class may not be let go: its new price does not fit into the sweep's limit."""
    limit, planned = asked.get("limit"), float(asked.get("hours") or 0)
    if limit is None or not planned:
        return ""
    cost = float(asked["others"]) + float(asked["price"]) * facts["hours"] / planned
    if cost <= limit:
        return ""
    unit = asked.get("unit", "GPU-h")
    return (
        f"a trial takes {facts['hours']:.3g} h, not {planned:.3g} h: the sweep would cost {cost:,.3g} {unit}, "
        f"more than its limit of {limit:,g}"
    )
