"""Put the arrays of a sweep into the order in which sbatch gets them, with their dependencies.

In: a plan. Out: one call of a function per `Submission`, or the scripts of --dry-run. Both go
through `submit_in_order`, so that what `--dry-run` shows is what `submit` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jepa_cluster.errors import LaunchError, QueueFull, SubmitLimit
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.submit import canary, code_snapshot, sbatch
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.launch.submit.sbatch import Branches, Submission
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.records import BatchScript, LocalCommand

DEFAULT_ARRAY_SIZE = 1001  # Slurm's default of MaxArraySize


def longest_array() -> tuple[int, str]:
    """Return the most tasks of one array, and what was assumed because Slurm does not answer."""
    try:
        return slurm.max_array_size(), ""
    except LaunchError:
        text = f"MaxArraySize = {DEFAULT_ARRAY_SIZE}, Slurm's default; no slurmctld answers here"
        return DEFAULT_ARRAY_SIZE, text


def submit_in_order(
    plan: Plan,
    longest: int,
    canaries: Mapping[str, str],
    submit: Callable[[Submission], str],
) -> None:
    """Call `submit` for each array of the plan, and for each canary before its class.

    An array for which the user has no room left in the queue is halved, until a part of it fits.

    longest: most tasks of one array. canaries: class -> name of the canary that it depends on.
    submit: returns the id of the job. Raises SubmitLimit when not one more trial fits.
    """
    live: list[gpu_throttle.LiveArray] = []
    if plan.gpu_cap:
        live = gpu_throttle.live_arrays(plan.root, plan.sweep.name, plan.status.tasks)
    earlier_jobs = [array.job for array in live]
    canary_jobs = canary.in_progress(plan.root, canaries)
    arrays = plan.arrays(longest, [array.demand for array in live])
    while arrays:
        array = arrays.pop(0)
        name = canaries.get(array.letter, "")
        if name and not canary_jobs.get(array.letter):
            canary_jobs[array.letter] = submit(Submission(canary.array(array, name)))
        branches = _branches(plan, array)
        is_throttled = not array.parallel and not branches
        submission = Submission(
            array,
            canary=name,
            canary_job=canary_jobs.get(array.letter, ""),
            throttle_jobs=tuple(earlier_jobs) if is_throttled else (),
            branches=branches,
        )
        try:
            earlier_jobs.append(submit(submission))
        except SubmitLimit as e:
            if len(array.trials) == 1 or isinstance(e, QueueFull):
                raise
            arrays[:0] = array.halves()


def _branches(plan: Plan, array: Array) -> Branches:
    """Return branch -> trunk and first step, if the trunk starts too or is in progress."""
    active = {*plan.actions.start, *plan.actions.trials("keep")}
    branches: Branches = {}
    for name in array.trials:
        trial = plan.trials[name]
        if trial.trunk in active:
            branches[name] = (trial.trunk, trial.begins)
    return branches


def scripts(plan: Plan, longest: int, with_canary: bool = False) -> list[BatchScript]:
    """Return the script of each submission. What sbatch has yet to answer is in <>.

    longest: most tasks of one array.
    """
    code, _ = code_snapshot.read()
    canaries = canary.required(plan, code) if with_canary else {}
    found: list[BatchScript] = []

    def add(submission: Submission) -> str:
        name = f"jepa.{plan.sweep.name}.{submission.array.letter}.<unique>"
        script: BatchScript = {
            "title": submission.title,
            "name": name,
            "trials": list(submission.array.trials),
            "script": sbatch.script_text(plan, submission, name, code),
        }
        found.append(script)
        return f"<job of script {len(found)}>"

    submit_in_order(plan, longest, canaries, add)
    return found


def local_commands(plan: Plan, with_canary: bool = False) -> list[LocalCommand]:
    """Return the command of each trial that the local queue would start, canaries first."""
    canaries = canary.required(plan, code_snapshot.read()[0]) if with_canary else {}
    found: list[LocalCommand] = []

    def add(cls: ResourceClass, name: str) -> None:
        command = f"python -m jepa_cluster.launch.worker.main {plan.root.trial(name).path}"
        found.append({"processes": cls.world, "command": command})

    for cls, letter in plan.class_letters.items():
        if letter in canaries:
            add(cls, canaries[letter])
    for name in plan.actions.start:
        add(plan.classes[name], name)
    return found
