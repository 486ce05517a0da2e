"""Exactly once, whatever happens: the real pipeline, killed and resumed at random, against one undisturbed process."""

import gc
import json
import multiprocessing
import os
import signal
import threading
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.image_sets import config, packed

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import pipeline
from jepa_cluster.data.sample_order import epoch_order
from jepa_cluster.errors import DataError

IMAGES = 60
Seen = list[list[int]]  # [epoch, sample, CRC-32 of its crop and context] of each sample, in order

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Segment(NamedTuple):
    """An attempt: how it reads, how many steps it is let do, how it dies, how many steps its checkpoint lacks."""

    world: int
    workers: int
    steps: int
    death: str  # SIGKILL to the whole "group", to the "leader", to a "worker"; or "none"
    lost: int


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in several shards."""
    folder = tmp_path_factory.mktemp("set")
    packed(folder, images=IMAGES)
    return folder


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Seen:
    """20 epochs in one process, in order; a crop is a function of (seed, epoch, sample), so any batch will do."""
    batches = pipeline.stream(config(root, batch=IMAGES), 0, 1, 0)
    seen = [row for _ in range(20) for row in rows([next(batches)])]
    assert [s for _, s, _ in seen] == [s for e in range(20) for s in epoch_order(IMAGES, 0, e).tolist()]
    return seen


def rows(ranks: list[pipeline.Batch]) -> Seen:
    """The samples of a global batch in the order of the stream; rank r holds every world-th of them."""
    shares = [
        [
            [e, i, zlib.crc32(c.numpy().tobytes(), zlib.crc32(image.numpy().tobytes()))]
            for e, i, image, c in zip(b.epoch.tolist(), b.index.tolist(), b.images, b.masks.context, strict=True)
        ]
        for b in ranks
    ]
    return [row for together in zip(*shares, strict=True) for row in together]


def attempt(trial: TrialConfig, segment: Segment, consumed: int, out: int) -> None:
    """All ranks of an attempt in a process group of their own; a line a step, until it is killed."""
    os.setsid()
    torch.set_num_threads(1)
    gc.callbacks.clear()  # hypothesis's: what a signal's handler raises in one is lost
    steps = range(segment.steps if segment.death == "none" else 1000)
    try:
        streams = [pipeline.stream(trial, r, segment.world, consumed) for r in range(segment.world)]
        for _ in steps:
            os.write(out, (json.dumps(rows([next(s) for s in streams])) + "\n").encode())
        for s in streams:
            s.close()
    except DataError as e:
        os._exit(3 if "DataLoader worker" in str(e) else 4)


def kill(leader: int, segment: Segment) -> None:
    workers = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    assert len(workers) == segment.world * segment.workers
    if segment.death == "group":
        os.killpg(leader, signal.SIGKILL)
    else:
        chosen = segment.steps * 7 % len(workers) if workers else 0
        os.kill(int(workers[chosen]) if segment.death == "worker" and workers else leader, signal.SIGKILL)


def lived(trial: TrialConfig, segment: Segment, consumed: int) -> Seen:
    """What a real process saw until it died, and all who could write were gone."""
    incoming, outgoing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(trial, segment, consumed, outgoing))
    process.start()
    os.close(outgoing)
    watchdog = threading.Timer(240, process.kill)  # as training's, should the news of a dead worker be lost
    watchdog.start()
    try:
        with os.fdopen(incoming) as lines:
            told = [read(lines) for _ in range(segment.steps)]
            if segment.death != "none":
                kill(process.pid or 0, segment)
            while lines.read(1 << 16):  # until no worker holds the pipe any more
                pass
        process.join()
    finally:
        watchdog.cancel()
        process.kill()
    by_worker = segment.death == "worker" and segment.workers
    assert process.exitcode in ({0} if segment.death == "none" else {3, -9} if by_worker else {-9})
    return [row for step in told for row in step]


def read(lines: IO[str]) -> Seen:
    line = lines.readline()
    assert line.endswith("\n"), "the attempt ended before its time"
    return json.loads(line)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Segment]]:
    """A global batch and attempts whose world sizes can share it; few enough processes for a small machine."""
    batch = draw(st.sampled_from([48, 60, 84, 110, 117]))
    worlds = st.sampled_from([w for w in range(1, 17) if batch % w == 0])
    segments = []
    for _ in range(draw(st.integers(2, 4))):
        world = draw(worlds)
        workers = draw(st.integers(0, min(4, 8 // world)))
        death = draw(st.sampled_from(["group", "leader", "worker", "none"]))
        segments.append(Segment(world, workers, draw(st.integers(1, 2)), death, draw(st.integers(0, 1))))
    return batch, segments


@given(history=histories())
@example((48, [Segment(16, 4, 1, "group", 0), Segment(3, 1, 2, "worker", 1), Segment(12, 0, 2, "none", 0)]))
@example((84, [Segment(7, 2, 2, "leader", 1), Segment(1, 4, 2, "worker", 0), Segment(14, 1, 1, "group", 0)]))
@settings(max_examples=6, deadline=None)
def test_any_history_of_kills_world_sizes_and_workers_consumes_the_epochs_once_and_in_order(
    root: Path, undisturbed: Seen, history: tuple[int, list[Segment]]
):
    """SIGKILL to a group, a trainer or a worker, in the middle of anything; resumed from a checkpoint's one integer."""
    batch, segments = history
    kept: Seen = []
    for segment in segments:
        trial = config(root, batch=batch, workers=segment.workers)
        kept += lived(trial, segment, len(kept))
        del kept[len(kept) - batch * min(segment.lost, segment.steps) :]  # steps after the last checkpoint
    assert kept == undisturbed[: len(kept)]
    epochs = len(kept) // IMAGES
    for e in range(epochs):
        assert sorted(s for _, s, _ in kept[e * IMAGES : (e + 1) * IMAGES]) == list(range(IMAGES))
