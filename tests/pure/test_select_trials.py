"""The grammar of selections of trials."""

from typing import Any

import pytest

from jepa_cluster.errors import ConfigError
from jepa_cluster.sweep.select_trials import select


def row(index: int, model: str, seed: int, state: str) -> dict[str, Any]:
    """Make a row of `jepa status`."""
    return {
        "index": index,
        "name": f"{model}-ts.1-s{seed}-{index:012x}",
        "id": f"{index + 10:012x}",
        "label": f"{model} .1-.15 s{seed}",
        "class": "A",
        "seed": seed,
        "state": state,
        "point": {"model": model, "mask.target_scale": [0.1, 0.15]},
    }


ROWS = [
    row(0, "vit_s", 0, "done"),
    row(1, "vit_s", 1, "failed"),
    row(2, "vit_l", 0, "done"),
    row(3, "vit_l", 1, "failed"),
]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], [0, 1, 2, 3]),
        (["model=vit_l"], [2, 3]),
        (["model=vit_l", "seed=0"], [2]),
        (["state=failed,running"], [1, 3]),
        (["target_scale=.1-.15", "!state=failed"], [0, 2]),
        (["mask.target_scale=.1*"], [0, 1, 2, 3]),
        (["1", "3"], [1, 3]),
        (["vit_s"], [0, 1]),
        (["!vit_s"], [2, 3]),
        (["00000000000c"], [2]),
    ],
)
def test_a_selection(words: list[str], found: list[int]):
    """Pairs narrow it, single words widen it, and ! excludes."""
    assert [row["index"] for row in select(ROWS, words)] == found


@pytest.mark.parametrize("text", ["1.5e-3", "0.0015", ".0015", "15E-4", "1.50e-3,6"])
def test_a_number_may_be_written_as_in_the_sweep_file(text: str) -> None:
    rates = [{**row(n, "vit_s", n, "done"), "point": {"optim.lr": 0.0015 * 2**n}} for n in (0, 1)]
    assert [found["index"] for found in select(rates, [f"lr={text}"])] == [0]


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        select(ROWS, ["modle=vit_s"])


def test_a_selection_of_no_trial_is_refused():
    with pytest.raises(ConfigError, match="no trial matches"):
        select(ROWS, ["seed=7"])
