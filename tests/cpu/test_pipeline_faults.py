"""Faults of data, disk and processes: each is named, and nothing is left behind."""

import errno
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import webdataset
from support.image_sets import config, encoded, packed, picture, with_data
from test_pipeline import take, take_alone, with_workers

from jepa_cluster.config import TrialConfig
from jepa_cluster.data import indexing, manifest, pipeline, reader
from jepa_cluster.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images in train/. No test changes them."""
    folder = tmp_path_factory.mktemp("set")
    packed(folder, images=100)
    return folder


# ---- corrupt samples


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 0x10]))


def corrupt(root: Path, sample: int, byte: int = 0) -> None:
    """Change one byte of the sample's span."""
    made = reader.Reader(root / "train", *manifest.load(root / "train"))
    shard, *_ = made.locate(sample)
    start = int(made.index.columns["start"][sample])
    flip_bit(made.paths[shard], start + byte)


def test_a_corrupt_sample_is_replaced_by_the_same_one_at_any_world_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Replaced, counted, and named on stderr with shard and bytes."""
    packed(tmp_path, images=40)
    trial = with_data(config(tmp_path, batch=40), max_corrupt=0.1)
    (intact,) = take_alone(trial, 1)
    corrupt(tmp_path, 7, 3)
    corrupt(tmp_path, 20, 2000)
    (batch,) = take_alone(trial, 1)
    changed = (batch.images != intact.images).flatten(1).any(1)
    assert sorted(batch.index[changed].tolist()) == [7, 20]
    assert batch.corrupt == 2
    err = capfd.readouterr().err
    assert "shard-00000" in err
    assert "sample" in err
    assert "replaced by sample" in err
    (ranks,) = take(with_workers(trial, 1), 1, world=4)
    assert sum(share.corrupt for share in ranks) == 2
    for r, share in enumerate(ranks):
        assert torch.equal(share.images, batch.images[r::4])


def test_more_corrupt_samples_than_the_stated_share_stop_the_trial(tmp_path: Path):
    """The error has both numbers and the command to run."""
    packed(tmp_path, images=40)
    trial = with_data(config(tmp_path, batch=20), max_corrupt=0.05)  # two of an epoch of 40
    corrupt(tmp_path, 1)
    corrupt(tmp_path, 2)
    take(trial, 2)
    corrupt(tmp_path, 3)
    with pytest.raises(DataError) as e:
        take(trial, 2)
    assert "3 of" in str(e.value)
    assert "max_corrupt=0.05" in str(e.value)
    assert "jepa shards verify" in str(e.value)
    with pytest.raises(DataError, match=r"max_corrupt=0\.0 of"):
        take(with_data(trial, max_corrupt=0.0), 2)


def test_images_that_no_decoder_reads_never_end_a_worker(tmp_path: Path):
    """400 images, most of them mutated: batches go on, every corrupt one is counted."""
    rng = random.Random(0)
    folder = tmp_path / "train"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "fuzz.tar")) as tar:
        for n in range(400):
            form = "PNG" if n % 5 == 0 else "JPEG"
            data = bytearray(encoded(picture(n), form))
            if n % 4:
                for _ in range(rng.randrange(30)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            tar.write(
                {
                    "__key__": f"{n:04d}",
                    "jpg": bytes(data),
                    "cls": n % 3,
                }
            )
    indexing.index(folder, workers=1)
    trial = with_data(config(tmp_path, batch=100, workers=2), max_corrupt=1.0)
    assert sum(batch.corrupt for batch in take_alone(trial, 4)) > 50


# ---- the disk and the set


def test_a_disk_that_does_not_answer_is_read_again_and_then_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two errors are retried; one that stays is an error with the node, not a corrupt sample."""
    monkeypatch.setattr(reader, "PAUSES", (0.001, 0.001, 0.001))
    failures = [errno.ESTALE, errno.EIO]
    plain = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "the server is away")
        return plain(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    (batch,) = take_alone(config(root), 1)
    assert batch.corrupt == 0
    assert not failures
    failures += [errno.EIO] * 100
    with pytest.raises(DataError) as e:
        take(config(root), 1)
    assert "cannot read shard-0000" in str(e.value)
    assert "4 tries" in str(e.value)
    assert os.uname().nodename in str(e.value)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With more shards than descriptors the oldest is closed."""
    made = packed(tmp_path, images=60, shard_bytes=1)
    monkeypatch.setattr(reader, "DESCRIPTORS", 8)
    assert len(made.shards) == 60
    opened = reader.open_split(tmp_path / "train")
    before = open_files()
    for k in range(60):
        opened.image(k)
    assert open_files() - before <= 8


def test_a_set_that_changed_since_the_trial_was_frozen_is_refused(root: Path):
    """Both digests are in the message."""
    trial = with_data(config(root), digest="0123456789abcdef")
    with pytest.raises(DataError) as e:
        take(trial, 1)
    assert "0123456789abcdef" in str(e.value)
    assert manifest.read(root / "train").digest in str(e.value)


# ---- workers


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def any_alive(pids: list[str]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_leave_signals_to_their_parent(root: Path):
    """Slurm signals every process of a step; workers live until the checkpoint is written."""
    others = children_of(os.getpid())
    batches = pipeline.stream(config(root, workers=1), 0, 1, 0)
    next(batches)
    children = [pid for pid in children_of(os.getpid()) if pid not in others]
    for name in ("TERM", "USR2", "INT"):  # by another process, as slurmstepd is
        subprocess.run(["kill", "-s", name, *children], check=True)
    assert len(list(islice(batches, 10))) == 10
    batches.close()
    assert children
    assert not any_alive(children)


EXIT_WITHOUT_CLOSING = """
import pickle, sys
from jepa_cluster.data import pipeline
batches = pipeline.stream(pickle.loads(bytes.fromhex(sys.argv[1])), 0, 1, 0)
next(batches)
raise SystemExit(7)
"""


def test_a_process_that_exits_with_an_open_stream_ends(root: Path):
    """It hung: Python ends its children by SIGTERM and waits for them."""
    trial = pickle.dumps(config(root, workers=2)).hex()
    words = [sys.executable, "-c", EXIT_WITHOUT_CLOSING, trial]
    assert subprocess.run(words, check=False, timeout=120).returncode == 7


def hold(trial: TrialConfig, out: int) -> None:
    torch.set_num_threads(1)
    batches = pipeline.stream(trial, 0, 1, 0)
    next(batches)
    os.write(out, b"on")
    time.sleep(60)


def test_a_killed_training_leaves_neither_workers_nor_shared_memory(root: Path):
    """After SIGKILL the workers end, and nothing of theirs stays in /dev/shm."""
    incoming, outgoing = os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=hold, args=(config(root, workers=2), outgoing))
    process.start()
    assert os.read(incoming, 2) == b"on"
    children = children_of(process.pid)
    process.kill()
    process.join()
    os.close(outgoing)
    deadline = time.monotonic() + 60
    while any_alive(children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)
    os.close(incoming)
    assert len(children) >= 2
    family = {str(process.pid), *children}
    left = [path for path in Path("/dev/shm").iterdir() if family & set(path.name.split("_"))]
    assert not left


# ---- staging on the node's own disk


def test_staged_shards_give_the_same_stream_and_are_gone_afterwards(root: Path, tmp_path: Path):
    """Two ranks share one copy; the last one removes it, and what a killed job left."""
    stage = tmp_path / "scratch"
    stale = stage / f"jepa-{os.getuid()}-feedfeedfeedfeed"
    stale.mkdir(parents=True)
    (stale / "000000.tar").write_bytes(b"of a job that was killed")
    first_step, second_step = take(config(root), 2, 2)
    trial = config(root, staging_dir=str(stage))
    streams = [pipeline.stream(trial, rank, 2, 0) for rank in (0, 1)]
    for stream, wanted in zip(streams, first_step, strict=True):
        assert torch.equal(next(stream).images, wanted.images)
    digest = manifest.read(root / "train").digest
    assert [path.name for path in stage.iterdir()] == [f"jepa-{os.getuid()}-{digest}"]
    streams[0].close()
    assert torch.equal(next(streams[1]).images, second_step[1].images)
    streams[1].close()
    assert not list(stage.iterdir())


SLOW_STAGING = """
import shutil, sys, time
from pathlib import Path
from jepa_cluster.data import manifest, staging
from jepa_cluster.data.reader import open_split

plain = shutil.copyfileobj

def copy(a, b, length):
    b.write(a.read(1000))
    b.flush()
    time.sleep(0.2)
    plain(a, b, length)

shutil.copyfileobj = copy
staging.STREAMS = 1
folder = Path(sys.argv[1])
with staging.staged(folder, manifest.read(folder), Path(sys.argv[2])):
    pass
"""


def test_staging_killed_with_sigkill_goes_on_and_leaves_nothing_behind(root: Path, tmp_path: Path):
    """The next attempt completes half a copy, reads the same stream and removes it."""
    stage = tmp_path / "scratch"
    command = [sys.executable, "-c", SLOW_STAGING, str(root / "train"), str(stage)]
    process = subprocess.Popen(command)
    while len(list(stage.glob("*/*.tar"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(stage.glob("*/*.tar"))
    plain = take_alone(config(root), 2)
    staged = take_alone(config(root, staging_dir=str(stage)), 2)
    for a, b in zip(plain, staged, strict=True):
        assert torch.equal(a.images, b.images)
    assert not list(stage.iterdir())


def test_a_stage_without_room_says_how_much_is_missing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The error has the free gigabytes, and nothing is written."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    stage = tmp_path / "scratch"
    with pytest.raises(DataError, match="GB free"):
        take(config(root, staging_dir=str(stage)), 1)
    assert not list(stage.iterdir())
