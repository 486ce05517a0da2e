"""The labels of values, points and trials, which a selection accepts."""

from typing import Any

import pytest

from jepa_cluster.labels import (
    LONGEST_NAME,
    directory_name,
    format_percent,
    format_value,
    level_numbers,
    point_label,
    setting_label,
    sort_key,
)
from jepa_cluster.sweep import sweep_file, yaml_source
from jepa_cluster.sweep.select_trials import select

GRID = """
question: Q
base: [data=synthetic]
grid:
  mask: [reference]
  model: [vit_s, vit_l]
  mask.target_scale: [[0.1, 0.15], [0.15, 0.2], [0.15, 1.0]]
  optim.lr: [0.001, 0.0015]
  optim.steps: [1500, 80000, 180000]
  mask.targets: [1, 10]
  data.flip: [true, false]
seeds: [0, 1, 10]
"""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([0.15, 0.2], ".15-.2"),
        ([1.0, 0], "1-0"),
        (0.001, ".001"),
        (-0.5, "-.5"),
        (10.5, "10.5"),
        (1e-5, "1e-05"),
        (0.0, "0"),
        (True, "true"),
        (None, "null"),
        ("vit_s", "vit_s"),
        (3, "3"),
        (80_000, "80k"),
        (2500, "2.5k"),
        (2048, "2048"),
        ({"qk_norm": True, "act": "a b"}, "qk_norm:true+act:a_b"),
    ],
)
def test_a_value_is_one_short_ascii_word(
    value: object,
    text: str,
):
    """Tables, names and selections have the same word."""
    assert format_value(value) == text


def rows_of(grid: str) -> list[dict[str, Any]]:
    """Make the rows of `jepa status` that a selection reads."""
    rows: list[dict[str, Any]] = []
    sweep = sweep_file.from_source(yaml_source.parse(grid, "x.yaml"), "x")
    for index, (point, seed) in enumerate(sweep.points()):
        row = {
            "index": index,
            "id": f"{index:x}z",
            "name": f"n{index}",
            "label": point_label(point, seed),
            "point": point,
            "seed": seed,
        }
        rows.append(row)
    return rows


def test_a_label_has_the_axes_that_differ_first():
    """`mask` has only one value. Text and thousands of steps need no name."""
    first = rows_of(GRID)[0]
    assert first["label"] == "vit_s ts=.1-.15 lr=.001 1.5k targets=1 flip=true reference s0"


def test_the_label_of_a_trial_selects_this_trial():
    """The user types it word by word or as one quoted word."""
    rows = rows_of(GRID)
    for row in rows[:: len(rows) // 40]:
        assert select(rows, row["label"].split()) == [row]
        assert select(rows, [row["label"]]) == [row]


def test_a_word_of_a_label_selects_all_trials_that_have_it():
    rows = rows_of(GRID)
    words: set[str] = set()
    for row in rows:
        words.update(row["label"].split())
    for word in words:
        assert select(rows, [word]) == [row for row in rows if word in row["label"].split()]


def test_a_label_without_its_seed_selects_all_seeds_of_the_point():
    rows = rows_of(GRID)
    for row in rows[:: len(rows) // 40]:
        label, _, _ = row["label"].rpartition(" ")
        assert select(rows, [label]) == [each for each in rows if each["point"] == row["point"]]


def test_a_setting_selects_its_trials_of_every_size_horizon_and_seed():
    rows = rows_of(GRID)
    for row in rows[:: len(rows) // 40]:
        setting = setting_label(row["point"])
        expected = [each for each in rows if setting_label(each["point"]) == setting]
        assert select(rows, [setting]) == expected


@pytest.mark.parametrize(
    "axis",
    [
        "model.timm: [{qk_norm: true, act: a b}, {}]",
        "model.init: ['a=b', 'x[1]', '16-mixed', '3', 'true', '']",
        "data.shuffle_block: [true, null, -0.5, 1.0e-5, 12345]",
        "optim.lr: [[a, b], [a], []]",
    ],
)
def test_a_value_of_any_kind_selects_its_trials(axis: str):
    """A value may be text with characters of the grammar."""
    grid = f"grid:\n  {axis}\n  optim.steps: [800, 80000]\nseeds: [0, 1]"
    rows = rows_of(f"question: Q\nbase: [data=synthetic]\n{grid}")
    for row in rows:
        assert select(rows, row["label"].split()) == [row]


@pytest.mark.parametrize("word", ["ts=.15-.2", "ts=0.15-0.20", "mask.target_scale=0.15-0.2"])
def test_a_number_may_be_written_with_its_zeros(word: str):
    """As in the sweep file."""
    rows = rows_of(GRID)
    expected = [row for row in rows if row["point"]["mask.target_scale"] == [0.15, 0.2]]
    assert len(expected) == len(rows) / 3
    assert select(rows, [word]) == expected


def test_a_pattern_may_have_zeros():
    rows = rows_of(GRID)
    assert select(rows, ["ts=0.15*"]) == select(rows, ["ts=.15-.2,.15-1"])


def test_values_are_sorted_by_their_number():
    """As text, 80k would come before 800."""
    texts = ["80k", "vit", "2.5k", "800", "1e-05", ".2-.3", ".15-.2", "-.5"]
    expected = ["-.5", "vit", "1e-05", ".15-.2", ".2-.3", "800", "2.5k", "80k"]
    assert sorted(texts, key=sort_key) == expected


@pytest.mark.parametrize("seed_word", ["s10", "!s1"])
def test_words_of_one_axis_widen_and_words_of_others_narrow(seed_word: str):
    """The selection is vit_s or vit_l, with seed 10."""
    rows = rows_of("question: Q\ngrid: {model: [vit_s, vit_l, vit_h]}\nseeds: [1, 10]")
    assert select(rows, ["vit_s", "vit_l", seed_word]) == [rows[1], rows[3]]


def test_a_directory_name_is_the_label_without_characters_that_a_shell_changes():
    """A long label is cut."""
    words = ["ts=.15-.2", "data=a/b:{1}", "80k", "s0"]
    name = directory_name("vit_s", words, "0123456789ab")
    assert name == "vit_s-ts.15-.2-dataa_b__1_-80k-s0-0123456789ab"
    assert len(directory_name("vit_s", ["x" * 300], "0123456789ab")) == LONGEST_NAME + 13


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        ([".15-.2", ".2-.3"], [0.175, 0.25]),
        (["80k", "-1", "1e-05"], [80000, -1, 1e-5]),
        (["2", "l2"], []),
        ([".1-.4", ".2-.3"], []),
    ],
    ids=["intervals", "numbers", "a name", "one middle"],
)
def test_levels_are_numbers_where_they_have_an_order(
    texts: list[str],
    numbers: list[float],
):
    assert level_numbers(texts) == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("fraction", "text", "signed"),
    [
        (0.094, "9.4", "+9.4"),
        (-0.094, "-9.4", "-9.4"),
        (0.00125, "0.1", "+0.1"),
        (-0.0004, "0.0", "+0.0"),
        (1e27, "1e+29", "+1e+29"),
        (-1e27, "-1e+29", "-1e+29"),
        (float("inf"), "–", "–"),
        (float("nan"), "–", "–"),
        (None, "–", "–"),
    ],
)
def test_a_fraction_is_a_percentage_with_one_decimal(
    fraction: float | None, text: str, signed: str
):
    assert format_percent(fraction) == text
    assert format_percent(fraction, "+") == signed
