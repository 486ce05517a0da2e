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
from typing import Any, TypeVar

import yaml

from jepa_cluster.errors import SweepFileError, suggest
from jepa_cluster.labels import DIRECTIONS, SIZE_AXES, TRENDS, format_value, level_numbers
from jepa_cluster.schema import to_dict
from jepa_cluster.sweep import claims, yaml_source
from jepa_cluster.sweep.points import (
    RETRIES,
    CalibrationUse,
    Fork,
    Limits,
    Point,
    ResourceRequest,
    Sweep,
    Value,
    Values,
)
from jepa_cluster.sweep.time_limit import TIME_FORMS, parse_minutes
from jepa_cluster.sweep.yaml_source import YamlSource

KEYS = (
    "question",
    "expect",
    "expect_best",
    "claims",
    "cost",  # of the file only: for people
    "found",  # likewise
    "base",
    "grid",
    "zip",
    "list",
    "fork",
    "scale_lr",
    "ladder_per",
    "calibration",
    "where",
    "seeds",
    "resources",
    "limits",
    "retries",
)
MAX_POINTS = 100_000
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED = ("next",)
_AXIS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load(path: Path) -> Sweep:
    """Read a sweep file. The sweep is named after the file. Raises SweepFileError."""
    return from_source(yaml_source.read(path), path.stem)


def from_source(src: YamlSource, name: str) -> Sweep:
    """Check the values of a sweep file. Raises SweepFileError with file, line and hint."""
    check_name(name, src.file)
    hint = "write the points under list; plan.json of a submitted sweep has them"
    src.require("random" not in src.values, "points are no longer drawn", "random", hint)
    src.reject_unknown_keys(src.values, KEYS)
    sweep = Sweep(
        name=name,
        question=_text(src, "question"),
        expect=_text(src, "expect"),
        expect_best=_mapping(src, "expect_best"),
        claims=claims.read(src),
        base=_base(src),
        grid=_grid(src),
        zip=_zip(src),
        list=_listed_points(src),
        fork=_fork(src),
        scale_lr=_value(src, "scale_lr", bool, "true or false", "true"),
        ladder_per=tuple(_list(src, "ladder_per")),
        calibration=_calibration(src),
        where=_text(src, "where"),
        seeds=_seeds(src),
        resources=_resources(src),
        limits=_limits(src),
        retries=_retries(src),
        source=src,
    )
    what = "a sweep asks a question, and this one has none"
    src.require(sweep.question, what, hint="question: what do you want to know?")
    _check_axes_are_distinct(sweep)
    _check_expectations(sweep)
    for i, setting in enumerate(sweep.ladder_per):
        what = f"ladder_per names {setting!r}, which is not swept"
        src.require(setting in sweep.axes, what, f"ladder_per[{i}]", ", ".join(sweep.axes))
    _check_size(sweep)
    return sweep


def check_name(name: str, file: str) -> None:
    """Raise SweepFileError where no sweep can have this name."""
    hint = "letters, digits, _ and -"
    if name in RESERVED:
        hint = f"another name: `jepa scaling {name}` is a command"
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise SweepFileError(f"a sweep cannot be called '{name}'", where=file, hint=hint)


def to_yaml(sweep: Sweep) -> str:
    """Write a sweep as YAML that `load` reads back."""
    values = {key: to_dict(getattr(sweep, key, None)) for key in KEYS}
    values["limits"] = _without_empty(values["limits"])
    if values["retries"] == RETRIES:
        values["retries"] = None
    for i, request in enumerate(values["resources"]):
        minutes = request.pop("minutes")
        request["time"] = f"{minutes}m" if minutes else ""
        values["resources"][i] = _without_empty(request)
    return yaml.safe_dump(
        _without_empty(values), sort_keys=False, default_flow_style=None, width=100
    )


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


# ---- values of one type


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _value(
    src: YamlSource,
    key: str,
    kind: type[T],
    wanted: str,
    example: str,
) -> T:
    """Return the value of a key, an empty one when it is absent."""
    value = src.values.get(key)
    if value is None:
        return kind()
    what = f"{key} wants {wanted}, got {value!r}"
    src.require(isinstance(value, kind), what, key, hint=f"{key}: {example}")
    return value


def _text(src: YamlSource, key: str) -> str:
    value = _value(src, key, str, "text", '"..."')
    return " ".join(value.split())


def _list(src: YamlSource, key: str) -> Values:
    return _value(src, key, list, "a list", f"[{src.values.get(key)}]")


def _mapping(src: YamlSource, key: str, known: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping below `key`. known: its keys, if they are fixed."""
    value = _value(src, key, dict, "a mapping", "{name: value}")
    if known:
        src.reject_unknown_keys(value, known, key)
    return value


def _positive(
    src: YamlSource,
    values: Mapping[str, Any],
    key: str,
    path: str,
) -> int | None:
    """Return the positive integer below `key`, None when it is absent. path: of `values`."""
    value = values.get(key)
    valid = value is None or (type(value) is int and value > 0)
    what = f"{key} wants a positive integer, got {value!r}"
    src.require(valid, what, f"{path}.{key}")
    return value


# ---- base and axes


def _base(src: YamlSource) -> tuple[str, ...]:
    overrides = _list(src, "base")
    for i, text in enumerate(overrides):
        what = f"base wants overrides such as data=imagenet, got {text!r}"
        valid = isinstance(text, str) and "=" in text
        src.require(valid, what, f"base[{i}]", hint="base: [data=imagenet, optim=paper]")
    return tuple(overrides)


def _check_axis_name(src: YamlSource, name: str, path: str) -> None:
    """path: of the mapping that has the axis."""
    path = f"{path}.{name}"
    src.require(name != "seed", "'seed' is no axis here", path, hint="seeds: [0, 1, ...]")
    what = f"'{name}' changes only speed and placement, so its points would be one trial"
    hint = "put it in base, in resources, or in the cluster profile"
    src.require(name.split(".")[0] != "runtime", what, path, hint)
    what = f"'{name}' is not the name of a setting"
    src.require(_AXIS.fullmatch(name), what, path, hint="for example mask.target_scale")


def _axes(src: YamlSource, key: str) -> dict[str, Values]:
    axes = _mapping(src, key)
    for name, values in axes.items():
        _check_axis_name(src, name, key)
        path = f"{key}.{name}"
        what = f"{path} wants a list of values, got {values!r}"
        hint = f"{name}: [{values or 'first, second'}]"
        src.require(values and isinstance(values, list), what, path, hint)
    return axes


def _grid(src: YamlSource) -> dict[str, Values]:
    axes = _axes(src, "grid")
    for name, values in axes.items():
        for i, value in enumerate(values):
            path = f"grid.{name}"
            what = f"{path} lists {format_value(value)} twice"
            src.require(value not in values[:i], what, f"{path}[{i}]", hint="keep one of them")
    return axes


def _zip(src: YamlSource) -> dict[str, Values]:
    axes = _axes(src, "zip")
    lengths = {name: len(values) for name, values in axes.items()}
    what = f"axes of zip differ in length: {lengths}"
    hint = "give each the same number of values"
    src.require(len(set(lengths.values())) <= 1, what, "zip", hint)
    return axes


def _listed_points(src: YamlSource) -> tuple[Point, ...]:
    points = _list(src, "list")
    for i, point in enumerate(points):
        path = f"list[{i}]"
        what = f"list wants points such as {{model: vit_s}}, got {point!r}"
        src.require(isinstance(point, dict), what, path)
        for name in point:
            _check_axis_name(src, name, path)
    return tuple(points)


def _fork(src: YamlSource) -> Fork | None:
    values = _mapping(src, "fork", ("at", "cooldown", "from_zero"))
    if not values:
        return None
    at = values.get("at", [])
    cooldown = values.get("cooldown", 0.1)
    from_zero = values.get("from_zero", False)
    what = f"fork.at wants horizons in steps, ascending, got {at!r}"
    valid = _are_integers(at, least=2) and sorted(at) == at
    src.require(valid, what, "fork.at", hint="[20000, 40000]")
    what = f"fork.cooldown wants a fraction inside (0, 1), got {cooldown!r}"
    valid = _is_number(cooldown) and 0 < cooldown < 1
    src.require(valid, what, "fork.cooldown", hint="0.1")
    what = f"fork.from_zero wants true or false, got {from_zero!r}"
    src.require(type(from_zero) is bool, what, "fork.from_zero")
    return Fork(tuple(at), float(cooldown), from_zero)


def _calibration(src: YamlSource) -> CalibrationUse | None:
    values = _mapping(src, "calibration", ("sweep", "other_sizes", "other_data"))
    if not values:
        return None
    sweep = values.get("sweep")
    what = f"calibration.sweep wants the name of a sweep over rates, got {sweep!r}"
    hint = "calibration: {sweep: model_size_lr}"
    src.require(isinstance(sweep, str), what, "calibration.sweep", hint)
    for name, instead in (("other_sizes", "law"), ("other_data", "use")):
        value = values.setdefault(name, "refuse")
        what = f"calibration.{name} wants refuse or {instead}, got {value!r}"
        src.require(value in ("refuse", instead), what, f"calibration.{name}")
    return CalibrationUse(**values)


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
        requests.append(_request(src, entry, f"resources[{i}]"))
    return tuple(requests)


def _request(src: YamlSource, entry: Value, path: str) -> ResourceRequest:
    what = f"resources wants entries such as {{nodes: 1, time: 8h}}, got {entry!r}"
    src.require(isinstance(entry, dict), what, path)
    src.reject_unknown_keys(entry, ("when", "nodes", "procs_per_node", "time"), path)
    when = entry.get("when", "")
    what = f"when wants an expression, got {when!r}"
    src.require(isinstance(when, str), what, f"{path}.when", hint="when: model == 'vit_l'")
    return ResourceRequest(
        when=when,
        nodes=_positive(src, entry, "nodes", path),
        procs_per_node=_positive(src, entry, "procs_per_node", path),
        minutes=_minutes(src, entry, path),
    )


def _minutes(src: YamlSource, entry: Mapping[str, Value], path: str) -> int | None:
    if "time" not in entry:
        return None
    value = entry["time"]
    minutes = parse_minutes(value)
    short = re.sub(r"\s*(d|h|m)\w*\s*", r"\1", str(value))  # '10 minutes' -> '10m'
    example = short if parse_minutes(short) else "8h"
    what = f"time wants {TIME_FORMS}, got {value!r}"
    src.require(minutes, what, f"{path}.time", hint=f"time: {example}")
    return minutes


def _limits(src: YamlSource) -> Limits:
    values = _mapping(src, "limits", ("gpu_hours", "gpus_in_flight"))
    hours = values.get("gpu_hours")
    valid = hours is None or (_is_number(hours) and 0 < hours < math.inf)
    what = f"gpu_hours wants a positive number, got {hours!r}"
    src.require(valid, what, "limits.gpu_hours")
    return Limits(hours, _positive(src, values, "gpus_in_flight", "limits"))


def _retries(src: YamlSource) -> dict[str, int]:
    values = _mapping(src, "retries", RETRIES)
    for key, value in values.items():
        what = f"retries.{key} wants a number of retries, got {value!r}"
        src.require(type(value) is int and value >= 0, what, f"retries.{key}")
    return {**RETRIES, **values}


# ---- the sweep as a whole


def _check_axes_are_distinct(sweep: Sweep) -> None:
    owner: dict[str, str] = {}
    for key, axes in sweep.axes_by_key().items():
        for axis in axes:
            what = f"'{axis}' is an axis of {owner.get(axis)} and of {key}"
            sweep.source.require(axis not in owner, what, key)
            owner[axis] = key


def _check_expectations(sweep: Sweep) -> None:
    """Every expectation is about a swept setting, and names a trend or one of its levels."""
    settings = [axis for axis in sweep.axes if axis not in (*SIZE_AXES, "seed")]
    for axis, wanted in sweep.expect_best.items():
        path = f"expect_best.{axis}"
        what = f"expect_best names '{axis}', which is no swept setting (size and horizon are none)"
        sweep.source.require(axis in settings, what, path, suggest(axis, settings))
        levels = list(dict.fromkeys(map(format_value, sweep.values_of(axis))))
        text = format_value(wanted)
        known = [*TRENDS, *levels]
        what = f"{path} is {text}, which is neither a trend nor a level"
        sweep.source.require(text in known, what, path, ", ".join(known))
        has_order = text not in DIRECTIONS or level_numbers(levels)
        what = f"{path} is {text}, but {', '.join(levels)} have no order"
        hint = ", ".join(["levels that are different numbers", "stays", *levels])
        sweep.source.require(bool(has_order), what, path, hint)


def _check_size(sweep: Sweep) -> None:
    sizes = map(len, sweep.factors())
    count = len(sweep.seeds) * math.prod(sizes)
    what = f"{count} points are more than {MAX_POINTS}"
    sweep.source.require(count <= MAX_POINTS, what, hint="thin the grid")
