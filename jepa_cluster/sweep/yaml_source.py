"""YAML with line numbers: a mapping of plain values, and the line of each of them in the file.

Stricter than YAML: a repeated key is an error, `1e-3` is a number, and only mappings, lists and
plain scalars are accepted. It knows neither sweeps nor clusters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jepa_cluster.errors import ConfigError, SweepFileError, suggest

Key = str | int
KeyPath = tuple[Key, ...]  # from the top of the file

_SCALARS = (  # type, pattern, characters that such a scalar may begin with
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader whose only implicit scalars are null, true, false, decimal integers and floats."""


_Loader.yaml_implicit_resolvers = {}
for _type, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


@dataclass(frozen=True)
class YamlSource:
    """A mapping read from a file.

    lines: 1-based line of each value, by its path of keys from the top.
    """

    file: str
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def location(self, *path: Key) -> str:
        """Return 'sweeps/x.yaml:12' for the nearest enclosing value whose line is known."""
        keys = tuple(path)
        while keys and keys not in self.lines:
            keys = keys[:-1]
        if keys not in self.lines:
            return self.file
        return f"{self.file}:{self.lines[keys]}"

    def error(self, what: str, *path: Key, hint: str = "") -> SweepFileError:
        return SweepFileError(what, where=self.location(*path), hint=hint)

    def location_of(self, key: str) -> str:
        """Return the location of the first value with this key, at any depth, else the file."""
        paths = [path for path in self.lines if path[-1:] == (key,)]
        return self.location(*next(iter(paths), ()))

    @contextlib.contextmanager
    def errors_at(self, key: str, *path: Key) -> Generator[None]:
        """Raise a ConfigError from inside as one of `key`, at the line of `path`."""
        try:
            yield
        except ConfigError as e:
            raise self.error(f"{key}: {e.what}", *path, hint=e.hint) from e

    def reject_unknown_keys(
        self,
        values: Mapping[str, Any],
        known: Iterable[str],
        *path: Key,
    ) -> None:
        """Raise SweepFileError for a key that is not in `known`. path: of `values`."""
        known = list(known)
        for key in values:
            if key not in known:
                inside = f" in '{_dotted(path)}'" if path else ""
                what = f"unknown key '{key}'{inside}"
                raise self.error(what, *path, key, hint=suggest(key, known))


def _dotted(path: KeyPath) -> str:
    """Return 'resources[1].when' for ('resources', 1, 'when')."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def read(path: Path) -> YamlSource:
    """Read a file. Raises SweepFileError when it is missing, is not YAML, or holds no mapping."""
    try:
        text = path.read_text()
    except FileNotFoundError as e:
        beside = [p.stem for p in path.parent.glob("*.yaml")]
        hint = suggest(path.stem, beside) if beside else ""
        what = f"cannot read {path}: no such file"
        raise SweepFileError(what, where=str(path.absolute()), hint=hint) from e
    except (OSError, UnicodeDecodeError) as e:
        raise SweepFileError(f"cannot read {path}: {e}", where=str(path.absolute())) from e
    return parse(text, str(path))


def parse(text: str, file: str) -> YamlSource:
    """Parse YAML. file: its name, for errors. Raises SweepFileError."""
    try:
        builder = _Builder(_Loader(text), file, {})
        node = builder.loader.get_single_node()
        values = builder.build(node, ()) if node is not None else {}
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
    return YamlSource(file, values, builder.lines)


@dataclass
class _Builder:
    """Turns YAML nodes into plain values and records the line of each."""

    loader: _Loader
    file: str
    lines: dict[KeyPath, int]

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        value: object = self.loader.construct_object(node)  # pyright: ignore[reportUnknownMemberType]
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise SweepFileError(f"{node.value!r} is no plain value", where=self._line(node))
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise SweepFileError("a key must be a plain word", where=self._line(key_node))
            key = str(key_node.value)
            if key in values:
                what = f"'{key}' is given twice"
                raise SweepFileError(what, where=self._line(key_node), hint="keep one of them")
            values[key] = self.build(value_node, (*path, key))
            self.lines[(*path, key)] = key_node.start_mark.line + 1
        return values

    def _line(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"
