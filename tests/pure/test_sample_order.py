"""The order of samples: every epoch is a permutation, and interruptions do not change it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cluster.data.sample_order import Stream, epoch_order, positions

GLOBAL = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
BLOCK = [3, 5, 4, 11, 10, 2, 0, 1, 7, 6, 9, 8]
ORDERS = st.sampled_from([(0, 0), (64, 1024), (4, 32), (7, 9), (1, 1), (5, 1)])


@given(
    images=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 10**6),
    kind=ORDERS,
)
@settings(max_examples=150)
def test_an_epoch_is_a_permutation_in_every_order(
    images: int, seed: int, epoch: int, kind: tuple[int, int]
):
    """No sample is lost or repeated, for any size, seed, epoch, block and window."""
    order = epoch_order(images, seed, epoch, *kind)
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(images))


WORLD_SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])
ATTEMPTS = st.lists(st.tuples(WORLD_SIZES, st.integers(0, 6)), min_size=1, max_size=8)


@given(images=st.integers(1, 400), attempts=ATTEMPTS, kind=ORDERS)
@settings(max_examples=150)
def test_interrupted_attempts_read_what_one_process_would_read(
    images: int, attempts: list[tuple[int, int]], kind: tuple[int, int]
):
    """Each attempt has its own world size and ends after some steps."""
    seed = 3
    batch = 48
    consumed = 0
    found: list[list[int]] = []
    for world, steps in attempts:
        stream = Stream(images, seed, *kind)  # a new process knows nothing but `consumed`
        for _ in range(steps):
            step = np.empty((batch, 2), np.int64)
            for rank in range(world):
                own = positions(consumed, batch, rank, world)
                step[rank::world] = np.stack(stream.lookup(own), 1)
            found += step.tolist()
            consumed += batch

    expected: list[list[int]] = []
    for epoch in range(consumed // images + 1):
        order = epoch_order(images, seed, epoch, *kind).tolist()
        expected += [[epoch, index] for index in order]
    assert found == expected[:consumed]


def test_the_order_never_changes_between_versions():
    """A changed order would break every resumed training without an error."""
    assert epoch_order(10, 0, 0).tolist() == GLOBAL
    assert epoch_order(12, 0, 0, 2, 8).tolist() == BLOCK


def test_epochs_and_seeds_have_different_orders():
    assert epoch_order(10, 0, 1).tolist() != GLOBAL
    assert epoch_order(10, 1, 0).tolist() != GLOBAL


def test_block_order_mixes_the_classes_of_class_sorted_data():
    """1000 classes of 128 images: near the 870 classes per batch of a global permutation."""
    images = 128_000
    batch = 2048
    order = epoch_order(images, 0, 0, 64, 1024)
    counts: list[int] = []
    for first in range(0, images - batch, batch):
        classes = np.unique(order[first : first + batch] // 128)
        counts.append(len(classes))
    assert np.mean(counts) > 600


def test_block_order_gives_each_block_of_neighbours_to_one_rank():
    world = 8
    order = epoch_order(128_000, 0, 0, 64, 1024)
    readers: dict[int, set[int]] = {}
    for rank in range(world):
        for block in set((order[rank::world] // 64).tolist()):
            readers.setdefault(block, set()).add(rank)
    ranks_per_block = [len(ranks) for ranks in readers.values()]
    assert np.mean(ranks_per_block) < 1.3
