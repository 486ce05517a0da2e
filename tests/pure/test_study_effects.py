"""Effects of settings, their answers, and the law at the best levels, of made-up studies."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jepa_cluster import labels
from jepa_cluster.report import answers, findings, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.findings import summary
from jepa_cluster.report.power_law import NotEnoughData
from jepa_cluster.results import effects, mixed_model, tables
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
    draw: int = 3,
) -> list[Row]:
    """Return finished trials. The log error of a model is a parabola around its best scale."""
    rng = np.random.default_rng(draw)
    rows: list[Row] = []
    for (size, at), scale, steps in itertools.product(
        zip(SIZES, best, strict=True), SCALES, horizons
    ):
        compute = size * steps
        (middle,) = labels.level_numbers([scale])
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


def analysed(
    rows: list[Row],
    *settings: str,
) -> Analysis:
    axes = ["model", *(settings or [SCALE]), "optim.steps"]
    plan: Any = {"axes": axes, "expect_best": {}, "claims": [], "unit": "GPU-h"}
    return Analysis(SweepResults("s", plan), ERROR, "flops_total", rows)


@functools.cache
def shared(best: tuple[float, float, float] = (0.175, 0.175, 0.175)) -> Analysis:
    """Return an analysis that many tests read: models and laws are fitted once."""
    return analysed(study(best=best))


def test_the_best_level_is_found_between_levels_and_does_not_move():
    (found,) = shared().answers
    assert [best.level for best in found.best] == [".15-.2"] * 3
    for best in found.best:
        assert best.optimum
        assert 0.175 in best.optimum
        assert best.optimum.high - best.optimum.low < 0.02
    assert found.moves == "no"


def test_a_best_level_that_moves_with_size_is_found():
    (found,) = shared((0.14, 0.175, 0.21)).answers
    assert found.moves == "yes"
    assert found.shift
    assert 0.035 in found.shift


def test_where_noise_hides_the_effect_it_is_not_known():
    s = analysed(study(curvature=0.0, noise=0.1, seeds=1))
    (found,) = s.answers
    assert found.moves == ""
    assert found.effect.low < 0
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
def test_the_expectation_is_met_or_not(
    best: Any,
    wanted: object,
    verdict: str,
):
    s = shared(best)
    s.sweep.plan["expect_best"][SCALE] = wanted
    assert any(line.endswith(f": {verdict}") for line in summary(s) if "expected" in line)


@pytest.mark.parametrize("wanted", ["rises", "stays"])
def test_a_trend_of_one_model_is_open(wanted: str):
    s = analysed([row for row in study() if row["parameters"] == SIZES[0]])
    s.sweep.plan["expect_best"][SCALE] = wanted
    assert f"expected that ts {wanted}: open: one model" in summary(s)


def test_names_have_no_direction():
    s = analysed(renamed(study(), ("random", "multiblock", "block")))
    s.sweep.plan["expect_best"][SCALE] = "rises"
    assert "expected that ts rises: open: its levels have no order" in summary(s)


def test_two_levels_can_rise():
    rows = [row for row in study(best=(0.125, 0.17, 0.225)) if row[SCALE] != ".15-.2"]
    (found,) = analysed(rows).answers
    assert answers.expectation(found, "rises").endswith(": met")


def test_the_hold_out_is_known_where_seeds_cost_differently():
    rows = study()
    for n, row in enumerate(rows):
        row["flops_total"] *= 1 + 0.3 * (n % 2)
    held_out = analysed(rows).held_out
    assert not isinstance(held_out, NotEnoughData)
    assert np.isfinite(held_out.error)


def test_an_expectation_is_open_where_noise_hides_the_effect():
    s = analysed(study(curvature=0.0, noise=0.1, seeds=1))
    s.sweep.plan["expect_best"][SCALE] = "rises"
    assert "expected that ts rises: open" in summary(s)


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
    assert "settings are not compared: 3 trials; add seeds or horizons" in "\n".join(summary(s))
    assert isinstance(s.law, NotEnoughData)


def test_names_have_a_best_level_and_those_that_may_be_as_good():
    rows = renamed(study(curvature=100.0), ("random", "multiblock", "block"))
    (found,) = analysed(rows).answers
    assert [best.text for best in found.best] == ["multiblock"] * len(SIZES)
    assert found.moves == "no"


def renamed(
    rows: list[Row],
    names: tuple[str, ...],
) -> list[Row]:
    """Return the trials with other levels in place of the three scales."""
    level = dict(zip(SCALES, names, strict=True))
    return [{**row, SCALE: level[row[SCALE]], "setting": level[row[SCALE]]} for row in rows]


def test_the_optimum_of_levels_spaced_by_factors_is_found_in_their_logarithm():
    """The error is a parabola in the logarithm, around the middle level."""
    (found,) = analysed(renamed(study(), (".0001", ".001", ".01"))).answers
    assert found.is_log
    for best in found.best:
        assert best.optimum
        assert 0.0008 < best.optimum.low < 0.001 < best.optimum.high < 0.00125
    assert found.moves == "no"
    assert found.trend == "stays"


def test_intervals_with_one_middle_are_names():
    (found,) = analysed(renamed(study(), (".1-.25", ".15-.2", ".3-.4"))).answers
    assert [best.optimum for best in found.best] == [None] * 3
    assert found.best[0].level == ".15-.2"


def test_a_level_that_one_model_has_not_run_moves_nothing():
    """The largest model has not run the level that is best for the others."""
    rows = renamed(study(best=(0.125,) * 3), ("p", "q", "r"))
    left = [row for row in rows if (row["model"], row[SCALE]) != ("m1e+08", "p")]
    (found,) = analysed(left).answers
    assert [best.level for best in found.best] == ["p", "p", "q"]
    assert found.moves == "no"


def test_alike_levels_seldom_seem_to_move():
    moved = 0
    for seed in range(10):
        rows = renamed(study(curvature=0.0, noise=0.03, draw=seed), ("p", "q", "r"))
        moved += analysed(rows).answers[0].moves == "yes"
    assert moved <= 2


def test_levels_that_no_block_shares_are_not_compared():
    level = dict(zip(("m1e+06", "m1e+07", "m1e+08"), SCALES, strict=True))
    s = analysed([row for row in study() if row[SCALE] == level[row["model"]]])
    assert s.answers == []
    assert "it changes only together with other axes" in "\n".join(summary(s))
    assert isinstance(s.law, power_law.PowerLawFit)


def test_a_second_axis_that_changes_with_the_first_is_left_out():
    rows = study()
    for row in rows:
        row["optim.lr"] = {".1-.15": ".001", ".15-.2": ".002", ".2-.25": ".004"}[row[SCALE]]
    s = analysed(rows, SCALE, "optim.lr")
    assert [answer.axis for answer in s.answers] == [SCALE]
    assert "lr is not compared" in "\n".join(summary(s))


def test_the_frontier_has_trials_where_the_best_levels_never_ran_together():
    rows: list[Row] = []
    for rate in (0.0, 0.03, 0.06):
        for row in study(best=(0.125,) * 3):
            changed = {"optim.lr": f"{rate}", ERROR: row[ERROR] * np.exp(rate)}
            if (rate, row[SCALE]) != (0.0, ".1-.15"):
                rows.append({**row, **changed, "trial": f"{row['trial']} {rate}"})
    s = analysed(rows, SCALE, "optim.lr")
    assert len(s.frontier) > 5
    assert not isinstance(s.held_out, NotEnoughData)
    assert abs(s.held_out.error) < 0.03


def test_what_the_settings_of_a_seed_share_is_part_of_the_noise():
    rows = study(seeds=4)
    rng = np.random.default_rng(1)
    shared: dict[Any, float] = {}
    for row in rows:
        key = row["model"], row["steps"], row["seed"]
        row[ERROR] *= np.exp(shared.setdefault(key, 0.06 * rng.normal()))
    s = analysed(rows)
    assert isinstance(s.effects, effects.Effects)
    assert 0.04 < float(np.median(s.effects.noise)) < 0.08


def test_models_of_one_name_and_different_sizes_are_different():
    rows = study()
    for row in rows:
        row["model"] = "vit"
    s = analysed(rows)
    assert isinstance(s.effects, effects.Effects)
    assert s.effects.models == ["vit 1M", "vit 10M", "vit 100M"]
    assert [best.model for best in s.answers[0].best] == s.effects.models


def test_the_laws_of_two_sizes_of_one_name_are_two():
    rows = study()
    for row in rows:
        row["model"] = "vit"
    assert list(analysed(rows).by_size) == ["vit 1M", "vit 10M", "vit 100M"]


def test_names_of_sizes_that_hardly_differ_are_different():
    rows: list[Row] = [{"model": "vit", "parameters": p} for p in (21.61e6, 21.62e6)]
    assert list(tables.size_names(rows).values()) == ["vit 21.61M", "vit 21.62M"]


def test_an_answer_has_all_trials_whatever_compute_is_selected():
    """A trial whose GPU-hours are unknown is in no law over GPU-hours, and in all answers."""
    rows = study()
    for row in rows:
        row["gpu_hours_alone"] = row["flops_total"] * 1e-12 if row["seed"] else 0.0
    s = analysed(rows)
    hours = replace(s, compute="gpu_hours_alone")
    assert len(hours.finished) == len(s.finished) == len(rows)
    assert list(map(str, hours.answers)) == list(map(str, s.answers))
    assert isinstance(hours.law, power_law.PowerLawFit)
    assert hours.law.blocks == 9
    assert " for ten times the GPU-h" in "".join(summary(hours))
    assert "27 finished trials without gpu_hours_alone: in no law" in summary(hours)


def test_intervals_hardly_depend_on_the_seed_of_the_chain():
    rows = study()
    y = np.log([row[ERROR] for row in rows])
    keys = [(row["model"], row["steps"]) for row in rows]
    block = np.array([sorted(set(keys)).index(key) for key in keys])
    scale = np.array([SCALES.index(row[SCALE]) for row in rows])
    ends = []
    for seed in range(4):
        drawn = mixed_model.sample(y, block, [(scale, 0.2)], seed=seed).effects[0]
        ends.append(np.quantile(drawn[:, 0] - drawn[:, 1], [0.05, 0.95]))
    width = np.ptp(ends, axis=1)
    assert width.max() < 1.25 * width.min()


@pytest.mark.parametrize("noise", [0.0003, 0.003, 0.03])
def test_blocks_are_found_whatever_the_noise(noise: float):
    """A chain whose cells hold a part of their block's mean finds it again."""
    s = analysed(study(noise=noise))
    assert isinstance(s.effects, effects.Effects)
    truth = np.array([0.1 + 0.6 * (c / 1e9) ** -0.2 for c in s.effects.compute("flops_total")])
    off = np.median(s.effects.best_draws, 0) - np.log(truth)
    assert np.abs(off).max() < 3 * noise + 0.002


def test_an_answer_is_the_same_in_every_call():
    first, second = (analysed(study()) for _ in range(2))
    assert first.answers == second.answers
    assert findings.answer_lines(first) == findings.answer_lines(second)


def at_end(best: float = 0.5) -> list[Row]:
    """The error falls with the scale to the last level that ran."""
    return study(best=(best, best, best), curvature=3.0)


def test_a_best_level_at_the_end_of_those_that_ran_is_said_to_be_there():
    """Nothing is known beyond: neither that it stays, nor how exactly it is known."""
    s = analysed(at_end())
    (found,) = s.answers
    assert all(best.text == "0.225 or more" for best in found.best)
    assert found.moves == ""
    assert answers.expectation(found, "stays").endswith(": open")
    assert "a best level is the last one that ran: add levels" in answers.moves(s.effects, found)


def test_sizes_without_two_common_levels_need_levels_rather_than_trials():
    missing = dict(zip(SIZES, SCALES, strict=True))  # a level that each size has not run
    s = analysed([row for row in study() if row[SCALE] != missing[row["parameters"]]])
    for found in s.answers:
        assert "no two levels that all sizes ran" in answers.moves(s.effects, found)


def test_a_design_of_equal_budgets_has_a_frontier_although_no_size_is_surely_the_best():
    """Six sizes share each of four budgets; each is the best one in a few draws."""
    rng = np.random.default_rng(1)
    rows: list[Row] = []
    for size, budget in itertools.product(np.geomspace(1e6, 7.6e6, 6), np.geomspace(1e15, 1e17, 4)):
        error = (0.1 + 20 * budget**-0.12) * np.exp(0.02 * rng.normal())
        row: Row = {"state": "done", "trial": f"{size:g}-{budget:g}", "model": f"m{size:g}"}
        row |= {
            "parameters": size,
            "steps": round(budget / size),
            "seed": 0,
            "setting": "all",
            SCALE: SCALES[0],
        }
        rows.append({**row, "label": row["trial"], ERROR: error, "flops_total": budget})
    s = analysed(rows)
    assert {row["flops_total"] for row in s.frontier} <= set(np.geomspace(1e15, 1e17, 4))
    assert any(line.startswith("hold-out") for line in summary(s))


def test_effects_of_trials_without_compute_do_not_stop_the_frontier():
    rows = study()
    del rows[0]["flops_total"]
    s = analysed(rows)
    compute, error = s.frontier_line
    assert len(compute) == len(error) > 2


def test_one_seed_of_two_settings_is_no_noise_of_seeds():
    """Settings that cannot be compared are not taken for seeds of a point."""
    rows = [row for row in study(seeds=1, horizons=(1000,)) if row["parameters"] == SIZES[0]][:2]
    s = analysed(rows)
    assert isinstance(s.effects, effects.Effects)
    assert not s.effects.axes
    assert not s.effects.has_seeds
