"""Divide trials into arrays, and a cap on GPUs in flight among arrays.

In: names of trials, their resource classes, numbers of tasks. Out: arrays. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from jepa_cluster.launch.cluster.profile import ResourceClass


@dataclass(frozen=True)
class Array:
    """Trials that one sbatch call submits.

    trials: names by array index. parallel: tasks that may run at a time; 0: none before other
    arrays have ended.
    """

    cls: ResourceClass
    letter: str
    trials: tuple[str, ...]
    parallel: int

    def halves(self) -> tuple[Array, Array]:
        """Divide the trials and the tasks that may run at a time."""
        middle = len(self.trials) // 2
        first = min(self.parallel, middle)
        return (
            replace(self, trials=self.trials[:middle], parallel=first),
            replace(self, trials=self.trials[middle:], parallel=self.parallel - first),
        )


@dataclass(frozen=True)
class ArrayDemand:
    """What an array could use. world: processes per task. tasks: pending or running ones."""

    world: int
    tasks: int
    running: int = 0


def make_arrays(
    trials: Mapping[str, ResourceClass],
    letters: Mapping[ResourceClass, str],
    longest: int,
    in_flight: int | None = None,
    live: Sequence[ArrayDemand] = (),
    branches: Collection[str] = (),
) -> list[Array]:
    """Put the trials of a class into as few arrays as Slurm accepts.

    trials: name -> class. longest: most tasks of one array. in_flight: cap on processes.
    live: arrays in the queue, which share the cap. branches: trials that wait for a trunk; they get
    arrays of their own, after the others, and no share of the cap yet.
    """
    by_class: dict[tuple[bool, ResourceClass], list[str]] = {}
    for name, cls in trials.items():
        by_class.setdefault((name in branches, cls), []).append(name)

    arrays: list[Array] = []
    demands = [*live]
    for (waits, cls), names in sorted(by_class.items()):
        for first in range(0, len(names), longest):
            chunk = tuple(names[first : first + longest])
            arrays.append(Array(cls, letters[cls], chunk, parallel=len(chunk)))
            demands.append(ArrayDemand(cls.world, 0 if waits else len(chunk)))
    if in_flight is None:
        return arrays
    shares = allocate_tasks(demands, in_flight)[len(live) :]
    return [replace(array, parallel=n) for array, n in zip(arrays, shares, strict=True)]


def allocate_tasks(arrays: Sequence[ArrayDemand], cap: int) -> list[int]:
    """Return the tasks at a time of each array under one cap on processes; 0: no room for one.

    The array with the smallest part of its demand gets the next task. Running tasks cannot be taken
    back: an array that runs more than its share gets the share and counts with all that it runs,
    and the others are raised only as far as the cap has room.
    """
    shares = _fill([0] * len(arrays), range(len(arrays)), arrays, cap)
    running = [array.running for array in arrays]
    may_grow = [i for i, share in enumerate(shares) if running[i] <= share]
    raised = _fill(running, may_grow, arrays, cap)
    for i in may_grow:
        shares[i] = raised[i]
    return shares


def _fill(
    tasks: list[int], may_grow: Collection[int], arrays: Sequence[ArrayDemand], cap: int
) -> list[int]:
    """Add tasks to some of the arrays until the cap is full. tasks: per array, to begin with."""
    used = sum(array.world * n for array, n in zip(arrays, tasks, strict=True))

    def filled(i: int) -> float:
        """Return the part of its demand that an array has; 1 when it can have no more."""
        array = arrays[i]
        if tasks[i] >= array.tasks or used + array.world > cap:
            return 1.0
        return tasks[i] / array.tasks

    while may_grow:
        chosen = min(may_grow, key=filled)
        if filled(chosen) == 1:
            break
        tasks[chosen] += 1
        used += arrays[chosen].world
    return tasks
