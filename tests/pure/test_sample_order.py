"""Which sample is where: permutations, exactly once, whatever happens to the machines."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cluster.data.sample_order import Stream, epoch_order, positions

GLOBAL = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
BLOCK = [3, 5, 4, 11, 10, 2, 0, 1, 7, 6, 9, 8]
ORDERS = st.sampled_from([(0, 0), (64, 1024), (4, 32), (7, 9), (1, 1), (5, 1)])


@given(images=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6), kind=ORDERS)
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_a_permutation_in_every_order(images: int, seed: int, epoch: int, kind: tuple[int, int]):
    """No sample is lost or doubled, for any size, seed, epoch, block and window."""
    order = epoch_order(images, seed, epoch, *kind)
    assert order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(images))


@given(
    images=st.integers(1, 400),
    schedule=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), st.integers(0, 6)), min_size=1, max_size=8
    ),
    kind=ORDERS,
)
@settings(max_examples=150, deadline=None)
def test_any_schedule_of_kills_and_world_sizes_consumes_the_stream_once_and_in_order(
    images: int, schedule: list[tuple[int, int]], kind: tuple[int, int]
):
    """Each attempt has its own world size and dies after some steps; together they read what one process would."""
    batch, consumed, seen = 48, 0, list[tuple[int, int]]()
    for world, steps in schedule:
        stream = Stream(images, 3, *kind)  # a new process knows nothing but `consumed`
        for _ in range(steps):
            step = np.empty((batch, 2), np.int64)
            for rank in range(world):
                step[rank::world] = np.stack(stream.lookup(positions(consumed, batch, rank, world)), 1)
            seen += map(tuple, step.tolist())
            consumed += batch
    epochs = [epoch_order(images, 3, e, *kind).tolist() for e in range(consumed // images + 1)]
    assert seen == [(e, i) for e, order in enumerate(epochs) for i in order][:consumed]


def test_epochs_and_seeds_differ_and_the_order_never_changes_between_versions():
    """The numbers are pinned: a changed order would silently break every resumed training."""
    assert epoch_order(10, 0, 0).tolist() == GLOBAL
    assert epoch_order(12, 0, 0, 2, 8).tolist() == BLOCK
    assert epoch_order(10, 0, 1).tolist() != GLOBAL != epoch_order(10, 1, 0).tolist()


def test_block_order_mixes_classes_well_and_gives_each_run_of_neighbours_to_one_rank():
    """Class-sorted data, 1000 classes: near the global permutation; at 8 ranks no run is split between ranks."""
    images, batch, world = 128_000, 2048, 8
    order = epoch_order(images, 0, 0, 64, 1024)
    classes = [len(set((order[k : k + batch] // 128).tolist())) for k in range(0, images - batch, batch)]
    assert np.mean(classes) > 600
    readers: dict[int, set[int]] = {}
    for rank in range(world):
        for run in set((order[rank::world] // 64).tolist()):
            readers.setdefault(run, set()).add(rank)
    assert np.mean([len(r) for r in readers.values()]) < 1.3
