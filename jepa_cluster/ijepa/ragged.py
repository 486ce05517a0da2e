"""Sequences of different length in one tensor, and attention that keeps them apart.

In: for padded sequences [S, N], where each one's run of real tokens begins and how long it is. Out: a key mask, for
kernels that take one, and the ends of all runs laid end to end, for kernels of variable length (flash on CUDA).

The second needs no packing: padding before and behind a run counts as a sequence of its own, which attends to itself
and is read by nobody. So shapes stay those of the padded tensor whatever the lengths are: nothing is gathered, the host
waits for nothing, compiled blocks are not compiled again and a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
# q [Tq, H, d], k and v [Tk, H, d], their sequences' ends [n + 1] int32 from 0 on, the longest of each -> [Tq, H, d]


class Ragged(NamedTuple):
    mask: Tensor  # bool [S, 1, 1, N]: the real keys
    runs: Tensor  # int32 [S, 3]: in each row of N, the end of padding, of the real run, of padding
    kernel: Varlen | None  # None: the mask, whatever the device

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Attention of the last n rows q [S, H, n, d] over k, v [S, H, N, d]; None where the kernel cannot."""
        if self.kernel is None or (self.kernel is flash and not fits(q, k, v)):
            return None
        sequences, _, rows, _ = q.shape
        columns = k.shape[2]
        flat = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out = self.kernel(*flat, self.ends(columns, rows), self.ends(columns, columns), rows, columns)
        return out.unflatten(0, (sequences, rows)).transpose(1, 2)

    def ends(self, columns: int, rows: int) -> Tensor:
        """Where the runs of the last `rows` of `columns` end, all sequences laid end to end: int32 [3 * S + 1]."""
        inside = (self.runs - (columns - rows)).clamp_min(0)
        start = torch.arange(len(inside), dtype=torch.int32, device=inside.device) * rows
        return F.pad((inside + start[:, None]).flatten(), (1, 0))


def ragged(begin: Tensor, length: Tensor, columns: int, kernel: Varlen | None) -> Ragged:
    """Sequences of `columns` tokens whose real ones are begin .. begin + length (int [S] both)."""
    end = begin + length
    place = torch.arange(columns, device=begin.device)
    mask = (place >= begin[:, None]) & (place < end[:, None])
    runs = torch.stack([begin, end, torch.full_like(end, columns)], 1).int()
    return Ragged(mask[:, None, None], runs, kernel)


def fits(*tensors: Tensor) -> bool:
    """What flash attention of variable length asks of q, k, v: CUDA, half precision, heads of a multiple of 8."""
    low = {t.dtype for t in tensors}
    width = tensors[0].shape[-1]
    return tensors[0].is_cuda and low in ({torch.bfloat16}, {torch.float16}) and width % 8 == 0 and width <= 256


def flash(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int) -> Any:
    """torch's kernel for CUDA; imported when it is first used."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, q_ends, k_ends, q_most, k_most)
