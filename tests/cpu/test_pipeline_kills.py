"""Each sample once: the pipeline, killed and resumed at random, against one undisturbed process."""

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
WORKER_KILLED = 3  # exit code of an attempt whose error is that a worker was killed
Seen = list[list[int]]  # [epoch, sample, CRC-32 of its crop and context] of each sample, in order

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Segment(NamedTuple):
    """One attempt of a history."""

    world: int
    workers: int  # per rank
    steps: int  # that it consumes before it is killed
    death: str  # SIGKILL to the whole "group", to the "leader", to a "worker"; or "none"
    lost: int  # steps that its checkpoint lacks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in several shards."""
    folder = tmp_path_factory.mktemp("set")
    packed(folder, images=IMAGES)
    return folder


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Seen:
    """20 epochs in one process. A crop is a function of (seed, epoch, sample), not of the batch."""
    batches = pipeline.stream(config(root, batch=IMAGES), 0, 1, 0)
    seen: Seen = []
    order: list[int] = []
    for epoch in range(20):
        seen += rows([next(batches)])
        order += epoch_order(IMAGES, 0, epoch).tolist()
    assert [sample for _, sample, _ in seen] == order
    return seen


def rows(ranks: list[pipeline.Batch]) -> Seen:
    """Return the samples of a global batch in stream order; rank r holds every world-th of them."""
    found: Seen = []
    for position in range(len(ranks[0].images)):
        for batch in ranks:
            epoch = int(batch.epoch[position])
            sample = int(batch.index[position])
            crop = zlib.crc32(batch.images[position].numpy().tobytes())
            context = batch.masks.context[position].numpy().tobytes()
            found.append([epoch, sample, zlib.crc32(context, crop)])
    return found


def attempt(trial: TrialConfig, segment: Segment, consumed: int, out: int) -> None:
    """Run all ranks in a process group of their own; write one line per step, until killed."""
    os.setsid()
    torch.set_num_threads(1)
    gc.callbacks.clear()  # in those of hypothesis an exception of a signal handler would be lost
    steps = segment.steps if segment.death == "none" else 1000
    world = segment.world
    try:
        streams = [pipeline.stream(trial, rank, world, consumed) for rank in range(world)]
        for _ in range(steps):
            line = json.dumps(rows(list(map(next, streams)))) + "\n"
            os.write(out, line.encode())
        for stream in streams:
            stream.close()
    except DataError as e:
        os._exit(WORKER_KILLED if "DataLoader worker" in str(e) else 4)


def kill(leader: int, segment: Segment) -> None:
    workers = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    assert len(workers) == segment.world * segment.workers
    if segment.death == "group":
        os.killpg(leader, signal.SIGKILL)
    elif segment.death == "worker" and workers:
        chosen = segment.steps * 7 % len(workers)
        os.kill(int(workers[chosen]), signal.SIGKILL)
    else:
        os.kill(leader, signal.SIGKILL)


def possible_exits(segment: Segment) -> set[int]:
    if segment.death == "none":
        return {0}
    if segment.death == "worker" and segment.workers:
        return {WORKER_KILLED, -signal.SIGKILL}
    return {-signal.SIGKILL}


def lived(trial: TrialConfig, segment: Segment, consumed: int) -> Seen:
    """Run an attempt until it ends. Returns the samples of its first `segment.steps` steps."""
    incoming, outgoing = os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=attempt, args=(trial, segment, consumed, outgoing))
    process.start()
    os.close(outgoing)
    watchdog = threading.Timer(240, process.kill)  # for the case that the attempt hangs
    watchdog.start()
    seen: Seen = []
    try:
        with os.fdopen(incoming) as lines:
            for _ in range(segment.steps):
                seen += read(lines)
            if segment.death != "none":
                kill(process.pid or 0, segment)
            while lines.read(1 << 16):  # until no worker holds the pipe any more
                pass
        process.join()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.exitcode in possible_exits(segment)
    return seen


def read(lines: IO[str]) -> Seen:
    line = lines.readline()
    assert line.endswith("\n"), "the attempt ended before its time"
    return json.loads(line)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Segment]]:
    """Draw a global batch and attempts whose world sizes divide it, with at most 8 workers."""
    batch = draw(st.sampled_from([48, 60, 84, 110, 117]))
    worlds = st.sampled_from([world for world in range(1, 17) if batch % world == 0])
    segments = []
    for _ in range(draw(st.integers(2, 4))):
        world = draw(worlds)
        workers = draw(st.integers(0, min(4, 8 // world)))
        death = draw(st.sampled_from(["group", "leader", "worker", "none"]))
        steps = draw(st.integers(1, 2))
        lost = draw(st.integers(0, 1))
        segments.append(Segment(world, workers, steps, death, lost))
    return batch, segments


DIVISORS_OF_48 = [
    Segment(16, 4, 1, "group", 0),
    Segment(3, 1, 2, "worker", 1),
    Segment(12, 0, 2, "none", 0),
]
DIVISORS_OF_84 = [
    Segment(7, 2, 2, "leader", 1),
    Segment(1, 4, 2, "worker", 0),
    Segment(14, 1, 1, "group", 0),
]


@given(history=histories())
@example((48, DIVISORS_OF_48))
@example((84, DIVISORS_OF_84))
@settings(max_examples=6)
def test_any_history_of_kills_consumes_the_epochs_once_and_in_order(
    root: Path, undisturbed: Seen, history: tuple[int, list[Segment]]
):
    """SIGKILL to a group, a trainer or a worker; resumed from the number of consumed samples."""
    batch, segments = history
    kept: Seen = []
    for segment in segments:
        trial = config(root, batch=batch, workers=segment.workers)
        kept += lived(trial, segment, len(kept))
        after_checkpoint = batch * min(segment.lost, segment.steps)
        del kept[len(kept) - after_checkpoint :]
    assert kept == undisturbed[: len(kept)]
    samples = [sample for _, sample, _ in kept]
    for start in range(0, len(kept) - IMAGES + 1, IMAGES):
        assert sorted(samples[start : start + IMAGES]) == list(range(IMAGES))
