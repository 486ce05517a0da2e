"""The objective: predict the targets, as `objective.target` represents them, from the context.

In: normalised images and the masks of a batch. Out: the loss, and named scalars to log.
Nothing is known here of disks, processes, optimisers or data sets. The caller that updates the
weights also calls `update_target`.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import losses, mup, vicreg
from jepa_cluster.ijepa.masks import Masks
from jepa_cluster.ijepa.predictor import Predictor
from jepa_cluster.ijepa.shapes import Bool, Float
from jepa_cluster.ijepa.vit import Attention, Encoder, gather_rows, patchify, sincos_2d


class IJepa(nn.Module):
    """Context encoder `encoder`, `predictor`, and target encoder `target` (no gradient).

    With `objective.target=views` the predictor is an `Expander`. of_all_ranks: joins rows of this
    rank with those of the others.

    Built without values, on any device, `meta` included; `init_weights` fills it. The blocks to
    shard or compile are `encoder.blocks`, `predictor.blocks` and `target.blocks`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe.model)
        self.loss_fn: losses.LossFn = getattr(losses, recipe.objective.loss)
        if recipe.objective.target == "views":
            self.predictor = vicreg.Expander(recipe.model.width)
            self.loss_fn = vicreg.loss
        else:
            self.predictor = Predictor(recipe.model, recipe.predictor, recipe.target_width)
        self.of_all_ranks: Callable[[Tensor], Tensor] = lambda own: own
        self.target = Encoder(recipe.model).requires_grad_(False)
        for name, part in self.named_children():
            for module in part.modules():
                if isinstance(module, Attention):
                    module.query_scale = mup.query_scale(recipe, name)

    def forward(
        self,
        images: Float[Tensor, "B 3 S S"],
        masks: Masks,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss, and named values to log. masks: on the same device.

        The loss is one of losses.py. Scalars [] are averaged over micro-batches and ranks as the
        loss is. `channel_moments` are summed over both and logged as a standard deviation.

        loss/NAME: what the loss returned to log.
        target_std: of the target patches, or of the embeddings of views; 0 is a collapse.
        """
        precision = contextlib.nullcontext()
        if self.recipe.optim.precision == "autocast":
            precision = torch.autocast(images.device.type, torch.bfloat16)
        with precision:
            if masks.views is None:
                patches = patchify(images, self.recipe.model.patch)
                target, moments = self.encode_targets(patches, masks)
                x = self.encoder(patches, masks.context, masks.context_len)
                prediction = self.predictor(
                    x, masks.context, masks.targets, masks.context_len, masks.target_len
                )
            else:
                with torch.autocast(images.device.type, enabled=False):
                    views = vicreg.make_views(images, masks.views, self.recipe.data)
                x = features(self.encoder, views.to(images.dtype))
                x = self.of_all_ranks(x.unflatten(0, (-1, 2)))
                x = self.predictor(x.flatten(0, 1)).float()
                moments = x.std(0).mean()
                prediction, target = x.unflatten(0, (-1, 2)).unbind(1)
        loss, scalars = self.loss_fn(prediction.float(), target, masks.target_len)
        aux = {f"loss/{name}": value for name, value in scalars.items()}
        return loss, {**aux, "target_std": moments}

    @torch.no_grad()
    def encode_targets(
        self,
        patches: Float[Tensor, "B N P"],
        masks: Masks,
    ) -> tuple[Float[Tensor, "B M T D"], Tensor]:
        """Return what is predicted of the targets, normalised, and the moments before that.

        The last block of the target encoder is computed for the targets only.
        """
        if self.recipe.objective.target == "pixels":
            x = gather_rows(patches, masks.union).float()
        else:
            x = self.target(patches, rows=masks.union).float()
        slots = masks.slots
        last_valid = slots.amax((1, 2))
        valid = torch.arange(x.shape[1], device=x.device) <= last_valid[:, None]
        moments = channel_moments(x, valid)
        x = F.layer_norm(x, (x.shape[-1],))
        return gather_rows(x, slots.flatten(1)).unflatten(1, slots.shape[1:]), moments


def channel_moments(
    x: Float[Tensor, "B N D"],
    valid: Bool[Tensor, "B N"],
) -> Tensor:
    """Return [1 + 2 D] in float64: the number of valid rows, their sums and sums of squares.

    Those of a batch are the sum of those of its parts, so a standard deviation that is made of them
    does not depend on micro-batches and ranks.
    """
    x = x * valid[..., None]
    count = valid.sum(dtype=torch.float64)
    sums = x.sum((0, 1), dtype=torch.float64)
    squares = x.square().sum((0, 1), dtype=torch.float64)
    return torch.cat([count[None], sums, squares])


def features(encoder: Encoder, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
    """Return the features that probes read: the mean of the output patches."""
    return encoder(images).mean(1)


def mean_std_max(patches: Float[Tensor, "B N D"]) -> Float[Tensor, "B 3*D"]:
    """Return features that keep more than the mean: also the deviation and the maximum."""
    return torch.cat([patches.mean(1), patches.std(1), patches.amax(1)], 1)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def update_target(
    model: IJepa,
    momentum: float,
) -> None:
    """target <- momentum * target + (1 - momentum) * encoder, in place; a frozen one stays.

    Each rank updates its own rows of sharded parameters.
    """
    if model.recipe.objective.target == "frozen":
        return
    target = [local_part(p) for p in model.target.parameters()]
    encoder = [local_part(p) for p in model.encoder.parameters()]
    torch._foreach_lerp_(target, encoder, 1.0 - momentum)


@torch.no_grad()
def init_weights(
    model: IJepa,
    recipe: Recipe,
) -> None:
    """Fill a materialised, unsharded CPU model from recipe.seed; the target encoder is a copy.

    Each parameter has its own generator, keyed by (seed, its name), so its values do not depend on
    which other parameters exist. `reference`: every weight is N(0, 0.02), as the reference code
    leaves it. `depth_rescaled`: the two projections that write to the residual stream of block i
    are then divided by sqrt(2 i), as the reference code intends. `fan_in`: the matrices of blocks
    and predictor are N(0, 1 / inputs), which keeps a narrow model from being almost linear; some of
    them are smaller with `optim.transfer=mup`. An expander has a third of that variance, as torch
    initialises it.
    """
    init_part(model.encoder, recipe, "encoder.", recipe.model.width)
    init_part(model.predictor, recipe, "", recipe.predictor.width)
    parameters = zip(model.target.parameters(), model.encoder.parameters(), strict=True)
    for target, encoder in parameters:
        target.copy_(encoder)


def init_part(
    part: Encoder | Predictor | vicreg.Expander,
    recipe: Recipe,
    prefix: str,
    width: int,
) -> None:
    """Fill a part of the model. prefix: of the names that key the generators.

    Biases are 0, scales of norms 1, layer scale its own constant, everything else is normal.
    """
    factors = mup.factors(part, recipe)
    for name, parameter in part.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gamma":
            parameter.fill_(cast("float", part.get_submodule(owner).init_values))
        elif leaf == "bias":
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            generator = generator_of(recipe.seed, prefix + name)
            std = 0.02
            if recipe.model.init == "fan_in" and parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5 * factors[parameter].std
            if isinstance(part, vicreg.Expander):
                std = (3 * parameter.shape[1]) ** -0.5
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
    if isinstance(part, vicreg.Expander):
        return
    part.pos_embed.copy_(sincos_2d(width, recipe.model.grid))
    if recipe.model.init == "depth_rescaled":
        for i, block in enumerate(part.blocks, 1):
            block.get_parameter("attn.proj.weight").div_(math.sqrt(2 * i))
            block.get_parameter("mlp.fc2.weight").div_(math.sqrt(2 * i))


def generator_of(
    seed: int,
    name: str,
) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
