"""Learning rate, weight decay and target momentum as pure functions of the step.

In: the optim section of a recipe and a step. Out: the three settings of that step. No torch and no
state: a resumed attempt needs nothing but the step.

Steps count from 1: `schedule_at(optim, 1)` is the first update. As in the reference code, learning
rate and weight decay are read at the step's own number s: s/W of a warm-up of W steps has passed at
step s < W. The momentum is applied after the update and read at s - 1: the first update uses
`optim.momentum` itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from jepa_cluster.config import Optim
from jepa_cluster.errors import ConfigError


class Schedule(NamedTuple):
    """The settings of one update. momentum: of the target encoder."""

    lr: float
    weight_decay: float
    momentum: float


def schedule_at(optim: Optim, step: int) -> Schedule:
    """Return the settings of update `step` (1 .. optim.steps).

    Raises ConfigError while steps or warmup_steps is null.
    """
    if optim.steps is None or optim.warmup_steps is None:
        raise ConfigError(
            f"optim.steps={optim.steps}, optim.warmup_steps={optim.warmup_steps}: not resolved"
        )
    horizon = int(optim.steps * optim.schedule_stretch)
    return Schedule(
        learning_rate(optim, step, horizon),
        weight_decay(optim, min(step / horizon, 1.0)),
        # The reference rounds the horizon of rate and decay down, but not that of the momentum.
        target_momentum(optim, step, optim.momentum_steps or horizon),
    )


def initial_share(optim: Optim, step: int) -> float:
    """Return how much of its initial weights the target encoder holds: the product of momenta."""
    horizon = optim.momentum_steps or int((optim.steps or 0) * optim.schedule_stretch)
    momenta = (target_momentum(optim, s, horizon) for s in range(1, step + 1))
    return math.prod(momenta, start=1.0)


def target_momentum(
    optim: Optim,
    step: int,
    horizon: int | float,
) -> float:
    done = min((step - 1) / horizon, 1.0)
    return optim.momentum + done * (optim.final_momentum - optim.momentum)


def shared_prefix_steps(a: Optim, b: Optim) -> int:
    """Return the number of updates after which two plans have the same state; 0 if none.

    Such plans differ only in where they end (`wsd` with constant decay and momentum): a trunk and
    its branch share every step before the first cooldown.
    """
    same_end = dataclasses.replace(
        a, steps=b.steps, cooldown_steps=b.cooldown_steps, momentum_steps=b.momentum_steps
    )
    if same_end != b or a.schedule != "wsd":
        return 0
    last = min((a.steps or 0) - a.cooldown_steps, (b.steps or 0) - b.cooldown_steps)
    if last <= 0:
        return 0
    for step in (1, (last + 1) // 2, last):
        if schedule_at(a, step) != schedule_at(b, step):
            return 0
    return last


def learning_rate(
    optim: Optim,
    step: int,
    horizon: int,
) -> float:
    """Linear warm-up, then a cosine, or (wsd) a plateau and a linear cooldown at the end."""
    warmup = optim.warmup_steps or 0
    if step < warmup:
        return optim.start_lr + step / warmup * (optim.lr - optim.start_lr)
    if optim.schedule == "wsd":
        cooldown = optim.cooldown_steps
        if step <= horizon - cooldown:
            return optim.lr
        remaining = max(horizon - step, 0) / cooldown
        return optim.final_lr + remaining * (optim.lr - optim.final_lr)
    done = min((step - warmup) / max(1, horizon - warmup), 1.0)
    return max(optim.final_lr, cosine(optim.lr, optim.final_lr, done))


def weight_decay(optim: Optim, done: float) -> float:
    """done: fraction of the horizon."""
    start, end = optim.weight_decay, optim.final_weight_decay
    if optim.decay_shape == "cosine":
        return cosine(start, end, done)
    return start + done * (end - start)


def cosine(
    start: float,
    end: float,
    done: float,
) -> float:
    """Half a cosine from start (done = 0) to end (done = 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
