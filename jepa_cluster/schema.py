"""Dataclasses from mappings and back, strictly typed.

In: mappings from YAML, JSON or Hydra, and a frozen dataclass. Out: the dataclass, or a ConfigError
with the setting, its value and a hint. It knows no setting by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from jepa_cluster.errors import ConfigError, suggest

ConfigDict = dict[str, Any]  # sections, settings and values as plain dicts and lists
T = TypeVar("T")

_TYPE_NAMES: Mapping[Any, str] = {
    float: "a number",
    int: "an integer",
    str: "text",
    bool: "true or false",
    Mapping: "a mapping",
}
_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
_fields: Callable[[Any], tuple[dataclasses.Field[Any], ...]] = functools.cache(dataclasses.fields)


def to_dict(value: Any) -> Any:
    """Turn dataclasses and tuples into plain dicts and lists, as JSON has them."""
    return json.loads(json.dumps(value, default=vars))


def settings_of(section: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of each setting, such as 'model.width', and its value in JSON."""
    for name, value in to_dict(section).items():
        if isinstance(value, dict):
            for inner, leaf in settings_of(value):
                yield f"{name}.{inner}", leaf
        else:
            yield name, value


def non_defaults(section: Any) -> ConfigDict:
    """Return the settings of a dataclass that differ from their defaults.

    A setting without a default is always there. A section of which nothing is left is left out.
    """
    found: ConfigDict = {}
    for field in _fields(type(section)):
        value = getattr(section, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value == default:
            continue
        if not dataclasses.is_dataclass(value):
            found[field.name] = value
        elif inner := non_defaults(value):
            found[field.name] = inner
    return found


def setting_names(cls: type[Any], key: str = "") -> list[str]:
    """Return the dotted names of all settings of a section."""
    names: list[str] = []
    for name, hint in _type_hints(cls).items():
        dotted = f"{key}.{name}".lstrip(".")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            names += setting_names(hint, dotted)
        else:
            names.append(dotted)
    return names


def build_dataclass(cls: type[T], values: object, key: str) -> T:
    """Build `cls` from a mapping: no unknown key, no missing key, no cast except from int to float.

    values: the mapping, or an instance of `cls`. key: dotted name of the section, for errors.
    Raises ConfigError.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key or cls.__name__} wants a mapping, got {values!r}")
    hints = _type_hints(cls)
    for name in values:
        if name not in hints:
            dotted = f"{key}.{name}".lstrip(".")
            raise ConfigError(f"unknown setting '{dotted}'", hint=suggest(str(name), hints))
    converted: ConfigDict = {}
    for field in _fields(cls):
        dotted = f"{key}.{field.name}".lstrip(".")
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            converted[field.name] = _convert(value, hint, dotted)
        elif field.default is field.default_factory:  # both are MISSING
            raise ConfigError(f"'{dotted}' is missing", hint=f"set {dotted}=...")
    return cls(**converted)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return the value of one setting as the type of its field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, key)  # pyright: ignore[reportArgumentType]
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, args[0], key)
    if origin is Literal:
        if value in args:
            return value
        names = list(map(str, args))
        what = f"{key} wants one of {', '.join(names)}, got {value!r}"
        raise ConfigError(what, hint=suggest(str(value), names))
    if origin is tuple:
        return _convert_tuple(value, args, key)
    if origin is Mapping and isinstance(value, Mapping):
        return to_dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint and not (hint is float and math.isnan(value)):
        return value
    raise _wrong_type(_TYPE_NAMES[origin or hint], value, key)


def _convert_tuple(value: Any, hints: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    any_length = hints[-1] is Ellipsis
    wanted = "a list" if any_length else f"{len(hints)} values"
    if key.endswith(("_scale", "_aspect")):
        wanted = "[low, high]"
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(wanted, value, key)
    if any_length:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise _wrong_type(wanted, value, key)
    converted: list[Any] = []
    for i, item in enumerate(value):
        converted.append(_convert(item, hints[i], f"{key}[{i}]"))
    return tuple(converted)


def _wrong_type(wanted: str, value: Any, key: str) -> ConfigError:
    example = wanted if wanted.startswith("[") else f"<{wanted}>"
    return ConfigError(f"{key} wants {wanted}, got {value!r}", hint=f"set {key}={example}")
