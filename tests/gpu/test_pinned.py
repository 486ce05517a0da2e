"""On a GPU: batches arrive in pinned memory, go over while the host works on, and free their buffer at once."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from support.image_sets import config, packed

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def trial(tmp_path: Path) -> TrialConfig:
    packed(tmp_path, images=100)
    return config(tmp_path, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_and_the_same_as_without_a_gpu(trial: TrialConfig, tmp_path: Path, workers: int):
    """Images and masks of every batch; more of them kept than there are buffers; copied without the host waiting."""
    plain = list(islice(pipeline.stream(trial, 0, 1, 0), 12))
    torch.zeros(1).cuda()  # the workers are forked from a process that has used the device
    batches = pipeline.stream(config(tmp_path, workers=workers, device="cuda"), 0, 1, 0)
    kept = list(islice(batches, 12))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = [b.images.to("cuda", non_blocking=True) for b in kept]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, on_device, alone in zip(kept, sent, plain, strict=True):
        assert mine.images.is_pinned() and all(m.is_pinned() for m in mine.masks if m is not None)
        assert torch.equal(mine.images, alone.images) and torch.equal(on_device.cpu(), alone.images)
        assert torch.equal(mine.masks.context, alone.masks.context) and torch.equal(mine.index, alone.index)
    batches.close()


def test_pinned_memory_is_used_again_and_stays_bounded(trial: TrialConfig, tmp_path: Path):
    """200 batches that are let go come from a handful of pinned blocks."""
    batches = pipeline.stream(config(tmp_path, workers=1, device="cuda"), 0, 1, 0)
    places = {next(batches).images.data_ptr() for _ in range(200)}
    batches.close()
    assert len(places) <= 16
