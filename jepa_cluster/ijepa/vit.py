"""The encoder: timm's VisionTransformer, run on the patches that matter.

In: images (or already cut patches) and, for the context, which patches to keep. Out: one vector a kept patch, after
the final norm. Parameter names, and everything not overridden here, are timm's. Knows nothing of masks' meaning.

`Attention` and `Block` add to timm's: which keys are real, and the rows (queries) whose output is wanted. Both run
inside `forward`, so that fully_shard, activation checkpointing and compile see ordinary modules.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Model
from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.ijepa.linear import linear
from jepa_cluster.ijepa.ragged import Ragged, Varlen, flash, ragged

NORM = partial(nn.LayerNorm, eps=1e-6)
FIXED = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0, "weight_init": "skip"}
Rows = int | Tensor | None  # the last n rows, or indices [B, U], or all


class Attention(TimmAttention):
    """timm's attention, for chosen query rows and from a ready-made qkv."""

    def forward(self, x: Tensor, real: Ragged | None = None, rows: Rows = None) -> Tensor:
        """x [B, N, D], of which `real` may say which tokens count as keys -> [B, N or rows, D]."""
        weight, bias, split = self.qkv.weight, self.qkv.bias, self.attn_dim
        y = select(x, rows)
        if rows is None:
            q, k, v = self.all(x).chunk(3, -1)
        else:  # queries of the wanted rows, keys and values of all
            q = linear(y, weight[:split], None if bias is None else bias[:split])
            k, v = linear(x, weight[split:], None if bias is None else bias[split:]).chunk(2, -1)
        return self.attend(q, k, v, real, None if self.gate is None else self.gate(y).sigmoid())

    def all(self, x: Tensor) -> Tensor:
        """Queries, keys and values of every row, side by side [..., N, 3*D]."""
        return linear(x, self.qkv.weight, self.qkv.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Ragged | None, gate: Tensor | None = None) -> Tensor:
        """Heads apart, softmax over the keys, heads together, projection. With `real`, q are the last rows."""
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        drop = self.attn_drop.p if self.training else 0.0
        x = None if real is None or drop else real.attend(q, k, v)
        if x is None:
            mask = None if real is None else real.mask
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        x = self.norm(x.transpose(1, 2).flatten(2))
        return self.proj_drop(linear(x if gate is None else x * gate, self.proj.weight, self.proj.bias))


class Feed(Mlp):
    """timm's MLP with our linear map."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(linear(x, self.fc1.weight, self.fc1.bias)))
        return self.drop2(linear(self.norm(x), self.fc2.weight, self.fc2.bias))


class Block(TimmBlock):
    """timm's pre-norm block; with `rows`, queries, MLP and output are computed for those rows only."""

    def forward(self, x: Tensor, real: Ragged | None = None, rows: Rows = None) -> Tensor:
        y = self.norm1(x)
        if isinstance(self.attn, Attention):
            y, x = self.attn(y, real, rows), select(x, rows)
        else:  # an attention layer chosen in conf: all rows, then the wanted ones
            y, x = select(self.attn(y, attn_mask=None if real is None else real.mask), rows), select(x, rows)
        return self.finish(x, y)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual of the attention, then the MLP."""
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


DEFAULTS = {"norm_layer": NORM, "block_fn": Block, "attn_layer": Attention, "mlp_layer": Feed}
DEFAULTS |= {"qkv_bias": True, "no_embed_class": True}


class Encoder(VisionTransformer):
    """timm's VisionTransformer without class token, with fixed 2-D sin-cos positions."""

    def __init__(self, model: Model, gather: bool = True, varlen: Varlen | None = flash) -> None:
        """gather: choose patches before embedding them; varlen: attention for kept patches of different number."""
        shape = {"img_size": model.image, "patch_size": model.patch, "embed_dim": model.width, "depth": model.depth}
        shape |= {"num_heads": model.heads, "mlp_ratio": model.mlp_ratio}
        super().__init__(**{**DEFAULTS, **options(model), **shape, **FIXED})
        self.pos_embed.requires_grad_(False)
        self.gather, self.varlen = gather, varlen

    def forward(
        self, images: Tensor, keep: Tensor | None = None, lengths: Tensor | None = None, rows: Rows = None
    ) -> Tensor:
        """Images [B, 3, S, S] or patches [B, N, 3*p*p] -> [B, N, D], or [B, K, D] for the patches keep [B, K].

        lengths: [B], how many of the kept patches are real, the first ones. rows: [B, U] indices into the output that
        are wanted; the last block computes nothing else, and there are no lengths then. Without keep, an image of
        another size has its positions resampled.
        """
        patches = cut(images, self.patch_embed.patch_size[0]) if images.dim() == 4 else images
        positions = self.positions(patches.shape[1])
        proj = self.patch_embed.proj
        if keep is not None and self.gather:
            patches, positions = select(patches, keep), positions[0][keep]
        x = self.patch_embed.norm(F.linear(patches, proj.weight.flatten(1), proj.bias)) + positions
        if keep is not None and not self.gather:
            x = select(x, keep)
        prefix = self.num_reg_tokens
        if prefix:
            x = torch.cat([self.reg_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        real = None
        if lengths is not None:
            real = ragged(torch.zeros_like(lengths), lengths + prefix, x.shape[1], self.varlen)
        x = self.norm_pre(x)
        last = len(self.blocks) - 1
        wanted = rows + prefix if isinstance(rows, Tensor) else rows
        for i, block in enumerate(self.blocks):
            x = block(x, real, wanted if i == last else None)
        return self.norm(x if rows is not None else x[:, prefix:])

    def positions(self, patches: int) -> Tensor:
        """The table of positions [1, N, D], resampled when the image has another size than the model's."""
        if patches == self.pos_embed.shape[1]:
            return self.pos_embed
        side = int(patches**0.5)
        return resample_abs_pos_embed(self.pos_embed, [side, side], num_prefix_tokens=0)


def options(model: Model) -> dict[str, Any]:
    """model.timm as arguments of timm's VisionTransformer, classes named as in timm.layers. ConfigError if unknown."""
    known = (
        set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "img_size", "patch_size"} - set(FIXED)
    )
    chosen = dict(model.timm)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"model.timm.{name} is no option of timm's VisionTransformer", hint=suggest(name, known))
    for name in ("mlp_layer", "embed_layer"):
        if name in chosen:
            if not hasattr(timm.layers, str(chosen[name])):
                raise ConfigError(f"model.timm.{name}={chosen[name]} is not in timm.layers", hint="for example SwiGLU")
            chosen[name] = getattr(timm.layers, str(chosen[name]))
    return chosen


def cut(images: Tensor, patch: int) -> Tensor:
    """Images [B, C, S, S] -> patches [B, N, C*p*p], ordered as a convolution's weight is."""
    b, c, h, w = images.shape
    tiles = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def select(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x [B, N, D]: all, the last n, or those of an index [B, U]."""
    if rows is None:
        return x
    if isinstance(rows, int):
        return x[:, -rows:]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def sincos(width: int, grid: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, grid*grid, width]: first half for the column, second half for the row.

    Base 10000; `scale` stretches the coordinates for a finer grid over the same scene.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * scale * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    column, row = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], 2).reshape(1, grid * grid, width).float()
