"""Maximal update parametrisation (2203.03466): rates and initial scales that follow the widths.

In: the encoder or the predictor, and the recipe. Out: for each parameter the factors of its
learning rate and of its initial deviation against `model.init=fan_in`, and the factor of
attention's queries. All of them are 1 at the base widths and without `optim.transfer=mup`.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from timm.layers import LayerScale, RmsNorm
from torch import nn

from jepa_cluster.config import Recipe
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa.predictor import Predictor
from jepa_cluster.ijepa.vit import Encoder

# matrix: its inputs may grow. input: they never do. vector: one number per feature
Kind = Literal["matrix", "input", "vector"]
KINDS: Mapping[type[nn.Module], Mapping[str, Kind]] = {
    nn.Linear: {"weight": "matrix", "bias": "vector"},
    nn.Conv2d: {"weight": "input", "bias": "vector"},  # embeds patches
    nn.LayerNorm: {"weight": "vector", "bias": "vector"},
    RmsNorm: {"weight": "vector"},
    LayerScale: {"gamma": "vector"},
    Encoder: {"reg_token": "input", "pos_embed": "input"},
    Predictor: {"mask_token": "input", "pos_embed": "input"},
}


class Factors(NamedTuple):
    lr: float = 1.0
    std: float = 1.0


def factors(
    part: nn.Module,
    recipe: Recipe,
) -> dict[nn.Parameter, Factors]:
    """Return the factors of each parameter. Raises ConfigError for one without a kind."""
    encoder, width = recipe.growth["encoder"], recipe.growth["encoder"]
    across: dict[nn.Module, tuple[float, float]] = {}
    if isinstance(part, Predictor):
        width = recipe.growth["predictor"]
        outputs = 1.0 if recipe.objective.target == "pixels" else encoder
        across = {part.embed: (encoder, width), part.proj: (width, outputs)}
    found: dict[nn.Parameter, Factors] = {}
    for name, owner in part.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            kinds = (table.get(leaf) for cls, table in KINDS.items() if isinstance(owner, cls))
            kind = next(kinds, None)
            if kind is None and recipe.optim.transfer == "mup":
                raise ConfigError(f"optim.transfer=mup has no rule for {name}.{leaf}")
            ends = across.get(owner, (width, width))
            found[parameter] = matrix_factors(*ends) if kind == "matrix" else Factors()
    return found


def matrix_factors(
    inputs: float,
    outputs: float,
) -> Factors:
    """Return the factors of a matrix whose inputs and outputs have grown so many times.

    The entries of an AdamW update have one size and add up over the inputs: lr / inputs. If the
    outputs grow less, the initial matrix is as small as its update, because the changes of the
    input lie along its rows and would add up, too.
    """
    return Factors(1 / inputs, min(1.0, outputs / inputs) ** 0.5)


def query_scale(
    recipe: Recipe,
    part: str,
) -> float:
    """Return the factor of a part's queries: 1 / sqrt(growth of a head), beside 1 / sqrt(width).

    Queries and keys become aligned in training, so their products add up over the width of a head.
    """
    head = "predictor_head" if part == "predictor" else "encoder_head"
    return recipe.growth[head] ** -0.5
