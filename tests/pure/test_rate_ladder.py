"""The best rate of a ladder, and the law of several."""

import itertools
import math

import numpy as np
import pytest

from jepa_cluster.report import calibration
from jepa_cluster.report.rate_ladder import Ladder, Optimum, optimum


def octaves_of(
    rates: int,
    apart: float,
    seeds: int,
    offset: float = 0.0,
) -> np.ndarray:
    return np.repeat(offset + apart * (np.arange(rates) - (rates - 1) / 2), seeds)


def found_in(
    octaves: np.ndarray,
    rise: np.ndarray,
    noise: float,
    seed: int,
    untrained: float = 0.6,
) -> Optimum:
    """Return the optimum of a ladder of two seeds whose error is about .4 at its best rate, 1."""
    rng = np.random.default_rng(seed)
    seeds = np.arange(len(octaves)) % 2
    shared = 0.1 * rng.normal(size=2)[seeds]
    errors = 0.4 * np.exp(rise + shared + noise * rng.normal(size=len(octaves)))
    found = optimum(Ladder(2.0**octaves, errors, seeds, np.full(len(octaves), untrained)))
    assert isinstance(found, Optimum)
    return found


@pytest.mark.parametrize(("left", "right"), [(0.05, 0.05), (0.06, 0.02), (0.02, 0.06)])
def test_the_interval_contains_the_best_rate(
    left: float,
    right: float,
):
    """It does in most of 60 ladders, also where one side is steeper."""
    held = 0
    for seed in range(60):
        octaves = octaves_of(6, 1.0, 2, offset=(seed % 20) / 20 - 0.5)
        rise = octaves**2 * np.where(octaves < 0, left, right)
        found = found_in(octaves, rise, 0.03, seed)
        assert not found.problems
        held += 1.0 in found.lr
    assert held >= 49


def test_a_flat_ladder_has_a_wide_interval_and_no_problem():
    """To be off costs nothing, which its interval shows."""
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, 0 * octaves, 0.03, 1)
    assert not found.problems
    assert found.lr.high / found.lr.low > 8
    assert found.excess(found.lr.value * 2).value < 0.03


@pytest.mark.parametrize(("offset", "side"), [(4.5, -1), (-4.5, 1)])
def test_a_minimum_at_the_edge_is_refused_and_widened(
    offset: float,
    side: int,
):
    octaves = octaves_of(6, 1.0, 2, offset)
    found = found_in(octaves, 0.05 * octaves**2, 0.03, 1)
    assert found.widen == side
    assert "edge of the ladder" in " ".join(found.problems)


def test_a_ladder_is_not_widened_towards_rates_that_diverge():
    octaves = octaves_of(6, 1.0, 2, -2.2)
    errors = 0.4 * np.exp(0.05 * octaves**2)
    untrained = np.full(len(octaves), 0.9)
    assert optimum(Ladder(2.0**octaves, errors, 0 * octaves, untrained)).widen == 1
    found = optimum(Ladder(2.0**octaves, errors, 0 * octaves, untrained, diverged=[2.0]))
    assert not found.problems


def test_a_rate_that_hardly_trains_is_refused():
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, 0.05 * octaves**2, 0.05, 1, untrained=0.42)
    assert "better than the untrained encoder" in found.problems[0]


def test_an_error_with_a_maximum_is_refused():
    octaves = octaves_of(6, 1.0, 2)
    found = found_in(octaves, -0.05 * octaves**2, 0.03, 1)
    assert "no minimum" in " ".join(found.problems)


def test_few_trials_give_no_optimum():
    octaves = octaves_of(2, 1.0, 2)
    found = optimum(Ladder(2.0**octaves, 0.4 + 0 * octaves, 0 * octaves, np.ones(4)))
    assert found == "4 finished at 2 rates; 5 trials at 3 rates are needed"


def test_cells_of_a_law_are_independent():
    """Their draws share no random numbers, so the interval of an exponent contains it."""
    held = 0
    for study in range(40):
        logs, draws = [], []
        for size, steps in itertools.product((1e5, 3e5, 1e6), (100, 300)):
            best = -0.5 * math.log2(size / 1e5) - 0.3 * math.log2(steps / 100)
            octaves = octaves_of(6, 1.0, 2)
            rise = 0.05 * (octaves - best) ** 2
            found = found_in(octaves, rise, 0.03, seed=1000 * study + len(draws), untrained=0.9)
            logs.append([math.log(size), math.log(steps), 0.0])
            draws.append(found.log2_rate * math.log(2))
        law = calibration.fit_law(np.array(logs), np.stack(draws, 1))
        reach = 1.645 * law.covariance[1][1] ** 0.5
        held += abs(law.terms[1] + 0.5) < reach
    assert held >= 33
