"""Schedules as pure functions of the step, against closed forms worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jepa_cluster.config import Optim
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import schedules

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


def test_the_first_update_has_one_step_of_warm_up_behind_it_and_the_starting_momentum():
    """Rate and decay count from 1, the momentum from 0, as in the reference code."""
    first = schedules.schedule_at(REFERENCE, 1)
    assert first.lr == pytest.approx(2e-4 + 8e-4 / 100)
    assert first.weight_decay == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 1000)))
    assert first.momentum == 0.996


def test_the_rate_peaks_when_warm_up_ends_and_halves_midway_and_ends_at_the_final_rate():
    """Cosine over the steps after warm-up."""
    assert schedules.schedule_at(REFERENCE, 99).lr == pytest.approx(2e-4 + 0.99 * 8e-4)
    assert schedules.schedule_at(REFERENCE, 100).lr == pytest.approx(1e-3)
    assert schedules.schedule_at(REFERENCE, 550).lr == pytest.approx((1e-3 + 1e-6) / 2)
    assert schedules.schedule_at(REFERENCE, 1000).lr == pytest.approx(1e-6)


def test_decay_and_momentum_end_at_their_final_values():
    """Cosine (reference) or straight (paper) decay; momentum straight, one step behind."""
    paper = dataclasses.replace(REFERENCE, decay_shape="linear")
    assert schedules.schedule_at(REFERENCE, 1000).weight_decay == pytest.approx(0.4)
    assert schedules.schedule_at(REFERENCE, 500).weight_decay == pytest.approx(0.22)
    assert schedules.schedule_at(paper, 250).weight_decay == pytest.approx(0.04 + 0.36 / 4)
    assert schedules.schedule_at(REFERENCE, 1000).momentum == pytest.approx(0.996 + 0.004 * 999 / 1000)


def test_a_stretched_schedule_is_cut_before_its_end():
    """With schedule_stretch 1.25 the last step stands at 80 % of every schedule."""
    stretched = schedules.schedule_at(dataclasses.replace(REFERENCE, schedule_stretch=1.25), 1000)
    done = (1000 - 100) / (1250 - 100)
    assert stretched.lr == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * done)))
    assert stretched.weight_decay == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * 0.8)))


def test_wsd_warms_up_stays_and_cools_down_in_a_straight_line():
    """Plateau until `cooldown_steps` before the end; a branch with another end shares every step of the trunk."""
    wsd = dataclasses.replace(REFERENCE, schedule="wsd", cooldown_steps=200)
    assert [schedules.schedule_at(wsd, s).lr for s in (100, 500, 800)] == pytest.approx([1e-3] * 3)
    assert schedules.schedule_at(wsd, 900).lr == pytest.approx((1e-3 + 1e-6) / 2)
    assert schedules.schedule_at(wsd, 1000).lr == pytest.approx(1e-6)
    longer = dataclasses.replace(wsd, steps=5000)
    assert [schedules.schedule_at(wsd, s).lr for s in range(1, 801)] == [
        schedules.schedule_at(longer, s).lr for s in range(1, 801)
    ]


def test_no_warm_up_starts_at_the_peak_and_unresolved_epochs_are_refused():
    """warmup_steps=0 divides by nothing; null steps are a ConfigError, not a crash."""
    assert schedules.schedule_at(dataclasses.replace(REFERENCE, warmup_steps=0), 1).lr == pytest.approx(1e-3, rel=1e-4)
    with pytest.raises(ConfigError, match=r"optim\.steps=None"):
        schedules.schedule_at(dataclasses.replace(REFERENCE, steps=None, epochs=3.0), 1)
