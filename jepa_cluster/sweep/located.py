"""YAML that remembers its lines: plain values in, and for each of them where it stood in the file.

Strict where YAML is lax: a repeated key is an error, `1e-3` is a number, and nothing but mappings, lists and
plain scalars is accepted. It knows nothing of sweeps or clusters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from jepa_cluster.errors import SweepFileError, suggest

Key = str | int
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INT = re.compile(r"[-+]?\d+")


class _Loader(yaml.SafeLoader):
    """SafeLoader whose only implicit scalars are null, true, false, decimal integers and floats."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT.pattern, list("-+0123456789")),
    ("float", _FLOAT.pattern, list("-+0123456789.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True)
class Located:
    """A mapping read from a file. lines: 1-based line of each value, by its path of keys from the top."""

    file: str
    values: dict[str, Any]
    lines: Mapping[tuple[Key, ...], int]

    def where(self, *path: Key) -> str:
        """'sweeps/x.yaml:12' for the nearest enclosing value whose line is known."""
        keys = tuple(path)
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{self.file}:{self.lines[keys]}" if keys in self.lines else self.file

    def error(self, what: str, *path: Key, hint: str = "") -> SweepFileError:
        return SweepFileError(what, where=self.where(*path), hint=hint)

    def known(self, values: Mapping[str, Any], names: Iterable[str], *path: Key) -> None:
        """Refuse a key that is none of `names`, with the nearest of them."""
        names = list(names)
        for key in values:
            if key not in names:
                inside = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
                inside = f" in '{inside}'" if path else ""
                raise self.error(f"unknown key '{key}'{inside}", *path, key, hint=suggest(key, names))


def read(path: Path) -> Located:
    """Raises SweepFileError for a file that is missing, is no YAML, or holds no mapping."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        what = "no such file" if isinstance(e, FileNotFoundError) else str(e)
        beside = [p.stem for p in path.parent.glob("*.yaml")] if what == "no such file" else []
        hint = suggest(path.stem, beside) if beside else ""
        raise SweepFileError(f"cannot read {path}: {what}", where=str(path.absolute()), hint=hint) from e
    return parse(text, str(path))


def parse(text: str, file: str) -> Located:
    lines: dict[tuple[Key, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = _plain(loader, node, (), lines, file) if node is not None else {}
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise SweepFileError(f"not valid YAML: {e.problem or e.context}", where=where) from e
    except (yaml.YAMLError, ValueError) as e:
        raise SweepFileError(f"not valid YAML: {' '.join(str(e).split())}", where=file) from e
    except RecursionError as e:
        raise SweepFileError("nested too deeply", where=file) from e
    if not isinstance(values, dict):
        raise SweepFileError(f"wants a mapping, got {values!r}", where=f"{file}:1")
    return Located(file, cast("dict[str, Any]", values), lines)


def _plain(
    loader: _Loader, node: yaml.Node, path: tuple[Key, ...], lines: dict[tuple[Key, ...], int], file: str
) -> Any:
    line = node.start_mark.line + 1
    lines[path] = line
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            key = str(cast(Any, key_node).value) if isinstance(key_node, yaml.ScalarNode) else None
            at = f"{file}:{key_node.start_mark.line + 1}"
            if key is None:
                raise SweepFileError("a key must be a plain word", where=at)
            if key in out:
                raise SweepFileError(f"'{key}' is given twice", where=at, hint="keep one of them")
            out[key] = _plain(loader, value_node, (*path, key), lines, file)
            lines[(*path, key)] = key_node.start_mark.line + 1
        return out
    if isinstance(node, yaml.SequenceNode):
        items = cast("list[yaml.Node]", node.value)
        return [_plain(loader, item, (*path, i), lines, file) for i, item in enumerate(items)]
    value: Any = loader.construct_object(node)  # pyright: ignore[reportUnknownMemberType]
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise SweepFileError(f"{cast(Any, node).value!r} is no plain value", where=f"{file}:{line}")
    return value
