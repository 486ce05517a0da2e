"""Expressions over the names of a point: the language of `where` and `when` in a sweep file.

In: text such as "model != 'vit_l' or seed == 0". Out: a function from names to a truth value. It
evaluates Python's syntax tree: comparisons, and/or/not, in, arithmetic, indexing and literals.
Calls and everything else are rejected. Dotted names (`mask.target_scale[0] < 0.2`) are settings.
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
    """An expression, parsed once and evaluated per point. Both raise ConfigError."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            hint = "for example: model != 'vit_l' or seed == 0"
            raise ConfigError(f"not an expression: {text!r}", hint=hint) from e

    def __call__(self, lookup: Lookup) -> bool:
        try:
            return bool(self._value(self._tree, lookup))
        except (TypeError, IndexError, ArithmeticError, RecursionError, MemoryError) as e:
            raise ConfigError(f"{self.text!r} cannot be evaluated: {e}") from e

    def _value(self, node: ast.AST, lookup: Lookup) -> Any:
        def value(inner: ast.AST) -> Any:
            return self._value(inner, lookup)

        match node:
            case ast.Constant(value=None | str() | int() | float()):
                return node.value
            case ast.Name() | ast.Attribute():
                return lookup(self._dotted(node))
            case ast.List() | ast.Tuple():
                return list(map(value, node.elts))
            case ast.Subscript():
                return value(node.value)[value(node.slice)]
            case ast.BoolOp(op=ast.And()):
                return all(map(value, node.values))
            case ast.BoolOp():
                return any(map(value, node.values))
            case ast.UnaryOp(op=ast.Not()):
                return not value(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp() if type(node.op) in _BINARY:
                left = value(node.left)
                right = value(node.right)
                return self._arithmetic(type(node.op), left, right)
            case ast.Compare() if set(map(type, node.ops)) <= _BINARY.keys():
                return self._compare(node, value)
            case _:
                what = f"{ast.unparse(node)!r} is not allowed in {self.text!r}"
                raise ConfigError(what, hint="compare names and values")

    def _compare(self, node: ast.Compare, value: Callable[[ast.AST], Any]) -> bool:
        left = value(node.left)
        rights = list(map(value, node.comparators))
        for op, right in zip(node.ops, rights, strict=True):
            holds = _BINARY[type(op)]
            if not holds(left, right):
                return False
            left = right
        return True

    def _arithmetic(self, op: type[ast.AST], a: Any, b: Any) -> Any:
        for value in (a, b):
            if not isinstance(value, (int, float)):  # 'x' * 10**9
                what = f"{self.text!r} computes with {value!r}, which is not a number"
                raise ConfigError(what)
        return _BINARY[op](a, b)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            return node.id
        raise ConfigError(f"{ast.unparse(node)!r} is not a name", hint=f"in {self.text!r}")
