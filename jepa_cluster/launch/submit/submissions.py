"""In which order a sweep's arrays are handed to Slurm, and what each of them waits for.

In: a plan. Out: a `Submission` for each sbatch, or, for --dry-run, its exact script. It submits nothing, so what
`--dry-run` shows and what `submit` does cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jepa_cluster.errors import plural
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit import canary, code_snapshot, sbatch
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.launch.worker import gpu_throttle, node_exclusion
from jepa_cluster.trial.status import ACTIVE

Job = str | int  # Slurm's id, or the place of an earlier turn whose id nobody knows yet


@dataclass(frozen=True)
class Submission:
    """One sbatch.

    canary: name of the canary that must succeed first, in the job `ok`. behind: jobs that end first because the cap has
    no room. branches: trial -> its trunk and the step that the trunk must commit first; the array is then held.
    """

    array: Array
    canary: str = ""
    ok: Job = ""
    behind: tuple[Job, ...] = ()
    branches: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])

    @property
    def what(self) -> str:
        """For a person: 'class A, 12 trials', 'the canary of class A'."""
        trials = self.array.trials
        whose = "the canary of " if any(name.startswith("canary.") for name in trials) else ""
        return f"{whose}class {self.array.letter}, {plural(len(trials), 'trial')}"

    def dependency(self, jobs: Sequence[str]) -> str:
        """As sbatch takes it; '' when it waits for nothing. jobs: of the turns before this one."""
        ids = [jobs[job] if isinstance(job, int) else job for job in (self.ok, *self.behind)]
        canary = [f"afterok:{ids[0]}"] if self.canary else []
        others = [f"afterany:{':'.join(ids[1:])}"] if self.behind else []
        return ",".join([*canary, *others])

    def executor(self, p: Plan, name: str, code: str, jobs: Sequence[str]) -> Any:
        """submitit's executor for this sbatch. jobs: of the turns before this one."""
        return sbatch.executor(
            p.root,
            p.sweep.name,
            p.profile,
            self.array,
            name,
            code,
            dependency=self.dependency(jobs),
            held=bool(self.branches),
            bad_nodes=node_exclusion.bad_nodes_to_exclude(p.root, p.profile, self.array.cls.nodes),
        )


def submissions(p: Plan, canaries: Mapping[str, str]) -> list[Submission]:
    """Arrays in the order of their submission, each canary before its class.

    canaries: class -> name of the canary that its arrays depend on.
    """
    live = gpu_throttle.live_arrays(p.root, p.sweep.name, p.seen.tasks) if p.gpus else []
    others: list[Job] = [array.record["job"] for array in live]
    states = canary.states(p.root, canaries)
    canary_jobs: dict[str, Job] = {c: s.job for c, s in states.items() if s.job and s.state in ACTIVE}
    found: list[Submission] = []
    for array in p.arrays(slurm.max_array_size(), [array.load for array in live]):
        name = canaries.get(array.letter, "")
        if name and array.letter not in canary_jobs:
            canary_jobs[array.letter] = len(found)
            found.append(Submission(canary.array(array, name)))
        branches = _branches(p, array)
        behind = tuple(others) if not array.parallel and not branches else ()
        others.append(len(found))
        found.append(Submission(array, name, canary_jobs.get(array.letter, ""), behind, branches))
    return found


def _branches(p: Plan, array: Array) -> dict[str, tuple[str, int]]:
    """Branches whose trunk is in progress or starts too -> their trunk, and the step where they begin."""
    active = {name for name, seen in p.seen.trials.items() if seen.state in ACTIVE}.union(p.plan.start)
    found: dict[str, tuple[str, int]] = {}
    for name in array.trials:
        trial = p.trials[name]
        if trial.trunk in active:
            found[name] = (trial.trunk, trial.begins)
    return found


def scripts(p: Plan, with_canary: bool = False) -> list[dict[str, Any]]:
    """[{what, name, trials, script}] of every turn. In <> stands what is only known once sbatch has answered."""
    code, _ = code_snapshot.read()
    canaries = canary.required(p, code) if with_canary else {}
    found: list[dict[str, Any]] = []
    jobs: list[str] = []
    for turn in submissions(p, canaries):
        name = f"jepa.{p.sweep.name}.{turn.array.letter}.<unique>"
        executor = turn.executor(p, name, code, jobs)
        script = sbatch.script_text(executor, len(turn.array.trials))
        found.append({"what": turn.what, "name": name, "trials": list(turn.array.trials), "script": script})
        jobs.append(f"<job of script {len(found)}>")
    return found
