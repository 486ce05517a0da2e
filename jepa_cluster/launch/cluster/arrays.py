"""Trials of one class share an array; arrays are cut at what Slurm accepts and share one cap on GPUs in flight.

Pure: names and numbers in, arrays out.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

from jepa_cluster.launch.cluster.profile import ResourceClass


@dataclass(frozen=True)
class Array:
    """trials: names by array index. parallel: tasks that may run at a time; 0: none before others have ended."""

    cls: ResourceClass
    letter: str
    trials: tuple[str, ...]
    parallel: int


@dataclass(frozen=True)
class ArrayDemand:
    """An array as the cap sees it. world: processes a task; left: tasks queued or running; running: of these."""

    world: int
    left: int
    running: int = 0


def make_arrays(
    trials: Mapping[str, ResourceClass],
    letters: Mapping[ResourceClass, str],
    longest: int,
    in_flight: int | None = None,
    live: Sequence[ArrayDemand] = (),
    branches: Collection[str] = (),
) -> list[Array]:
    """trials: name -> class. longest: most tasks of one array (MaxArraySize limits the index). in_flight: processes.

    live: arrays that are in the queue already and share the cap.
    branches: names that wait for others; they get arrays of their own, after all the rest.
    """
    by_class: dict[tuple[bool, ResourceClass], list[str]] = {}
    for name, cls in trials.items():
        by_class.setdefault((name in branches, cls), []).append(name)
    chunks = [
        (waits, cls, tuple(names[i : i + longest]))
        for (waits, cls), names in sorted(by_class.items())
        for i in range(0, len(names), longest)
    ]
    now = [
        0 if waits and in_flight is not None else len(names) for waits, _, names in chunks
    ]  # the cap is for what can run
    loads = [*live, *(ArrayDemand(cls.world, n) for (_, cls, _), n in zip(chunks, now, strict=True))]
    shares = allocate_tasks(loads, in_flight)[len(live) :]
    return [Array(c, letters[c], names, n) for (_, c, names), n in zip(chunks, shares, strict=True)]


def allocate_tasks(arrays: Sequence[ArrayDemand], cap: int | None) -> list[int]:
    """Tasks at a time for arrays under one cap on processes; 0 where there is no room for a single one now.

    One task for each array in turn, as far as they fit, then the array with the smallest part of its demand first.
    What runs cannot be taken back, so an array that runs more than its part is set to that part and counts with all
    that it runs, and the others are raised only as far as the cap really has room.
    """
    if cap is None:
        return [max(a.left, 1) for a in arrays]
    fair = _deal(arrays, cap, [0] * len(arrays))
    over = {i for i, a in enumerate(arrays) if a.running > fair[i]}
    room = cap - sum(arrays[i].world * arrays[i].running for i in over)
    given = _deal(arrays, room, [a.left if i in over else a.running for i, a in enumerate(arrays)], over)
    return [fair[i] if i in over else n for i, n in enumerate(given)]


def _deal(arrays: Sequence[ArrayDemand], cap: int, given: list[int], without: Container[int] = ()) -> list[int]:
    used = sum(a.world * n for i, (a, n) in enumerate(zip(arrays, given, strict=True)) if i not in without)
    for i, a in enumerate(arrays):
        if i not in without and not given[i] and a.left and used + a.world <= cap:
            given[i] += 1
            used += a.world
    while fits := [i for i, a in enumerate(arrays) if 0 < given[i] < a.left and used + a.world <= cap]:
        i = min(fits, key=lambda i: given[i] / arrays[i].left)
        given[i] += 1
        used += arrays[i].world
    return given
