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

_SCALARS = {  # type -> pattern
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?\d+",
    "float": r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader whose only implicit scalars are null, true, false, decimal integers and floats."""


_Loader.yaml_implicit_resolvers = {}
for _type, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(rf"(?:{_pattern})\Z"), None
    )


@dataclass(frozen=True)
class YamlSource:
    """A mapping read from a file.

    lines: 1-based line of each value, by its path from the top, such as `resources[1].when`.
    """

    file: str
    values: dict[str, Any]
    lines: Mapping[str, int]

    def location(self, path: str = "") -> str:
        """Return 'sweeps/x.yaml:12' for the nearest enclosing value whose line is known."""
        while path and path not in self.lines:
            end = max(path.rfind("."), path.rfind("["), 0)
            path = path[:end]
        line = self.lines.get(path)
        return f"{self.file}:{line}" if line else self.file

    def error(self, what: str, path: str = "", hint: str = "") -> SweepFileError:
        return SweepFileError(what, where=self.location(path), hint=hint)

    def require(self, valid: object, what: str, path: str = "", hint: str = "") -> None:
        """Raise SweepFileError unless valid."""
        if not valid:
            raise self.error(what, path, hint)

    def location_of(self, key: str) -> str:
        """Return the location of the first value with this key, at any depth, else the file."""
        for path in self.lines:
            if f".{path}".endswith(f".{key}"):
                return self.location(path)
        return self.location()

    @contextlib.contextmanager
    def errors_at(self, path: str) -> Generator[None]:
        """Raise a ConfigError from inside as one of the key and the line of `path`."""
        try:
            yield
        except ConfigError as e:
            key = path.rpartition(".")[2]
            raise self.error(f"{key}: {e.what}", path, e.hint) from e

    def reject_unknown_keys(
        self, values: Mapping[str, Any], known: Iterable[str], path: str = ""
    ) -> None:
        """Raise SweepFileError for a key that is not in `known`. path: of `values`."""
        for key in values:
            if key not in known:
                inside = f" in '{path}'" if path else ""
                what = f"unknown key '{key}'{inside}"
                raise self.error(what, f"{path}.{key}".lstrip("."), suggest(key, known))


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
        values = builder.build(node, "") if node is not None else {}
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
    lines: dict[str, int]

    def build(self, node: yaml.Node, path: str) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, f"{path}[{i}]") for i, item in enumerate(node.value)]
        value: object = self.loader.construct_object(node)  # pyright: ignore[reportUnknownMemberType]
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise SweepFileError(f"{node.value!r} is no plain value", where=self._line(node))
        return value

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise SweepFileError("a key must be a plain word", where=self._line(key_node))
            key = str(key_node.value)
            if key in values:
                what = f"'{key}' is given twice"
                raise SweepFileError(what, where=self._line(key_node), hint="keep one of them")
            inner = f"{path}.{key}".lstrip(".")
            values[key] = self.build(value_node, inner)
            self.lines[inner] = key_node.start_mark.line + 1
        return values

    def _line(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"
