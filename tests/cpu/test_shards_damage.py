"""Damage on disk: verify names every kind of it, and training counts or refuses it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.image_sets import config, packed, with_data

from jepa_cluster.data import indexing, manifest, pipeline, verify
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.tar_samples import samples
from jepa_cluster.errors import CorruptSample, DataError

BLOCK = 512  # bytes of a tar header, which lies just before its member


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data root whose train split is one shard of 4 samples, each a jpg, a cls and a json."""
    packed(tmp_path, images=4, shard_bytes=1 << 20)
    return tmp_path


def shard(root: Path) -> Path:
    return root / "train" / "shard-000000.tar"


def corrupt_in_an_epoch(root: Path) -> int:
    """Train one epoch. Returns the number of corrupt samples that were counted."""
    trial = with_data(config(root, batch=4), max_corrupt=1.0)
    batches = pipeline.stream(trial, 0, 1, 0)
    try:
        return next(batches).corrupt
    finally:
        batches.close()


def header_bytes(path: Path) -> Iterator[tuple[int, int]]:
    """Yield sample and offset of each byte of each header."""
    for number, sample in enumerate(samples(path)):
        for offset, _ in sample.parts.values():
            for position in range(offset - BLOCK, offset):
                yield number, position


def test_every_byte_flip_in_a_header_is_found_by_verify_and_by_training(small: Path):
    """Reading refuses the sample for each byte; verify names it, tried for one byte in each 64."""
    path = shard(small)
    whole = path.read_bytes()
    reader = open_split(small / "train")
    every = list(samples(path))
    positions = list(header_bytes(path))
    with path.open("r+b", buffering=0) as f:
        for number, position in positions:
            flipped = whole[position] ^ 1 << position % 8
            os.pwrite(f.fileno(), bytes([flipped]), position)
            with pytest.raises(CorruptSample):
                reader.image(number)
            if position % 64 == 3:
                (fault,) = verify.verify(small / "train")
                sample = every[number]
                assert fault.startswith(f"{path.name}: sample {number}")
                assert fault.endswith(f"bytes {sample.start}-{sample.end} differ")
            os.pwrite(f.fileno(), whole[position : position + 1], position)
        label, _ = every[1].parts["cls"]
        os.pwrite(f.fileno(), b"\xff", label - BLOCK + 3)
    (fault,) = verify.verify(small / "train")
    assert f"{path.name}: sample 1 (class" in fault
    assert corrupt_in_an_epoch(small) == 1
    assert manifest.read(small / "train").images == 4


def test_a_shard_cut_at_any_member_boundary_is_refused_by_name(small: Path):
    """A plain tar reader sees a shorter archive there and no error."""
    path = shard(small)
    whole = path.read_bytes()
    cuts = {0}
    for sample in samples(path):
        cuts.add(sample.end)
        cuts.update(offset - BLOCK for offset, _ in sample.parts.values())
    assert len(cuts) == 4 * 3 + 1
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        faults = verify.verify(small / "train")
        assert path.name in faults[0]
        assert f"{cut} bytes" in faults[0]
        with pytest.raises(DataError, match=path.name):
            corrupt_in_an_epoch(small)
        if cut:  # indexing again does not accept the shorter shard
            with pytest.raises(DataError, match=r"does not end there|not a readable tar"):
                indexing.index(small / "train", workers=1)


def with_zeros(data: bytes, start: int) -> bytes:
    """Return the bytes with one block of zeros at `start`."""
    return data[:start] + bytes(BLOCK) + data[start + BLOCK :]


def test_zeroed_blocks_are_named_with_their_sample(small: Path):
    """A header, a block of an image, a label: verify names the sample, training counts it."""
    path = shard(small)
    whole = path.read_bytes()
    third = list(samples(path))[2]
    image, _ = third.parts["jpg"]
    label, _ = third.parts["cls"]
    for start in (image - BLOCK, image + BLOCK, label - BLOCK):
        path.write_bytes(with_zeros(whole, start))
        (fault,) = verify.verify(small / "train")
        assert "sample 2" in fault
        assert fault.endswith(f"bytes {third.start}-{third.end} differ")
        assert corrupt_in_an_epoch(small) == 1
    path.write_bytes(with_zeros(whole, image - BLOCK))
    with pytest.raises(DataError, match="damaged at byte"):
        indexing.index(small / "train", workers=1)


def test_a_missing_a_swapped_and_a_foreign_shard_are_named(tmp_path: Path):
    """Two shards: one gone, then exchanged, then one that the manifest does not have."""
    made = packed(tmp_path, images=12, shard_bytes=12_000)
    folder = tmp_path / "train"
    first, second = made.shards[:2]
    a = folder / first.name
    b = folder / second.name
    a_data = a.read_bytes()
    b_data = b.read_bytes()
    a.unlink()
    assert verify.verify(folder) == [f"{a.name}: missing"]
    with pytest.raises(DataError, match=rf"{a.name}: missing"):
        corrupt_in_an_epoch(tmp_path)

    a.write_bytes(b_data.ljust(first.bytes, b"\0")[: first.bytes])
    b.write_bytes(a_data.ljust(second.bytes, b"\0")[: second.bytes])
    faults = "\n".join(verify.verify(folder))
    assert f"{a.name}: not one sample is as indexed" in faults
    assert f"{b.name}: not one sample" in faults
    with pytest.raises(DataError, match="jepa shards verify"):
        next(pipeline.stream(config(tmp_path, batch=12), 0, 1, 0))

    a.write_bytes(a_data)
    b.write_bytes(b_data)
    shutil.copy(a, folder / "shard-000077.tar")
    (fault,) = verify.verify(folder)
    assert fault == "shard-000077.tar: not in the manifest; jepa shards index adds it"


def copy_foreign_index(folder: Path) -> None:
    """Put the index of another set in place of the folder's own."""
    packed(folder / "other", images=8, first=50)
    shutil.copy(folder / "other" / "train" / manifest.INDEX, folder / manifest.INDEX)
    shutil.rmtree(folder / "other")


def cut_index(folder: Path) -> None:
    index = folder / manifest.INDEX
    index.write_bytes(index.read_bytes()[:-200])


def remove_index(folder: Path) -> None:
    (folder / manifest.INDEX).unlink()


def remove_manifest(folder: Path) -> None:
    (folder / manifest.MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (copy_foreign_index, "is not the one the manifest speaks of"),
        (cut_index, "is damaged"),
        (remove_index, "no index.npz"),
        (remove_manifest, "no manifest.json"),
    ],
)
def test_a_stale_index_is_refused_before_the_first_batch(tmp_path: Path, damage, message: str):
    """Verify and training give the reason and the command to type."""
    packed(tmp_path, images=8)
    folder = tmp_path / "train"
    trial = config(tmp_path)
    damage(folder)
    for read in (
        lambda: verify.verify(folder),
        lambda: next(pipeline.stream(trial, 0, 1, 0)),
    ):
        with pytest.raises(DataError) as e:
            read()
        assert message in str(e.value)
        assert f"jepa shards index {folder}" in str(e.value)
