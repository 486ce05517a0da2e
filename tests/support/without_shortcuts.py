"""The objective without shortcuts: every block is computed for every token of every sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_cluster.ijepa.masks import Masks
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.ijepa.predictor import (
    Predictor,
    context_target_sequences,
    join_targets,
    valid_sequence_tokens,
)
from jepa_cluster.ijepa.varlen_attention import valid_tokens
from jepa_cluster.ijepa.vit import Block, Encoder, gather_rows, patchify


def encode(
    encoder: Encoder, images: Tensor, keep: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Embed all patches, then select, then run the blocks."""
    patches = patchify(images, encoder.patch_embed.patch_size[0])
    x = encoder.patch_embed.norm(F.linear(patches, *embedding(encoder))) + encoder.pos_embed
    if keep is not None:
        x = gather_rows(x, keep)
    registers = encoder.num_reg_tokens
    if registers:
        x = torch.cat([encoder.reg_token.expand(len(x), -1, -1), x], 1)
    valid = None
    if lengths is not None:
        valid = valid_tokens(torch.zeros_like(lengths), lengths + registers, x.shape[1])
    x = encoder.norm_pre(x)
    for block in encoder.blocks:
        x = block(x, valid)
    return encoder.norm(x[:, registers:])


def embedding(encoder: Encoder) -> tuple[Tensor, Tensor]:
    proj = encoder.patch_embed.proj
    return proj.weight.flatten(1), proj.bias


def predict(predictor: Predictor, x: Tensor, masks: Masks) -> Tensor:
    """Build every sequence, then run the blocks."""
    targets, target_len, order = masks.targets, masks.target_len, None
    if predictor.joint:
        targets, target_len, order = join_targets(targets, target_len)
    x = predictor.embed(x) + predictor.pos_embed[0][masks.context]
    if masks.context_len is not None:
        x = x.flip(1)
    target_tokens = predictor.mask_token[0] + predictor.pos_embed[0]
    valid = valid_sequence_tokens(masks.context, targets, masks.context_len, target_len)
    x = context_target_sequences(x, target_tokens, targets)
    for block in predictor.blocks:
        x = Block.forward(block, x, valid)
    x = x[:, -targets.shape[2] :]
    if order is not None:
        x = gather_rows(x, order)
    return predictor.proj(predictor.norm(x)).reshape(*masks.targets.shape, -1)


class WithoutShortcuts(IJepa):
    """The modules of IJepa.

    embeds_all: False embeds only the patches of the context, as IJepa does.
    """

    embeds_all = True

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            target = encode(self.target, images)
            target = F.layer_norm(target, target.shape[-1:])
            chosen = gather_rows(target, masks.targets.flatten(1))
            target = chosen.unflatten(1, masks.targets.shape[1:])
        if self.embeds_all:
            x = encode(self.encoder, images, masks.context, masks.context_len)
        else:
            x = self.encoder(images, masks.context, masks.context_len)
        prediction = predict(self.predictor, x, masks)
        loss, _ = self.loss_fn(prediction, target, masks.target_len)
        return loss, {}
