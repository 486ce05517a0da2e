"""A linear map that is faster on CPUs in fp32: oneDNN where it beats the default BLAS.

On the AMD processors measured, with AVX-512 oneDNN is 6-18 % faster for the output and for the
gradient of the input. It is slower for the gradient of the weight, which stays with the BLAS.
With AVX2 alone it is slower for all three (the step by 8 %) and is not used.
Everything but eager fp32 on a CPU is F.linear.
"""

# pyright: standard

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_cluster.ijepa.shapes import Float

MIN_PRODUCTS = 1 << 25  # multiply-accumulates from which the choice of library matters

enabled = torch.backends.cpu.get_cpu_capability() == "AVX512"  # tests set it


def linear(
    x: Float[Tensor, "*batch I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*batch O"]:
    """Return x @ weight.T + bias."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32
    if not (enabled and fp32_on_cpu):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.numel() * weight.shape[0] < MIN_PRODUCTS or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return OneDnnLinear.apply(x, weight, bias)


class OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch I"],
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None,
    ) -> Float[Tensor, "*batch O"]:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad.contiguous(), weight.t(), None) if for_x else None
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None
        grad_bias = flat.sum(0) if for_bias else None
        return grad_x, grad_weight, grad_bias


def _product(
    x: Float[Tensor, "*batch I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None,
) -> Float[Tensor, "*batch O"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
