"""The watch's verdicts, from numbers alone."""

import math

from jepa_cluster.config import Watch
from jepa_cluster.training.stability import LEARN, Stability

WATCH = Watch(rollbacks=1, every=50, spike=4.0, patience=2, target_std=0.05, rankme=2.0)


def calm(steps: int = LEARN) -> Stability:
    stability = Stability(WATCH)
    for step in range(1, steps + 1):
        stability.judge(step, 1.0 + 0.1 * (step % 2), 0.5)
    return stability


def test_a_verdict_takes_as_many_bad_steps_in_a_row_as_patience_says():
    """One spike is forgiven, two in a row are not; what comes after a verdict is not judged."""
    stability = calm()
    for step, norm in ((21, 9.0), (22, 1.0), (23, 9.0)):
        stability.judge(step, norm, 0.5)
    assert stability.bad == 1 and not stability.fallen
    stability.judge(24, math.nan, 0.5)
    stability.judge(25, 1.0, 0.5)
    assert stability.fallen == 24 and "gradient norm" in stability.why


def test_a_flat_target_and_a_lost_rank_are_collapses():
    """target_std step by step; RankMe at an anchor alone, where one bad probe is enough."""
    stability = calm()
    stability.judge(21, 1.0, 0.01)
    stability.judge(22, 1.0, 0.01)
    assert stability.fallen == 22 and "target_std" in stability.why
    stability = calm(50)
    stability.rank(49, 1.0)
    assert stability.good(50)
    stability.rank(50, 1.0)
    assert stability.fallen == 50 and not stability.good(50)


def test_nothing_is_judged_before_the_usual_norm_is_known_but_for_numbers_that_are_none():
    """A warm-up may do as it likes; NaN is bad from the first step on."""
    stability = Stability(WATCH)
    stability.judge(1, 1e-3, 0.5)
    stability.judge(2, 1e3, 0.5)
    assert not stability.bad
    stability.judge(3, math.inf, 0.5)
    stability.judge(4, math.nan, 0.5)
    assert stability.fallen == 4


def test_a_resumed_watch_judges_as_one_that_was_never_interrupted():
    """All it knows goes through the checkpoint's manifest, the bad streak included; off, it keeps nothing."""
    alone, resumed = calm(), Stability(WATCH)
    alone.judge(21, 9.0, 0.5)
    resumed.restore(alone.state())
    for stability in (alone, resumed):
        stability.judge(22, 9.0, 0.5)
    assert alone.fallen == resumed.fallen == 22 and alone.state() == resumed.state()
    off = Stability(Watch())
    off.judge(1, math.nan, 0.0)
    assert off.state() == {} and not off.fallen and not off.anchors(1000)
