"""A linear map that is quicker on CPUs in fp32: oneDNN's product where it beats the default BLAS, else torch's own.

On the AMD processors measured, with AVX-512 oneDNN is 6-18 % faster for the output and for the gradient of the input,
and slower for the gradient of the weight, which therefore stays with the BLAS; with AVX2 alone it is slower for all
(the step by 8 %) and is not used. Anything but eager fp32 on a CPU is F.linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 1 << 25  # multiply-accumulates from which the choice of library matters

enabled = torch.backends.cpu.get_cpu_capability() == "AVX512"  # the one switch; tests set it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    fits = enabled and x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32
    if not fits or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.numel() * weight.shape[0] < LARGE or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return OneDnn.apply(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = product(grad.contiguous(), weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
