"""Power laws: known exponents are inside their intervals, and unsuitable data are refused."""

import itertools

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import stdtrit

from jepa_cluster.report import comparisons, frontier, huber_fit, power_law
from jepa_cluster.results import student

OFFSET = "a C^-b + c"
POWER = "a C^-b"
BUDGETS = (1e15, 3e15, 1e16, 3e16)
SIZES = (1e6, 3e6, 1e7, 3e7)


def synthetic_trials(
    rng,
    budgets=8,
    noise=0.01,
):
    """Return compute in FLOP and errors 0.6 (C / 1e15)^-0.2 + 0.1 with log-normal noise.

    There are two seeds per budget.
    """
    compute = np.repeat(np.geomspace(1e15, 1e17, budgets), 2)
    return compute, true_error(compute) * np.exp(noise * rng.normal(size=len(compute)))


def true_error(compute):
    return 0.6 * (compute / 1e15) ** -0.2 + 0.1


def contains(
    interval,
    value: float,
) -> bool:
    return interval.low <= value <= interval.high


@pytest.mark.parametrize("level", [student.ONE_SIGMA, 0.9, 0.95])
def test_students_quantile_equals_that_of_scipy(level: float):
    for degrees in (*range(1, 30), 999):
        expected = stdtrit(degrees, (1 + level) / 2)
        assert student.quantile(degrees, level) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_nine_of_ten_intervals_contain_the_truth():
    """They do in 85 to 97 % of 200 studies, for the exponent, the offset and a prediction."""
    rng = np.random.default_rng(7)
    inside = np.zeros(3)
    for _ in range(200):
        compute, error = synthetic_trials(rng)
        law = power_law.fit_trials(compute, error)
        assert isinstance(law, power_law.PowerLawFit)
        low, high = law.band(5e17)
        inside += [
            contains(law.parameters["b"], 0.2),
            contains(law.parameters["c"], 0.1),
            low[0] <= true_error(5e17) <= high[0],
        ]
    assert np.all(inside >= 170), inside
    assert np.all(inside <= 194), inside


@pytest.mark.slow
def test_seeds_of_one_point_are_not_independent():
    """The deviation of a size is the same in all its seeds; more seeds do not average it away."""
    rng = np.random.default_rng(9)
    held = 0
    for _ in range(60):
        compute = np.repeat(np.geomspace(1e15, 1e17, 8), 4)
        shared_noise = np.repeat(0.01 * rng.normal(size=8), 4)
        noise = 0.002 * rng.normal(size=len(compute))
        error = true_error(compute) * np.exp(shared_noise + noise)
        held += contains(power_law.fit_trials(compute, error).parameters["b"], 0.2)
    assert held >= 49


def test_the_fit_equals_that_of_an_independent_minimiser():
    """scipy minimises the same robust loss from three starting points."""
    rng = np.random.default_rng(1)
    compute, error = synthetic_trials(rng, budgets=10, noise=0.02)
    compute, y = compute[::2], np.log(error[::2])
    law = power_law.fit(compute, y[None], np.ones(10), forms=(OFFSET,))
    x = compute / law.compute_scale
    scale = huber_fit.robust_scale(y - np.log(law.predict(compute)), np.ones(10), 3)

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
    """A block with a sixth more error changes the exponent by less than its interval."""
    rng = np.random.default_rng(2)
    compute, error = synthetic_trials(rng, budgets=20)
    before = power_law.fit_trials(compute, error).parameters["b"]
    error[14:16] *= 1.15
    after = power_law.fit_trials(compute, error).parameters["b"]
    assert abs(after.value - before.value) < 0.02


def test_three_points_on_a_line_are_a_law():
    known = power_law.fit_trials([1e15, 4e15, 1.6e16], [0.6, 0.5, 0.41])
    assert isinstance(known, power_law.PowerLawFit)
    assert known.unreliable_because == ""
    assert str(known).startswith("E = a C^-b")


def test_three_points_off_a_line_are_no_law():
    """The interval of b reaches its lower bound."""
    unknown = power_law.fit_trials([1e15, 4e15, 1.6e16], [0.6, 0.58, 0.2])
    assert isinstance(unknown, power_law.PowerLawFit)
    assert unknown.parameters["b"].low == 0
    assert str(unknown).startswith("no law: the interval of b includes 0; E = a C^-b: b = ")


def test_all_forms_are_listed_and_the_best_one_is_taken():
    """The report shows the AICc of each form. The data have an offset."""
    law = power_law.fit_trials(*synthetic_trials(np.random.default_rng(3)))
    assert set(law.aicc) == set(power_law.FORMS)
    assert law.form == OFFSET
    assert "a C^-b + c" in str(law)


@pytest.mark.parametrize(
    ("compute", "error", "says"),
    [
        ([], [], "0 distinct budgets"),
        ([1e15, 1e15, 1e15], [0.5, 0.4, 0.45], "1 distinct budget;"),
        ([1e15, 2e15], [0.5, 0.4], "2 distinct budgets"),
        ([1e15, 1.2e15, 1.5e15], [0.5, 0.4, 0.3], "factor of 1.5"),
        ([1e15, 4e15, 9e15], [0.5, 0.5, 0.5], "same everywhere"),
        ([1e15, 4e15, 9e15], [0.5, float("nan"), 0.3], "no positive compute and error"),
        ([1e15, 4e15, 9e15, 3e16], [0.3, 0.35, 0.4, 0.45], "does not fall"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused_with_a_reason(
    compute,
    error,
    says,
):
    answer = power_law.fit_trials(compute, error)
    assert isinstance(answer, power_law.NotEnoughData), answer
    assert says in str(answer), answer


def test_a_law_of_an_error_that_rises_says_so():
    """Only the cheapest block is on the frontier; that budgets are missing would be wrong."""
    compute = np.geomspace(1e15, 1e18, 6)
    draws = np.log(0.3 + 0.02 * np.arange(6)) + np.zeros((50, 1))
    weights = frontier.weights_of(compute, draws)
    found = power_law.fit(compute, draws, np.ones(6), weights)
    assert "the error does not fall with compute" in str(found)


def test_a_law_with_few_budgets_on_the_frontier_says_so():
    compute = np.geomspace(1e15, 1e18, 6)
    draws = np.log([0.5, 0.51, 0.3, 0.31, 0.32, 0.33]) + np.zeros((50, 1))
    weights = frontier.weights_of(compute, draws)
    found = power_law.fit(compute, draws, np.ones(6), weights)
    assert "2 of 6 budgets are on the frontier" in str(found)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((0.2, 0.179, 0.239), "0.200 [0.179, 0.239]"),
        ((0.0005, 0.0005, 0.002), "0.0005 [0.0005, 0.002]"),
        ((847, 282, 1024), "847 [282, 1024]"),
        ((3e15, 1e15, 1e16), "3e+15 [1e+15, 1e+16]"),
    ],
    ids=["decimals", "small", "integers", "large"],
)
def test_an_interval_has_one_style_of_numbers(
    interval: tuple[float, float, float],
    text: str,
):
    assert str(power_law.Interval(*interval)) == text


def iso_flop_trials(seeds: int = 2) -> list[dict]:
    """Make trials of four sizes, four budgets and two mask settings that are alike.

    The best size is 2e6 (C / 1e15)^0.5.
    """
    rng = np.random.default_rng(4)
    rows = []
    for scale in (".1-.15", ".15-.2"):
        for compute, size, seed in itertools.product(BUDGETS, SIZES, range(seeds)):
            distance = np.log10(size / (2e6 * (compute / 1e15) ** 0.5))
            noise = 0.002 * rng.normal()
            row = {
                "model": f"m{size:g}",
                "steps": compute,
                "seed": seed,
                "parameters": size,
                "flops_total": compute,
                "e": 0.3 + 0.05 * distance**2 + noise,
                "mask.target_scale": scale,
            }
            rows.append(row)
    return rows


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
