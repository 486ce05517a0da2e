"""Learning rate, weight decay and momentum per step, against formulas worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jepa_cluster.config import Optim
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa.schedules import initial_share, schedule_at

REFERENCE = Optim(
    batch=2048,
    steps=1000,
    epochs=None,
    warmup_steps=100,
    warmup_epochs=None,
    start_lr=2e-4,
    lr=1e-3,
    final_lr=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    decay_shape="cosine",
    momentum=0.996,
    final_momentum=1.0,
)


WSD = dataclasses.replace(REFERENCE, schedule="wsd", cooldown_steps=200)


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value of a half cosine from start to end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def test_the_first_update_has_one_step_of_warmup_and_the_first_momentum():
    """Rate and decay count from 1, the momentum counts from 0, as in the reference code."""
    first = schedule_at(REFERENCE, 1)
    assert first.lr == pytest.approx(2e-4 + 8e-4 / 100)
    assert first.weight_decay == pytest.approx(cosine(0.04, 0.4, 1 / 1000))
    assert first.momentum == 0.996


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        pytest.param(99, 2e-4 + 0.99 * 8e-4, id="in warmup"),
        pytest.param(100, 1e-3, id="end of warmup"),
        pytest.param(550, (1e-3 + 1e-6) / 2, id="midway"),
        pytest.param(1000, 1e-6, id="last"),
    ],
)
def test_the_rate_is_a_cosine_over_the_steps_after_warmup(step: int, lr: float):
    assert schedule_at(REFERENCE, step).lr == pytest.approx(lr)


def test_the_weight_decay_is_a_cosine_or_linear():
    """The reference code uses a cosine, the paper a linear increase."""
    paper = dataclasses.replace(REFERENCE, decay_shape="linear")
    assert schedule_at(REFERENCE, 1000).weight_decay == pytest.approx(0.4)
    assert schedule_at(REFERENCE, 500).weight_decay == pytest.approx(0.22)
    assert schedule_at(paper, 250).weight_decay == pytest.approx(0.04 + 0.36 / 4)


def test_the_momentum_is_linear_and_one_step_behind():
    expected = 0.996 + 0.004 * 999 / 1000
    assert schedule_at(REFERENCE, 1000).momentum == pytest.approx(expected)


def test_a_horizon_that_is_not_whole_is_rounded_for_all_but_the_momentum():
    """As in the reference code: 999 steps at 1.25 are 1248.75 for the momentum, 1248 for others."""
    optim = dataclasses.replace(REFERENCE, steps=999, schedule_stretch=1.25, momentum_steps=1248.75)
    last = schedule_at(optim, 999)
    expected = 0.996 + 998 / 1248.75 * 0.004
    assert last.momentum == pytest.approx(expected, rel=1e-12)
    assert last.weight_decay == pytest.approx(cosine(0.04, 0.4, 999 / 1248))


def test_a_stretched_schedule_is_cut_before_its_end():
    """With schedule_stretch 1.25 the last step is at 80 % of every schedule."""
    optim = dataclasses.replace(REFERENCE, schedule_stretch=1.25)
    stretched = schedule_at(optim, 1000)
    after_warmup = (1000 - 100) / (1250 - 100)
    assert stretched.lr == pytest.approx(cosine(1e-3, 1e-6, after_warmup))
    assert stretched.weight_decay == pytest.approx(cosine(0.04, 0.4, 0.8))


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (100, 1e-3),
        (500, 1e-3),
        (800, 1e-3),
        (900, (1e-3 + 1e-6) / 2),
        (1000, 1e-6),
    ],
)
def test_wsd_is_constant_after_warmup_and_then_falls_linearly(step: int, lr: float):
    assert schedule_at(WSD, step).lr == pytest.approx(lr)


def test_a_wsd_branch_shares_every_step_before_its_cooldown_with_the_trunk():
    trunk = dataclasses.replace(WSD, steps=5000)
    for step in range(1, 801):
        assert schedule_at(WSD, step).lr == schedule_at(trunk, step).lr


def test_without_warmup_the_rate_starts_at_its_peak():
    optim = dataclasses.replace(REFERENCE, warmup_steps=0)
    assert schedule_at(optim, 1).lr == pytest.approx(1e-3, rel=1e-4)


def test_a_config_without_steps_is_refused():
    optim = dataclasses.replace(REFERENCE, steps=None, epochs=3.0)
    with pytest.raises(ConfigError, match=r"optim\.steps=None"):
        schedule_at(optim, 1)


def test_what_the_target_holds_of_its_initial_weights_is_the_product_of_its_momenta():
    optim = dataclasses.replace(
        REFERENCE, steps=4, warmup_steps=1, momentum=0.9, final_momentum=1.0
    )
    momenta = [schedule_at(optim, step).momentum for step in (1, 2, 3)]
    assert initial_share(optim, 3) == pytest.approx(math.prod(momenta))
    assert initial_share(optim, 0) == 1.0
