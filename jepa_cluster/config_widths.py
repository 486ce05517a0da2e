"""The widths of a model that `optim.transfer=mup` compares with the base widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Features of a token or of an attention head. null, of a base: the model's own width."""

    encoder: int | None = None
    encoder_head: int | None = None
    predictor: int | None = None
    predictor_head: int | None = None


def growth(own: Widths, base: Widths) -> Mapping[str, float]:
    """Return how many times wider than the base a model is, by the names of `Widths`."""
    return {name: width / (getattr(base, name) or width) for name, width in vars(own).items()}
