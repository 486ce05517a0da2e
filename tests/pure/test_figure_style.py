"""What page and PNG share: colours of sizes, marks of states, ticks; and what they draw."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import fake_trials
from support.colors import contrast, linear_rgb

from jepa_cluster.report import analysis, comparisons, figure_numbers, figure_style, payload
from jepa_cluster.report.figure_style import STATE_MARKS, linear_ticks, log_ticks, tick_text
from jepa_cluster.results import tables
from jepa_cluster.tracking import chart_view
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.status import STATES

PAPERS = ("#ffffff", "#16181b")  # of the page, light and dark
CONTRAST = 3.0  # of a mark, by WCAG
# in OKLab, of two colours; settings have shapes too
APART = {chart_view.COLORS: 0.05, figure_style.OTHER_COLORS: 0.035}
# Machado, Oliveira and Fernandes 2009, full severity, linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "deuteranopia": np.array(
        [
            [
                0.367,
                0.861,
                -0.228,
            ],
            [
                0.280,
                0.673,
                0.047,
            ],
            [
                -0.012,
                0.043,
                0.969,
            ],
        ]
    ),
    "protanopia": np.array(
        [
            [
                0.152,
                1.053,
                -0.205,
            ],
            [
                0.115,
                0.786,
                0.099,
            ],
            [
                -0.004,
                -0.048,
                1.052,
            ],
        ]
    ),
    "tritanopia": np.array(
        [
            [
                1.256,
                -0.077,
                -0.179,
            ],
            [
                -0.078,
                0.931,
                0.148,
            ],
            [
                0.005,
                0.691,
                0.304,
            ],
        ]
    ),
}
TO_LMS = np.array(
    [
        [
            0.412,
            0.536,
            0.051,
        ],
        [
            0.212,
            0.681,
            0.107,
        ],
        [
            0.088,
            0.282,
            0.630,
        ],
    ]
)
TO_LAB = np.array(
    [
        [
            0.210,
            0.794,
            -0.004,
        ],
        [
            1.978,
            -2.429,
            0.451,
        ],
        [
            0.026,
            0.783,
            -0.809,
        ],
    ]
)


def nearest(
    colors: Sequence[str],
    blindness: str,
) -> float:
    """Return the distance of the two colours that are most alike."""
    seen = [np.clip(BLINDNESS[blindness] @ linear_rgb(color), 0, 1) for color in colors]
    lab = [TO_LAB @ np.cbrt(TO_LMS @ each) for each in seen]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize("colors", APART)
def test_colours_are_legible_on_white_and_dark_and_apart_for_the_colour_blind(colors):
    for paper in PAPERS:
        assert min(contrast(color, paper) for color in colors) >= CONTRAST
    for blindness in BLINDNESS:
        assert nearest(colors, blindness) > APART[colors], blindness


def test_sizes_are_coloured_by_parameters_and_not_by_name():
    """The smallest and the largest have the ends of the palette, in MLflow as in the figures."""
    sizes = [
        (3e8, "vit_a"),
        (2e7, "vit_s"),
        (9e7, "vit_b"),
        (9e7, "vit_b"),
    ]
    colors = chart_view.size_colors(sizes)
    assert list(colors) == [(2e7, "vit_s"), (9e7, "vit_b"), (3e8, "vit_a")]
    assert colors[2e7, "vit_s"] == chart_view.COLORS[0]
    assert colors[3e8, "vit_a"] == chart_view.COLORS[-1]
    assert chart_view.color(sizes, (9e7, "vit_b")) == colors[9e7, "vit_b"]
    assert chart_view.color(sizes[:1], sizes[0]) == ""
    for count in (1, 2, 6, 9):
        assert len(set(chart_view.ramp(chart_view.COLORS, count))) == count


def test_each_state_has_a_mark_and_only_finished_trials_are_filled():
    assert STATE_MARKS.keys() == set(STATES)
    distinct = ("done", "running", "interrupted", "stopped", "failed", "unknown")
    for field in ("symbol", "glyph"):
        assert len({getattr(STATE_MARKS[state], field) for state in distinct}) == len(distinct)
    filled = [state for state, mark in STATE_MARKS.items() if "open" not in mark.symbol]
    assert filled == ["done"]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1e9, 3e10),
        (2.9e9, 3.1e9),
        (0.3, 0.7),
        (1e3, 1e19),
        (0.41, 0.44),
    ],
)
def test_ticks_begin_with_one_two_or_five_and_are_six_at_most(
    low: float,
    high: float,
):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low <= found[0] < found[-1] <= high + 1e-9
    if high / low > 10:
        assert {f"{tick:e}"[0] for tick in found} <= set("125")
    assert len(linear_ticks(low, high, 4)) <= 4
    assert tick_text(2e9) == r"$2{\times}10^{9}$"
    assert tick_text(0.2) == "0.2"


# ---- numbers that are drawn


def study_of(folder: Path, failed: Sequence[int] = (), **sweep) -> analysis.Analysis:
    root = Root(folder)
    for number, trial in enumerate(fake_trials.sweep(root, **sweep)):
        if number in failed:
            fake_trials.run(trial, stop=20, kill=True)
            write_json(trial.failed, {"error": "diverged", "cause": "diverged"})
        else:
            fake_trials.run(trial, every=20, commit=20)
    return analysis.analyse(tables.load(root, "demo"))


MASKS = {
    "models": ("vit_a", "vit_b"),
    "aspects": fake_trials.ASPECTS,
    "seeds": (0, 1),
}


def test_a_whisker_is_the_pooled_noise_and_not_students_t_of_two_seeds(tmp_path: Path):
    s = study_of(tmp_path, scales=fake_trials.SCALES, **MASKS)
    noise = float(np.median(s.effects.noise))
    assert figure_numbers.seed_reach(s.effects) == pytest.approx(1.645 * noise, rel=1e-3)
    one = study_of(tmp_path / "one", models=("vit_a", "vit_b"), seeds=(0,))
    assert math.isnan(figure_numbers.seed_reach(one.effects))


def test_heat_maps_hold_the_effects_of_both_axes_and_of_the_cell(tmp_path: Path):
    """One per size; a cell in which nothing has finished is empty; the mean of a size is near 1."""
    s = study_of(tmp_path, failed=(0, 1), scales=fake_trials.SCALES, **MASKS)
    maps = figure_numbers.heat_maps(s.effects)
    assert [found.size for found in maps] == [0, 1]
    first = maps[0]
    assert (first.x, first.y) == ("mask.target_scale", "mask.target_aspect")
    assert first.count.sum() == sum(row["model"] == "vit_a" for row in s.finished)
    assert np.isnan(first.values[first.count == 0]).all()
    assert (first.count == 0).sum() == 1
    known = first.count > 0
    assert (first.low[known] < first.values[known]).all()
    worst = first.values[first.y_levels.index(".3-.6"), first.x_levels.index(".05-.1")]
    assert worst == pytest.approx(np.nanmax(first.values))
    document = payload.build(s.sweep)
    shown = document["heat"]["probe/class_error"][0]
    assert shown["model"]["name"] == "vit_a"
    assert [bar["name"] for bar in document["importance"]["probe/class_error"]] == [
        "mask.target_scale",
        "mask.target_aspect",
        "seeds",
    ]


def test_of_a_single_axis_the_heat_map_has_a_line_per_size(tmp_path: Path):
    s = study_of(tmp_path, models=("vit_a", "vit_b"), seeds=(0, 1))
    (found,) = figure_numbers.heat_maps(s.effects)
    assert found.y_levels == ["vit_a", "vit_b"]
    assert found.count.tolist() == [[2, 2], [2, 2]]


def test_levels_that_are_numbers_are_drawn_in_their_order(tmp_path: Path):
    """By its middle, .3-2 lies behind 1-1, though its label begins with a smaller number."""
    aspects = ((1.0, 1.0), (0.3, 2.0), (0.3, 0.6))
    s = study_of(tmp_path, models=("vit_a",), aspects=aspects, seeds=(0, 1))
    shown = payload.build(s.sweep)["effects"]["probe/class_error"]
    (aspect,) = [axis for axis in shown if axis["axis"] == "mask.target_aspect"]
    assert aspect["models"][0]["levels"] == [".3-.6", "1-1", ".3-2"]
    assert len(aspect["models"][0]["fractions"]["context_fraction"]) == 3


def test_the_frontier_that_is_drawn_never_rises(tmp_path: Path):
    s = study_of(
        tmp_path,
        scales=fake_trials.SCALES[:1],
        seeds=(0, 1, 2),
        steps=(40, 60, 120),
    )
    compute, error = s.frontier_line
    assert len(compute) > 3
    assert (np.diff(compute) > 0).all()
    assert (np.diff(error) <= 0).all()


def test_a_parabola_that_opens_downwards_has_no_curve():
    sizes = [
        {"parameters": n, "error": e, "c": 1e9} for n, e in ((1e5, 0.4), (1e6, 0.5), (1e7, 0.4))
    ]
    found = comparisons.fit_iso_flop(sizes, "error", "c")
    assert str(found) == (
        "no budget has its lowest error inside its sizes "
        "(N_opt(C) needs three such budgets, and has 0)"
    )
    (curve,) = found.budgets
    assert len(payload._iso_flop_curve(curve)["curve_e"]) == 0
