"""The predictor: a narrow transformer that predicts missing patches from the context.

In: the context vectors of the encoder, their patches, and the patches of the targets.
Out: one vector per target patch. `per_target` runs one sequence per target block (the paper);
`joint` puts all targets of an image in one sequence.

A sequence is the context backwards, then the target forwards, so that its valid tokens are one run.
S is the number of sequences per image: M for `per_target`, 1 for `joint`.
"""

# pyright: standard

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster import config
from jepa_cluster.ijepa.shapes import Float, Int
from jepa_cluster.ijepa.varlen_attention import ValidTokens, valid_tokens
from jepa_cluster.ijepa.vit import NORM, Attention, Block, Mlp, gather_rows

BLOCK_KWARGS: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "norm_layer": NORM,
    "attn_layer": Attention,
    "mlp_layer": Mlp,
}


class SharedFirstBlock(Block):
    """The first block. It computes norm and qkv once per distinct token and copies them.

    Context tokens repeat over the S sequences of an image, and a target token depends on its
    position alone.
    """

    attn: Attention

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: Float[Tensor, "B K D"],
        target_tokens: Float[Tensor, "N D"],
        targets: Int[Tensor, "B S T"],
        valid: ValidTokens | None,
    ) -> Float[Tensor, "B*S K+T D"]:
        """Run the block over all sequences."""
        x = context_target_sequences(context, target_tokens, targets)
        context_qkv = self.attn.qkv_rows(self.norm1(context))
        target_qkv = self.attn.qkv_rows(self.norm1(target_tokens))
        q, k, v = context_target_sequences(context_qkv, target_qkv, targets).chunk(3, -1)
        return self.add_mlp(x, self.attn.attend(q, k, v, valid))


class Predictor(nn.Module):
    def __init__(
        self,
        model: config.Model,
        settings: config.Predictor,
        outputs: int,
    ) -> None:
        """outputs: numbers to predict of a patch."""
        super().__init__()
        width = settings.width
        self.joint = settings.mode == "joint"
        self.embed = nn.Linear(model.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, model.grid**2, width), requires_grad=False)
        self.blocks = nn.Sequential(SharedFirstBlock(width, settings.heads, **BLOCK_KWARGS))
        for _ in range(1, settings.depth):
            self.blocks.append(Block(width, settings.heads, **BLOCK_KWARGS))
        self.norm = NORM(width)
        self.proj = nn.Linear(width, outputs)

    def forward(
        self,
        x: Float[Tensor, "B K D"],
        context: Int[Tensor, "B K"],
        targets: Int[Tensor, "B M T"],
        context_len: Int[Tensor, " B"] | None = None,
        target_len: Int[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B M T O"]:
        """Predict the targets from the encoder's output x at the patches of the context.

        context_len, target_len: number of valid entries, which come first. No valid token attends
        to padding.
        """
        shape, order = targets.shape, None
        if self.joint:
            targets, target_len, order = join_targets(targets, target_len)
        x = self.embed(x)
        x = x + self.pos_embed[0][context].to(x.dtype)
        valid = valid_sequence_tokens(context, targets, context_len, target_len)
        if context_len is not None:
            x = x.flip(1)
        target_tokens = (self.mask_token[0] + self.pos_embed[0]).to(x.dtype)
        target_rows = targets.shape[2]
        first, *others = self.blocks
        x = first(x, target_tokens, targets, valid)
        for block in others:
            is_last = block is self.blocks[-1]  # only its target rows are computed
            x = block(x, valid, target_rows if is_last else None)
        x = x[:, -target_rows:]
        if order is not None:
            x = gather_rows(x, order)
        return self.proj(self.norm(x)).reshape(*shape, -1)


def context_target_sequences(
    context: Float[Tensor, "B K C"],
    target_tokens: Float[Tensor, "N C"],
    targets: Int[Tensor, "B S T"],
) -> Float[Tensor, "B*S K+T C"]:
    """Join the context of each image with the tokens of each of its targets."""
    repeated = context[:, None].expand(-1, targets.shape[1], -1, -1)
    predicted = F.embedding(targets, target_tokens).to(context.dtype)
    return torch.cat([repeated, predicted], 2).flatten(0, 1)


def valid_sequence_tokens(
    context: Int[Tensor, "B K"],
    targets: Int[Tensor, "B S T"],
    context_len: Int[Tensor, " B"] | None,
    target_len: Int[Tensor, "B S"] | None,
) -> ValidTokens | None:
    """Return which tokens of the sequences are valid; None when all are."""
    if context_len is None and target_len is None:
        return None
    columns, (batch, count, target_columns) = context.shape[1], targets.shape
    if context_len is None:
        context_len = targets.new_full((batch,), columns)
    if target_len is None:
        target_len = targets.new_full((batch, count), target_columns)
    begin = (columns - context_len)[:, None].expand(-1, count)
    length = context_len[:, None] + target_len
    return valid_tokens(begin.flatten(), length.flatten(), columns + target_columns)


def join_targets(
    targets: Int[Tensor, "B M T"], target_len: Int[Tensor, "B M"] | None
) -> tuple[
    Int[Tensor, "B 1 M*T"],
    Int[Tensor, "B 1"] | None,
    Int[Tensor, "B M*T"] | None,
]:
    """Join the targets of an image -> one target, its length, and an order.

    Valid entries come first. gather_rows with the order undoes the sorting. Length and order are
    None when nothing is padded.
    """
    flat = targets.flatten(1)
    if target_len is None:
        return flat[:, None], None, None
    padding = torch.arange(targets.shape[2], device=targets.device) >= target_len[..., None]
    order = padding.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    return flat.gather(1, order)[:, None], target_len.sum(1, keepdim=True), order.argsort(1)
