"""The losses between predicted and target representation: `objective.loss` is the name of one.

A loss gets the prediction and the target [B, M, T, D] in float32, and the number of valid tokens
[B, M] (None: all T are valid). It returns the scalar to minimise, and named scalars to log, which
become the metrics `loss/NAME`. A loss that is linear in images has the same value for every split
of a batch into micro-batches and ranks.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_cluster.ijepa.shapes import Bool, Float, Int

Tokens = Float[Tensor, "B M T D"]
Lengths = Int[Tensor, "B M"] | None
Loss = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]
LossFn = Callable[[Tensor, Tensor, Tensor | None], Loss]


def smooth_l1(
    prediction: Tokens,
    target: Tokens,
    target_len: Lengths,
) -> Loss:
    """The loss of the reference code: quadratic below an error of 1, linear above."""
    error = F.smooth_l1_loss(prediction, target, reduction="none")
    return mean_over_images(error.mean(-1), target_len), {}


def l2(
    prediction: Tokens,
    target: Tokens,
    target_len: Lengths,
) -> Loss:
    """The mean square error, as the paper writes it."""
    error = F.mse_loss(prediction, target, reduction="none")
    return mean_over_images(error.mean(-1), target_len), {}


def mean_over_images(
    per_token: Float[Tensor, "B M T"],
    target_len: Lengths,
) -> Float[Tensor, ""]:
    """Return the mean over images of the mean over the image's valid tokens."""
    if target_len is None:
        return per_token.mean()
    valid = is_valid(per_token.shape[-1], target_len)
    per_image = (per_token * valid).sum((1, 2)) / target_len.sum(1)
    return per_image.mean()


def is_valid(
    width: int,
    target_len: Int[Tensor, "B M"],
) -> Bool[Tensor, "B M {width}"]:
    """Return which of `width` padded tokens are valid."""
    position = torch.arange(width, device=target_len.device)
    return position < target_len[..., None]
