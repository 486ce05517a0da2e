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
from jepa_cluster.ijepa.ragged import Ragged, Varlen, flash, ragged
from jepa_cluster.ijepa.vit import NORM, Attention, Block, Feed, select


class First(Block):
    """The first block: what enters it is a table. Context tokens repeat over the M sequences of an image, and a
    target token depends on its position alone, so norm and qkv are computed once for each and then copied."""

    def forward(self, context: Tensor, table: Tensor, targets: Tensor, real: Ragged | None, saving: bool) -> Tensor:
        """context [B, K, D], table [N, D] of target tokens, targets [B, S, T] -> [B*S, K+T, D]."""
        x = sequences(context, table, targets)
        if not saving:
            return super().forward(x, real)
        qkv = sequences(self.attn.all(self.norm1(context)), self.attn.all(self.norm1(table)), targets)
        return self.finish(x, self.attn.attend(*qkv.chunk(3, -1), real))


class Predictor(nn.Module):
    def __init__(self, recipe: Recipe, savings: Savings | None = None, varlen: Varlen = flash) -> None:
        super().__init__()
        p, model = recipe.predictor, recipe.model
        self.savings = savings or Savings()
        self.varlen = varlen if self.savings.varlen else None
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
        context_len: Tensor | None = None,
        target_len: Tensor | None = None,
    ) -> Tensor:
        """x [B, K, D] at patches context [B, K], targets [B, M, T] -> predictions [B, M, T, D].

        context_len [B] and target_len [B, M] count the real entries, which come first; no token attends to others.
        A sequence is the context backwards, then the target forwards, so that its real tokens are one run.
        """
        shape, back = targets.shape, None
        if self.joint:
            targets, target_len, back = one_sequence(targets, target_len)
        x = self.embed(x)
        x = x + self.pos_embed[0][context].to(x.dtype)
        real = which(context, targets, context_len, target_len, self.varlen)
        if context_len is not None:
            x = x.flip(1)
        table = (self.mask_token[0] + self.pos_embed[0]).to(x.dtype)
        first, *others = self.blocks
        x = first(x, table, targets, real, self.savings.first_layer)
        room = targets.shape[2]
        for i, block in enumerate(others, 2):
            x = block(x, real, room if i == len(self.blocks) and self.savings.last_layer else None)
        x = x[:, -room:]
        return self.proj(self.norm(x if back is None else select(x, back))).reshape(*shape, -1)


def sequences(context: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """context [B, K, C] and rows of table [N, C] at targets [B, S, T] -> [B*S, K+T, C]."""
    count = targets.shape[1]
    repeated = context[:, None].expand(-1, count, -1, -1)
    return torch.cat([repeated, F.embedding(targets, table).to(context.dtype)], 2).flatten(0, 1)


def which(
    context: Tensor, targets: Tensor, context_len: Tensor | None, target_len: Tensor | None, kernel: Varlen | None
) -> Ragged | None:
    """The real tokens of the sequences of context [B, K] and targets [B, S, T]; None when all are."""
    if context_len is None and target_len is None:
        return None
    kept, (batch, count, room) = context.shape[1], targets.shape
    seen = targets.new_full((batch,), kept) if context_len is None else context_len
    asked = targets.new_full((batch, count), room) if target_len is None else target_len
    begin = (kept - seen)[:, None].expand(-1, count)
    return ragged(begin.flatten(), (seen[:, None] + asked).flatten(), kept + room, kernel)


def one_sequence(targets: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Targets [B, M, T] -> [B, 1, M*T], real ones first, their number [B, 1], and where each went [B, M*T]."""
    flat = targets.flatten(1)
    if lengths is None:
        return flat[:, None], None, None
    padding = torch.arange(targets.shape[2], device=targets.device) >= lengths[..., None]
    order = padding.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    return flat.gather(1, order)[:, None], lengths.sum(1, keepdim=True), order.argsort(1)
