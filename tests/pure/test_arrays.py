"""Job arrays per resource class, and how many tasks of each may run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_cluster.launch.cluster.arrays import ArrayDemand, allocate_tasks, make_arrays
from jepa_cluster.launch.cluster.profile import ResourceClass, class_letters

SMALL = ResourceClass(1, 8, 60)
LARGE = ResourceClass(4, 8, 120)


def test_a_resource_class_has_arrays_of_limited_length():
    """Trials keep their order, and the smallest class comes first."""
    trials = {f"t{i}": SMALL for i in range(9)}
    trials |= {"t0": LARGE, "t3": LARGE, "t6": LARGE}
    arrays = make_arrays(trials, class_letters(trials.values()), longest=4)
    assert [(array.letter, array.trials) for array in arrays] == [
        ("A", ("t1", "t2", "t4", "t5")),
        ("A", ("t7", "t8")),
        ("B", ("t0", "t3", "t6")),
    ]


LOADS = st.builds(
    lambda world, left, part: ArrayDemand(world, left, int(left * part)),
    st.integers(1, 64),
    st.integers(1, 50),
    st.floats(0, 1),
)


@given(st.lists(LOADS, min_size=1, max_size=6), st.integers(1, 600))
def test_allocated_tasks_keep_the_cap_and_use_all_gpus(arrays: list[ArrayDemand], cap: int):
    """If more GPUs than the cap are in use already, no further task may start."""
    allocated = allocate_tasks(arrays, cap)
    in_use = 0
    at_most = 0
    for array, tasks in zip(arrays, allocated, strict=True):
        assert 0 <= tasks <= array.tasks
        in_use += array.world * array.running
        at_most += array.world * max(array.running, tasks)
    assert at_most <= max(cap, in_use)

    if in_use == 0:
        idle = cap - at_most
        for array, tasks in zip(arrays, allocated, strict=True):
            assert tasks == array.tasks or array.world > idle


@pytest.mark.parametrize(
    ("arrays", "allocated"),
    [
        pytest.param([ArrayDemand(8, 10), ArrayDemand(8, 10)], [4, 4], id="equal"),
        pytest.param([ArrayDemand(8, 1, 1), ArrayDemand(8, 10, 4)], [1, 7], id="one nearly done"),
        pytest.param([ArrayDemand(8, 10, 8), ArrayDemand(8, 10)], [4, 0], id="no room yet"),
        pytest.param([ArrayDemand(8, 10, 6), ArrayDemand(8, 10)], [4, 2], id="little room"),
        pytest.param([ArrayDemand(64, 3), ArrayDemand(8, 10)], [1, 0], id="one task fills the cap"),
    ],
)
def test_arrays_share_64_gpus(arrays: list[ArrayDemand], allocated: list[int]):
    """An array with more than its share loses it as its tasks end."""
    assert allocate_tasks(arrays, 64) == allocated
