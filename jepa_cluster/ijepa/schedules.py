"""Learning rate, weight decay and target momentum as pure functions of the step.

In: the optim section of a recipe and a step. Out: the three settings of that step. No torch, no state: a resumed
attempt needs the step and nothing else.

Steps count from 1: `at(optim, 1)` is the very first update. As in the published code, rate and decay are read at
the step's own number s (so a warm-up of W steps has s/W of the way behind it at step s < W), and the momentum,
applied after the update, at s - 1 (the first update uses `momentum` itself).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from jepa_cluster.config import Optim
from jepa_cluster.errors import ConfigError


class Settings(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float


def at(optim: Optim, step: int) -> Settings:
    """Settings of update number `step` (1 .. optim.steps). ConfigError while steps or warmup_steps is null."""
    if optim.steps is None or optim.warmup_steps is None:
        raise ConfigError(f"optim.steps={optim.steps}, optim.warmup_steps={optim.warmup_steps}: not resolved")
    horizon = int(optim.steps * optim.stretch)
    done = min(step / horizon, 1.0)
    start, end = optim.weight_decay, optim.final_weight_decay
    fall = cosine(start, end, done) if optim.decay_shape == "cosine" else start + done * (end - start)
    momentum = optim.momentum + min((step - 1) / horizon, 1.0) * (optim.final_momentum - optim.momentum)
    return Settings(rate(optim, step, horizon), fall, momentum)


def shared(a: Optim, b: Optim) -> int:
    """Updates after which two plans have brought the same state: until the first cool-down; 0 when they never agree.

    Such plans differ in nothing but where they end (`wsd` with constant decay and momentum): a trunk and its branch.
    """
    if dataclasses.replace(a, steps=b.steps, cooldown_steps=b.cooldown_steps) != b or a.schedule != "wsd":
        return 0
    last = min((o.steps or 0) - o.cooldown_steps for o in (a, b))
    return last if last > 0 and all(at(a, s) == at(b, s) for s in (1, (last + 1) // 2, last)) else 0


def rate(optim: Optim, step: int, horizon: int) -> float:
    """The learning rate: linear warm-up, then a cosine, or (wsd) a plateau and a linear cool-down at the end."""
    warm = optim.warmup_steps or 0
    if step < warm:
        return optim.start_lr + step / warm * (optim.lr - optim.start_lr)
    if optim.schedule == "wsd":
        left = horizon - step
        return optim.lr if left >= optim.cooldown_steps else cool(optim, left)
    done = min((step - warm) / max(1, horizon - warm), 1.0)
    return max(optim.final_lr, cosine(optim.lr, optim.final_lr, done))


def cool(optim: Optim, left: int) -> float:
    return optim.final_lr + max(left, 0) / optim.cooldown_steps * (optim.lr - optim.final_lr)


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine from start (done = 0) to end (done = 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
