"""Power laws: known exponents are inside their intervals, and unsuitable data are refused."""

import functools
import itertools

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import stdtrit

from jepa_cluster.report import comparisons, huber_fit, power_law
from jepa_cluster.results import student

OFFSET = "a C^-b + c"
POWER = "a C^-b"
BUDGETS = (1e15, 3e15, 1e16, 3e16)
SIZES = (1e6, 3e6, 1e7, 3e7)


def synthetic_trials(rng, budgets=8, noise=0.01):
    """Return compute in FLOP and errors 0.6 (C / 1e15)^-0.2 + 0.1 with log-normal noise.

    There are two seeds per budget.
    """
    compute = np.repeat(np.geomspace(1e15, 1e17, budgets), 2)
    return compute, true_error(compute) * np.exp(noise * rng.normal(size=len(compute)))


def true_error(compute):
    return 0.6 * (compute / 1e15) ** -0.2 + 0.1


def contains(interval, value: float) -> bool:
    return interval.low <= value <= interval.high


@pytest.mark.parametrize("level", [student.ONE_SIGMA, 0.9, 0.95])
def test_students_quantile_equals_that_of_scipy(level: float):
    for degrees in (*range(1, 30), 999):
        expected = stdtrit(degrees, (1 + level) / 2)
        assert student.quantile(degrees, level) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_nine_of_ten_intervals_contain_the_truth():
    """They do in 85 to 95 % of 200 studies, for the exponent, the offset and a prediction."""
    rng = np.random.default_rng(7)
    inside = np.zeros(3)
    for i in range(200):
        compute, error = synthetic_trials(rng)
        law = power_law.fit(compute, error, forms=(OFFSET,), draws=120, seed=i)
        assert isinstance(law, power_law.PowerLawFit)
        low, high = law.band(5e17)
        inside += [
            contains(law.parameters["b"], 0.2),
            contains(law.parameters["c"], 0.1),
            low[0] <= true_error(5e17) <= high[0],
        ]
    assert np.all(inside >= 170), inside
    assert np.all(inside <= 190), inside


@pytest.mark.slow
def test_seeds_of_one_point_are_not_independent():
    """The deviation of a size is the same in all its seeds; as separate trials they mislead."""
    rng = np.random.default_rng(9)
    grouped = 0
    separate = 0
    for i in range(60):
        compute = np.repeat(np.geomspace(1e15, 1e17, 8), 4)
        shared_noise = np.repeat(0.01 * rng.normal(size=8), 4)
        noise = 0.002 * rng.normal(size=len(compute))
        error = true_error(compute) * np.exp(shared_noise + noise)

        fit = functools.partial(power_law.fit, compute, error, forms=(OFFSET,), draws=120, seed=i)
        grouped += contains(fit(points=list(compute)).parameters["b"], 0.2)
        separate += contains(fit(points=None).parameters["b"], 0.2)
    assert grouped >= 49
    assert separate <= 42


def test_the_fit_equals_that_of_an_independent_minimiser():
    """scipy minimises the same robust loss from three starting points."""
    rng = np.random.default_rng(1)
    compute, error = synthetic_trials(rng, budgets=10, noise=0.02)
    law = power_law.fit(compute, error, forms=(OFFSET,), draws=2)
    x = compute / law.compute_scale
    y = np.log(error)
    scale = huber_fit.robust_scale(y - np.log(law.predict(compute)), 3)

    def predict(theta):
        return np.exp(theta[0]) * x ** -np.exp(theta[1]) + np.exp(theta[2])

    def residual(theta):
        return y - np.log(predict(theta))

    found = []
    for start in ([-1.5, -1, -3], [-1.5, -2, -5], [-2, -0.5, -2]):
        minimum = least_squares(
            residual,
            start,
            loss="huber",
            f_scale=huber_fit.HUBER * scale,
            xtol=1e-14,
            ftol=1e-14,
        )
        found.append(minimum)
    best = min(found, key=lambda minimum: minimum.cost)
    assert np.allclose(predict(law.theta), predict(best.x), rtol=2e-3)


def test_one_outlier_changes_a_robust_law_little():
    """A trial with twice the error changes the exponent by less than its interval."""
    rng = np.random.default_rng(2)
    compute, error = synthetic_trials(rng, budgets=10)
    before = power_law.fit(compute, error, forms=(POWER,)).parameters["b"]
    error[7] *= 2
    after = power_law.fit(compute, error, forms=(POWER,)).parameters["b"]
    assert abs(after.value - before.value) < 0.02


def test_three_points_on_a_line_are_a_law():
    known = power_law.fit([1e15, 4e15, 1.6e16], [0.6, 0.5, 0.41])
    assert isinstance(known, power_law.PowerLawFit)
    assert known.unreliable_because == ""
    assert str(known).startswith("E = a C^-b")


def test_three_points_off_a_line_are_no_law():
    """The interval of b reaches its lower bound."""
    unknown = power_law.fit([1e15, 4e15, 1.6e16], [0.6, 0.58, 0.2])
    assert isinstance(unknown, power_law.PowerLawFit)
    assert unknown.parameters["b"].low == 0
    assert str(unknown).startswith("no law: the interval of b includes 0; E = a C^-b: a = ")


def test_all_forms_are_listed_and_the_best_one_is_taken():
    """The report shows the AICc of each form. The data have an offset."""
    law = power_law.fit(*synthetic_trials(np.random.default_rng(3)))
    assert set(law.aicc) == set(power_law.FORMS)
    assert law.form == OFFSET
    assert "a C^-b + c" in str(law)


@pytest.mark.parametrize(
    ("compute", "error", "says"),
    [
        ([], [], "0 distinct budgets"),
        ([1e15, 1e15, 1e15], [0.5, 0.4, 0.45], "1 distinct budgets"),
        ([1e15, 2e15], [0.5, 0.4], "2 distinct budgets"),
        ([1e15, 1.2e15, 1.5e15], [0.5, 0.4, 0.3], "factor of 1.5"),
        ([1e15, 4e15, 9e15], [0.5, 0.5, 0.5], "same everywhere"),
        ([1e15, 4e15, 9e15], [0.5, float("nan"), 0.3], "no positive compute and error"),
        ([1e15, 4e15, 9e15, 3e16], [0.3, 0.35, 0.4, 0.45], "does not fall"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused_with_a_reason(compute, error, says):
    answer = power_law.fit(compute, error)
    assert isinstance(answer, power_law.NotEnoughData), answer
    assert says in str(answer), answer


def iso_flop_trials(seeds: int = 2, effect: float = 0.0) -> list[dict]:
    """Make trials of four sizes, four budgets and two mask settings.

    The best size is 2e6 (C / 1e15)^0.5.
    effect: how much the error grows per target scale.
    """
    rng = np.random.default_rng(4)
    rows = []
    for scale, target in ((".1-.15", 0.125), (".15-.2", 0.175)):
        for compute, size, seed in itertools.product(BUDGETS, SIZES, range(seeds)):
            distance = np.log10(size / (2e6 * (compute / 1e15) ** 0.5))
            noise = 0.002 * rng.normal()
            row = {
                "model": f"m{size:g}",
                "steps": compute,
                "seed": seed,
                "parameters": size,
                "flops_total": compute,
                "e": 0.3 + 0.05 * distance**2 + noise + effect * (target - 0.125),
                "mask.target_scale": scale,
            }
            rows.append(row)
    return rows


def with_scale(rows: list[dict], scale: str) -> list[dict]:
    return [row for row in rows if row["mask.target_scale"] == scale]


def test_iso_flop_parabolas_find_the_best_size_and_its_growth():
    """N_opt(C) grows with an exponent of 0.5."""
    frontier = comparisons.fit_iso_flop(iso_flop_trials(), "e", "flops_total")
    assert len(frontier.budgets) == 4
    assert contains(frontier.exponent, 0.5)
    assert frontier.budgets[0].optimum == pytest.approx(2e6, rel=0.3)


def test_iso_flop_is_refused_where_no_budget_has_three_sizes():
    points = ((1e6, 1e15), (3e6, 3e15))
    all_rows = iso_flop_trials(seeds=1)
    rows = [row for row in all_rows if (row["parameters"], row["flops_total"]) in points]
    answer = comparisons.fit_iso_flop(rows, "e", "flops_total")
    assert "no budget is shared by three sizes" in str(answer)


def test_a_difference_between_settings_is_paired_and_has_an_interval():
    """A pair has the same model, horizon and seed, so a size cannot look like a mask effect."""
    data = iso_flop_trials(effect=0.6)
    a = with_scale(data, ".15-.2")
    b = with_scale(data, ".1-.15")
    shown = comparisons.paired_difference("wide", "narrow", a, b, "e")
    assert shown.pairs == 32
    assert 1.05 < shown.ratio.low < shown.ratio.value < 1.15
    assert "a difference" in str(shown)


def test_without_an_effect_no_difference_is_shown():
    null = iso_flop_trials()
    a = with_scale(null, ".15-.2")
    b = with_scale(null, ".1-.15")
    all_pairs = comparisons.paired_difference("wide", "narrow", a, b, "e")
    assert "no difference shown" in str(all_pairs)
    one_pair = comparisons.paired_difference("wide", "narrow", a[:1], b[:1], "e")
    assert "an interval needs 2" in str(one_pair)


def test_the_largest_budget_is_held_out_and_predicted():
    """The text has the error of the prediction and says whether it is inside the interval."""
    compute, error = synthetic_trials(np.random.default_rng(5))
    held_out = comparisons.hold_out(compute, error, list(compute))
    assert isinstance(held_out, comparisons.HoldOut)
    assert abs(held_out.error) < 0.1
    assert "inside the interval" in str(held_out)


def test_holding_out_is_refused_with_too_few_budgets():
    answer = comparisons.hold_out([1e15, 4e15, 1.6e16], [0.5, 0.4, 0.33], [1, 2, 3])
    assert "without the largest budget" in str(answer)
