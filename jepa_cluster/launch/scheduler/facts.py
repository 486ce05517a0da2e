"""Where each trial stands: markers, then squeue (one query), then sacct -D, then the attempts.

In: a root and trial names. Out: a `TrialStatus` each. Nothing is stored and nothing is inferred from absence alone:
when the scheduler does not answer, trials it may hold are `unknown`, and the reason is told.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jepa_cluster.errors import JepaError, TrialError
from jepa_cluster.launch.scheduler import local, retry_policy, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.sweep.reconcile import ACTIVE, State
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.usage import modified, process_seconds

FRESH = 180  # s: a heartbeat younger than this is a sign of life
TAIL = 8192  # bytes of a spool that hold its newest row


@dataclass(frozen=True)
class TrialStatus:
    """note: in plain words, why it is so. job: Slurm's id or '' ; attempts: how many there were.

    canary: of those that wait, the name of the canary they wait for.
    """

    state: State
    note: str = ""
    job: str = ""
    attempts: int = 0
    canary: str = ""


@dataclass(frozen=True)
class StatusSnapshot:
    """problem: what could not be asked, '' when all was. tasks: Slurm's, queued or running."""

    trials: Mapping[str, TrialStatus]
    problem: str = ""
    tasks: tuple[Task, ...] = field(default=(), repr=False)

    @property
    def states(self) -> dict[str, State]:
        """Of the trials alone, without canaries."""
        return {name: s.state for name, s in self.trials.items() if not name.startswith("canary.")}


def query_status(root: Root, names: Iterable[str]) -> StatusSnapshot:
    """The state of these trials, and of the canaries that they wait for."""
    held, known = local.list_trials(root), array_records(root)
    asked = list(names)
    canaries = [local.canary(held[name]) for name in asked if name in held]
    canaries += [r.get("canary", "") for r in known if set(asked) & set(r["trials"])]
    asked += [name for name in canaries if name]
    found = {name: _from_files(root.trial(name), held.get(name)) for name in dict.fromkeys(asked)}
    open_ = {n for n, s in found.items() if s.state not in ("done", "failed") and s.state not in ACTIVE}
    records = [r for r in known if open_ & set(r["trials"])]
    if not records:
        return StatusSnapshot(_behind_canaries(found))
    try:
        tasks = slurm.squeue(r["name"] for r in records)
    except JepaError as e:
        for name in open_ & {n for r in records for n in r["trials"]}:
            alive = _fresh(root.trial(name))
            found[name] = replace(found[name], state="running" if alive else "unknown", note="Slurm does not answer")
        return StatusSnapshot(found, e.what)
    by_name = {r["name"]: r for r in records}
    for task in tasks:
        record = by_name.get(task.name)
        trial = _trial_of(record, task) if record else None
        if record and trial in open_:
            state, note = _from_squeue(task)
            if state and _RANK[state] > _RANK.get(found[trial].state, 0):
                note = f"starting {note}" if state == "running" and not found[trial].attempts else note
                if trial in record.get("held", ()) and "JobHeldUser" in task.reason:
                    note = "waits for its trunk"
                canary = str(record.get("canary") or "") if task.reason.startswith("Dependency") else ""
                found[trial] = replace(found[trial], state=state, note=note, job=task.id, canary=canary)
    _ask_the_past(root, found, {n for n in open_ if found[n].state not in ACTIVE}, records, tasks)
    return StatusSnapshot(_behind_canaries(found), "", tuple(t for t in tasks if state_of(t)))


def _behind_canaries(found: Mapping[str, TrialStatus]) -> dict[str, TrialStatus]:
    """What waits for a canary says so, and whether that canary can still pass."""
    out = dict(found)
    for name, s in found.items():
        if s.canary and s.canary in found:
            note = CANARY_NOTES.get(found[s.canary].state, "waits for its canary")
            out[name] = replace(s, note=note)
    return out


CANARY_NOTES: Mapping[State, str] = {
    "done": "its canary succeeded",
    "failed": "held: its canary failed, see jepa why",
    "stopped": "held: its canary was stopped, see jepa why",
    "interrupted": "held: its canary was lost, see jepa why",
}
_RANK: Mapping[State, int] = {"queued": 1, "cooling": 2, "running": 3}


def array_records(root: Root, sweep: str = "*") -> list[dict[str, Any]]:
    """Every array that was handed to Slurm, of every sweep, oldest first; with its sweep's name."""
    found: list[dict[str, Any]] = []
    for path in (root.path / "sweeps").glob(f"{sweep}/arrays/*.json"):
        record = read_json(path)
        if record:
            found.append({**record, "sweep": path.parents[1].name})
    return sorted(found, key=lambda r: r["submitted"])


def waits_for_trunk(root: Root, record: Mapping[str, Any], trial: str) -> bool:
    """Whether a trial is held because its trunk has neither committed the step where it begins nor ended.

    record: of its array; `held`: trials that were submitted with --hold, `branches`: trial -> trunk and step.
    """
    if trial not in record.get("held", ()) or trial not in record["branches"]:
        return False
    name, step = record["branches"][trial]
    trunk = root.trial(name)
    return not (trunk.checkpoint(step).exists() or trunk.done.exists() or trunk.failed.exists() or trunk.stop.exists())


def latest_metrics(trial: TrialDir) -> dict[str, Any]:
    """The last whole metrics line of the newest attempt; {} when there is none. Reads only the file's end."""
    for path in sorted((trial.path / "metrics").glob("[0-9]*.jsonl"), reverse=True):
        with path.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - TAIL))
            lines = f.read().split(b"\n")[:-1]
        for line in reversed(lines):
            if line.startswith(b'{"step"'):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
    return {}


def billed_gpu_hours(root: Root, names: Iterable[str]) -> dict[str, float] | None:
    """Trial or canary -> process-seconds of all its attempts by `sacct -D`, whichever sweep asked for them.

    None where there is no accounting. What ran on this machine is not in Slurm's books: our own records say it.
    """
    wanted = set(names)
    records = {r["name"]: r for r in array_records(root) if wanted & set(r["trials"])}
    tasks = slurm.sacct(records, _since(records.values())) if records else None
    if tasks is None:
        return None
    total: dict[str, float] = {}
    for name in wanted:
        trial = root.trial(name)
        total[name] = process_seconds(trial, trial.attempts(), kind="local")
    for task in tasks:
        record = records[task.name]
        trial = _trial_of(record, task)
        if trial in total:
            total[trial] += task.seconds * record["nodes"] * record["procs_per_node"]
    return total


def _since(records: Iterable[Mapping[str, Any]]) -> str:
    """A moment before the first of these was submitted, as sacct takes it."""
    first = min(r["submitted"] for r in records) / 1000 - 60
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(first))


def _from_files(trial: TrialDir, held: str | None) -> TrialStatus:
    attempts = trial.newest_attempt() if trial.path.exists() else 0
    if trial.done.exists() or (trial.canary.exists() and trial.succeeded()):
        return TrialStatus("done", attempts=attempts)
    if trial.failed.exists():
        error = (read_json(trial.failed) or {}).get("error", "")
        return TrialStatus("failed", " ".join(str(error).split())[:100], attempts=attempts)
    if held == "running":
        note = "stopping" if trial.stop.exists() else "" if attempts else "starting"
        return TrialStatus("running", note, attempts=attempts)
    if trial.stop.exists():
        return TrialStatus("stopped", f"{_who_stopped(trial)}: jepa resume", attempts=attempts)
    if held:
        return TrialStatus("queued", "waits for a slot", attempts=attempts, canary=local.canary(held))
    return TrialStatus("interrupted" if attempts else "new", attempts=attempts)


def _who_stopped(trial: TrialDir) -> str:
    """'stopped by jepa cancel, 3 Mar 14:05': what STOP says, and since when."""
    said = trial.stop.read_text().strip() or "somebody asked it to stop"
    return f"{said}, {time.strftime('%d %b %H:%M', time.localtime(modified(trial.stop)))}"


def overdue_checkpoint(trial: TrialDir) -> str:
    """'' or that the newest checkpoint of a running trial is too old, with its age and the reason.

    From the trial's heartbeat, which may be old itself: a full disk takes neither.
    """
    try:
        heartbeat = read_json(trial.heartbeat) or {}
    except (TrialError, OSError):
        return ""
    newest = heartbeat.get("checkpoint") or {}
    age = time.time() - newest.get("t", math.inf) / 1000
    if age <= newest.get("late_seconds", math.inf):
        return ""
    reason = f": {newest['error']}" if newest.get("error") else ""
    return f"checkpoint of step {newest['step']} is {age / 60:.0f} min old{reason}"


def _from_squeue(task: Task) -> tuple[State | None, str]:
    if task.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED"):
        return "running", f"on {task.node}" if task.node else ""
    if task.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED"):
        words = next((v for k, v in slurm.REASONS.items() if task.reason.strip("()").startswith(k)), task.reason)
        return ("cooling" if "BeginTime" in task.reason else "queued"), words
    return None, ""  # COMPLETED, FAILED, ...: squeue shows them for a while, and they say nothing about what is next


def state_of(task: Task) -> State | None:
    """'queued', 'cooling' or 'running'; None for a task that has ended."""
    return _from_squeue(task)[0]


def _ask_the_past(
    root: Root, found: dict[str, TrialStatus], names: set[str], records: list[dict[str, Any]], tasks: list[Task]
) -> None:
    """For trials that left the queue: was it a person (stays stopped) or not (interrupted)?

    tasks: what slurmctld remembers. It forgets after minutes (MinJobAge), but a task that was cancelled while it
    waited never appears in sacct, and a cluster without accounting has nothing else.
    """
    mine = [r for r in records if names & set(r["trials"])]
    if not mine:
        return
    last: dict[str, tuple[int, Task]] = {}
    told = slurm.sacct((r["name"] for r in mine), _since(mine))
    by_name = {r["name"]: r for r in mine}
    for task in [*(told or []), *tasks]:
        record = by_name.get(task.name)
        trial = _trial_of(record, task) if record else None
        if record and trial in names and record["submitted"] >= last.get(trial, (0, task))[0]:
            last[trial] = (record["submitted"], task)
    newest = {n: r for r in mine for n in r["trials"]}  # the record of its last array, for they are in order
    for name in names & set(newest):
        word = last[name][1].state if name in last else ""
        if found[name].state == "stopped":
            continue
        found[name] = _from_files(root.trial(name), None)  # it may have ended since we looked
        if found[name].state in ("done", "failed", "stopped"):
            continue
        if not word and _cancelled_unbegun(root, name, newest[name], tasks):
            word = "CANCELLED"
        if word.startswith("CANCELLED"):
            found[name] = replace(found[name], state="stopped", note=f"{word.lower()} in Slurm: jepa resume")
        else:
            note = f"Slurm: {word}" if word else "left Slurm's queue"
            found[name] = replace(found[name], state="interrupted", note=note, job=last[name][1].id if word else "")
            if too_often := _too_often(root, name, newest[name]["sweep"], word):
                found[name] = replace(found[name], state="failed", note=too_often)


def _cancelled_unbegun(root: Root, name: str, record: Mapping[str, Any], tasks: Iterable[Task]) -> bool:
    """Whether a task left the queue before it ever ran: Slurm has no line of an index that was cancelled while all of
    its array waited. What says so is that the rest of the array is still there."""
    rest = any(t.name == record["name"] and state_of(t) for t in tasks)
    ran = any(a.get("started", 0) >= record["submitted"] for a in root.trial(name).attempts())
    folder = root.sweep(record["sweep"]).jobs / f"{record['job']}_{record['trials'].index(name)}"
    return rest and not ran and not any(folder.glob("*_log.*"))


def _too_often(root: Root, name: str, sweep: str, word: str) -> str:
    """'' while the sweep's `retries` allow another attempt, else which of them is used up."""
    trial = root.trial(name)
    if not trial.newest_attempt():
        return ""
    plan = root.sweep(sweep).read_plan()
    return retry_policy.exhausted_budget(trial.attempts(), plan["retries"] if plan else {}, word)


def _trial_of(record: Mapping[str, Any], task: Task) -> str:
    index = task.index or 0
    return record["trials"][index] if index < len(record["trials"]) else ""


def _fresh(trial: TrialDir) -> bool:
    return time.time() - modified(trial.heartbeat) < FRESH
