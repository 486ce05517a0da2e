"""The sweep file: YAML in, a checked `Sweep` out, and back.

In: a file as in docs/howto/sweeps.md. Out: a `Sweep`. Every unknown key and every value of the
wrong type is a SweepFileError with its line and a hint. Whether the settings themselves exist is
checked by `resolve`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jepa_cluster.errors import SweepFileError
from jepa_cluster.labels import format_value
from jepa_cluster.schema import to_dict
from jepa_cluster.sweep import yaml_source
from jepa_cluster.sweep.points import (
    RETRIES,
    Distribution,
    Fork,
    Limits,
    Point,
    RandomPoints,
    ResourceRequest,
    Sweep,
    Value,
    Values,
)
from jepa_cluster.sweep.time_limit import TIME_FORMS, parse_minutes
from jepa_cluster.sweep.yaml_source import Key, YamlSource

KEYS = (
    "question",
    "expect",
    "cost",  # of the file only: for people
    "found",  # likewise
    "base",
    "grid",
    "zip",
    "list",
    "random",
    "fork",
    "where",
    "seeds",
    "resources",
    "limits",
    "retries",
)
DISTRIBUTIONS: Mapping[Distribution, str] = {  # -> what its values are
    "uniform": "[low, high] of numbers",
    "log": "[low, high] of positive numbers",
    "int": "[low, high] of integers",
    "choice": "a list of values",
}
MAX_POINTS = 100_000

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_AXIS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load(path: Path) -> Sweep:
    """Read a sweep file. The sweep is named after the file. Raises SweepFileError."""
    return from_source(yaml_source.read(path), path.stem)


def from_source(src: YamlSource, name: str) -> Sweep:
    """Check the values of a sweep file. Raises SweepFileError with file, line and hint."""
    if not _NAME.fullmatch(name):
        what = f"a sweep cannot be called '{name}'"
        raise SweepFileError(what, where=src.file, hint="letters, digits, _ and -")
    src.reject_unknown_keys(src.values, KEYS)
    sweep = Sweep(
        name=name,
        question=_text(src, "question"),
        expect=_text(src, "expect"),
        base=_base(src),
        grid=_axes(src, "grid"),
        zip=_zip(src),
        list=_listed_points(src),
        random=_random(src),
        fork=_fork(src),
        where=_text(src, "where"),
        seeds=_seeds(src),
        resources=_resources(src),
        limits=_limits(src),
        retries=_retries(src),
        source=src,
    )
    if not sweep.question:
        what = "a sweep asks a question, and this one has none"
        raise src.error(what, hint="question: what do you want to know?")
    _check_axes_are_distinct(sweep)
    _check_size(sweep)
    return sweep


def to_yaml(sweep: Sweep) -> str:
    """Write a sweep as YAML that `load` reads back."""
    values = {key: to_dict(getattr(sweep, key, None)) for key in KEYS}
    values["limits"] = _without_empty(values["limits"])
    for i, request in enumerate(values["resources"]):
        minutes = request.pop("minutes")
        request["time"] = f"{minutes}m" if minutes else ""
        values["resources"][i] = _without_empty(request)
    return yaml.safe_dump(_without_empty(values), sort_keys=False)


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


# ---- values of one type


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _text(src: YamlSource, key: str) -> str:
    value = src.values.get(key)
    if value is not None and not isinstance(value, str):
        raise src.error(f"{key} wants text, got {value!r}", key, hint=f'{key}: "..."')
    return " ".join((value or "").split())


def _list(src: YamlSource, key: str) -> Values:
    value = src.values.get(key)
    if value is not None and not isinstance(value, list):
        raise src.error(f"{key} wants a list, got {value!r}", key, hint=f"{key}: [{value}]")
    return value or []


def _mapping(src: YamlSource, key: str, known: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping below `key`, {} when it is absent. known: its keys, if they are fixed."""
    value = src.values.get(key)
    if value is not None and not isinstance(value, dict):
        hint = f"{key}: {{name: value}}"
        raise src.error(f"{key} wants a mapping, got {value!r}", key, hint=hint)
    if value and known:
        src.reject_unknown_keys(value, known, key)
    return value or {}


def _positive(src: YamlSource, values: Mapping[str, Any], key: str, *path: Key) -> int | None:
    """Return the positive integer below `key`, None when it is absent. path: of `values`."""
    value = values.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise src.error(f"{key} wants a positive integer, got {value!r}", *path, key)
    return value


# ---- base and axes


def _base(src: YamlSource) -> tuple[str, ...]:
    overrides = _list(src, "base")
    for i, text in enumerate(overrides):
        if not isinstance(text, str) or "=" not in text:
            what = f"base wants overrides such as data=imagenet, got {text!r}"
            raise src.error(what, "base", i, hint="base: [data=imagenet, optim=paper]")
    return tuple(overrides)


def _check_axis_name(src: YamlSource, name: str, *path: Key) -> None:
    if name == "seed":
        raise src.error("'seed' is no axis here", *path, hint="seeds: [0, 1, ...]")
    if name.split(".")[0] == "runtime":
        what = f"'{name}' changes only speed and placement, so its points would be one trial"
        hint = "put it in base, in resources, or in the cluster profile"
        raise src.error(what, *path, hint=hint)
    if not _AXIS.fullmatch(name):
        what = f"'{name}' is not the name of a setting"
        raise src.error(what, *path, hint="for example mask.target_scale")


def _axes(src: YamlSource, key: str) -> dict[str, Values]:
    axes = _mapping(src, key)
    for name, values in axes.items():
        _check_axis_name(src, name, key, name)
        if not isinstance(values, list) or not values:
            what = f"{key}.{name} wants a list of values, got {values!r}"
            raise src.error(what, key, name, hint=f"{name}: [{values or 'first, second'}]")
        for i, value in enumerate(values):
            if value in values[:i]:
                what = f"{key}.{name} lists {format_value(value)} twice"
                raise src.error(what, key, name, i, hint="keep one of them")
    return axes


def _zip(src: YamlSource) -> dict[str, Values]:
    axes = _axes(src, "zip")
    lengths = {name: len(values) for name, values in axes.items()}
    if len(set(lengths.values())) > 1:
        what = f"axes of zip differ in length: {lengths}"
        raise src.error(what, "zip", hint="give each the same number of values")
    return axes


def _listed_points(src: YamlSource) -> tuple[Point, ...]:
    points = _list(src, "list")
    for i, point in enumerate(points):
        if not isinstance(point, dict):
            what = f"list wants points such as {{model: vit_s}}, got {point!r}"
            raise src.error(what, "list", i)
        for name in point:
            _check_axis_name(src, name, "list", i, name)
    return tuple(points)


def _random(src: YamlSource) -> RandomPoints | None:
    values = _mapping(src, "random", ("n", "seed", "axes"))
    if not values:
        return None
    n = values.get("n")
    seed = values.get("seed", 0)
    axes = values.get("axes")
    if type(n) is not int or not 1 <= n <= MAX_POINTS:
        raise src.error(f"random.n wants a number of points, got {n!r}", "random", "n")
    if type(seed) is not int:
        raise src.error(f"random.seed wants an integer, got {seed!r}", "random", "seed")
    if not isinstance(axes, dict) or not axes:
        raise src.error(f"random.axes wants a mapping, got {axes!r}", "random", "axes")
    for name, spec in axes.items():
        _check_distribution(src, name, spec)
    return RandomPoints(n, axes, seed)


def _check_distribution(
    src: YamlSource,
    name: str,
    spec: Value,
) -> None:
    """Reject what is not {distribution: values}."""
    path = ("random", "axes", name)
    _check_axis_name(src, name, *path)
    if not isinstance(spec, dict) or len(spec) != 1:
        what = f"{name} wants one distribution, got {spec!r}"
        raise src.error(what, *path, hint=f"one of {', '.join(DISTRIBUTIONS)}: [...]")
    src.reject_unknown_keys(spec, DISTRIBUTIONS, *path)
    ((distribution, values),) = spec.items()
    if not _belongs_to(distribution, values):
        what = f"{name}: {distribution} wants {DISTRIBUTIONS[distribution]}, got {values!r}"
        raise src.error(what, *path, distribution)


def _belongs_to(distribution: Distribution, values: Value) -> bool:
    """Return whether the values are what DISTRIBUTIONS says."""
    if not isinstance(values, list) or not values:
        return False
    if distribution == "choice":
        return True
    numbers = {int} if distribution == "int" else {int, float}
    if len(values) != 2 or not set(map(type, values)) <= numbers:
        return False
    low, high = values
    if distribution == "log" and low <= 0:
        return False
    return -math.inf < low <= high < math.inf


def _fork(src: YamlSource) -> Fork | None:
    values = _mapping(src, "fork", ("at", "cooldown", "from_zero"))
    if not values:
        return None
    at = values.get("at", [])
    cooldown = values.get("cooldown", 0.1)
    from_zero = values.get("from_zero", False)
    if not _are_integers(at, least=2) or sorted(at) != at:
        what = f"fork.at wants horizons in steps, ascending, got {at!r}"
        raise src.error(what, "fork", "at", hint="[20000, 40000]")
    if not _is_number(cooldown) or not 0 < cooldown < 1:
        what = f"fork.cooldown wants a fraction inside (0, 1), got {cooldown!r}"
        raise src.error(what, "fork", "cooldown", hint="0.1")
    if type(from_zero) is not bool:
        what = f"fork.from_zero wants true or false, got {from_zero!r}"
        raise src.error(what, "fork", "from_zero")
    return Fork(tuple(at), float(cooldown), from_zero)


def _are_integers(value: Value, least: int) -> bool:
    """Return whether the value is a list of different integers from `least` on."""
    if not isinstance(value, list) or set(map(type, value)) != {int}:
        return False
    return min(value) >= least and len(set(value)) == len(value)


# ---- seeds, resources, limits, retries


def _seeds(src: YamlSource) -> tuple[int, ...]:
    value = src.values.get("seeds", [0])
    if not _are_integers(value, least=0):
        count = value if type(value) is int and 0 < value < 33 else 3
        what = f"seeds wants a list of different integers from 0 on, got {value!r}"
        raise src.error(what, "seeds", hint=f"seeds: {list(range(count))}")
    return tuple(value)


def _resources(src: YamlSource) -> tuple[ResourceRequest, ...]:
    requests: list[ResourceRequest] = []
    for i, entry in enumerate(_list(src, "resources")):
        requests.append(_request(src, i, entry))
    return tuple(requests)


def _request(
    src: YamlSource,
    i: int,
    entry: Value,
) -> ResourceRequest:
    path = ("resources", i)
    if not isinstance(entry, dict):
        what = f"resources wants entries such as {{nodes: 1, time: 8h}}, got {entry!r}"
        raise src.error(what, *path)
    src.reject_unknown_keys(entry, ("when", "nodes", "procs_per_node", "time"), *path)
    when = entry.get("when", "")
    if not isinstance(when, str):
        what = f"when wants an expression, got {when!r}"
        raise src.error(what, *path, "when", hint="when: model == 'vit_l'")
    return ResourceRequest(
        when=when,
        nodes=_positive(src, entry, "nodes", *path),
        procs_per_node=_positive(src, entry, "procs_per_node", *path),
        minutes=_minutes(src, entry, *path),
    )


def _minutes(src: YamlSource, entry: Mapping[str, Value], *path: Key) -> int | None:
    if "time" not in entry:
        return None
    value = entry["time"]
    minutes = parse_minutes(value)
    if minutes is None:
        short = re.sub(r"\s*(d|h|m)\w*\s*", r"\1", str(value))  # '10 minutes' -> '10m'
        example = short if parse_minutes(short) else "8h"
        what = f"time wants {TIME_FORMS}, got {value!r}"
        raise src.error(what, *path, "time", hint=f"time: {example}")
    return minutes


def _limits(src: YamlSource) -> Limits:
    values = _mapping(src, "limits", ("gpu_hours", "gpus_in_flight"))
    hours = values.get("gpu_hours")
    valid = hours is None or (_is_number(hours) and 0 < hours < math.inf)
    if not valid:
        raise src.error(f"gpu_hours wants a positive number, got {hours!r}", "limits", "gpu_hours")
    return Limits(hours, _positive(src, values, "gpus_in_flight", "limits"))


def _retries(src: YamlSource) -> dict[str, int]:
    values = _mapping(src, "retries", RETRIES)
    for key, value in values.items():
        if type(value) is not int or value < 0:
            what = f"retries.{key} wants a number of retries, got {value!r}"
            raise src.error(what, "retries", key)
    return {**RETRIES, **values}


# ---- the sweep as a whole


def _check_axes_are_distinct(sweep: Sweep) -> None:
    owner: dict[str, str] = {}
    for key, axes in sweep.axes_by_key().items():
        for axis in axes:
            if axis in owner:
                what = f"'{axis}' is an axis of {owner[axis]} and of {key}"
                raise sweep.source.error(what, key)
            owner[axis] = key


def _check_size(sweep: Sweep) -> None:
    count = len(sweep.seeds)
    count *= math.prod(map(len, sweep.grid.values()))
    count *= max(map(len, sweep.zip.values()), default=1)
    count *= len(sweep.list) or 1
    if sweep.random:
        count *= sweep.random.n
    if sweep.fork:
        count *= len(sweep.fork.at)
    if count > MAX_POINTS:
        raise sweep.source.error(f"{count} points are more than {MAX_POINTS}", hint="thin the grid")
