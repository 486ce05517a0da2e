"""Expressions over the names of a point: the language of `where` and `when` in a sweep file.

In: text such as "model != 'vit_l' or seed == 0". Out: a function from names to a truth value.
Python evaluates it: comparisons, and/or/not, in, arithmetic with numbers, indexing and literals.
Calls and everything else are rejected. Dotted names (`mask.target_scale[0] < 0.2`) are settings.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.sweep.yaml_source import YamlSource

_ALLOWED = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.expr_context,
    ast.List,
    ast.Subscript,
    ast.BoolOp,
    ast.boolop,
    ast.UnaryOp,
    ast.unaryop,
    ast.Compare,
    ast.Eq,
    ast.NotEq,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.In,
    ast.NotIn,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
)
_NUMBER = "a number"  # no name that a user can write


class _PlainNames(ast.NodeTransformer):
    """Turns `a.b` into one name. Turns a tuple into a list, because values in YAML are lists."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(ast.unparse(node), ast.Load())

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        return self.generic_visit(ast.List(node.elts, ast.Load()))


class _CheckedOperands(ast.NodeTransformer):
    """Lets arithmetic refuse operands that are no numbers: 'x' * 10**9 would take all memory."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        check = ast.Name(_NUMBER, ast.Load())
        left = ast.Call(check, [node.left], [])
        right = ast.Call(check, [node.right], [])
        return ast.BinOp(left, node.op, right)


class _Names(dict[str, Any]):
    """The values of the names. kind: what a name means, for the error of an unknown one."""

    def __init__(self, values: Mapping[str, Any], kind: str) -> None:
        super().__init__(values)
        self.kind = kind

    def __missing__(self, name: str) -> Any:
        if name == _NUMBER:
            return _number
        raise ConfigError(f"no {self.kind} is called '{name}'", hint=suggest(name, self))


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        raise ConfigError(f"arithmetic with {value!r}, which is not a number")
    return value


class Expression:
    """An expression, parsed once and evaluated per point.

    path: where it is written in the file. Both raise SweepFileError with that line.
    """

    def __init__(self, text: str, source: YamlSource, path: str) -> None:
        self.text, self.source, self.path = text, source, path
        with source.errors_at(path):
            self._parse()

    def _parse(self) -> None:
        try:
            tree = _PlainNames().visit(ast.parse(self.text.strip(), mode="eval"))
            for node in ast.walk(tree):
                for part in ast.iter_child_nodes(node):
                    if not isinstance(part, _ALLOWED):
                        word = ast.unparse(part) or ast.unparse(node)  # nothing for an operator
                        what = f"{word!r} is not allowed in {self.text!r}"
                        raise ConfigError(what, hint="compare names and values")
            tree = ast.fix_missing_locations(_CheckedOperands().visit(tree))
            with warnings.catch_warnings(action="ignore"):
                self._code = compile(tree, self.path, "eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            hint = "for example: model != 'vit_l' or seed == 0"
            raise ConfigError(f"not an expression: {self.text!r}", hint=hint) from e

    def __call__(self, values: Mapping[str, Any], kind: str) -> bool:
        """values: of all names. kind: what a name means, for the error of an unknown one."""
        with self.source.errors_at(self.path):
            try:
                return bool(eval(self._code, {"__builtins__": {}}, _Names(values, kind)))
            except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as e:
                raise ConfigError(f"{self.text!r} cannot be evaluated: {e}") from e
