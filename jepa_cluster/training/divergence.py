"""Detect divergence and collapse from the numbers of each step and of each probe.

In: gradient norm, target_std and RankMe, the same on every rank. Out: a verdict and its evidence,
the same on every rank. The state of the detector is in every checkpoint, so a resumed attempt
judges as an undisturbed one does. This module knows no disk and no clock.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Mapping

from jepa_cluster.config import DivergenceConfig

WARMUP = 20  # unsuspicious steps before a gradient norm is compared with the usual one
DECAY = 0.98  # of the running mean, per step
STATE = ("mean_log_norm", "normal_steps", "suspicious_steps")  # what a checkpoint carries


class DivergenceDetector:
    """Judges one step after another until a verdict.

    diverged_at: step of the verdict, 0 while there is none.
    suspicious_steps: number of suspicious steps in a row, up to the newest step.
    mean_log_norm: running mean of the logarithm of the gradient norm over unsuspicious steps.
    """

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config
        self.mean_log_norm = 0.0
        self.normal_steps = 0
        self.suspicious_steps = 0
        self.diverged_at = 0
        self._seen = ""

    def observe(self, step: int, grad_norm: float, target_std: float) -> None:
        """Judge a step. grad_norm: before clipping; not finite when the step was skipped."""
        if not self.config.enabled or self.diverged_at:
            return
        usual = math.exp(self.mean_log_norm)
        if self._is_spike(grad_norm, usual):
            self._suspect(
                step,
                f"gradient norm {grad_norm:.3g}, usually {usual:.3g} ({self.normal_steps} steps)",
            )
        elif not target_std >= self.config.target_std:  # NaN is suspicious
            self._suspect(
                step, f"target_std {target_std:.3g}, at least {self.config.target_std:g} expected"
            )
        else:
            self.suspicious_steps = 0
            self.normal_steps += 1
            weight = max(1 - DECAY, 1 / self.normal_steps)
            self.mean_log_norm += weight * (math.log(max(grad_norm, 1e-30)) - self.mean_log_norm)

    def observe_rankme(self, step: int, rankme: float) -> None:
        """Judge a probe of a trained encoder. A single RankMe below the limit is a verdict."""
        if not self.config.enabled or self.diverged_at or step == 0:
            return
        if not rankme >= self.config.rankme:
            self.suspicious_steps = max(self.suspicious_steps, 1)
            self.diverged_at = step
            self._seen = f"RankMe {rankme:.3g}, at least {self.config.rankme:g} expected"

    @property
    def suspicious_since(self) -> int:
        """First step of the suspicion that led to the verdict."""
        return self.diverged_at - self.suspicious_steps + 1

    @property
    def evidence(self) -> str:
        """What led to the verdict, in one line."""
        since = self.suspicious_since
        return f"diverged at step {self.diverged_at}: {self._seen}; suspicious since step {since}"

    def state(self) -> dict[str, float]:
        """The numbers that a checkpoint carries. No checkpoint is made after a verdict."""
        if not self.config.enabled:
            return {}
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from the numbers of a checkpoint, or from nothing when there are none."""
        for name in STATE:
            setattr(self, name, state.get(name, 0))

    def _is_spike(self, grad_norm: float, usual: float) -> bool:
        if self.normal_steps < WARMUP:
            return not math.isfinite(grad_norm)
        return not grad_norm <= self.config.spike * usual

    def _suspect(self, step: int, seen: str) -> None:
        self.suspicious_steps += 1
        if self.suspicious_steps >= self.config.patience:
            self.diverged_at = step
            self._seen = seen
