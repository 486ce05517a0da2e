"""Which gradient norms, target deviations and RankMe values are a divergence."""

import json
import math

import pytest

from jepa_cluster.config import DivergenceConfig
from jepa_cluster.training.divergence import WARMUP, DivergenceDetector

CONFIG = DivergenceConfig(
    enabled=True,
    spike=4.0,
    patience=2,
    target_std=0.05,
    rankme=2.0,
)


def calm(steps: int = WARMUP) -> DivergenceDetector:
    """Return a detector that has seen ordinary steps."""
    detector = DivergenceDetector(CONFIG)
    for step in range(1, steps + 1):
        detector.observe(step, 1.0 + 0.1 * (step % 2), 0.5)
    return detector


def test_as_many_suspicious_steps_in_a_row_as_patience_are_a_divergence():
    """One spike is ignored, two in a row are not. Steps after a divergence are not judged."""
    detector = calm()
    usual = detector.mean_log_norm
    detector.observe(21, 9.0, 0.5)
    assert detector.suspicious_steps == 1
    assert detector.mean_log_norm == usual
    detector.observe(22, 1.0, 0.5)
    assert detector.suspicious_steps == 0
    detector.observe(23, 9.0, 0.5)
    assert not detector.diverged_at
    detector.observe(24, 8.0, 0.5)
    detector.observe(25, 1.0, 0.5)
    assert detector.diverged_at == 24
    assert detector.suspicious_since == 23
    assert detector.evidence == (
        "diverged at step 24: gradient norm 8, usually 1.05 (21 steps); suspicious since step 23"
    )


@pytest.mark.parametrize("grad_norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_suspicious_from_the_first_step(grad_norm: float):
    """Any finite norm is accepted while the usual one is not known."""
    detector = DivergenceDetector(CONFIG)
    detector.observe(1, 1e-3, 0.5)
    detector.observe(2, 1e3, 0.5)
    assert not detector.suspicious_steps
    detector.observe(3, grad_norm, 0.5)
    detector.observe(4, grad_norm, 0.5)
    assert detector.diverged_at == 4


@pytest.mark.parametrize("target_std", [0.01, math.nan])
def test_a_flat_target_is_a_collapse(target_std: float):
    detector = calm()
    detector.observe(21, 1.0, target_std)
    detector.observe(22, 1.0, target_std)
    assert detector.diverged_at == 22
    assert f"target_std {target_std:.3g}, at least 0.05 expected" in detector.evidence


def test_a_spike_and_a_flat_target_count_as_one_streak():
    detector = calm()
    detector.observe(21, 9.0, 0.5)
    detector.observe(22, 1.0, 0.01)
    assert detector.diverged_at == 22
    assert detector.suspicious_since == 21


@pytest.mark.parametrize("rankme", [1.9, math.nan])
def test_a_low_rankme_is_a_divergence_except_before_training(rankme: float):
    """Patience does not count here: probes are rare."""
    detector = calm(49)
    detector.observe_rankme(0, rankme)
    detector.observe_rankme(40, 2.0)
    assert not detector.diverged_at
    detector.observe_rankme(49, rankme)
    assert detector.diverged_at == 49
    assert detector.suspicious_since == 49
    assert f"RankMe {rankme:.3g}, at least 2 expected" in detector.evidence


def test_a_low_rankme_within_a_streak_names_its_first_step():
    detector = DivergenceDetector(DivergenceConfig(enabled=True, patience=9))
    for step in (1, 2, 3):
        detector.observe(step, math.nan, 0.5)
    detector.observe_rankme(3, 1.0)
    assert detector.diverged_at == 3
    assert detector.suspicious_since == 1


@pytest.mark.parametrize("interrupted", [1, 10, 21, 22])
def test_a_resumed_detector_judges_as_an_uninterrupted_one(interrupted: int):
    """Its state, with the streak of suspicious steps, goes through the JSON of a manifest."""
    norms = [1.0 + 0.3 * math.sin(step) for step in range(20)]
    norms += [9.0, 1.0, 9.0, 9.0]
    undisturbed = DivergenceDetector(CONFIG)
    resumed = DivergenceDetector(CONFIG)
    for step, norm in enumerate(norms, 1):
        undisturbed.observe(step, norm, 0.5)
        resumed.observe(step, norm, 0.5)
        if step == interrupted:
            state = json.loads(json.dumps(resumed.state()))
            resumed = DivergenceDetector(CONFIG)
            resumed.restore(state)
        assert resumed.state() == undisturbed.state()
    assert undisturbed.diverged_at == resumed.diverged_at == 24
    assert undisturbed.evidence == resumed.evidence


def test_restoring_an_empty_state_resets_the_detector():
    detector = calm()
    detector.restore({})
    assert detector.state() == DivergenceDetector(CONFIG).state()


def test_a_disabled_detector_judges_and_keeps_nothing():
    detector = DivergenceDetector(DivergenceConfig())
    detector.observe(1, math.nan, 0.0)
    detector.observe_rankme(2, 0.0)
    assert detector.state() == {}
    assert not detector.diverged_at
    assert not detector.suspicious_steps
