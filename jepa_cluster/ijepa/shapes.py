"""Shapes of tensors in annotations: those of jaxtyping where it is installed.

Only tests check them. Without jaxtyping `Float[Tensor, "B D"]` is `Tensor`.
"""

from __future__ import annotations

from typing import Any

try:
    from jaxtyping import Bool, Float, Int, Int32
except ImportError:

    class _Unchecked:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = Int32 = _Unchecked

__all__ = ["Bool", "Float", "Int", "Int32"]
