"""On a GPU: batches arrive in pinned memory, are copied without a wait, and free their buffer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from support.image_sets import config, packed

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def trial(tmp_path: Path) -> TrialConfig:
    packed(tmp_path, images=100)
    return config(tmp_path, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_and_the_same_as_without_a_gpu(
    trial: TrialConfig, tmp_path: Path, workers: int
):
    """More batches are kept than there are buffers; all are copied without a wait of the host."""
    plain = list(islice(pipeline.stream(trial, 0, 1, 0), 12))
    torch.zeros(1).cuda()  # the workers are forked from a process that has used the device
    on_gpu = config(tmp_path, workers=workers, device="cuda")
    batches = pipeline.stream(on_gpu, 0, 1, 0)
    kept = list(islice(batches, 12))
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies = [batch.images.to("cuda", non_blocking=True) for batch in kept]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, copy, wanted in zip(kept, copies, plain, strict=True):
        assert batch.images.is_pinned()
        for mask in batch.masks:
            assert mask is None or mask.is_pinned()
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(copy.cpu(), wanted.images)
        assert torch.equal(batch.masks.context, wanted.masks.context)
        assert torch.equal(batch.index, wanted.index)
    batches.close()


def test_pinned_memory_is_used_again_and_stays_bounded(trial: TrialConfig, tmp_path: Path):
    """200 batches that are released come from at most 16 pinned blocks."""
    on_gpu = config(tmp_path, workers=1, device="cuda")
    batches = pipeline.stream(on_gpu, 0, 1, 0)
    addresses = {next(batches).images.data_ptr() for _ in range(200)}
    batches.close()
    assert len(addresses) <= 16
