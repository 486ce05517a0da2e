"""The sweep file: a question, its axes, and what a trial needs.

In: YAML (docs/howto/sweeps.md). Out: a `Sweep`, whose points are enumerated in a fixed order. Everything unknown
in the file is an error with its line and the nearest valid name. It knows the grammar, not the settings: whether
`mask.target_scale` exists is `resolve`'s business. A Python caller uses `Sweep` itself, with the same words.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from jepa_cluster.errors import ConfigError, SweepFileError, suggest
from jepa_cluster.sweep import located
from jepa_cluster.sweep.expression import Expression
from jepa_cluster.sweep.located import Located

Point = dict[str, Any]  # axis -> value

Values = list[Any]  # of one axis, in the order of the file

KEYS = ("question", "expect", "cost", "found", "base", "grid", "zip", "list", "random", "fork", "where", "seeds",
        "resources", "limits", "retries")  # fmt: skip
HORIZON = "optim.steps"  # the axis that `fork` makes
RETRIES = {"timeout": 20, "node": 5, "hang": 3, "killed": 5, "oom": 1, "error": 0}  # preemption is free
LAWS = ("uniform", "log", "int", "choice")
MOST_POINTS = 100_000
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_AXIS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")


@dataclass(frozen=True)
class Need:
    """What trials need for which `when` holds (an empty one always does). None: the cluster profile decides."""

    when: str = ""
    nodes: int | None = None
    procs_per_node: int | None = None  # one process a GPU
    minutes: int | None = None


@dataclass(frozen=True)
class Limits:
    gpu_hours: float | None = None  # a plan above it is refused
    gpus_in_flight: int | None = None  # never more at once, over all arrays


@dataclass(frozen=True)
class Fork:
    """Many horizons from one run: the longest trial is the trunk, the others cool down from its milestones."""

    at: tuple[int, ...]  # horizons, in steps
    cooldown: float = 0.1  # share of each horizon
    from_zero: bool = False  # share nothing: train each horizon by itself

    def cooldown_steps(self, horizon: int) -> int:
        return max(round(self.cooldown * horizon), 1)


@dataclass(frozen=True)
class Sweep:
    """A question with axes. `grid`, `zip`, `list`, `random`, `fork` are factors of one product; `where` thins it."""

    name: str
    question: str = ""
    expect: str = ""
    base: tuple[str, ...] = ()
    grid: Mapping[str, Values] = field(default_factory=dict[str, Values])
    zip: Mapping[str, Values] = field(default_factory=dict[str, Values])
    list: tuple[Point, ...] = ()
    random: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fork: Fork | None = None
    where: str = ""
    seeds: tuple[int, ...] = (0,)
    resources: tuple[Need, ...] = ()
    limits: Limits = Limits()
    retries: Mapping[str, int] = field(default_factory=lambda: dict(RETRIES))
    source: Located = field(default_factory=lambda: Located("", {}, {}), compare=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the swept settings in the order of the file, `seed` last when there are several."""
        names = [*self.grid, *self.zip]
        for point in self.list:
            names += [k for k in point if k not in names]
        names += [*self.random.get("axes", {}), *([HORIZON] if self.fork else [])]
        return (*dict.fromkeys(names), *(("seed",) if len(self.seeds) > 1 else ()))

    def points(self) -> Iterator[tuple[Point, int]]:
        """Every (point, seed) that `where` lets through. Raises SweepFileError when it cannot be evaluated."""
        keep = self.expression("where", self.where) if self.where else None
        names = {"seed": "seed"} | {name: a for a in self.axes for name in (shortest(a, self.axes), a)}
        for point in self._product():
            for seed in self.seeds:
                if keep is None or self._holds(keep, {**point, "seed": seed}, names):
                    yield point, seed

    def expression(self, key: str, text: str, *path: str | int) -> Expression:
        try:
            return Expression(text)
        except ConfigError as e:
            raise self.source.error(f"{key}: {e.what}", *(path or (key,)), hint=e.hint) from e

    def _holds(self, keep: Expression, point: Point, names: Mapping[str, str]) -> bool:
        def lookup(name: str) -> Any:
            if name not in names:
                raise ConfigError(f"no axis is called '{name}'", hint=suggest(name, names))
            return point.get(names[name])

        try:
            return keep(lookup)
        except ConfigError as e:
            raise self.source.error(f"where: {e.what}", "where", hint=e.hint) from e

    def _product(self) -> Iterator[Point]:
        factors: list[list[Point]] = [[{axis: v} for v in values] for axis, values in self.grid.items()]
        if self.zip:
            factors.append([dict(zip(self.zip, row, strict=True)) for row in zip(*self.zip.values(), strict=True)])
        if self.list:
            factors.append([dict(p) for p in self.list])
        if self.random:
            factors.append(_draw(self.random))
        if self.fork:
            factors.append([{HORIZON: steps} for steps in self.fork.at])
        for parts in itertools.product(*factors):
            yield {k: v for part in parts for k, v in part.items()}


def load(path: Path) -> Sweep:
    """A sweep file -> Sweep, named after the file. Raises SweepFileError with file, line and nearest name."""
    return from_located(located.read(path), path.stem)


def from_located(src: Located, name: str) -> Sweep:
    if not _NAME.fullmatch(name):
        raise SweepFileError(f"a sweep cannot be called '{name}'", where=src.file, hint="letters, digits, _ and -")
    src.known(src.values, KEYS)
    v = src.values
    grid, together = _axes(src, "grid"), _axes(src, "zip")
    lengths = {k: len(values) for k, values in together.items()}
    if len(set(lengths.values())) > 1:
        raise src.error(f"axes of zip differ in length: {lengths}", "zip", hint="give each the same number of values")
    sweep = Sweep(
        name=name,
        question=_text(src, "question"),
        expect=_text(src, "expect"),
        base=_base(src),
        grid=grid,
        zip=together,
        list=_points(src),
        random=_random(src),
        fork=_fork(src),
        where=_text(src, "where"),
        seeds=_seeds(src),
        resources=tuple(_need(src, i, r) for i, r in enumerate(_sequence(src, "resources"))),
        limits=_limits(src),
        retries=_retries(src),
        source=src,
    )
    if not sweep.question:
        raise src.error("a sweep asks a question, and this one has none", hint="question: what do you want to know?")
    _disjoint(sweep, v)
    return sweep


def label(value: Any) -> str:
    """A short form of an axis value for tables and names: [0.15, 0.2] -> '.15-.2', 0.001 -> '0.001'."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        items = list(cast("tuple[Any]", value))
        return "-".join(f"{v:g}".lstrip("0") or "0" if isinstance(v, (int, float)) else label(v) for v in items)
    return str(value)


def shortest(axis: str, axes: Iterable[str]) -> str:
    """The last part of an axis' name; the whole of it where another axis ends the same."""
    last = axis.rpartition(".")[2]
    return last if sum(a.rpartition(".")[2] == last for a in axes) == 1 else axis


def minutes(text: object) -> int | None:
    """'8h', '1d12h', '90m' -> minutes; None when it is no such time."""
    found = _TIME.fullmatch(str(text).replace(" ", "")) if isinstance(text, str) and text.strip() else None
    if not found:
        return None
    days, hours, mins = (int(g or 0) for g in found.groups())
    return days * 1440 + hours * 60 + mins or None


def _draw(spec: Mapping[str, Any]) -> list[Point]:
    source = random.Random(f"jepa {spec.get('seed', 0)}")

    def one(law: str, values: list[Any]) -> Any:
        if law == "choice":
            return source.choice(values)
        low, high = values
        if law == "int":
            return source.randint(low, high)
        if law == "log":
            return float(f"{math.exp(source.uniform(math.log(low), math.log(high))):.4g}")
        return float(f"{source.uniform(low, high):.4g}")

    axes = cast("dict[str, dict[str, list[Any]]]", spec["axes"])
    return [{axis: one(*next(iter(law.items()))) for axis, law in axes.items()} for _ in range(spec["n"])]


def _text(src: Located, key: str) -> str:
    value = src.values.get(key)
    if value is not None and not isinstance(value, str):
        raise src.error(f"{key} wants text, got {value!r}", key, hint=f'{key}: "..."')
    return " ".join(value.split()) if value else ""


def _sequence(src: Located, key: str) -> list[Any]:
    value = src.values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise src.error(f"{key} wants a list, got {value!r}", key, hint=f"{key}: [{label(value)}]")
    return cast("list[Any]", value)


def _mapping(src: Located, key: str) -> dict[str, Any]:
    value = src.values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise src.error(f"{key} wants a mapping, got {value!r}", key, hint=f"{key}: {{name: value}}")
    return cast("dict[str, Any]", value)


def _base(src: Located) -> tuple[str, ...]:
    items = _sequence(src, "base")
    for i, item in enumerate(items):
        if not isinstance(item, str) or "=" not in item:
            hint = "base: [data=imagenet, optim=paper]"
            raise src.error(f"base wants overrides such as data=imagenet, got {item!r}", "base", i, hint=hint)
    return tuple(items)


def _axis_name(src: Located, name: str, *path: str | int) -> None:
    if name == "seed":
        raise src.error("'seed' is no axis here", *path, hint="seeds: [0, 1, ...]")
    if name == "runtime" or name.startswith("runtime."):
        raise src.error(
            f"'{name}' changes only speed and place, so its points would be one trial",
            *path,
            hint="put it in base, in resources, or in the cluster profile",
        )
    if not _AXIS.fullmatch(name):
        raise src.error(f"'{name}' is no setting's name", *path, hint="for example mask.target_scale")


def _axes(src: Located, key: str) -> dict[str, list[Any]]:
    axes = _mapping(src, key)
    for name, values in axes.items():
        _axis_name(src, name, key, name)
        if not isinstance(values, list) or not values:
            hint = f"{name}: [{label(values)}]" if values else f"{name}: [first, second]"
            raise src.error(f"{key}.{name} wants a list of values, got {values!r}", key, name, hint=hint)
        seen: list[Any] = []
        for i, value in enumerate(cast("list[Any]", values)):
            if value in seen:
                raise src.error(f"{key}.{name} lists {label(value)} twice", key, name, i, hint="keep one of them")
            seen.append(value)
    return axes


def _points(src: Located) -> tuple[Point, ...]:
    points = _sequence(src, "list")
    for i, point in enumerate(points):
        if not isinstance(point, dict):
            raise src.error(f"list wants points such as {{model: vit_s}}, got {point!r}", "list", i)
        for name in cast("dict[str, Any]", point):
            _axis_name(src, name, "list", i, name)
    return tuple(points)


def _random(src: Located) -> dict[str, Any]:
    spec = _mapping(src, "random")
    if not spec:
        return {}
    src.known(spec, ("n", "seed", "axes"), "random")
    n, axes = spec.get("n"), spec.get("axes")
    if type(n) is not int or not 1 <= n <= MOST_POINTS:
        raise src.error(f"random.n wants a number of points, got {n!r}", "random", "n")
    if type(spec.get("seed", 0)) is not int:
        raise src.error(f"random.seed wants an integer, got {spec['seed']!r}", "random", "seed")
    if not isinstance(axes, dict) or not axes:
        raise src.error(f"random.axes wants a mapping, got {axes!r}", "random", "axes")
    for name, law in cast("dict[str, Any]", axes).items():
        at = ("random", "axes", name)
        _axis_name(src, name, *at)
        if not isinstance(law, dict) or len(cast("dict[str, Any]", law)) != 1:
            raise src.error(f"{name} wants one law, got {law!r}", *at, hint=f"one of {', '.join(LAWS)}: [...]")
        kind, values = next(iter(cast("dict[str, Any]", law).items()))
        src.known({kind: 0}, LAWS, *at)
        if not isinstance(values, list) or not values or (kind != "choice" and not _interval(kind, values)):
            raise src.error(f"{name}: {kind} wants {_LAW_WANTS[kind]}, got {values!r}", *at, kind)
    return spec


_LAW_WANTS = {
    "choice": "a list of values",
    "int": "[low, high] of integers",
    "log": "[low, high] of positive numbers",
    "uniform": "[low, high] of numbers",
}


def _interval(kind: str, values: Any) -> bool:
    kinds: Callable[[Any], bool] = lambda v: type(v) is int or (kind != "int" and type(v) is float)  # noqa: E731
    return (
        len(values) == 2
        and all(kinds(v) and math.isfinite(v) for v in values)
        and values[0] <= values[1]
        and (kind != "log" or values[0] > 0)
    )


def _fork(src: Located) -> Fork | None:
    spec = _mapping(src, "fork")
    if not spec:
        return None
    src.known(spec, ("at", "cooldown", "from_zero"), "fork")
    at, cooldown, from_zero = spec.get("at"), spec.get("cooldown", 0.1), spec.get("from_zero", False)
    steps = cast("list[Any]", at) if isinstance(at, list) else []
    if not steps or any(type(s) is not int or s < 2 for s in steps) or sorted(set(steps)) != steps:
        raise src.error(f"fork.at wants horizons in steps, ascending, got {at!r}", "fork", "at", hint="[20000, 40000]")
    if type(cooldown) not in (int, float) or not 0 < cooldown < 1:
        raise src.error(f"fork.cooldown wants a share inside (0, 1), got {cooldown!r}", "fork", "cooldown", hint="0.1")
    if type(from_zero) is not bool:
        raise src.error(f"fork.from_zero wants true or false, got {from_zero!r}", "fork", "from_zero")
    return Fork(tuple(steps), float(cooldown), from_zero)


def _seeds(src: Located) -> tuple[int, ...]:
    value = src.values.get("seeds", [0])
    seeds = cast("list[Any]", value) if isinstance(value, list) else []
    if not seeds or any(type(s) is not int or s < 0 for s in seeds) or len(set(seeds)) != len(seeds):
        hint = f"seeds: {list(range(value))}" if type(value) is int and 0 < value < 33 else "seeds: [0, 1, 2]"
        raise src.error(f"seeds wants a list of different integers from 0 on, got {value!r}", "seeds", hint=hint)
    return tuple(seeds)


def _positive(src: Located, values: Mapping[str, Any], key: str, *path: str | int) -> int | None:
    value = values.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise src.error(f"{key} wants a positive integer, got {value!r}", *path, key)
    return value


def _need(src: Located, i: int, values: Any) -> Need:
    at = ("resources", i)
    if not isinstance(values, dict):
        raise src.error(f"resources wants entries such as {{nodes: 1, time: 8h}}, got {values!r}", *at)
    entry = cast("dict[str, Any]", values)
    src.known(entry, ("when", "nodes", "procs_per_node", "time"), *at)
    when = entry.get("when", "")
    if not isinstance(when, str):
        raise src.error(f"when wants an expression, got {when!r}", *at, "when", hint="when: model == 'vit_l'")
    limit = minutes(entry["time"]) if "time" in entry else None
    if "time" in entry and limit is None:
        said = re.sub(r"\s*(d|h|m)\w*\s*", r"\1", str(entry["time"]))  # '10 minutes' -> '10m'
        hint = f"time: {said if minutes(said) else '8h'}"
        raise src.error(f"time wants 30m, 8h or 1d12h, got {entry['time']!r}", *at, "time", hint=hint)
    return Need(when, _positive(src, entry, "nodes", *at), _positive(src, entry, "procs_per_node", *at), limit)


def _limits(src: Located) -> Limits:
    values = _mapping(src, "limits")
    src.known(values, ("gpu_hours", "gpus_in_flight"), "limits")
    hours = values.get("gpu_hours")
    if hours is not None and (type(hours) not in (int, float) or not 0 < hours < math.inf):
        raise src.error(f"gpu_hours wants a positive number, got {hours!r}", "limits", "gpu_hours")
    return Limits(hours, _positive(src, values, "gpus_in_flight", "limits"))


def _retries(src: Located) -> dict[str, int]:
    values = _mapping(src, "retries")
    src.known(values, RETRIES, "retries")
    for key, value in values.items():
        if type(value) is not int or value < 0:
            raise src.error(f"retries.{key} wants a number of tries, got {value!r}", "retries", key)
    return {**RETRIES, **values}


def _disjoint(sweep: Sweep, values: Mapping[str, Any]) -> None:
    """One axis, one place; and not more points than anyone can mean."""
    places: dict[str, str] = {}
    groups = {
        "grid": list(sweep.grid),
        "zip": list(sweep.zip),
        "list": list(dict.fromkeys(k for p in sweep.list for k in p)),
        "random": list(sweep.random.get("axes", {})),
        "fork": [HORIZON] if sweep.fork else [],
    }
    for place, names in groups.items():
        for name in names:
            if name in places:
                raise sweep.source.error(f"'{name}' is an axis of {places[name]} and of {place}", place)
            places[name] = place
    count = math.prod([len(v) for v in sweep.grid.values()]) * len(sweep.seeds) * sweep.random.get("n", 1)
    count *= len(sweep.fork.at) if sweep.fork else 1
    count *= max(len(sweep.list), 1) * (len(next(iter(sweep.zip.values()))) if sweep.zip else 1)
    if count > MOST_POINTS:
        raise sweep.source.error(f"{count} points are more than {MOST_POINTS}", hint="thin the grid")


def text(sweep: Sweep) -> str:
    """The sweep as YAML that `load` reads back: what a Python caller's sweep leaves in its folder."""
    v: dict[str, Any] = {"question": sweep.question, "expect": sweep.expect, "base": list(sweep.base)}
    v |= {"grid": dict(sweep.grid), "zip": dict(sweep.zip), "list": [dict(p) for p in sweep.list]}
    if sweep.fork:
        v["fork"] = {"at": list(sweep.fork.at), "cooldown": sweep.fork.cooldown, "from_zero": sweep.fork.from_zero}
    v |= {"random": dict(sweep.random), "where": sweep.where or None, "seeds": list(sweep.seeds)}
    v["resources"] = [
        {k: w for k, w in (("when", n.when), ("nodes", n.nodes), ("procs_per_node", n.procs_per_node)) if w}
        | ({"time": f"{n.minutes}m"} if n.minutes else {})
        for n in sweep.resources
    ]
    limits = {"gpu_hours": sweep.limits.gpu_hours, "gpus_in_flight": sweep.limits.gpus_in_flight}
    v |= {"limits": {k: w for k, w in limits.items() if w}, "retries": dict(sweep.retries)}
    return yaml.safe_dump({k: w for k, w in v.items() if w}, sort_keys=False)
