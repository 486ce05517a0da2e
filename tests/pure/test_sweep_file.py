"""The sweep file: its grammar, the order of its points, its errors."""

from pathlib import Path

import pytest

from jepa_cluster.errors import SweepFileError
from jepa_cluster.sweep import sweep_file, yaml_source
from jepa_cluster.sweep.points import Fork, Sweep

GOOD = """
question: Does it?
base: [data=synthetic]
grid:
  model: [vit_s, vit_l]
  mask.target_scale: [[0.1, 0.15], [0.15, 0.2]]
seeds: [0, 1]
where: model != 'vit_l' or seed == 0
resources:
  - {when: "model == 'vit_l'", nodes: 2, time: 1d}
  - {time: 8h}
limits: {gpu_hours: 900, gpus_in_flight: 96}
retries: {node: 2}
"""


def read(
    text: str,
    name: str = "x",
) -> Sweep:
    return sweep_file.from_source(yaml_source.parse(text, f"sweeps/{name}.yaml"), name)


def test_points_have_the_order_of_the_file_and_where_excludes_some():
    """The last axis changes fastest; vit_l has only seed 0."""
    sweep = read(GOOD)
    found: list[tuple[str, float, int]] = []
    for point, seed in sweep.points():
        low, _ = point["mask.target_scale"]
        found.append((point["model"], low, seed))
    assert found == [
        ("vit_s", 0.1, 0),
        ("vit_s", 0.1, 1),
        ("vit_s", 0.15, 0),
        ("vit_s", 0.15, 1),
        ("vit_l", 0.1, 0),
        ("vit_l", 0.15, 0),
    ]
    assert sweep.axes == ("model", "mask.target_scale", "seed")


def test_where_takes_the_last_part_of_the_name_of_an_axis():
    text = GOOD.replace("model != 'vit_l' or seed == 0", "target_scale[0] < 0.12")
    lows = {point["mask.target_scale"][0] for point, _ in read(text).points()}
    assert lows == {0.1}


def test_where_refuses_a_last_part_that_two_axes_have():
    text = "question: Q\ngrid: {model.depth: [1, 2], predictor.depth: [1, 2]}\nwhere: depth > 1"
    with pytest.raises(SweepFileError, match=r"no axis is called 'depth'[\s\S]*depth"):
        list(read(text).points())


PRODUCT = """
question: Q
zip: {model.depth: [2, 4], model.width: [64, 128]}
list: [{mask.targets: 1}, {mask.targets: 4, optim.lr: 1e-3}]
grid: {optim.batch: [8, 16, 32]}
"""


def test_grid_zip_and_list_are_factors_of_one_product():
    """3 values × 2 zipped × 2 listed points."""
    points = [point for point, _ in read(PRODUCT).points()]
    assert len(points) == 12
    for point in points:
        assert (point["model.depth"], point["model.width"]) in ((2, 64), (4, 128))
        assert point["optim.batch"] in (8, 16, 32)
    assert {point.get("optim.lr") for point in points} == {None, 0.001}


def test_a_sweep_built_in_python_survives_writing_and_reading():
    sweep = Sweep(
        "mine",
        question="Q",
        grid={"model": ["vit_s"]},
        seeds=(0, 1),
        where="seed == 1",
        fork=Fork((20, 40)),
    )
    again = read(sweep_file.to_yaml(sweep), "mine")
    points = [({"model": "vit_s", "optim.steps": steps}, 1) for steps in (20, 40)]
    assert list(sweep.points()) == points
    assert list(again.points()) == points
    assert again.fork == sweep.fork


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("question: Does it?", "", 3, "asks a question"),
        ("seeds:", "seedz:", 7, "did you mean 'seeds'?"),
        ("gpu_hours", "gpu_hour", 12, "did you mean 'gpu_hours'?"),
        ("nodes: 2", "node: 2", 10, "did you mean 'nodes'?"),
        ("[vit_s, vit_l]", "vit_s", 5, "wants a list of values"),
        ("[vit_s, vit_l]", "[vit_s, vit_s]", 5, "lists vit_s twice"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 7, "different integers"),
        ("model != 'vit_l'", "modle != 'vit_l'", 8, "did you mean 'model'?"),
        ("where: model", "where: model.f('x') and model", 8, "is not allowed"),
        ("where: model != 'vit_l'", "where: model < 3", 8, "cannot be evaluated"),
        ("where: model", "where: 10**9 < seed or model", 8, "is not allowed"),
        ("where: model", "where: seed * 'x' == 'x' or model", 8, "which is not a number"),
        ("where: model", "where: seed == '%q' % seed or model", 8, "which is not a number"),
        ("where: model", "where: (model", 8, "not an expression"),
        ("time: 8h", "time: 8 hours", 11, "time wants 30m, 8h or 1d12h"),
        ("time: 8h", "time: 8 hours", 11, "hint:  time: 8h"),
        ("time: 8h", "tme: 8h", 11, "unknown key 'tme' in 'resources[1]'"),
        ("seeds: [0, 1]", "seeds: 3", 7, "hint:  seeds: [0, 1, 2]"),
        ("[vit_s, vit_l]", "vit_s", 5, "hint:  model: [vit_s]"),
        ("time: 8h", "time: 8:00:00:00", 11, "time wants 30m, 8h or 1d12h"),
        ("time: 1d", "time: 0h", 10, "time wants"),
        ("nodes: 2", "nodes: two", 10, "wants a positive integer"),
        ("gpu_hours: 900", "gpu_hours: .nan", 12, "wants a positive number"),
        ("retries: {node: 2}", "retries: {preempted: 2}", 13, "known: error"),
        ("model: [vit_s", "seed: [vit_s", 5, "'seed' is no axis here"),
        ("model: [vit_s", "runtime.workers: [vit_s", 5, "changes only speed and place"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nexpect_best: {model: rises}",
            8,
            "no swept setting (size and horizon are none)",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nzip: {optim.lr: [1, 2]}\nexpect_best: {optim.lr: grows}",
            9,
            "hint:  rises, falls, stays, 1, 2",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nlist: [{mask.mode: random}, {mask.mode: multiblock}]\n"
            "expect_best: {mask.mode: rises}",
            9,
            "expect_best.mask.mode is rises, but random, multiblock have no order",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nlist: [{mask.mode: random}, {mask.mode: multiblock}]\n"
            "expect_best: {mask.mode: falls}",
            9,
            "hint:  levels that are different numbers, stays, random, multiblock",
        ),
        ("limits:", "limits: {}\nlimits:", 13, "'limits' is given twice"),
        ("grid:", "grid: [", 6, "not valid YAML"),
        ("base: [data=synthetic]", "base: data=synthetic", 3, "base wants a list"),
        ("base: [data=synthetic]", "base: [data]", 3, "base wants overrides"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nzip: {mask.targets: [1, 2], optim.lr: [1e-3]}",
            8,
            "differ in length",
        ),
        ("seeds: [0, 1]", "seeds: [0, 1]\nlist: [{model: x}]", 8, "is an axis of grid and of list"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nfork: {at: [40, 20]}", 8, "horizons in steps, ascending"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nfork: {at: [20, 40], cooldown: 1}",
            8,
            "a fraction inside (0, 1)",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nfork: {at: [20, 40], cooldwn: 0.2}",
            8,
            "did you mean 'cooldown'?",
        ),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nfork: {at: [9]}\nlist: [{optim.steps: 3}]",
            8,
            "an axis of list and of fork",
        ),
    ],
)
def test_a_mistake_is_one_error_with_its_line_and_a_hint(
    old: str,
    new: str,
    line: int,
    says: str,
):
    assert old in GOOD
    with pytest.raises(SweepFileError) as e:
        list(read(GOOD.replace(old, new, 1)).points())
    assert says in str(e.value), str(e.value)
    assert f"sweeps/x.yaml:{line}" in str(e.value), str(e.value)


def test_a_missing_file_is_named(tmp_path: Path):
    """The user sees no traceback."""
    with pytest.raises(SweepFileError, match=r"no\.yaml: no such file"):
        sweep_file.load(tmp_path / "no.yaml")


def test_axes_that_change_together_may_repeat_a_value() -> None:
    """As a learning rate that two masks share."""
    text = "question: Which?\nzip: {mask: [block, random], optim.lr: [0.006, 0.006]}\n"
    sweep = sweep_file.from_source(yaml_source.parse(text, "s.yaml"), "s")
    assert [point["optim.lr"] for point, _ in sweep.points()] == [0.006, 0.006]
