"""Attention over padded sequences of different length, by key mask or by a varlen kernel.

In: for padded sequences [S, N], where the valid tokens of each begin and how many there are.
Out: a key mask, and cumulative sequence lengths for kernels of variable length (flash on CUDA).

The kernel needs no packing: the padding before and after the valid tokens counts as a sequence of
its own, which attends to itself and whose output is not read. So all shapes stay those of the
padded tensor: nothing is gathered, the host never synchronises, compiled blocks are not compiled
again, and a step can be captured in a CUDA graph.
"""

# pyright: standard

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_cluster.ijepa.shapes import Bool, Float, Int, Int32


class ValidTokens(NamedTuple):
    """Which tokens of padded sequences [S, N] are valid.

    mask: the valid keys.
    segment_ends: end of the padding before, of the valid tokens, of the sequence.
    """

    mask: Bool[Tensor, "S 1 1 N"]
    segment_ends: Int32[Tensor, "S 3"]

    def attend(
        self,
        q: Float[Tensor, "S H R d"],
        k: Float[Tensor, "S H N d"],
        v: Float[Tensor, "S H N d"],
    ) -> Float[Tensor, "S H R d"]:
        """Attend with the last R rows to all N, by flash_varlen."""
        sequences, _, rows, _ = q.shape
        columns = k.shape[2]
        out = flash_varlen(
            _tokens_first(q),
            _tokens_first(k),
            _tokens_first(v),
            self.cu_seqlens(columns, rows),
            self.cu_seqlens(columns, columns),
            rows,
            columns,
        )
        return out.unflatten(0, (sequences, rows)).transpose(1, 2)

    def cu_seqlens(self, columns: int, rows: int) -> Int32[Tensor, " ends"]:
        """Return cumulative lengths of all segments in the last `rows` of `columns`."""
        ends = (self.segment_ends - (columns - rows)).clamp_min(0)
        start = torch.arange(len(ends), dtype=torch.int32, device=ends.device) * rows
        return F.pad((ends + start[:, None]).flatten(), (1, 0))


def valid_tokens(
    begin: Int[Tensor, " S"],
    length: Int[Tensor, " S"],
    columns: int,
) -> ValidTokens:
    """Describe sequences of `columns` tokens, valid from begin to begin + length."""
    end = begin + length
    position = torch.arange(columns, device=begin.device)
    mask = (position >= begin[:, None]) & (position < end[:, None])
    segment_ends = torch.stack([begin, end, torch.full_like(end, columns)], 1).int()
    return ValidTokens(mask[:, None, None], segment_ends)


def supports_flash(
    q: Float[Tensor, "S H R d"],
    k: Float[Tensor, "S H N d"],
    v: Float[Tensor, "S H N d"],
) -> bool:
    """Tell whether flash_varlen can run: CUDA, one half precision, heads of 8 n <= 256 channels."""
    same_type = q.dtype == k.dtype == v.dtype
    half = q.dtype in (torch.bfloat16, torch.float16)
    width = q.shape[-1]
    return q.is_cuda and same_type and half and width % 8 == 0 and width <= 256


def flash_varlen(
    q: Float[Tensor, "Tq H d"],
    k: Float[Tensor, "Tk H d"],
    v: Float[Tensor, "Tk H d"],
    cu_seqlens_q: Int32[Tensor, " ends"],
    cu_seqlens_k: Int32[Tensor, " ends"],
    max_q: int,
    max_k: int,
) -> Any:
    """Call torch's kernel for CUDA, imported at its first use."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)


def _tokens_first(x: Float[Tensor, "S H N d"]) -> Float[Tensor, "S*N H d"]:
    return x.transpose(1, 2).flatten(0, 1)
