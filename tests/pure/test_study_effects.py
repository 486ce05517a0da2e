"""Effects of settings, their answers, and the law at the best levels, of made-up studies."""

import itertools
from typing import Any

import numpy as np
import pytest

from jepa_cluster.report import answers, power_law
from jepa_cluster.report.analysis import Analysis, summary
from jepa_cluster.report.power_law import NotEnoughData
from jepa_cluster.results import effects
from jepa_cluster.results.tables import Row, SweepResults

ERROR = "probe/class_error"
SCALE = "mask.target_scale"
SCALES = (".1-.15", ".15-.2", ".2-.25")  # middles .125, .175, .225
SIZES = (1e6, 1e7, 1e8)


def study(
    best: tuple[float, float, float] = (0.175, 0.175, 0.175),
    curvature: float = 30.0,
    noise: float = 0.01,
    seeds: int = 2,
    horizons: tuple[int, ...] = (1000, 4000, 16000),
) -> list[Row]:
    """Return finished trials. The log error of a model is a parabola around its best scale."""
    rng = np.random.default_rng(3)
    rows: list[Row] = []
    for (size, at), scale, steps in itertools.product(
        zip(SIZES, best, strict=True), SCALES, horizons
    ):
        compute = size * steps
        middle = effects.level_number(scale)
        assert middle
        error = 0.1 + 0.6 * (compute / 1e9) ** -0.2
        error *= np.exp(curvature * (middle - at) ** 2)
        for seed in range(seeds):
            row: Row = {
                "state": "done",
                "trial": f"{size:g}-{scale}-{steps}-{seed}",
                "model": f"m{size:g}",
                "parameters": size,
                "steps": steps,
                "seed": seed,
                "setting": f"ts={scale}",
                "label": f"m{size:g} ts={scale} {steps} s{seed}",
                SCALE: scale,
                "flops_total": compute,
                ERROR: float(error * np.exp(noise * rng.normal())),
            }
            rows.append(row)
    return rows


def analysed(rows: list[Row]) -> Analysis:
    plan: Any = {"axes": ["model", SCALE, "optim.steps"], "expect_best": {}}
    return Analysis(SweepResults("s", plan), ERROR, "flops_total", rows)


def test_the_best_level_is_found_between_levels_and_does_not_move():
    (found,) = analysed(study()).answers
    assert [best.level for best in found.best] == [".15-.2"] * 3
    for best in found.best:
        assert best.optimum
        assert 0.175 in best.optimum
        assert best.optimum.high - best.optimum.low < 0.02
    assert found.moves == "no"


def test_a_best_level_that_moves_with_size_is_found():
    (found,) = analysed(study(best=(0.14, 0.175, 0.21))).answers
    assert found.moves == "yes"
    assert found.shift
    assert 0.035 in found.shift


def test_where_noise_hides_the_effect_it_is_not_known():
    s = analysed(study(curvature=0.0, noise=0.1, seeds=1))
    (found,) = s.answers
    assert found.moves == ""
    assert found.effect.low < 0.05
    assert "not known yet (81 more trials would halve" in "\n".join(summary(s))


@pytest.mark.parametrize(
    ("best", "wanted", "verdict"),
    [
        ((0.14, 0.175, 0.21), "rises", "met"),
        ((0.14, 0.175, 0.21), "falls", "not met"),
        ((0.14, 0.175, 0.21), "stays", "not met"),
        ((0.175, 0.175, 0.175), "stays", "met"),
        ((0.175, 0.175, 0.175), "rises", "not met"),
        ((0.175, 0.175, 0.175), [0.15, 0.2], "met"),
        ((0.175, 0.175, 0.175), [0.1, 0.15], "not met"),
    ],
)
def test_the_expectation_is_met_or_not(best: Any, wanted: object, verdict: str):
    s = analysed(study(best=best))
    s.sweep.plan["expect_best"][SCALE] = wanted
    assert any(line.endswith(f": {verdict}") for line in summary(s) if "expected: ts" in line)


def test_an_expectation_is_open_where_noise_hides_the_effect():
    s = analysed(study(curvature=0.0, noise=0.1, seeds=1))
    s.sweep.plan["expect_best"][SCALE] = "rises"
    assert "expected: ts rises: open" in summary(s)


def test_missing_cells_do_not_move_the_best_setting():
    """The better setting has lost its two largest trials: its mean over what is left is worse."""
    rows = study()
    largest = [row for row in rows if row["flops_total"] >= 4e11 and row[SCALE] == ".15-.2"]
    left = [row for row in rows if row not in largest]
    groups = {scale: [row[ERROR] for row in left if row[SCALE] == scale] for scale in SCALES}
    assert min(groups, key=lambda scale: float(np.mean(groups[scale]))) != ".15-.2"
    assert analysed(left).best_setting == "ts=.15-.2"


def test_all_trials_tell_the_law_at_the_best_levels():
    """Its interval holds the error of the best setting, which is lower than that of the mean."""
    s = analysed(study(noise=0.03))
    assert isinstance(s.law, power_law.PowerLawFit)
    end = max(row["flops_total"] for row in s.finished)
    assert 0.1 + 0.6 * (end / 1e9) ** -0.2 in s.law.interval(end)
    assert {row[SCALE] for row in s.frontier} == {".15-.2"}
    assert "for ten times the compute" in "\n".join(summary(s))


def test_one_seed_of_each_setting_at_one_horizon_is_not_compared():
    one = [row for row in study(seeds=1, horizons=(1000,)) if row["model"] == "m1e+06"]
    s = analysed(one)
    assert s.answers == []
    assert "settings are not compared: 3 trials in 1 blocks" in "\n".join(summary(s))
    assert isinstance(s.law, NotEnoughData)


def test_names_have_a_best_level_and_those_that_may_be_as_good():
    rows = study(curvature=100.0)
    names = dict(zip(SCALES, ("random", "multiblock", "block"), strict=True))
    for row in rows:
        row[SCALE] = names[row[SCALE]]
    s = analysed(rows)
    (found,) = s.answers
    assert [str(best) for best in found.best] == [f"m{size:g} multiblock" for size in SIZES]
    assert found.moves == "no"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".15-.2", 0.175),
        ("80k", 80000),
        ("1e-05", 1e-5),
        ("-1", -1),
        ("l2", None),
    ],
)
def test_the_number_of_a_level(text: str, number: float | None):
    assert effects.level_number(text) == (None if number is None else pytest.approx(number))


def test_an_answer_is_the_same_in_every_call():
    first, second = (analysed(study()) for _ in range(2))
    assert first.answers == second.answers
    assert answers.lines(first.effects, first.answers) == answers.lines(
        second.effects, second.answers
    )
