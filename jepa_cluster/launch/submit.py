"""From a sweep to the queue: propose (changes nothing), then intent -> sbatch -> record.

Crash-safe in that order: an intent without a record is looked up by its unique job name, and adopted when the
scheduler knows it. Idempotent: what is queued, running or done is not handed over again. One submitter at a time
holds the root's lock, and looks again once it has it.
"""

from __future__ import annotations

import fcntl
import functools
import shlex
import sys
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch import balance, canary, local, price, queue, relief, slurm, snapshot
from jepa_cluster.launch.arrays import Array, Load, arrange
from jepa_cluster.launch.environment import scrub
from jepa_cluster.launch.explain import bad_nodes
from jepa_cluster.launch.price import Price
from jepa_cluster.launch.queue import Seen
from jepa_cluster.launch.resources import Profile, ResourceClass, class_of, letters
from jepa_cluster.sweep import definition
from jepa_cluster.sweep.definition import Sweep
from jepa_cluster.sweep.reconcile import ACTIVE, Plan, State, reconcile
from jepa_cluster.sweep.resolve import Trial, resolve
from jepa_cluster.trial.layout import Root, TrialDir, read_json, write_atomic, write_json
from jepa_cluster.trial.spool import now_ms

LOCK_SECONDS = 120
THREADS = 16  # that create trial directories


@dataclass(frozen=True)
class Proposal:
    """What submit would do, with its price. trials: by name, in the sweep's order."""

    root: Root
    sweep: Sweep
    profile: Profile
    trials: Mapping[str, Trial]
    seen: Seen
    plan: Plan
    prices: Mapping[str, Price]

    @functools.cached_property
    def classes(self) -> dict[str, ResourceClass]:
        return {name: class_of(t) for name, t in self.trials.items()}

    @functools.cached_property
    def letters(self) -> dict[ResourceClass, str]:
        return letters(self.classes.values())

    @property
    def gpu_hours(self) -> float:
        """Of what would start."""
        return sum(self.left(n) for n in self.plan.start)

    @property
    def committed(self) -> float:
        """GPU-hours still to come: of what would start and of what is already at work."""
        return self.gpu_hours + sum(self.left(n) for n in self.plan.keep)

    @functools.cached_property
    def gpus(self) -> int | None:
        """Most GPUs in flight: what `jepa throttle` said last, else the sweep's limit."""
        return balance.said(self.root, self.sweep.name) or self.sweep.limits.gpus_in_flight

    @functools.cached_property
    def spent(self) -> float:
        """GPU-hours that these trials and their canaries have used so far, every attempt counted."""
        tried = [self.root.trial(n) for n, s in self.seen.trials.items() if s.attempts and n in self.trials]
        return sum(map(queue.seconds_used, [*tried, *canary.all_of(self.root, self.sweep.name)])) / 3600

    def left(self, name: str) -> float:
        """GPU-hours that a trial still needs: its price without the steps that are done."""
        horizon = max(self.trials[name].config.recipe.optim.steps or 0, 1)
        return self.prices[name].gpu_hours * (1 - self._steps.get(name, 0) / horizon)

    @functools.cached_property
    def _steps(self) -> dict[str, int]:
        """Newest step of the trials that somebody has worked on."""
        tried = (n for n, s in self.seen.trials.items() if s.attempts and n in self.trials)
        return {n: int(queue.newest_row(self.root.trial(n)).get("step", 0)) for n in tried}

    def arrays(self, longest: int, live: Sequence[Load] = ()) -> list[Array]:
        start = {n: self.classes[n] for n in self.plan.start}
        branches = {n for n in start if self.trials[n].trunk}
        return arrange(start, self.letters, longest, self.gpus, live, branches)


def propose(sweep: Sweep, profile: Profile, root: Root) -> Proposal:
    """Resolve, look, reconcile, price. Changes nothing."""
    trials = {t.config.name: t for t in resolve(sweep, profile.fallback, profile.runtime)}
    before = read_json(root.sweep(sweep.name) / "plan.json") or {}
    seen = queue.see(root, {*trials, *(t["name"] for t in before.get("trials", []))})
    cost = price.prices(root, profile, trials.values())
    return Proposal(root, sweep, profile, trials, seen, reconcile(trials, seen.states), cost)


def check(p: Proposal) -> None:
    """Refuse what cannot or may not be started. Raises LaunchError."""
    cap = p.sweep.limits.gpu_hours
    if cap is not None and p.plan.start and p.spent + p.committed > cap:
        parts = f"{p.spent:,.1f} spent and {p.committed:,.1f} to come" if p.spent else f"{p.committed:,.1f}"
        raise LaunchError(
            f"{parts} GPU-hours are more than the sweep's limit of {cap:,g}",
            where=p.sweep.source.where("limits", "gpu_hours"),
            now="thin the sweep, or raise limits.gpu_hours",
        )
    for name in p.plan.start:
        cls = p.classes[name]
        if p.profile.kind == "local" and cls.world > p.profile.slots:
            raise LaunchError(
                f"{p.trials[name].label} wants {cls.world} processes, this machine has {p.profile.slots} slots",
                where=p.profile.file,
                now="lower procs_per_node, or set slots in the profile",
            )
        if p.gpus is not None and cls.world > p.gpus:
            where = p.sweep.source.where("limits", "gpus_in_flight")
            raise LaunchError(
                f"a trial of {cls.world} GPUs never fits into {p.gpus} in flight", where=where, now="jepa throttle"
            )


def submit(
    p: Proposal, only: Iterable[str] | None = None, wake: Iterable[str] = (), with_canary: bool = False
) -> Proposal:
    """Make it so, and return what was done (the proposal as it stood under the lock).

    only: start none but these. wake: start these although somebody stopped them. with_canary: a short trial goes
    ahead of each class, and holds the rest of it until it has passed.
    """
    with locked(p.root):
        adopt(p.root)
        p = _look_again(p, only, set(wake))
        check(p)
        code = snapshot.take(p.root)
        _write_sweep(p, code)
        with ThreadPoolExecutor(THREADS) as pool:  # their syncs to disk overlap
            list(pool.map(functools.partial(_write_trial, p, set(p.plan.start)), p.trials))
        if p.plan.start:
            _to_local(p, code, with_canary) if p.profile.kind == "local" else _to_slurm(p, code, with_canary)
    return p


def _write_trial(p: Proposal, start: set[str], name: str) -> None:
    directory, trial = p.root.trial(name), p.trials[name]
    if name in start:
        directory.stop.unlink(missing_ok=True)
        directory.create(relief.relieved(trial.config, directory.attempts()))
    if directory.path.exists():
        directory.add_point(p.sweep.name, {**trial.point, "seed": trial.seed})


def _look_again(p: Proposal, only: Iterable[str] | None, wake: set[str]) -> Proposal:
    seen = queue.see(p.root, p.seen.trials)
    if seen.problem:
        raise SchedulerDown(f"nothing was submitted: {seen.problem}", now="try again when Slurm answers")
    states: dict[str, State] = {n: "interrupted" if n in wake and s == "stopped" else s for n, s in seen.states.items()}
    plan = reconcile(p.trials, states)
    if only is not None:
        keep = set(only)
        start = {"submit": plan.submit, "resume": plan.resume}
        plan = replace(plan, **{k: tuple(n for n in v if n in keep) for k, v in start.items()})
    return replace(p, seen=seen, plan=plan)


@contextmanager
def locked(root: Root) -> Generator[None]:
    """One submitter at a time below a root."""
    root.path.mkdir(parents=True, exist_ok=True)
    with (root.path / ".submit.lock").open("w") as f:
        for _ in range(LOCK_SECONDS * 10):
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise LaunchError("somebody else is submitting", where=f.name, now="wait for them, then try again")
        yield


def _write_sweep(p: Proposal, code: str) -> None:
    folder = p.root.sweep(p.sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(p.sweep.source.file)
    write_atomic(folder / "sweep.yaml", source.read_bytes() if source.is_file() else definition.text(p.sweep).encode())
    names = p.letters
    write_json(
        folder / "plan.json",
        {
            "sweep": p.sweep.name,
            "question": p.sweep.question,
            "expect": p.sweep.expect,
            "axes": list(p.sweep.axes),
            "code": code,
            "profile": p.profile.file,
            "kind": p.profile.kind,
            "submitted": now_ms(),
            "limits": asdict(p.sweep.limits),
            "retries": dict(p.sweep.retries),
            "classes": [{"class": names[c], **asdict(c)} for c in sorted(names)],
            "trials": [
                {
                    "name": name,
                    "id": t.config.id,
                    "label": t.label,
                    "point": dict(t.point),
                    "seed": t.seed,
                    "class": names[class_of(t)],
                    "world": class_of(t).world,
                    "steps": t.config.recipe.optim.steps,
                    "hours": round(p.prices[name].hours, 4),
                    "trunk": t.trunk,
                    "begins": t.begins,
                }
                for name, t in p.trials.items()
            ],
        },
    )


def _to_local(p: Proposal, code: str, with_canary: bool) -> None:
    shared = {
        "code": code,
        "python": p.profile.python or sys.executable,
        "environment": {k: str(v) for k, v in p.profile.environment.items()},
        "retries": dict(p.sweep.retries),
        "sweep": p.sweep.name,
    }
    entries: list[dict[str, Any]] = []
    for array in p.arrays(len(p.trials)):
        ahead = _canary_for(p, array, code) if with_canary else None
        after = {"after": ahead.name} if ahead and not ahead.done.exists() else {}
        if ahead and ahead.name not in local.look(p.root) and after:
            entries.append({**shared, "trial": ahead.name, "world": array.cls.world})
        entries += [{**shared, **after, **_trunk(p, n), "trial": n, "world": array.cls.world} for n in array.trials]
    order = {n: i for i, n in enumerate(p.plan.start)}  # as the sweep lists them, canaries first
    local.enqueue(p.root, sorted(entries, key=lambda e: order.get(e["trial"], -1)), p.profile.slots)


def _to_slurm(p: Proposal, code: str, with_canary: bool) -> None:
    folder, name = p.root.sweep(p.sweep.name), p.sweep.name
    for part in ("intents", "arrays", "jobs"):
        (folder / part).mkdir(exist_ok=True)
    live = balance.live(p.root, name, p.seen.tasks) if p.gpus else []
    jobs = [str(r["job"]) for r, _ in live]
    at_work = {n: str(s.job) for n, s in p.seen.trials.items() if s.job}
    for array in p.arrays(slurm.longest_array(), [load for _, load in live]):
        more: dict[str, Any] = {}
        if with_canary:
            ahead = _canary_for(p, array, code)
            if not ahead.done.exists():
                job = _job_of(p.root, name, ahead.name) or _hand_over(p, _alone(array, ahead.name), code, {})
                more = {"canary": ahead.name, "after": job}
        trunks = {p.trials[n].trunk or "" for n in array.trials}
        behind = {job for trial, job in at_work.items() if trial in trunks}
        more |= {"trunks": sorted(behind)} if behind else {}
        behind |= set(jobs) if p.gpus and not array.parallel else set()
        jobs.append(_hand_over(p, array, code, more, sorted(behind)))
        at_work |= dict.fromkeys(array.trials, jobs[-1])
    if live:
        balance.quietly(p.root, name)


def _hand_over(p: Proposal, array: Array, code: str, more: Mapping[str, Any], behind: Sequence[str] = ()) -> str:
    """intent -> sbatch -> record. more: what the record says beyond the array. behind: jobs that end first."""
    folder = p.root.sweep(p.sweep.name)
    name = f"jepa.{p.sweep.name}.{array.letter}.{uuid.uuid4().hex[:8]}"
    intent = {"name": name, "trials": list(array.trials), "class": array.letter, **asdict(array.cls), **more}
    intent |= {"code": code, "parallel": array.parallel, "submitted": now_ms()}
    write_json(folder / "intents" / f"{name}.json", intent)
    first = [f"afterok:{more['after']}"] if "after" in more else []
    wait = [*first, *([f"afterany:{':'.join(behind)}"] if behind else [])]
    executor = slurm_executor(p, array, name, code, ",".join(wait))
    job = _sbatch(executor, [str(p.root.trial(t).path) for t in array.trials])
    _record(p.root, p.sweep.name, intent, job)
    return job


def _trunk(p: Proposal, name: str) -> dict[str, Any]:
    """Where a branch begins; nothing for other trials."""
    trial = p.trials[name]
    return {"trunk": trial.trunk, "begins": trial.begins} if trial.trunk else {}


def _alone(array: Array, name: str) -> Array:
    """A job for one canary, in the shape of its class; a short limit lets it slip in early."""
    cls = replace(array.cls, minutes=min(array.cls.minutes, canary.MINUTES))
    return replace(array, trials=(name,), parallel=1, cls=cls)


def _job_of(root: Root, sweep: str, name: str) -> str:
    """The Slurm job that was given a canary, '' when it is new."""
    return next((r["job"] for r in reversed(queue.array_records(root, sweep)) if name in r["trials"]), "")


def _canary_for(p: Proposal, array: Array, code: str) -> TrialDir:
    """The canary of a class: the last one while it may still pass or has passed with this code; else a new one.

    It takes the dearest trial of the class, which fills the most memory.
    """
    last = canary.newest(p.root, p.sweep.name).get(array.letter)
    if last:
        asked = read_json(last.canary) or {}
        same = asked.get("code") == code and asked.get("trial") in p.trials
        state = queue.see(p.root, [last.name]).trials[last.name].state
        if same and state in (*ACTIVE, "done"):
            return last
    chosen = p.trials[max(array.trials, key=lambda n: p.prices[n].hours)]
    config = relief.relieved(chosen.config, p.root.trial(chosen.config.name).attempts())
    trial = p.root.trial(f"canary.{p.sweep.name}.{array.letter}.{uuid.uuid4().hex[:8]}")
    trial.create(
        replace(config, runtime=replace(config.runtime, log_every=1, stop_after=0, milestones=(), fork_from=None))
    )
    mine = [n for n in p.plan.start if p.classes[n] == array.cls]
    cost = sum(p.left(n) for n in mine)
    write_json(
        trial.canary,
        {
            "sweep": p.sweep.name,
            "class": array.letter,
            "trial": chosen.config.name,
            "about": chosen.label,
            "steps": canary.steps(config.recipe.optim.steps or 0),
            "hours": p.prices[chosen.config.name].hours,
            "price": cost,
            "others": p.spent + p.committed - cost,
            "limit": p.sweep.limits.gpu_hours,
            "code": code,
            "t": now_ms(),
        },
    )
    return trial


def _sbatch(executor: Any, paths: list[str]) -> str:
    """Hand an array over -> its job id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from jepa_cluster.launch.job import run

    try:
        with scrub():
            jobs = executor.map_array(run, paths)
    except (FailedJobError, FailedSubmissionError) as e:
        said = " ".join(str(e).split())
        kind = SchedulerDown if "ontact" in said else LaunchError
        raise kind(f"sbatch refused: {said[:400]}", now="jepa doctor checks the profile; jepa submit --dry-run") from e
    return str(jobs[0].job_id).partition("_")[0]


def _record(root: Root, sweep: str, intent: Mapping[str, Any], job: str) -> None:
    write_json(root.sweep(sweep) / "arrays" / f"{intent['name']}.json", {**intent, "job": job})


def adopt(root: Root) -> list[str]:
    """Intents that a crash left without a record: recorded when Slurm knows their name, else void. -> adopted names.

    A void intent stays as a file ending in .void, for whoever wants to know.
    """
    open_ = [p for p in (root.path / "sweeps").glob("*/intents/*.json") if not _recorded(p)]
    if not open_:
        return []
    intents = {p: read_json(p) or {} for p in open_}
    names = [p.stem for p in open_]
    oldest = min(i.get("submitted", 0) for i in intents.values()) / 1000 - 60
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(oldest))
    tasks = [*slurm.squeue(names), *(slurm.sacct(names, since) or [])]
    jobs = {t.name: t.job for t in tasks}
    for path, intent in intents.items():
        if path.stem in jobs:
            sweep = path.parents[1].name
            _pickles(root, sweep, intent, jobs[path.stem])
            _record(root, sweep, intent, jobs[path.stem])
        else:
            path.rename(path.with_suffix(".void"))
    return sorted(jobs)


def _recorded(intent: Path) -> bool:
    return (intent.parents[1] / "arrays" / intent.name).exists()


def _pickles(root: Root, sweep: str, intent: Mapping[str, Any], job: str) -> None:
    """submitit moves its pickles after sbatch: write those that the crash kept from their place."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    from jepa_cluster.launch.job import run

    for i, trial in enumerate(intent["trials"]):
        ident = f"{job}_{i}" if len(intent["trials"]) > 1 else job
        path = Path(JobPaths(root.sweep(sweep) / "jobs" / "%j", job_id=ident).submitted_pickle)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            DelayedSubmission(run, str(root.trial(trial).path)).dump(path)


def slurm_executor(p: Proposal, array: Array, name: str, code: str, dependency: str = "") -> Any:
    """submitit's executor with everything this array needs."""
    from submitit.slurm.slurm import SlurmExecutor

    profile, source = p.profile, p.root.code / code
    python = f"env --block-signal=USR2,TERM {shlex.quote(profile.python or sys.executable)}"
    try:
        jobs = p.root.sweep(p.sweep.name) / "jobs"
        executor = SlurmExecutor(jobs / "%j", max_num_timeout=1_000_000, python=python)
    except RuntimeError as e:
        raise SchedulerDown("srun is not installed here", now="submit from a login node of the cluster") from e
    exports = {**profile.environment, "PYTHONPATH": str(source)}
    # submitit makes a job's folder after sbatch, and Slurm may be faster: a job whose output has no folder is lost
    output = {"output": f"{jobs}/%j.log", "error": f"{jobs}/%j.log"}
    make = f"mkdir -p {shlex.quote(str(jobs))}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}"
    make += "${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    additional: dict[str, Any] = {"requeue": True, "chdir": str(source), **output, **profile.sbatch}
    if profile.mem_gb == 0:
        additional.setdefault("mem", 0)
    if dependency:  # a failed canary leaves the others pending, for a person to decide
        additional |= {"dependency": dependency, "kill-on-invalid-dep": "no"}
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": array.cls.minutes,
        "nodes": array.cls.nodes,
        "ntasks_per_node": array.cls.procs_per_node,
        "cpus_per_task": profile.cpus_per_proc,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join([*([profile.exclude] if profile.exclude else []), *bad_nodes(p.root)]) or None,
        "gpus_per_node": min(array.cls.procs_per_node, profile.gpus_per_node) or None,
        "mem": f"{profile.mem_gb:g}GB" if profile.mem_gb else None,
        "array_parallelism": max(array.parallel, 1),
        "signal_delay_s": profile.signal_seconds,
        "setup": [make, *(f"export {k}={shlex.quote(str(v))}" for k, v in exports.items()), *profile.setup],
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": additional,
    }
    executor.update_parameters(wckey=None, **{k: v for k, v in parameters.items() if v is not None})
    return executor


def sbatch_texts(p: Proposal) -> list[str]:
    """The exact scripts that submit would hand to sbatch, one an array."""
    texts: list[str] = []
    for array in p.arrays(slurm.longest_array()):
        before = [*(["<trunks>"] if array.waits else []), *([] if array.parallel else ["<the arrays before it>"])]
        wait = f"afterany:{':'.join(before)}" if before else ""
        executor = slurm_executor(p, array, f"jepa.{p.sweep.name}.{array.letter}.<unique>", "<code>", wait)
        if len(array.trials) > 1:
            executor.parameters["map_count"] = len(array.trials)
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts
