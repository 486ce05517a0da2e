"""The predictor: a narrow transformer that imagines missing patches from the context.

In: the encoder's context vectors, where they come from, and where the targets are. Out: one vector a target patch.
`per_target` runs a sequence for each target block (the paper); `joint` puts all targets in one sequence.
Blocks are timm's (`ijepa.vit`); `First` and the last block's `rows` leave out work that no output depends on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa.flops import Savings
from jepa_cluster.ijepa.vit import NORM, Attention, Block, Feed


class First(Block):
    """The first block: what enters it is a table. Context tokens repeat over the M sequences of an image, and a
    target token depends on its position alone, so norm and qkv are computed once for each and then copied."""

    def forward(self, context: Tensor, table: Tensor, targets: Tensor, mask: Tensor | None, saving: bool) -> Tensor:
        """context [B, K, D], table [N, D] of target tokens, targets [B, S, T] -> [B*S, K+T, D]."""
        x = sequences(context, table, targets)
        if not saving:
            return super().forward(x, mask)
        qkv = sequences(self.attn.all(self.norm1(context)), self.attn.all(self.norm1(table)), targets)
        return self.finish(x, self.attn.attend(*qkv.chunk(3, -1), mask))


class Predictor(nn.Module):
    def __init__(self, recipe: Recipe, savings: Savings | None = None) -> None:
        super().__init__()
        p, model = recipe.predictor, recipe.model
        self.savings = savings or Savings()
        self.joint = p.mode == "joint"
        self.embed = nn.Linear(model.width, p.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, p.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, model.grid**2, p.width), requires_grad=False)
        settings = {"mlp_ratio": 4.0, "qkv_bias": True, "norm_layer": NORM, "attn_layer": Attention, "mlp_layer": Feed}
        self.blocks = nn.Sequential(*((Block if i else First)(p.width, p.heads, **settings) for i in range(p.depth)))
        self.norm = NORM(p.width)
        self.proj = nn.Linear(p.width, model.width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        targets: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, K, D] at patches context [B, K], targets [B, M, T] -> predictions [B, M, T, D].

        context_mask [B, K] and target_mask [B, M, T] are false at padding, which no real token attends to.
        """
        shape = targets.shape
        if self.joint:
            targets = targets.flatten(1)[:, None]
            target_mask = None if target_mask is None else target_mask.flatten(1)[:, None]
        x = self.embed(x)
        x = x + self.pos_embed[0][context].to(x.dtype)
        table = (self.mask_token[0] + self.pos_embed[0]).to(x.dtype)
        mask = keys_that_count(context, targets, context_mask, target_mask)
        first, *others = self.blocks
        x = first(x, table, targets, mask, self.savings.first_layer)
        room = targets.shape[2]
        for i, block in enumerate(others, 2):
            x = block(x, mask, room if i == len(self.blocks) and self.savings.last_layer else None)
        return self.proj(self.norm(x[:, -room:])).reshape(*shape, -1)


def sequences(context: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """context [B, K, C] and rows of table [N, C] at targets [B, S, T] -> [B*S, K+T, C]."""
    count = targets.shape[1]
    repeated = context[:, None].expand(-1, count, -1, -1)
    return torch.cat([repeated, F.embedding(targets, table).to(context.dtype)], 2).flatten(0, 1)


def keys_that_count(
    context: Tensor, targets: Tensor, context_mask: Tensor | None, target_mask: Tensor | None
) -> Tensor | None:
    """Masks of real tokens -> bool [B*S, 1, 1, K+T], or None when every token is real."""
    if context_mask is None and target_mask is None:
        return None
    c = torch.ones_like(context, dtype=torch.bool) if context_mask is None else context_mask
    t = torch.ones_like(targets, dtype=torch.bool) if target_mask is None else target_mask
    return torch.cat([c[:, None].expand(-1, targets.shape[1], -1), t], 2).flatten(0, 1)[:, None, None]
