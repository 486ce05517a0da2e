"""The best size by E(N, D), beside the parabola, of made-up studies."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from jepa_cluster.report import findings, payload, size_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.comparisons import OptimalSize
from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.power_law import Interval, NotEnoughData, bounded
from jepa_cluster.report.size_law import SizeLaw
from jepa_cluster.results.tables import Row, SweepResults

ALPHA, BETA = 0.45, 0.25
OFF_CENTRE = np.geomspace(0.5, 60, 7)  # in millions; the best ones are 3.5 to 18
BUDGETS = np.geomspace(10, 1000, 5)


def true_error(
    size: float,
    images: float,
) -> float:
    return 0.1 + 0.3 * size**-ALPHA + 0.4 * images**-BETA


def study(
    sizes: Floats = OFF_CENTRE,
    budgets: Floats = BUDGETS,
    power: float = 1.0,
    fixed: float = 0.0,
    noise: float = 0.003,
    seeds: int = 2,
) -> list[Row]:
    """Return trials at equal compute. It is (N^power + fixed) D; N and D in millions."""
    rng = np.random.default_rng(4)
    rows: list[Row] = []
    for size in sizes:
        for budget in budgets:
            images = budget / (size**power + fixed)
            for seed in range(seeds):
                error = true_error(size, images) * np.exp(noise * rng.normal())
                row: Row = {
                    "state": "done",
                    "trial": f"{size:g} {budget:g} {seed}",
                    "label": f"{size:g} {budget:g} {seed}",
                    "model": f"m{size:.2f}",
                    "parameters": 1e6 * size,
                    "steps": round(1000 * images),
                    "images_seen": 1e6 * images,
                    "seed": seed,
                    "setting": "all",
                    "flops_total": 1e12 * budget,
                    "probe/class_error": float(error),
                }
                rows.append(row)
    return rows


def of_one_budget() -> list[Row]:
    """Return trials of one compute, though their images differ."""
    return [{**row, "flops_total": 1e15} for row in study()]


def without_size() -> list[Row]:
    """Return trials whose error depends on the images alone."""
    rows = study()
    for row in rows:
        row["probe/class_error"] = 0.4 * (row["images_seen"] / 1e6) ** -BETA
    return rows


def analysed(
    rows: list[Row],
    compute: str = "flops_total",
) -> Analysis:
    plan: Any = {
        "axes": ["model", "optim.steps"],
        "expect_best": {},
        "claims": [],
    }
    return Analysis(
        SweepResults("s", plan),
        "probe/class_error",
        compute,
        rows,
    )


def law_of(rows: list[Row]) -> SizeLaw:
    found = analysed(rows).size_law
    assert isinstance(found, SizeLaw), found
    return found


def best_size(
    budget: float,
    power: float,
    fixed: float,
) -> float:
    """Return the true best size in millions."""

    def error(log_size: float) -> float:
        size = float(np.exp(log_size))
        return true_error(size, budget / (size**power + fixed))

    return float(np.exp(optimize.minimize_scalar(error, bounds=(-5, 9), method="bounded").x))


def test_the_exponent_is_found_where_a_parabola_is_biased():
    """Both are shown, and that they differ."""
    s = analysed(study(noise=0.002))
    truth = BETA / (ALPHA + BETA)
    law = s.size_law
    assert isinstance(law, SizeLaw)
    assert truth in law.exponent
    assert law.exponent.high - law.exponent.low < 0.03
    assert isinstance(s.iso_flop, OptimalSize)
    assert isinstance(s.iso_flop.exponent, Interval)
    assert truth not in s.iso_flop.exponent
    (line,) = [line for line in findings.summary(s) if line.startswith("best sizes: ")]
    assert f"N_opt ~ C^{s.iso_flop.exponent}" in line
    assert f"N_opt ~ C^{law.exponent} (compute ~ N D, alpha 0.4" in line
    assert "their intervals do not overlap" in line


@pytest.mark.parametrize(
    ("power", "fixed", "relation"),
    [
        (1.0, 0.0, "compute ~ N D"),
        (0.8, 0.0, "compute ~ N^0.80 D"),
        (1.0, 5.0, "compute ~ (N +5M) D"),
    ],
    ids=["N D", "a power of N", "a predictor of fixed size"],
)
def test_the_best_size_is_that_at_the_compute_that_trials_took(
    power: float, fixed: float, relation: str
):
    law = law_of(study(power=power, fixed=fixed, noise=0.001))
    for budget in (10, 100, 1000):
        truth = best_size(budget, power, fixed)
        assert law.at(1e12 * budget)[0] / 1e6 == pytest.approx(truth, rel=0.1)
    assert str(law.per_image) == relation


def test_more_seeds_narrow_the_interval():
    widths: list[float] = []
    for seeds in (2, 8):
        exponent = law_of(study(noise=0.02, seeds=seeds)).exponent
        widths.append(exponent.high - exponent.low)
    assert widths[1] < 0.7 * widths[0]


def test_levels_that_do_not_differ_move_nothing():
    """Five levels of a setting without effect: the interval still has the truth."""
    rows = study(noise=0.02, seeds=5)
    levels = [{**row, "a": str(row["seed"]), "seed": 0} for row in rows]
    plan: Any = {"axes": ["model", "a", "optim.steps"], "expect_best": {}, "claims": []}
    s = Analysis(SweepResults("s", plan), "probe/class_error", "flops_total", levels)
    assert isinstance(s.size_law, SizeLaw)
    assert BETA / (ALPHA + BETA) in s.size_law.exponent


@pytest.mark.parametrize(
    ("rows", "compute", "reason"),
    [
        (study(sizes=OFF_CENTRE[:2]), "flops_total", "2 sizes; E(N, D) needs 3"),
        (study(), "images_seen", "this compute does not grow with the size"),
        (of_one_budget(), "flops_total", "the budgets span less than a factor of 2"),
        (without_size(), "flops_total", "the best sizes are far below those that ran"),
        (study(OFF_CENTRE[:3], BUDGETS[:1]), "flops_total", "3 sizes at horizons; E(N, D) needs 6"),
    ],
    ids=["two sizes", "images", "one budget", "no effect of size", "three blocks"],
)
def test_it_is_refused_with_what_is_missing(
    rows: list[Row],
    compute: str,
    reason: str,
):
    s = analysed(rows, compute)
    assert isinstance(s.size_law, NotEnoughData)
    assert reason in s.size_law.reason
    assert f"best sizes by E(N, D) ({reason}" in " ".join(findings.summary(s))


def test_the_derivatives_are_those_of_the_law():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(4, 5))
    x = rng.normal(size=(7, 2))
    _, derivative = size_law.jacobian(theta, x)
    for place in range(5):
        step = np.zeros(5)
        step[place] = 1e-6
        above, below = (size_law.jacobian(theta + s, x)[0] for s in (step, -step))
        assert derivative[:, :, place] == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_an_interval_at_a_bound_of_the_fit_says_so():
    assert bounded(Interval(1, 0.5, 2), 0.01, 5) == "1.00 [0.50, 2.00]"
    assert bounded(Interval(1, 0.5, 5), 0.01, 5) == "1.00 [0.50, 5.00] (at its bound 5)"
    exact = law_of(study())
    draws = exact.surface.draws.copy()
    draws[:40, 2] = np.log(5.0)
    law = replace(exact, surface=replace(exact.surface, draws=draws))
    assert "5.000] (at its bound 5), beta 0.2" in str(law)


def test_the_page_has_the_numbers_of_the_size_law():
    s = analysed(study())
    found = payload._findings(s)["size_law"]
    assert isinstance(s.size_law, SizeLaw)
    assert found["exponent"]["value"] == s.size_law.exponent.value
    assert found["alpha"]["low"] < ALPHA < found["alpha"]["high"]
    assert len(found["c"]) == len(found["n"]) == 20
