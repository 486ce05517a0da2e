"""The paper's step as one would first write it: the peer of `step.py` and `objective.py`.

Modules of its own, from the paper's text: all patches embedded, then gathered; attention as two
matrix products and a softmax; the context repeated for each target; every block for every row; a
per-parameter loop for the target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(b, n, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(
        self, image: int, patch: int, width: int, depth: int, heads: int, ratio: float
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(
            torch.randn(1, (image // patch) ** 2, width) * 0.02, requires_grad=False
        )
        self.layers = nn.ModuleList(Layer(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        x = x if keep is None else pick(x, keep)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Imagine(nn.Module):
    def __init__(self, grid: int, outside: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(outside, width), nn.Linear(width, outside)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(
            torch.randn(1, grid * grid, width) * 0.02, requires_grad=False
        )
        self.layers = nn.ModuleList(Layer(width, heads, 4.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        count, kept = targets.shape[1], context.shape[1]
        positions = self.positions.expand(len(x), -1, -1)
        x = self.enter(x) + pick(positions, context)
        asked = torch.cat([pick(positions, targets[:, i]) for i in range(count)]) + self.token
        x = torch.cat([x.repeat(count, 1, 1), asked], 1)
        for layer in self.layers:
            x = layer(x)
        return self.leave(self.norm(x)[:, kept:])


class Plain(nn.Module):
    """The whole step's model, built from plain numbers."""

    def __init__(self, model: dict, predictor: dict) -> None:
        super().__init__()
        shape = (
            model["image"],
            model["patch"],
            model["width"],
            model["depth"],
            model["heads"],
            model["mlp_ratio"],
        )
        self.encoder, self.target = Vit(*shape), Vit(*shape).requires_grad_(False)
        self.target.load_state_dict(self.encoder.state_dict())
        grid = model["image"] // model["patch"]
        self.predictor = Imagine(
            grid, model["width"], predictor["width"], predictor["depth"], predictor["heads"]
        )

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """images [B, 3, S, S], context [B, K], targets [B, M, T] -> loss []."""
        with torch.no_grad():
            goal = self.target(images)
            goal = F.layer_norm(goal, goal.shape[-1:])
            goal = torch.cat([pick(goal, targets[:, i]) for i in range(targets.shape[1])])
        guess = self.predictor(self.encoder(images, context), context, targets)
        return F.smooth_l1_loss(guess, goal)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for slow, fast in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            slow.mul_(momentum).add_((1.0 - momentum) * fast)


def pick(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))
