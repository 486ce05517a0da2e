"""One format for the values and points of a sweep, which a selection takes back."""

import itertools
from typing import Any

import pytest

from jepa_cluster.labels import format_value, point_label, setting_label, sort_key
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
def test_a_value_is_one_short_ascii_word(value: object, text: str):
    """The same in tables, names and selections."""
    assert format_value(value) == text


def test_a_label_shows_the_axes_that_differ_first():
    """Of `mask` there is one value only; text and thousands of steps need no name."""
    points = [p for p, _ in sweep_file.from_source(yaml_source.parse(GRID, "x.yaml"), "x").points()]
    label = "vit_s ts=.1-.15 lr=.001 1.5k targets=1 flip=true reference s0"
    assert point_label(points[0], 0) == label


def rows_of(grid: str) -> list[dict[str, Any]]:
    """The rows of `jepa status`, as far as a selection reads them."""
    rows: list[dict[str, Any]] = []
    for i, (point, seed) in enumerate(sweep_file.from_source(yaml_source.parse(grid, "x.yaml"), "x").points()):
        label = point_label(point, seed)
        rows.append({"index": i, "id": f"{i:x}z", "name": f"n{i}", "label": label, "point": point, "seed": seed})
    return rows


def test_the_label_of_a_trial_selects_this_trial():
    """Typed word by word, or as one quoted word; and a word of it selects all trials that show it."""
    rows = rows_of(GRID)
    for row in rows[:: len(rows) // 40]:
        assert select(rows, row["label"].split()) == select(rows, [row["label"]]) == [row]
    for word in set(itertools.chain(*(row["label"].split() for row in rows))):
        assert select(rows, [word]) == [row for row in rows if word in row["label"].split()]


def test_a_point_and_a_setting_select_their_trials():
    """A label without its seed: all seeds of the point. A setting: every size, horizon and seed of it."""
    rows = rows_of(GRID)
    for row in rows[:: len(rows) // 40]:
        point = row["label"].rpartition(" ")[0]
        assert select(rows, [point]) == [r for r in rows if r["point"] == row["point"]]
        setting = setting_label(row["point"])
        assert select(rows, [setting]) == [r for r in rows if setting_label(r["point"]) == setting]


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
    """Text with characters of the grammar, too."""
    rows = rows_of(f"question: Q\nbase: [data=synthetic]\ngrid:\n  {axis}\n  optim.steps: [800, 80000]\nseeds: [0, 1]")
    for row in rows:
        assert select(rows, row["label"].split()) == [row]


def test_numbers_are_accepted_as_the_sweep_file_has_them():
    """With their zeros; a pattern, too."""
    rows = rows_of(GRID)
    wanted = select(rows, ["ts=.15-.2"])
    assert len(wanted) == len(rows) / 3
    assert wanted == select(rows, ["ts=0.15-0.20"]) == select(rows, ["mask.target_scale=0.15-0.2"])
    assert select(rows, ["ts=0.15*"]) == select(rows, ["ts=.15-.2,.15-1"])


def test_values_are_sorted_by_their_number():
    """Not by their text: 800 before 2.5k."""
    texts = ["80k", "vit", "2.5k", "800", "1e-05", ".2-.3", ".15-.2", "-.5"]
    assert sorted(texts, key=sort_key) == ["-.5", "vit", "1e-05", ".15-.2", ".2-.3", "800", "2.5k", "80k"]


def test_words_about_one_axis_widen_and_words_about_others_narrow():
    """vit_s or vit_l, of those seed 10."""
    rows = [
        {"index": i, "id": f"{i}", "name": f"n{i}", "point": {"model": model}, "seed": seed}
        for i, (model, seed) in enumerate(itertools.product(("vit_s", "vit_l", "vit_h"), (1, 10)))
    ]
    assert [r["index"] for r in select(rows, ["vit_s", "vit_l", "s10"])] == [1, 3]
    assert [r["index"] for r in select(rows, ["vit_s", "vit_l", "!s1"])] == [1, 3]
