"""Settings that take more compute per step are not flattered by a comparison at equal steps."""

import itertools
from typing import Any

import numpy as np
import pytest

from jepa_cluster.report import payload
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.findings import summary
from jepa_cluster.report.power_law import PowerLawFit
from jepa_cluster.results import level_compute
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import Row, SweepResults

BATCH = "optim.batch"
BATCHES = (256, 512, 1024)
ERROR = "probe/class_error"


def study(
    horizons: tuple[int, ...],
    gain: float = 0.0,
    noise: float = 0.003,
) -> list[Row]:
    """Return trials whose error depends on their compute alone.

    gain: by how much log error falls with each doubling of the batch, beyond that.
    """
    rng = np.random.default_rng(2)
    rows: list[Row] = []
    for size, batch, steps, seed in itertools.product((1e6, 1e7), BATCHES, horizons, (0, 1)):
        compute = size * steps * batch
        error = 0.6 * (compute / 1e12) ** -0.1
        error *= 2 ** (-gain * np.log2(batch / 512) / np.log(2))
        row: Row = {
            "state": "done",
            "trial": f"{size:g} {batch} {steps} {seed}",
            "label": f"{size:g} {batch} {steps} {seed}",
            "model": f"m{size:g}",
            "parameters": size,
            "steps": steps,
            "seed": seed,
            "setting": f"batch={batch}",
            BATCH: str(batch),
            "flops_total": compute,
            ERROR: float(error * np.exp(noise * rng.normal())),
        }
        rows.append(row)
    return rows


def analysed(rows: list[Row]) -> Analysis:
    plan: Any = {
        "axes": ["model", BATCH, "optim.steps"],
        "expect_best": {},
        "claims": [],
    }
    return Analysis(SweepResults("s", plan), ERROR, "flops_total", rows)


def test_a_larger_batch_is_no_better_where_it_only_takes_more_compute():
    """At equal steps 1024 is 14 % better than 256. At equal compute they do not differ."""
    s = analysed(study((1000, 4000, 16000)))
    (found,) = s.answers
    assert found.effect.low < 0.01
    assert found.effect.high < 0.03
    (line,) = [line for line in summary(s) if line.startswith("batch: ")]
    assert ", at equal FLOPs (at equal steps 1024 takes ×4.00 the FLOPs of 256)" in line


def test_a_batch_that_is_better_at_equal_compute_is_the_best():
    (found,) = analysed(study((1000, 4000, 16000), gain=0.05)).answers
    assert [best.level for best in found.best] == ["1024", "1024"]
    assert 2**0.144 - 1 in found.effect


def test_an_axis_has_the_name_of_labels_in_answers_and_expectations():
    s = analysed(study((1000, 4000)))
    s.sweep.plan["expect_best"][BATCH] = 512
    assert [line for line in summary(s) if line.startswith("expected batch=512: ")]


def test_a_comparison_at_equal_steps_says_what_the_levels_cost():
    """One horizon does not show what compute alone does."""
    s = analysed(study((4000,)))
    assert s.answers[0].best[0].level == "1024"
    (line,) = [line for line in summary(s) if line.startswith("batch: ")]
    assert ", at equal steps, where 1024 takes ×4.00 the FLOPs of 256 (several" in line


def test_marks_of_trials_are_at_equal_compute_as_the_levels_are():
    s = analysed(study((1000, 4000, 16000)))
    assert isinstance(s.effects, Effects)
    assert s.effects.relative() == pytest.approx(np.ones(36), abs=0.03)


def test_the_law_has_the_compute_that_trials_took():
    law = analysed(study((1000, 4000, 16000))).law
    assert isinstance(law, PowerLawFit)
    assert law.predict(1e13)[0] == pytest.approx(0.6 * (1e13 / 1e12) ** -0.1, rel=0.01)


def test_levels_that_cost_the_same_need_no_note():
    rows = study((1000, 4000))
    for row in rows:
        row["flops_total"] = row["parameters"] * row["steps"] * (1 + 0.00002 * int(row[BATCH]))
    (found,) = analysed(rows).answers
    assert found.at_equal == ""


def test_missing_cells_do_not_move_the_compute_of_a_level():
    rows = study((1000, 4000, 16000))
    rows = [row for n, row in enumerate(rows) if n % 5]
    s = analysed(rows)
    assert isinstance(s.effects, Effects)
    (axis,) = s.effects.axes
    ratio = np.exp(axis.log_compute - axis.log_compute[:, :1])
    assert ratio == pytest.approx(np.array([[1, 2, 4], [1, 2, 4]]), rel=1e-6)


def test_a_level_that_a_model_has_not_run_costs_what_it_does_elsewhere():
    model = np.array([0, 0, 0, 1, 1])
    level = np.array([0, 1, 2, 0, 1])
    (found,) = level_compute.by_axis([(3, level)], model, model, np.log([1.0, 2, 4, 10, 20]))
    assert found[1] == pytest.approx(np.log([0.5, 1, 2]))
    assert found[0] == pytest.approx(found[1])


def test_the_page_has_the_compute_of_each_level():
    ((effect,),) = payload._effects(analysed(study((1000, 4000)))).values()
    assert effect["at_equal"].startswith("at equal FLOPs")
    assert effect["models"][0]["compute"] == pytest.approx(np.array([0.5, 1, 2]))
