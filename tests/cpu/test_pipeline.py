"""Bytes -> batches: one stream at any world size and worker count."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_sets import config, packed, with_data

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import manifest, pipeline
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.shared_buffers import Buffers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images in train/, 12 in val/. No test changes them."""
    folder = tmp_path_factory.mktemp("set")
    packed(folder, images=100)
    packed(folder, images=12, split="val", first=500)
    return folder


def take(
    trial: TrialConfig, steps: int, world: int = 1, consumed: int = 0
) -> list[list[pipeline.Batch]]:
    """Return [step][rank] -> the batch of this rank; each rank has an iterator of its own."""
    streams = [pipeline.stream(trial, rank, world, consumed) for rank in range(world)]
    try:
        return [list(map(next, streams)) for _ in range(steps)]
    finally:
        for stream in streams:
            stream.close()


def take_alone(trial: TrialConfig, steps: int, consumed: int = 0) -> list[pipeline.Batch]:
    """Return the batches of a single rank."""
    return [batch for (batch,) in take(trial, steps, consumed=consumed)]


def with_workers(trial: TrialConfig, count: int) -> TrialConfig:
    runtime = dataclasses.replace(trial.runtime, workers=count)
    return dataclasses.replace(trial, runtime=runtime)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("world", "count"),
    [
        (1, 4),
        (2, 0),
        (2, 1),
        (4, 2),
        (16, 0),
    ],
)
def test_samples_are_the_same_at_any_world_size_and_worker_count(
    root: Path, world: int, count: int
):
    """Pixels and masks agree sample by sample, over an epoch's end, from the middle of an epoch."""
    trial = with_data(config(root), flip=True)
    alone = take_alone(trial, 6, consumed=48)
    steps = take(with_workers(trial, count), 6, world, 48)
    for whole, ranks in zip(alone, steps, strict=True):
        for r, share in enumerate(ranks):
            assert torch.equal(share.images, whole.images[r::world])
            assert torch.equal(share.index, whole.index[r::world])
            assert torch.equal(share.epoch, whole.epoch[r::world])
            assert torch.equal(share.masks.context, whole.masks.context[r::world])
            assert share.images.dtype == torch.uint8
            assert share.images.shape == (16 // world, 3, 32, 32)


def test_micro_batches_are_the_ranks_share_in_order(root: Path):
    """Four micro-batches of 4 are one batch of 16; crops do not depend on the division."""
    (whole,) = take_alone(config(root), 1)
    parts = take_alone(config(root, micro_batch=4), 4)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_batches_travel_in_few_buffers_and_one_that_is_kept_never_changes(root: Path):
    """The memory of a released batch is used again; every batch that is kept stays as it was."""
    trial = config(root, workers=1)
    batches = pipeline.stream(trial, 0, 1, 0)
    addresses = {next(batches).images.data_ptr() for _ in range(30)}
    batches.close()
    assert len(addresses) <= pipeline.PREFETCH + pipeline.SPARE

    kept = take_alone(trial, 12)
    without_workers = take_alone(config(root), 12)
    for batch, wanted in zip(kept, without_workers, strict=True):
        assert torch.equal(batch.images, wanted.images)

    view = kept[0].images[3:4, :, ::2].numpy()
    before = view.copy()
    del kept, batch
    take(trial, 12)
    assert np.array_equal(view, before)


def test_a_pinned_batch_is_the_same_and_its_buffer_is_free_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    """As torch's pinning thread calls it, with a copy in place of pinning."""
    trial = config(root)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    buffers = Buffers(1, 16, 32)
    opened = open_split(root / "train")
    requests = pipeline._requests(
        trial.recipe,
        len(opened.index),
        0,
        1,
        0,
        16,
        buffers,
    )
    request = next(requests)
    worker_batch = pipeline._Training(trial.recipe, opened)[request]
    assert isinstance(worker_batch, pipeline.WorkerBatch)
    assert buffers.acquire() is None
    pinned, _ = worker_batch.pin_memory()
    assert buffers.acquire() is not None
    (wanted,) = take_alone(trial, 1)
    assert torch.equal(pinned.images, wanted.images)


def test_crops_change_with_epoch_and_seed(root: Path):
    """The same image in another epoch, or under another seed, is another crop."""
    first, second = take_alone(config(root, batch=100), 2)
    first_images = first.images[first.index.argsort()]
    second_images = second.images[second.index.argsort()]
    same = (first_images == second_images).flatten(1).all(1)
    assert not same.any()
    (other_seed,) = take_alone(config(root, seed=1), 1)
    assert not torch.equal(other_seed.images, first.images[:16])


Labelled = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]


def joined(batches: list[Labelled]) -> Labelled:
    """Return images, labels and indices of all batches."""
    images, labels, index = zip(*batches, strict=True)
    columns = {}
    for name in labels[0]:
        columns[name] = torch.cat([label[name] for label in labels])
    return torch.cat(images), columns, torch.cat(index)


def test_labelled_images_are_the_same_at_any_world_size(root: Path):
    """One pass over a fixed choice of images, with every label of the set."""
    trial = config(root)
    batches = list(
        pipeline.labelled(
            trial,
            "train",
            30,
            0,
            1,
            8,
        )
    )
    assert [len(index) for _, _, index in batches] == [8, 8, 8, 6]
    images, labels, index = joined(batches)
    for rank in (0, 1):
        share = pipeline.labelled(
            with_workers(trial, 1),
            "train",
            30,
            rank,
            2,
            8,
        )
        rank_images, _, rank_index = joined(list(share))
        assert torch.equal(rank_index, index[rank::2])
        assert torch.equal(rank_images, images[rank::2])
    wanted = manifest.load(root / "train")[1].labels
    for name in ("class", "count", "distance"):
        assert labels[name].tolist() == wanted[name][index.numpy()].tolist()
    val = pipeline.labelled(
        trial,
        "val",
        None,
        0,
        1,
        5,
    )
    assert sum(len(index) for _, _, index in val) == 12


def test_normalised_images_have_the_constants_of_the_recipe(root: Path):
    """(x / 255 - mean) / std, in float32."""
    trial = config(root)
    data = trial.recipe.data
    (batch,) = take_alone(trial, 1)
    mean = torch.tensor(data.mean).view(3, 1, 1)
    std = torch.tensor(data.std).view(3, 1, 1)
    wanted = (batch.images / 255 - mean) / std
    assert torch.allclose(pipeline.normalise(batch.images, data), wanted, atol=1e-5)
