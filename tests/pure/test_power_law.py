"""Power laws: known exponents are recovered with honest intervals, and what cannot be fitted is refused."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import stdtrit

from jepa_cluster.report import comparisons, huber_fit, power_law
from jepa_cluster.results import student

OFFSET, POWER = "a C^-b + c", "a C^-b"


def study(rng, budgets=8, seeds=2, noise=0.01, a=0.6, b=0.2, c=0.1, d=0.0, span=100.0):
    """Synthetic trials: compute in FLOP and error with log-normal noise."""
    compute = np.repeat(np.geomspace(1, span, budgets), seeds)
    error = (a * (compute + d) ** -b + c) * np.exp(noise * rng.normal(size=len(compute)))
    return compute * 1e15, error


def test_two_hundred_synthetic_studies_hold_the_truth_in_their_intervals():
    """Of 200 noisy studies, 85 to 95 % of the 90 % intervals hold the true exponent, and offset and prediction too."""
    rng = np.random.default_rng(7)
    held = np.zeros(3)
    for i in range(200):
        law = power_law.fit(*study(rng), forms=(OFFSET,), draws=120, seed=i)
        assert isinstance(law, power_law.PowerLawFit)
        b, c = law.parameters["b"], law.parameters["c"]
        low, high = law.band(5e17)
        held += [
            b.low <= 0.2 <= b.high,
            c.low <= 0.1 <= c.high,
            low[0] <= 0.6 * 500**-0.2 + 0.1 <= high[0],
        ]
    assert np.all((held >= 170) & (held <= 190)), held


def test_what_a_points_seeds_share_is_no_noise_that_more_seeds_average_away():
    """A size that lies off the law stays off in every seed: taken as separate trials the interval is too narrow."""
    rng = np.random.default_rng(9)
    held = np.zeros(2)
    for i in range(60):
        compute = np.repeat(np.geomspace(1e15, 1e17, 8), 4)
        error = (0.6 * (compute / 1e15) ** -0.2 + 0.1) * np.exp(
            np.repeat(0.01 * rng.normal(size=8), 4)
        )
        error *= np.exp(0.002 * rng.normal(size=len(error)))
        for j, points in enumerate((list(compute), None)):
            b = power_law.fit(
                compute, error, forms=(OFFSET,), draws=120, seed=i, points=points
            ).parameters["b"]
            held[j] += b.low <= 0.2 <= b.high
    assert held[0] >= 49 and held[1] <= 42, held


def test_the_fit_is_the_one_scipy_finds():
    """An independent minimiser of the same robust loss lands on the same curve."""
    rng = np.random.default_rng(1)
    compute, error = study(rng, budgets=10, noise=0.02)
    law = power_law.fit(compute, error, forms=(OFFSET,), draws=2)
    x, y = compute / law.compute_scale, np.log(error)
    theta = law.theta
    delta = huber_fit.HUBER * huber_fit.robust_scale(y - np.log(law.predict(compute)), 3)

    def residual(p):
        return y - np.log(np.exp(p[0]) * x ** -np.exp(p[1]) + np.exp(p[2]))

    costs = [least_squares(residual, start, loss="huber", f_scale=delta, xtol=1e-14, ftol=1e-14)
             for start in ([-1.5, -1, -3], [-1.5, -2, -5], [-2, -0.5, -2])]  # fmt: skip
    best = min(costs, key=lambda r: r.cost)
    ours = np.exp(theta[0]) * x ** -np.exp(theta[1]) + np.exp(theta[2])
    reference = np.exp(best.x[0]) * x ** -np.exp(best.x[1]) + np.exp(best.x[2])
    assert np.allclose(ours, reference, rtol=2e-3)


def test_students_quantile_is_scipys():
    """Of any number of seeds, and of one standard deviation as of 90 %."""
    for degrees in (*range(1, 30), 999):
        for level in (student.ONE_SIGMA, 0.9, 0.95):
            assert student.quantile(degrees, level) == pytest.approx(stdtrit(degrees, (1 + level) / 2), rel=1e-12)


def test_one_wild_trial_moves_a_robust_law_little():
    """A diverged trial at twice the error changes the exponent by less than its own interval."""
    rng = np.random.default_rng(2)
    compute, error = study(rng, budgets=10)
    clean = power_law.fit(compute, error, forms=(POWER,)).parameters["b"]
    error[7] *= 2
    assert (
        abs(power_law.fit(compute, error, forms=(POWER,)).parameters["b"].value - clean.value)
        < 0.02
    )


def test_three_points_off_a_line_know_no_exponent_and_the_law_says_so():
    """The interval of b reaches its lower bound; with the points on the line, nothing is in doubt."""
    c = np.array([1e15, 4e15, 1.6e16])
    known, unknown = power_law.fit(c, [0.6, 0.5, 0.41]), power_law.fit(c, [0.6, 0.58, 0.2])
    assert isinstance(known, power_law.PowerLawFit) and isinstance(unknown, power_law.PowerLawFit)
    assert known.unreliable_because == "" and str(known).startswith("E = a C^-b")
    assert unknown.parameters["b"].low == 0
    assert str(unknown).startswith("no law: the interval of b includes 0; E = a C^-b: a = ")


def test_all_forms_tried_are_listed():
    """The reader sees each form's AICc; the offset form is taken when the data carry it."""
    law = power_law.fit(*study(np.random.default_rng(3)))
    assert set(law.aicc) == set(power_law.FORMS) and law.form == OFFSET and "a C^-b + c" in str(law)


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
def test_what_cannot_be_fitted_is_refused_with_what_is_missing(compute, error, says):
    """No number comes out of degenerate data."""
    answer = power_law.fit(compute, error)
    assert isinstance(answer, power_law.NotEnoughData) and says in str(answer), answer


def rows(
    sizes=(1e6, 3e6, 1e7, 3e7), budgets=(1e15, 3e15, 1e16, 3e16), best=2e6, seeds=2, effect=None
):
    """Trials on iso-FLOP parabolas whose best size is best * (C / 1e15)^0.5, and a mask axis of two settings."""
    rng = np.random.default_rng(4)
    out = []
    for scale, target in ((".1-.15", 0.125), (".15-.2", 0.175)):
        for c in budgets:
            for n in sizes:
                for seed in range(seeds):
                    away = np.log10(n / (best * (c / 1e15) ** 0.5))
                    error = (
                        0.3
                        + 0.05 * away**2
                        + 0.002 * rng.normal()
                        + (effect or 0.0) * (target - 0.125)
                    )
                    out.append({"model": f"m{n:g}", "steps": c, "seed": seed, "parameters": n, "flops_total": c,
                                "e": error, "mask.target_scale": scale})  # fmt: skip
    return out


def test_iso_flop_parabolas_find_the_best_size_and_its_growth():
    """N_opt(C) grows with the exponent the data were made with, inside its interval."""
    frontier = comparisons.fit_iso_flop(rows(), "e", "flops_total")
    assert len(frontier.budgets) == 4 and frontier.exponent.low <= 0.5 <= frontier.exponent.high
    assert frontier.budgets[0].optimum == pytest.approx(2e6, rel=0.3)


def test_iso_flop_is_refused_where_no_budget_is_shared():
    """One size a budget is no parabola."""
    lonely = [
        r
        for r in rows(seeds=1)
        if (r["parameters"], r["flops_total"]) in ((1e6, 1e15), (3e6, 3e15))
    ]
    assert "no budget is shared by three sizes" in str(
        comparisons.fit_iso_flop(lonely, "e", "flops_total")
    )


def test_a_difference_between_settings_is_paired_and_has_an_interval():
    """Size does not pose as a mask effect: pairs of equal model, horizon and seed."""
    data = rows(effect=0.6)
    a, b = ([r for r in data if r["mask.target_scale"] == s] for s in (".15-.2", ".1-.15"))
    shown = comparisons.paired_difference("wide", "narrow", a, b, "e")
    assert (
        shown.pairs == 32
        and 1.05 < shown.ratio.low < shown.ratio.value < 1.15
        and "a difference" in str(shown)
    )
    null = rows()
    a, b = ([r for r in null if r["mask.target_scale"] == s] for s in (".15-.2", ".1-.15"))
    assert "no difference shown" in str(comparisons.paired_difference("wide", "narrow", a, b, "e"))
    assert "an interval needs 2" in str(
        comparisons.paired_difference("wide", "narrow", a[:1], b[:1], "e")
    )


def test_the_largest_budget_is_held_out_and_predicted():
    """The extrapolation is reported with its error and whether the interval held."""
    compute, error = study(np.random.default_rng(5))
    held = comparisons.hold_out(compute, error, list(compute))
    assert (
        isinstance(held, comparisons.HoldOut)
        and abs(held.error) < 0.1
        and "inside the interval" in str(held)
    )
    assert "without the largest budget" in str(
        comparisons.hold_out([1e15, 4e15, 1.6e16], [0.5, 0.4, 0.33], [1, 2, 3])
    )
