"""A view-invariant method: VICReg (Bardes et al., 2105.04906), for `objective.target=views`.

In: normalised images and the random numbers of the mask mode `views`. Out: two views of each image,
the expander, and the loss of the views' embeddings.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Data
from jepa_cluster.ijepa.flops import EXPANDED
from jepa_cluster.ijepa.losses import Loss
from jepa_cluster.ijepa.masks.views import BITS
from jepa_cluster.ijepa.pixels import grey_levels
from jepa_cluster.ijepa.shapes import Float, Int

WEIGHT = 25.0  # of invariance and variance, as published; that of covariance is 1
SHARE = (0.5, 1.0)  # of the image that a view shows
MIDDLE = 127.5  # grey level
CONTRAST = (0.6, 1.4)  # factor of differences from it
BRIGHTNESS = (-51.0, 51.0)  # grey levels
GAIN = (0.2, 1.8)  # factor of a channel's differences from its mean
SHIFT = (-102.0, 102.0)  # grey levels, of a channel
GREY = 0.2  # probability of a view without colour


class Expander(nn.Module):
    """Takes the place of the predictor. Its norm has the statistics of the batch, and no state."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()  # nothing here is sharded or compiled alone
        self.first = nn.Linear(inputs, EXPANDED)
        self.norm = nn.BatchNorm1d(EXPANDED, track_running_stats=False)
        self.last = nn.Linear(EXPANDED, EXPANDED)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.last(F.relu(self.norm(self.first(x))))


def loss(
    a: Float[Tensor, "B E"],
    b: Float[Tensor, "B E"],
    _: Tensor | None = None,
) -> Loss:
    """Return the loss of the embeddings of two views, and its three terms.

    Variance and covariance are statistics of the batch: the loss is not linear in images.
    """
    x = torch.stack([a, b])
    x = x - x.mean(1, keepdim=True)
    products = x.mT @ x / max(len(a) - 1, 1)
    variances = products.diagonal(dim1=1, dim2=2)
    others = products.square().sum() - variances.square().sum()

    invariance = F.mse_loss(a, b)
    variance = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    covariance = others / EXPANDED
    total = WEIGHT * (invariance + variance) + covariance
    terms = {
        "invariance": invariance.detach(),
        "variance": variance.detach(),
        "covariance": covariance.detach(),
    }
    return total, terms


def make_views(
    images: Float[Tensor, "B 3 S S"],
    draws: Int[Tensor, "B V n"],
    data: Data,
) -> Float[Tensor, "B*V 3 S S"]:
    """Crop, mirror and recolour each image V times, in float32.

    images: normalised. draws: see `Masks.views`.
    """
    mean, std = grey_levels(data.mean, data.std, images.device)
    x = (images.float() * std + mean).repeat_interleave(draws.shape[1], 0)
    numbers = draws.flatten(0, 1)[..., None, None] * 2.0**-BITS
    share, mirror, left, top, contrast, brightness, grey = numbers[:, :7].split(1, 1)
    gain, shift = numbers[:, 7:].split(3, 1)

    side = within(SHARE, share).sqrt()
    flip = 2.0 * (mirror < 0.5) - 1
    zero = torch.zeros_like(side)
    room = 1 - side
    across = torch.cat([side * flip, zero, room * (2 * left - 1)], -1)
    down = torch.cat([zero, side, room * (2 * top - 1)], -1)
    places = F.affine_grid(
        torch.cat([across, down], 2)[:, 0],
        list(x.shape),
        align_corners=False,
    )
    x = F.grid_sample(
        x,
        places,
        padding_mode="border",
        align_corners=False,
    )

    x = (x - MIDDLE) * within(CONTRAST, contrast)
    x = x + MIDDLE + within(BRIGHTNESS, brightness)
    mean_of_channel = x.mean((2, 3), keepdim=True)
    x = (x - mean_of_channel) * within(GAIN, gain)
    x = x + mean_of_channel + within(SHIFT, shift)
    x = torch.where(grey < GREY, x.mean(1, keepdim=True), x)
    return (x.clamp(0, 255) - mean) / std


def within(interval: tuple[float, float], draw: Tensor) -> Tensor:
    low, high = interval
    return low + (high - low) * draw
