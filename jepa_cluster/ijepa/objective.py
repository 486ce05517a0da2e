"""The objective: context in, prediction against the slow target encoder out.

In: normalised images and the masks of a batch. Out: the loss and what a person wants to watch. Nothing is known
here of disks, processes, optimisers or data sets; `update_target` is called by whoever takes the step.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa.flops import Savings
from jepa_cluster.ijepa.masks import Masks
from jepa_cluster.ijepa.predictor import Predictor
from jepa_cluster.ijepa.ragged import Varlen, flash
from jepa_cluster.ijepa.vit import Encoder, cut, select, sincos


class IJepa(nn.Module):
    """`encoder` sees the context, `predictor` imagines the targets, `target` (no gradient) says what they are.

    Built without values, on any device, `meta` included; `init_weights` fills it. The blocks to shard or compile are
    `encoder.blocks`, `predictor.blocks` and `target.blocks`.
    """

    def __init__(self, recipe: Recipe, savings: Savings | None = None, varlen: Varlen = flash) -> None:
        """varlen: attention for sequences of different length; where the default cannot run, a key mask does it."""
        super().__init__()
        self.recipe, self.savings = recipe, savings or Savings()
        self.encoder = Encoder(recipe.model, self.savings.gather, varlen if self.savings.varlen else None)
        self.predictor = Predictor(recipe, self.savings, varlen)
        self.target = Encoder(recipe.model).requires_grad_(False)
        self.distance = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[recipe.optim.loss]

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, dict[str, Tensor]]:
        """images float [B, 3, S, S], masks as tensors on the same device -> loss [], {"target_std": []}.

        The loss is the mean over images of the mean over that image's real target patches and channels: linear in
        images, so equal micro-batches and ranks average to the loss of the whole batch.
        """
        patches = cut(images, self.recipe.model.patch)
        with torch.no_grad():
            goal, deviation = self.goal(patches, masks)
        x = self.encoder(patches, masks.context, masks.context_len)
        guess = self.predictor(x, *masks[:2], masks.context_len, masks.target_len)
        each = self.distance(guess.float(), goal, reduction="none").mean(-1)  # [B, M, T]
        if masks.target_len is None:
            loss = each.mean()
        else:
            real = torch.arange(each.shape[-1], device=each.device) < masks.target_len[..., None]
            loss = ((each * real).sum((1, 2)) / masks.target_len.sum(1)).mean()
        return loss, {"target_std": deviation}

    def goal(self, patches: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """What the predictor should say [B, M, T, D], and the mean over channels of the std over target patches []."""
        if self.savings.union:
            seen, where = self.target(patches, rows=masks.union), masks.slots
        else:
            seen, where = self.target(patches), masks.targets
        seen = seen.float()
        deviation = seen.flatten(0, 1).std(0).mean()
        seen = F.layer_norm(seen, (seen.shape[-1],))
        return select(seen, where.flatten(1)).unflatten(1, where.shape[1:]), deviation


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """What probes read: images [B, 3, S, S] -> [B, D], the mean of the encoder's output patches."""
    return encoder(images).mean(1)


@torch.no_grad()
def update_target(model: IJepa, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * encoder, in place; sharded parameters stay sharded."""
    slow, fast = list(model.target.parameters()), list(model.encoder.parameters())
    if model.savings.together:
        torch._foreach_lerp_(slow, fast, 1.0 - momentum)
    else:
        for a, b in zip(slow, fast, strict=True):
            a.lerp_(b, 1.0 - momentum)


@torch.no_grad()
def init_weights(model: IJepa, recipe: Recipe) -> None:
    """Fill every parameter of a materialised, unsharded CPU model from recipe.seed; the target becomes a copy.

    Each parameter has a generator of its own, keyed by (seed, its name), so that no parameter's values hang on which
    others exist. `released`: every weight N(0, 0.02) as the published code ends up with; `depth_rescaled`: the two
    projections that write to the residual stream of block i are then divided by sqrt(2 i), as the paper's code means.
    """
    grid = recipe.model.grid
    for part, width in ((model.encoder, recipe.model.width), (model.predictor, recipe.predictor.width)):
        for name, parameter in part.named_parameters():
            path = name if part is model.predictor else f"encoder.{name}"
            owner = part.get_submodule(name.rpartition(".")[0])
            fill(parameter, name.rpartition(".")[2], owner, generator(recipe.seed, path))
        part.pos_embed.copy_(sincos(width, grid))
        if recipe.model.init == "depth_rescaled":
            for i, block in enumerate(part.blocks, 1):
                block.attn.proj.weight.div_(math.sqrt(2 * i))
                block.mlp.fc2.weight.div_(math.sqrt(2 * i))
    for slow, fast in zip(model.target.parameters(), model.encoder.parameters(), strict=True):
        slow.copy_(fast)


def fill(parameter: nn.Parameter, leaf: str, owner: nn.Module, random: torch.Generator) -> None:
    """One parameter by its role: biases 0, scales of norms 1, layer scale its own constant, the rest N(0, 0.02)."""
    if leaf == "gamma":
        parameter.fill_(owner.init_values)
    elif leaf == "bias":
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        nn.init.trunc_normal_(parameter, std=0.02, generator=random)


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
