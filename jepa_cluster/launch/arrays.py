"""Trials of one class share an array; arrays are cut at what Slurm accepts and share one cap on GPUs in flight.

Pure: names and numbers in, arrays out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from jepa_cluster.launch.resources import ResourceClass


@dataclass(frozen=True)
class Array:
    """trials: names by array index. parallel: tasks that may run at a time. waits: branches, which follow trunks."""

    cls: ResourceClass
    letter: str
    trials: tuple[str, ...]
    parallel: int
    waits: bool = False


def arrange(
    trials: Mapping[str, ResourceClass],
    letters: Mapping[ResourceClass, str],
    longest: int,
    in_flight: int | None = None,
    branches: Collection[str] = (),
) -> list[Array]:
    """trials: name -> class. longest: most tasks of one array (MaxArraySize limits the index). in_flight: processes.

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
    shares = share([(cls.world, len(names)) for _, cls, names in chunks], in_flight)
    return [Array(c, letters[c], names, n, waits) for (waits, c, names), n in zip(chunks, shares, strict=True)]


def share(arrays: Sequence[tuple[int, int]], cap: int | None) -> list[int]:
    """Tasks at a time for arrays of (processes a task, tasks left) under one cap on processes.

    Every array with work gets at least one task; the rest is dealt in turn, the array with the smallest part of
    its demand first. One task each can already exceed a cap that is smaller than the arrays' classes together.
    """
    if cap is None:
        return [max(left, 1) for _, left in arrays]
    given = [1 if left else 0 for _, left in arrays]
    used = sum(world * n for (world, _), n in zip(arrays, given, strict=True))
    while True:
        fits = [i for i, (world, left) in enumerate(arrays) if given[i] < left and used + world <= cap]
        if not fits:
            return [max(n, 1) for n in given]
        i = min(fits, key=lambda i: given[i] / arrays[i][1])
        given[i] += 1
        used += arrays[i][0]
