"""In which order a sweep's arrays are handed to Slurm, and what each of them waits for.

In: a proposal. Out: a `Turn` for each sbatch, or, for --dry-run, its script to the letter. It hands nothing over, so
what a person is shown and what is done cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jepa_cluster.errors import plural
from jepa_cluster.launch import balance, canary, node_exclusion, sbatch, slurm, snapshot
from jepa_cluster.launch.arrays import Array
from jepa_cluster.launch.propose import Proposal

Job = str | int  # Slurm's id, or the place of an earlier turn whose id nobody knows yet


@dataclass(frozen=True)
class Turn:
    """One sbatch. canary: name of the canary that must succeed first, in the job `ok`. trunks: jobs of the trunks that
    branches wait for. behind: jobs that end first because the cap has no room."""

    array: Array
    canary: str = ""
    ok: Job = ""
    trunks: tuple[Job, ...] = ()
    behind: tuple[Job, ...] = ()

    @property
    def what(self) -> str:
        """For a person: 'class A, 12 trials', 'the canary of class A'."""
        trials = self.array.trials
        whose = "the canary of " if any(name.startswith("canary.") for name in trials) else ""
        return f"{whose}class {self.array.letter}, {plural(len(trials), 'trial')}"

    def after(self, jobs: Sequence[str]) -> str:
        """The canary's job. jobs: of the turns before this one."""
        (job,) = self.ids([self.ok], jobs)
        return job

    def ids(self, some: Iterable[Job], jobs: Sequence[str]) -> set[str]:
        """Slurm's ids of these jobs. jobs: of the turns before this one."""
        return {jobs[job] if isinstance(job, int) else job for job in some}

    def dependency(self, jobs: Sequence[str]) -> str:
        """As sbatch takes it; '' when it waits for nothing."""
        first = [f"afterok:{self.after(jobs)}"] if self.canary else []
        others = sorted(self.ids({*self.trunks, *self.behind}, jobs))
        return ",".join([*first, *([f"afterany:{':'.join(others)}"] if others else [])])

    def executor(self, p: Proposal, name: str, code: str, jobs: Sequence[str]) -> Any:
        """submitit's executor for this sbatch. jobs: of the turns before this one."""
        return sbatch.executor(
            p.root,
            p.sweep.name,
            p.profile,
            self.array,
            name,
            code,
            dependency=self.dependency(jobs),
            bad_nodes=node_exclusion.bad_nodes_to_exclude(p.root, p.profile, self.array.cls.nodes),
        )


def turns(p: Proposal, canaries: Mapping[str, str]) -> list[Turn]:
    """Arrays in the order of their submission, each canary before its class.

    canaries: class -> name of the canary that its arrays depend on.
    """
    live = balance.live(p.root, p.sweep.name, p.seen.tasks) if p.gpus else []
    others: list[Job] = [r["job"] for r, _ in live]
    at_work: dict[str, Job] = {n: s.job for n, s in p.seen.trials.items() if s.job}
    canary_jobs: dict[str, Job] = {c: s.job for c, s in canary.states(p.root, canaries).items() if s.job}
    found: list[Turn] = []
    for array in p.arrays(slurm.longest_array(), [load for _, load in live]):
        name = canaries.get(array.letter, "")
        if name and array.letter not in canary_jobs:
            canary_jobs[array.letter] = len(found)
            found.append(Turn(canary.array(array, name)))
        trunks = {p.trials[n].trunk or "" for n in array.trials}
        before = {job for trial, job in at_work.items() if trial in trunks}
        behind = set(others) if p.gpus and not array.parallel else set[Job]()
        others.append(len(found))
        at_work |= dict.fromkeys(array.trials, len(found))
        found.append(Turn(array, name, canary_jobs.get(array.letter, ""), tuple(before), tuple(behind)))
    return found


def scripts(p: Proposal, with_canary: bool = False) -> list[dict[str, Any]]:
    """[{what, name, trials, script}] of every turn. In <> stands what is only known once sbatch has answered."""
    code, _ = snapshot.read()
    canaries = canary.required(p, code) if with_canary else {}
    found: list[dict[str, Any]] = []
    jobs: list[str] = []
    for turn in turns(p, canaries):
        name = f"jepa.{p.sweep.name}.{turn.array.letter}.<unique>"
        executor = turn.executor(p, name, code, jobs)
        script = sbatch.text(executor, len(turn.array.trials))
        found.append({"what": turn.what, "name": name, "trials": list(turn.array.trials), "script": script})
        jobs.append(f"<job of script {len(found)}>")
    return found
