"""A sweep as Python objects: its question, its axes, and the points that they span.

In: the fields of a sweep file, read by `sweep_file` or written by a Python caller. Out:
`Sweep.points()`, in a fixed order. It knows the grammar of axes, not the settings: whether
`mask.target_scale` exists is checked by `resolve`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jepa_cluster import labels
from jepa_cluster.sweep.expression import Expression
from jepa_cluster.sweep.yaml_source import YamlSource

Value = Any  # of an axis: what YAML can hold
Values = list[Any]
Point = dict[str, Value]  # axis -> value

HORIZON = labels.STEPS  # the axis that `fork` makes
RETRIES = {  # cause of the end of an attempt -> attempts that may end so; preemption is free
    "timeout": 20,
    "node": 5,
    "hang": 3,
    "killed": 5,
    "start": 2,
    "oom": 1,
    "error": 0,
}


@dataclass(frozen=True)
class ResourceRequest:
    """What a trial needs when `when` holds; an empty one always holds. None: see the profile."""

    when: str = ""
    nodes: int | None = None
    procs_per_node: int | None = None  # one process per GPU
    minutes: int | None = None


@dataclass(frozen=True)
class Limits:
    """Budgets of a sweep; None is no limit."""

    gpu_hours: float | None = None  # `submit` refuses a plan above it
    gpus_in_flight: int | None = None  # over all arrays of the sweep at any time


@dataclass(frozen=True)
class Fork:
    """Many horizons from one run: the others branch from milestones of the longest trial."""

    at: tuple[int, ...]  # horizons, in steps
    cooldown: float = 0.1  # fraction of each horizon
    from_zero: bool = False  # train each horizon from step 0 and share nothing
    base: ClassVar[str] = "optim.schedule=wsd"  # what all horizons have

    def settings(self, horizon: int) -> Point:
        """Return what a horizon has beside its steps."""
        return {"optim.cooldown_steps": max(round(self.cooldown * horizon), 1)}


@dataclass(frozen=True)
class CalibrationUse:
    """Which calibration says what `optim.lr: calibrated` is.

    sweep: of its ladders. other_sizes: what happens to a size without a ladder: `refuse`, or the
    prediction of its `law`. other_data: what happens to other images: `refuse`, or `use` its rates.
    """

    sweep: str
    other_sizes: Literal["refuse", "law"] = "refuse"
    other_data: Literal["refuse", "use"] = "refuse"


@dataclass(frozen=True)
class Claim:
    """Trials whose error is expected to be lower than that of others by a margin.

    metric: the error of a probe. lower, than: setting -> level, of both.
    """

    claim: str
    metric: str
    lower: Mapping[str, Value]
    than: Mapping[str, Value]
    by: float


@dataclass(frozen=True)
class Sweep:
    """A question with axes.

    grid, zip, list and fork are factors of one product, which `where` filters. expect_best: setting
    -> its best level, or how it moves with the size of the model (TRENDS). scale_lr: optim.start_lr
    and optim.final_lr keep their ratio to optim.lr. ladder_per: of a sweep over rates, settings
    whose levels have ladders of their own.
    """

    name: str
    question: str = ""
    expect: str = ""
    expect_best: Mapping[str, Value] = field(default_factory=dict[str, Value])
    claims: tuple[Claim, ...] = ()
    base: tuple[str, ...] = ()
    grid: Mapping[str, Values] = field(default_factory=dict[str, Values])
    zip: Mapping[str, Values] = field(default_factory=dict[str, Values])
    list: tuple[Point, ...] = ()
    fork: Fork | None = None
    scale_lr: bool = False
    ladder_per: tuple[str, ...] = ()
    calibration: CalibrationUse | None = None
    where: str = ""
    seeds: tuple[int, ...] = (0,)
    resources: tuple[ResourceRequest, ...] = ()
    limits: Limits = Limits()
    retries: Mapping[str, int] = field(default_factory=RETRIES.copy)
    source: YamlSource = field(default=YamlSource("", {}, {}), compare=False)

    def axes_by_key(self) -> dict[str, tuple[str, ...]]:
        """Return key of the file -> names of the axes it defines, in the order of the file."""
        listed = itertools.chain.from_iterable(self.list)
        return {
            "grid": tuple(self.grid),
            "zip": tuple(self.zip),
            "list": tuple(dict.fromkeys(listed)),
            "fork": (HORIZON,) if self.fork else (),
        }

    def values_of(self, axis: str) -> list[Value]:
        """Return the values of an axis of grid, zip or list."""
        listed = [point[axis] for point in self.list if axis in point]
        return [*self.grid.get(axis, ()), *self.zip.get(axis, ()), *listed]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes: those with several values first, `seed` last if there are several."""
        axes = itertools.chain.from_iterable(self.axes_by_key().values())

        def is_constant(axis: str) -> bool:
            return len(self.grid.get(axis, ())) == 1

        names = sorted(axes, key=is_constant)
        if len(self.seeds) > 1:
            names.append("seed")
        return tuple(names)

    def points(self) -> Iterator[tuple[Point, int]]:
        """Yield every (point, seed) for which `where` holds. Raises SweepFileError for `where`."""
        where = Expression(self.where or "True", self.source, "where")
        names = {"seed": "seed"}
        axes = self.axes
        for axis in axes:
            names[labels.last_part(axis, axes)] = axis
            names[axis] = axis
        for parts in itertools.product(*self.factors()):
            merged: Point = {}
            for part in parts:
                merged |= part
            point = {axis: merged[axis] for axis in axes if axis in merged}
            for seed in self.seeds:
                values = {**point, "seed": seed}
                named = {name: values.get(axis) for name, axis in names.items()}
                if where(named, "axis"):
                    yield point, seed

    def factors(self) -> list[Sequence[Point]]:
        """Return the parts of points whose product the sweep is."""
        factors: list[Sequence[Point]] = []
        for axis, values in self.grid.items():
            points = [{axis: value} for value in values]
            factors.append(points)
        if self.zip:
            rows = zip(*self.zip.values(), strict=True)
            factors.append([dict(zip(self.zip, row, strict=True)) for row in rows])
        if self.list:
            factors.append(self.list)
        if self.fork:
            horizons = [{HORIZON: steps} for steps in self.fork.at]
            factors.append(horizons)
        return factors
