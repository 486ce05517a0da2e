"""Bytes -> batches: one stream at any world size and worker count, faults that are named, nothing left behind."""

import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.image_sets import config, encoded, packed, picture, with_data

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import indexing, manifest, pipeline, reader
from jepa_cluster.data.shared_buffers import Buffers
from jepa_cluster.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images in train/, 12 in val/. Nobody changes it."""
    folder = tmp_path_factory.mktemp("set")
    packed(folder, images=100)
    packed(folder, images=12, split="val", first=500)
    return folder


def take(trial: TrialConfig, steps: int, world: int = 1, consumed: int = 0) -> list[list[pipeline.Batch]]:
    """[step][rank] -> this rank's batch; each rank has an iterator of its own."""
    streams = [pipeline.stream(trial, r, world, consumed) for r in range(world)]
    try:
        return [[next(s) for s in streams] for _ in range(steps)]
    finally:
        for s in streams:
            s.close()


def workers(trial: TrialConfig, count: int, **changes: object) -> TrialConfig:
    return dataclasses.replace(trial, runtime=dataclasses.replace(trial.runtime, workers=count, **changes))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "count"), [(1, 4), (2, 0), (2, 1), (4, 2), (16, 0)])
def test_pixels_masks_and_samples_are_the_same_at_any_world_size_and_worker_count(root: Path, world: int, count: int):
    """Sample by sample, over an epoch's end inside a batch, from the middle of an epoch."""
    trial = with_data(config(root), flip=True)
    for alone, ranks in zip(take(trial, 6, 1, 48), take(workers(trial, count), 6, world, 48), strict=True):
        for r, mine in enumerate(ranks):
            assert torch.equal(mine.images, alone[0].images[r::world])
            assert torch.equal(mine.index, alone[0].index[r::world]) and torch.equal(
                mine.epoch, alone[0].epoch[r::world]
            )
            assert torch.equal(mine.masks.context, alone[0].masks.context[r::world])
    assert mine.images.dtype == torch.uint8 and mine.images.shape == (16 // world, 3, 32, 32)


def test_micro_batches_are_the_ranks_share_in_order(root: Path):
    """Four micro-batches of 4 are one batch of 16; crops do not depend on the cut."""
    whole = take(config(root), 1)[0][0]
    parts = [b[0] for b in take(config(root, micro_batch=4), 4)]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)


def test_batches_travel_in_few_buffers_and_one_that_is_kept_never_changes(root: Path):
    """Let go, its memory is used again; kept, every batch stays what it was, however many are kept."""
    trial = config(root, workers=1)
    batches = pipeline.stream(trial, 0, 1, 0)
    places = {next(batches).images.data_ptr() for _ in range(30)}
    batches.close()
    assert len(places) <= pipeline.PREFETCH + pipeline.SPARE
    kept = [b[0] for b in take(trial, 12)]
    for mine, alone in zip(kept, take(config(root), 12), strict=True):
        assert torch.equal(mine.images, alone[0].images)
    view = kept[0].images[3:4, :, ::2].numpy()
    before = view.copy()
    del kept
    take(trial, 12)
    assert np.array_equal(view, before)


def test_a_pinned_batch_is_the_same_and_its_buffer_is_free_at_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    """What torch's pinning thread calls; pinning itself is stood in for by a copy."""
    trial = config(root)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    shared = Buffers(1, 16, 32)
    opened = pipeline.open_split(root / "train")
    wanted = next(pipeline._requests(trial.recipe, len(opened.index), 0, 1, 0, 16, shared))
    parcel = pipeline._Training(trial.recipe, opened)[wanted]
    assert isinstance(parcel, pipeline.WorkerBatch) and shared.acquire() is None
    pinned, _ = parcel.pin_memory()
    assert shared.acquire() is not None and torch.equal(pinned.images, take(trial, 1)[0][0].images)


def test_crops_change_with_epoch_and_seed(root: Path):
    """The same image in another epoch, or under another seed, is another crop."""
    batches = [b[0] for b in take(config(root, batch=100), 2)]
    order = [b.index.argsort() for b in batches]
    same = (batches[0].images[order[0]] == batches[1].images[order[1]]).flatten(1).all(1)
    assert not same.any()
    assert not torch.equal(take(config(root, seed=1), 1)[0][0].images, batches[0].images[:16])


def test_labelled_images_are_the_same_at_any_world_size_with_every_label_of_the_set(root: Path):
    """A finite pass over a limited, fixed choice of images."""
    trial = config(root)
    alone = list(pipeline.labelled(trial, "train", 30, 0, 1, 8))
    assert [len(i) for _, _, i in alone] == [8, 8, 8, 6]
    index = torch.cat([i for _, _, i in alone])
    parts = [list(pipeline.labelled(workers(trial, 1), "train", 30, r, 2, 8)) for r in (0, 1)]
    for r in (0, 1):
        assert torch.equal(torch.cat([i for _, _, i in parts[r]]), index[r::2])
        assert torch.equal(torch.cat([p for p, _, _ in parts[r]]), torch.cat([p for p, _, _ in alone])[r::2])
    wanted = manifest.load(root / "train")[1].labels
    for name in ("class", "count", "distance"):
        assert torch.cat([v[name] for _, v, _ in alone]).tolist() == wanted[name][index.numpy()].tolist()
    assert sum(len(i) for _, _, i in pipeline.labelled(trial, "val", None, 0, 1, 5)) == 12


def test_normalised_images_have_the_constants_of_the_recipe(root: Path):
    """(x / 255 - mean) / std, in float32."""
    trial = config(root)
    images = take(trial, 1)[0][0].images
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trial.recipe.data.mean, trial.recipe.data.std))
    assert torch.allclose(pipeline.normalise(images, trial.recipe.data), (images / 255 - mean) / std, atol=1e-5)


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 0x10]))


def corrupt(root: Path, sample: int, byte: int = 0) -> None:
    """Change one byte of the sample's span."""
    made = reader.Reader(root / "train", *manifest.load(root / "train"))
    flip_byte(made.paths[made.locate(sample)[0]], int(made.index.columns["start"][sample]) + byte)


def test_a_corrupt_sample_is_replaced_by_the_same_other_one_at_any_world_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Replaced, counted, and named on stderr with shard and bytes."""
    packed(tmp_path, images=40)
    trial = with_data(config(tmp_path, batch=40), max_corrupt=0.1)
    whole = take(trial, 1)[0][0]
    corrupt(tmp_path, 7, 3)
    corrupt(tmp_path, 20, 2000)
    alone = take(trial, 1)[0][0]
    changed = (alone.images != whole.images).flatten(1).any(1)
    assert sorted(alone.index[changed].tolist()) == [7, 20] and alone.corrupt == 2
    said = capfd.readouterr().err
    assert "shard-00000" in said and "sample" in said and "replaced by sample" in said
    ranks = take(workers(trial, 1), 1, 4)[0]
    assert sum(b.corrupt for b in ranks) == 2
    for r, mine in enumerate(ranks):
        assert torch.equal(mine.images, alone.images[r::4])


def test_more_corrupt_samples_than_the_stated_share_stop_the_trial(tmp_path: Path):
    """The error has both numbers, the last culprit and the command to run."""
    packed(tmp_path, images=40)
    trial = with_data(config(tmp_path, batch=20), max_corrupt=0.05)  # two of an epoch of 40
    corrupt(tmp_path, 1)
    corrupt(tmp_path, 2)
    take(trial, 2)
    corrupt(tmp_path, 3)
    with pytest.raises(DataError) as e:
        take(trial, 2)
    assert "3 of" in str(e.value) and "max_corrupt=0.05" in str(e.value) and "jepa shards verify" in str(e.value)
    with pytest.raises(DataError, match=r"max_corrupt=0\.0 of"):
        take(with_data(trial, max_corrupt=0.0), 2)


def test_images_that_no_decoder_reads_never_end_a_worker(tmp_path: Path):
    """300 mutated images packed as they are: batches go on, every one is counted, no worker dies."""
    import webdataset

    rng = random.Random(0)
    folder = tmp_path / "train"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "fuzz.tar")) as tar:
        for n in range(400):
            data = bytearray(encoded(picture(n), "PNG" if n % 5 == 0 else "JPEG"))
            for _ in range(rng.randrange(30) if n % 4 else 0):
                data[rng.randrange(len(data))] = rng.randrange(256)
            tar.write({"__key__": f"{n:04d}", "jpg": bytes(data), "cls": n % 3})
    indexing.index(folder, workers=1)
    trial = with_data(config(tmp_path, batch=100, workers=2), max_corrupt=1.0)
    assert sum(b[0].corrupt for b in take(trial, 4)) > 50


def test_a_disk_that_does_not_answer_is_tried_again_and_then_named_with_its_node(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two ESTALE are lived through; one that stays ends in an error that is not the sample's fault."""
    monkeypatch.setattr(reader, "PAUSES", (0.001, 0.001, 0.001))
    failures = [errno.ESTALE, errno.EIO]
    plain = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "the server is away")
        return plain(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    calm = take(config(root), 1)[0][0]
    assert calm.corrupt == 0 and not failures
    failures += [errno.EIO] * 100
    with pytest.raises(DataError) as e:
        take(config(root), 1)
    assert (
        "cannot read shard-0000" in str(e.value) and "4 tries" in str(e.value) and os.uname().nodename in str(e.value)
    )


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """More shards than descriptors: the oldest is closed."""
    made = packed(tmp_path, images=60, shard_bytes=1)
    monkeypatch.setattr(reader, "DESCRIPTORS", 8)
    assert len(made.shards) == 60
    opened = pipeline.open_split(tmp_path / "train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for k in range(60):
        opened.image(k)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8


def test_workers_leave_signals_to_their_parent(root: Path):
    """A preemption signals the whole step; workers must live until the checkpoint is written."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    others = set(listing.read_text().split())
    batches = pipeline.stream(config(root, workers=1), 0, 1, 0)
    next(batches)
    children = set(listing.read_text().split()) - others
    for child in children:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            os.kill(int(child), number)
    assert len(list(islice(batches, 10))) == 10
    batches.close()
    assert children and not any(Path(f"/proc/{c}").exists() for c in children)


def hold(trial: TrialConfig, out: int) -> None:
    torch.set_num_threads(1)
    batches = pipeline.stream(trial, 0, 1, 0)
    next(batches)
    os.write(out, b"on")
    time.sleep(60)


def test_a_training_killed_with_sigkill_leaves_neither_workers_nor_shared_memory(root: Path):
    """The workers notice; nothing of theirs stays in /dev/shm to poison the next job on the node."""
    said, out = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(config(root, workers=2), out))
    process.start()
    assert os.read(said, 2) == b"on"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    os.close(out)
    family = [str(process.pid), *children]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{c}").exists() for c in children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)
    os.close(said)
    assert len(children) >= 2 and not [p for p in Path("/dev/shm").iterdir() if set(p.name.split("_")) & set(family)]


def test_a_set_that_changed_since_the_trial_was_frozen_is_refused(root: Path):
    """Both digests are in the message."""
    trial = with_data(config(root), digest="0123456789abcdef")
    with pytest.raises(DataError) as e:
        take(trial, 1)
    assert "0123456789abcdef" in str(e.value) and manifest.read(root / "train").digest in str(e.value)


def test_staged_shards_give_the_same_stream_and_are_gone_afterwards(root: Path, tmp_path: Path):
    """Two ranks share one copy; the last one out removes it, and the leftovers of another set."""
    stage = tmp_path / "scratch"
    stale = stage / f"jepa-{os.getuid()}-feedfeedfeedfeed"
    stale.mkdir(parents=True)
    (stale / "000000.tar").write_bytes(b"of a job that was killed")
    plain = take(config(root), 2, 2)
    trial = config(root, staging_dir=str(stage))
    streams = [pipeline.stream(trial, r, 2, 0) for r in (0, 1)]
    for r in (0, 1):
        assert torch.equal(next(streams[r]).images, plain[0][r].images)
    assert [p.name for p in stage.iterdir()] == [f"jepa-{os.getuid()}-{manifest.read(root / 'train').digest}"]
    streams[0].close()
    assert torch.equal(next(streams[1]).images, plain[1][1].images)
    streams[1].close()
    assert not list(stage.iterdir())


def test_staging_killed_with_sigkill_goes_on_and_leaves_nothing_behind(root: Path, tmp_path: Path):
    """Half a copy on the node: the next attempt completes it, reads the same stream and removes it."""
    stage = tmp_path / "scratch"
    slow = (
        "import sys, time, shutil; from pathlib import Path; from jepa_cluster.data import manifest, staging\n"
        "def copy(a, b):\n    Path(b).write_bytes(Path(a).read_bytes()[:1000]); time.sleep(0.2); return plain(a, b)\n"
        "plain = shutil.copyfile; shutil.copyfile = copy; staging.STREAMS = 1; folder = Path(sys.argv[1])\n"
        "with staging.staged(folder, manifest.read(folder), Path(sys.argv[2])): pass"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(root / "train"), str(stage)])
    while len(list(stage.glob("*/*.tar"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(stage.glob("*/*.tar"))
    plain, staged = take(config(root), 2), take(config(root, staging_dir=str(stage)), 2)
    assert all(torch.equal(a[0].images, b[0].images) for a, b in zip(plain, staged, strict=True))
    assert not list(stage.iterdir())


def test_a_stage_without_room_says_how_much_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Needed and free gigabytes, and what to set."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DataError, match="GB free"):
        take(config(root, staging_dir=str(tmp_path / "scratch")), 1)
    assert not list((tmp_path / "scratch").iterdir())
