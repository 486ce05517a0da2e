"""Does it still learn: spikes and collapse, judged from the numbers of each step and of the probe at each anchor.

In: readings, the same on every rank. Out: a verdict, the same on every rank, and the few numbers it rests on, which
go with each checkpoint so that a resumed attempt judges as an undisturbed one does. Knows no disk and no clock.

An **anchor** is a checkpoint at every `watch.every`-th step at which nothing was suspicious. A verdict sends the trial
back to the last anchor, and only anchors settle history, so that no settled row is ever taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jepa_cluster.config import Watch

LEARN = 20  # steps before the usual gradient norm is believed
MEMORY = 0.98  # of the running mean, a step


class Stability:
    """bad: suspicious steps in a row. fallen: the step of the verdict, 0 while there is none. why: what was seen."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.usual, self.seen, self.bad, self.fallen, self.why = 0.0, 0, 0, 0, ""

    @property
    def on(self) -> bool:
        return self.watch.rollbacks > 0

    def anchors(self, step: int) -> bool:
        """Whether an anchor is due at this step, be it good or not."""
        return self.on and step > 0 and step % self.watch.every == 0

    def good(self, step: int) -> bool:
        """Whether this step, all of it judged, is an anchor."""
        return self.anchors(step) and not self.bad

    def judge(self, step: int, norm: float, target_std: float) -> None:
        """One step after another. norm: of the whole gradient; not finite when the step was skipped."""
        if not self.on or self.fallen:
            return
        times = norm / math.exp(self.usual) if self.seen >= LEARN else 1.0 if math.isfinite(norm) else math.inf
        if not times <= self.watch.spike:
            self._suspect(step, f"gradient norm {norm:.3g}, usually {math.exp(self.usual):.3g}")
        elif not target_std >= self.watch.target_std:
            self._suspect(step, f"target_std {target_std:.3g}")
        else:
            self.bad, self.seen = 0, self.seen + 1
            share = max(1 - MEMORY, 1 / self.seen)
            self.usual += share * (math.log(max(norm, 1e-30)) - self.usual)

    def rank(self, step: int, rankme: float) -> None:
        """The probe at an anchor; a single bad one is a verdict."""
        if self.anchors(step) and not self.fallen and not rankme >= self.watch.rankme:
            self.bad = self.watch.patience - 1
            self._suspect(step, f"RankMe {rankme:.3g}")

    def _suspect(self, step: int, why: str) -> None:
        self.bad, self.why = self.bad + 1, why
        if self.bad >= self.watch.patience:
            self.fallen = step

    def state(self) -> dict[str, float]:
        return {"usual": self.usual, "seen": self.seen, "bad": self.bad, "fallen": self.fallen} if self.on else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Judge on from a checkpoint's numbers; from nothing when there are none."""
        self.usual, self.why = float(state.get("usual", 0.0)), "seen by the attempt before"
        self.seen, self.bad, self.fallen = (int(state.get(k, 0)) for k in ("seen", "bad", "fallen"))
