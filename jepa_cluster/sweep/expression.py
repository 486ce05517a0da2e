"""A small safe expression over the names of a point: what `where` and `when` in a sweep file may say.

In: text such as "model != 'vit_l' or seed == 0". Out: a function from names to a truth value. It walks Python's
syntax tree and knows comparisons, and/or/not, in, arithmetic, indexing and literals; calls, attributes of
objects and everything else are refused. Dotted names (`mask.target_scale[0] < 0.2`) are settings.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from jepa_cluster.errors import ConfigError

Lookup = Callable[[str], Any]  # a dotted name -> its value; raises ConfigError for an unknown one

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Expression:
    """Parsed once, evaluated a point. Raises ConfigError for what it does not know, at either time."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise ConfigError(f"not an expression: {text!r}", hint="for example: model != 'vit_l' or seed == 0") from e

    def __call__(self, lookup: Lookup) -> bool:
        try:
            return bool(self._value(self._tree, lookup))
        except (TypeError, IndexError, ArithmeticError, RecursionError, MemoryError) as e:
            raise ConfigError(f"{self.text!r} cannot be evaluated: {e}") from e

    def _value(self, node: ast.AST, lookup: Lookup) -> Any:
        match node:
            case ast.Constant(value=value) if value is None or isinstance(value, (str, int, float)):
                return value
            case ast.Name() | ast.Attribute():
                return lookup(self._dotted(node))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(i, lookup) for i in items]
            case ast.Subscript(value=value, slice=index):
                return self._value(value, lookup)[self._value(index, lookup)]
            case ast.BoolOp(op=op, values=values):
                return (all if isinstance(op, ast.And) else any)(self._value(v, lookup) for v in values)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand, lookup)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand, lookup)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self._arithmetic(type(op), self._value(left, lookup), self._value(right, lookup))
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(o) in _BINARY for o in ops):
                values = [self._value(n, lookup) for n in (left, *rights)]
                return all(_BINARY[type(o)](a, b) for o, a, b in zip(ops, values, values[1:], strict=False))
            case _:
                raise ConfigError(
                    f"{ast.unparse(node)!r} is not allowed in {self.text!r}", hint="compare names and values"
                )

    def _arithmetic(self, op: type[ast.AST], a: Any, b: Any) -> Any:
        if not all(isinstance(v, (int, float)) for v in (a, b)):  # no 'x' * 10**9
            raise ConfigError(f"{self.text!r} computes with {a!r} and {b!r}, which are not both numbers")
        return _BINARY[op](a, b)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            return node.id
        raise ConfigError(f"{ast.unparse(node)!r} is not a name", hint=f"in {self.text!r}")
