"""AdamW on sharded parameters, and the norms of their gradients.

In: a sharded `IJepa` with gradients. Out: changed weights. A rank computes with its own rows alone;
the caller sums the squared norms over the ranks.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from jepa_cluster.config import Optim
from jepa_cluster.ijepa import mup
from jepa_cluster.ijepa.objective import IJepa, local_part


class ShardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, applied to this rank's rows of each parameter.

    Given sharded tensors, torch first derives how each operation is sharded. This takes the first
    step of a rank about a CPU second. AdamW is elementwise, so the rows need no other rank.
    """

    found_inf: Tensor  # 1 where a gradient is not finite on any rank: the step changes nothing

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [local_part(p) for p in parameters],
                [local_part(p.grad) for p in parameters],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def trainable_parameters(model: IJepa) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def build_optimizer(model: IJepa, optim: Optim) -> ShardedAdamW:
    """Return AdamW without weight decay for biases and other 1-d tensors.

    Its state exists from the start. A group has the parameters of one learning rate.
    """
    factors = mup.factors(model.encoder, model.recipe) | mup.factors(model.predictor, model.recipe)
    parameters = [p for _, p in trainable_parameters(model)]
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in sorted(parameters, key=lambda p: p.dim() <= 1):
        groups.setdefault((p.dim() > 1, factors[p].lr), []).append(p)
    described = [{"params": g, "decay": d, "lr_factor": f} for (d, f), g in groups.items()]
    adam = ShardedAdamW(described, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for p in parameters:
        adam.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return adam


def set_lr_and_decay(adam: ShardedAdamW, lr: float, weight_decay: float) -> None:
    """Set what the schedule says for the next step. lr * weight_decay is the same in all groups."""
    for group in adam.param_groups:
        factor = group["lr_factor"]
        group["lr"] = lr * factor
        group["weight_decay"] = weight_decay / factor if group["decay"] else 0.0


@torch.no_grad()
def reset_optimizer(adam: ShardedAdamW) -> None:
    """Make the optimizer as it was before its first step."""
    for moments in adam.state.values():
        for tensor in moments.values():
            tensor.zero_()


@torch.no_grad()
def squared_grad_norms(model: IJepa, replicas: int) -> Tensor:
    """Return this rank's part of the squared gradient norms of encoder and predictor.

    float64 [2]; to be summed over ranks.
    """
    out = []
    for part in (model.encoder, model.predictor):
        grads = [local_part(p.grad) for p in part.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([g for g in grads if g.numel()]))
        out.append(norms.double().square().sum() / replicas)
    return torch.stack(out)


@torch.no_grad()
def clip_gradients(model: IJepa, squared_norm: Tensor, max_norm: float | None) -> None:
    """Scale the gradients so that their global norm is at most max_norm. None: leave them."""
    if max_norm is None:
        return
    grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    factor = (max_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor.to(grads[0].dtype))
