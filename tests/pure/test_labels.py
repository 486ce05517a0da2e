"""One format for the values and points of a sweep, which a selection takes back."""

import itertools
from typing import Any

import pytest

from jepa_cluster.labels import format_value, point_label
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


def test_the_label_of_a_trial_selects_this_trial():
    """Typed word by word, or as one quoted word; and a word of it selects all trials that show it."""
    sweep = sweep_file.from_source(yaml_source.parse(GRID, "x.yaml"), "x")
    rows: list[dict[str, Any]] = []
    for i, (point, seed) in enumerate(sweep.points()):
        label = point_label(point, seed)
        rows.append({"index": i, "id": f"{i:x}z", "name": f"n{i}", "label": label, "point": point, "seed": seed})
    for row in rows[:: len(rows) // 40]:
        assert select(rows, row["label"].split()) == select(rows, [row["label"]]) == [row]
    for word in set(itertools.chain(*(row["label"].split() for row in rows))):
        assert select(rows, [word]) == [row for row in rows if word in row["label"].split()]


def test_words_about_one_axis_widen_and_words_about_others_narrow():
    """vit_s or vit_l, of those seed 10."""
    rows = [
        {"index": i, "id": f"{i}", "name": f"n{i}", "point": {"model": model}, "seed": seed}
        for i, (model, seed) in enumerate(itertools.product(("vit_s", "vit_l", "vit_h"), (1, 10)))
    ]
    assert [r["index"] for r in select(rows, ["vit_s", "vit_l", "s10"])] == [1, 3]
    assert [r["index"] for r in select(rows, ["vit_s", "vit_l", "!s1"])] == [1, 3]
