"""The encoder: timm's VisionTransformer, run on the patches that matter.

In: images (or patches) and, for the context, which patches to keep. Out: one vector per kept patch,
after the final norm. Parameter names, and everything not overridden here, are timm's.
The meaning of masks is not known here.

`Attention` and `Block` add to timm's: which keys are valid, and the rows (queries) to compute.
Both run inside `forward`, so that fully_shard, activation checkpointing and compile see ordinary
modules.
"""

# pyright: standard, reportPrivateImportUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from functools import partial
from typing import Any

import timm.layers
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp as TimmMlp
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import Model
from jepa_cluster.ijepa import varlen_attention
from jepa_cluster.ijepa.cpu_linear import linear
from jepa_cluster.ijepa.shapes import Float, Int
from jepa_cluster.ijepa.varlen_attention import ValidTokens, valid_tokens

NORM = partial(nn.LayerNorm, eps=1e-6)
Rows = int | Int[Tensor, "B U"] | None  # the last n rows, or indices [B, U], or all


class Attention(TimmAttention):
    """timm's attention, for chosen query rows and from a ready-made qkv.

    query_scale: factor of the queries.
    """

    query_scale = 1.0

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        valid: ValidTokens | None = None,
        rows: Rows = None,
    ) -> Float[Tensor, "B R D"]:
        """Return the output of the chosen rows. valid: which tokens count as keys."""
        if rows is None:
            q, k, v = self.qkv_rows(x).chunk(3, -1)
        else:
            weight, bias, split = self.qkv.weight, self.qkv.bias, self.attn_dim
            q_bias, kv_bias = None, None
            if bias is not None:
                q_bias, kv_bias = bias[:split], bias[split:]
            q = linear(gather_rows(x, rows), weight[:split], q_bias)
            k, v = linear(x, weight[split:], kv_bias).chunk(2, -1)
        return self.attend(q, k, v, valid)

    def qkv_rows(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows 3*D"]:
        """Return queries, keys and values of every row, side by side."""
        return linear(x, self.qkv.weight, self.qkv.bias)

    def attend(
        self,
        q: Float[Tensor, "B R D"],
        k: Float[Tensor, "B N D"],
        v: Float[Tensor, "B N D"],
        valid: ValidTokens | None,
    ) -> Float[Tensor, "B R D"]:
        """Softmax over the keys of each head, then the projection.

        With `valid`, q are the last rows.
        """
        q = self.q_norm(self.split_heads(q))
        k = self.k_norm(self.split_heads(k))
        v = self.split_heads(v)
        if self.query_scale != 1:
            q = q * self.query_scale
        dropout = self.attn_drop.p if self.training else 0.0
        if valid is None or dropout or not varlen_attention.supports_flash(q, k, v):
            mask = None if valid is None else valid.mask
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            x = valid.attend(q, k, v)
        x = self.norm(x.transpose(1, 2).flatten(2))
        return self.proj_drop(linear(x, self.proj.weight, self.proj.bias))

    def split_heads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N d"]:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class Mlp(TimmMlp):
    """timm's MLP with our linear map."""

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = self.drop1(self.act(linear(x, self.fc1.weight, self.fc1.bias)))
        return self.drop2(linear(self.norm(x), self.fc2.weight, self.fc2.bias))


class Block(TimmBlock):
    """timm's pre-norm block; `rows` limits queries, MLP and output to those rows."""

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        valid: ValidTokens | None = None,
        rows: Rows = None,
    ) -> Float[Tensor, "B R D"]:
        """Return the output of the chosen rows. valid: which tokens count as keys."""
        y = self.norm1(x)
        if isinstance(self.attn, Attention):
            y = self.attn(y, valid, rows)
        else:  # an attention layer chosen in conf computes all rows
            mask = None if valid is None else valid.mask
            y = gather_rows(self.attn(y, attn_mask=mask), rows)
        return self.add_mlp(gather_rows(x, rows), y)

    def add_mlp(
        self,
        x: Float[Tensor, "B N D"],
        attended: Float[Tensor, "B N D"],
    ) -> Float[Tensor, "B N D"]:
        """Add the attention, then the MLP, to the residual stream x."""
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


DEFAULT_KWARGS: dict[str, Any] = {
    "norm_layer": NORM,
    "block_fn": Block,
    "attn_layer": Attention,
    "mlp_layer": Mlp,
    "qkv_bias": True,
    "no_embed_class": True,
}
FIXED_KWARGS: dict[str, Any] = {
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "num_classes": 0,
    "weight_init": "skip",
}


class Encoder(VisionTransformer):
    """timm's VisionTransformer without class token, with fixed 2-D sin-cos positions."""

    blocks: nn.Sequential
    pos_embed: nn.Parameter  # pyright: ignore[reportIncompatibleVariableOverride]
    reg_token: nn.Parameter  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: Model) -> None:
        shape = {
            "img_size": model.image,
            "patch_size": model.patch,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
        }
        super().__init__(**{**DEFAULT_KWARGS, **timm_kwargs(model), **shape, **FIXED_KWARGS})
        self.pos_embed.requires_grad_(False)

    def forward(
        self,
        images: Float[Tensor, "B 3 S S"] | Float[Tensor, "B N P"],
        keep: Int[Tensor, "B K"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        rows: Rows = None,
    ) -> Float[Tensor, "B R D"]:
        """Encode images, or patches, to one vector per patch.

        keep: patches to encode. lengths: how many of them are valid, the first ones.
        rows: outputs to compute in the last block; there are no lengths then.
        Without keep, an image of another size has its positions resampled.
        """
        x = self.embed(images, keep)
        registers = self.num_reg_tokens
        if registers:
            tokens = self.reg_token.expand(len(x), -1, -1)
            x = torch.cat([tokens.to(x.dtype), x], 1)
        valid = None
        if lengths is not None:
            begin = torch.zeros_like(lengths)
            valid = valid_tokens(begin, lengths + registers, x.shape[1])
        if isinstance(rows, Tensor):
            rows = rows + registers
        x = self.norm_pre(x)
        for block in self.blocks:
            is_last = block is self.blocks[-1]
            x = block(x, valid, rows if is_last else None)
        if rows is None:
            x = x[:, registers:]
        return self.norm(x)

    def embed(
        self,
        images: Float[Tensor, "B 3 S S"] | Float[Tensor, "B N P"],
        keep: Int[Tensor, "B K"] | None,
    ) -> Float[Tensor, "B R D"]:
        """Embed the kept patches, and no others, and add positions."""
        patches = images
        if images.dim() == 4:
            patches = patchify(images, self.patch_embed.patch_size[0])
        positions = self.pos_embed
        if patches.shape[1] != positions.shape[1]:  # another image size than the model's
            side = int(patches.shape[1] ** 0.5)
            positions = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=0)
        if keep is not None:
            patches, positions = gather_rows(patches, keep), positions[0][keep]
        proj = self.patch_embed.proj
        return (
            self.patch_embed.norm(F.linear(patches, proj.weight.flatten(1), proj.bias)) + positions
        )


def timm_kwargs(model: Model) -> dict[str, Any]:
    """Return model.timm as arguments of timm's VisionTransformer."""
    kwargs = dict(model.timm)
    if "mlp_layer" in kwargs:  # timm knows the other layers by their names
        kwargs["mlp_layer"] = getattr(timm.layers, kwargs["mlp_layer"])
    return kwargs


def patchify(
    images: Float[Tensor, "B C S S"],
    patch: int,
) -> Float[Tensor, "B N C*{patch}*{patch}"]:
    """Cut images into patches, ordered as the weight of a convolution."""
    b, c, h, w = images.shape
    rows, columns = h // patch, w // patch
    tiles = images.reshape(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(b, rows * columns, c * patch * patch)


def gather_rows(
    x: Float[Tensor, "B N D"],
    rows: Rows,
) -> Float[Tensor, "B R D"]:
    """Return all rows of x, the last n, or those of an index [B, U]."""
    if rows is None:
        return x
    if isinstance(rows, int):
        return x[:, -rows:]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def sincos_2d(
    width: int,
    grid: int,
    scale: float = 1.0,
) -> Float[Tensor, "1 {grid}*{grid} {width}"]:
    """Fixed 2-D sine-cosine positions.

    The first half of the channels is for the column, the second for the row. Base 10000.
    scale: factor of the coordinates, for a finer grid over the same scene.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * scale * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    column = line[None].expand(grid, -1, -1)
    row = line[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], 2).reshape(1, grid * grid, width).float()
