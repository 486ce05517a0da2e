"""Damage on disk: every kind is named by verify and met by training; nothing is lost in silence."""

import os
import shutil
from pathlib import Path

import pytest
from support.image_sets import config, packed, with_data

from jepa_cluster.data import indexing, manifest, pipeline, verify
from jepa_cluster.data.sources import samples
from jepa_cluster.errors import CorruptSample, DataError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data root whose train split is one shard of 4 samples, each a jpg, a cls and a json."""
    packed(tmp_path, images=4, shard_bytes=1 << 20)
    return tmp_path


def shard(root: Path) -> Path:
    return root / "train" / "shard-000000.tar"


def epoch(root: Path) -> int:
    """Train one epoch; corrupt samples met and counted."""
    batches = pipeline.stream(with_data(config(root, batch=4), max_corrupt=1.0), 0, 1, 0)
    try:
        return next(batches).corrupt
    finally:
        batches.close()


def test_every_single_byte_flip_in_a_header_is_found_by_verify_and_by_training(small: Path):
    """All headers of the shard, byte by byte: reading refuses that sample; verify names it, for one byte in each 64."""
    path, whole = shard(small), shard(small).read_bytes()
    reader = pipeline.open_split(small / "train")
    every = list(samples(path))
    with path.open("r+b", buffering=0) as f:
        for n, at in [(n, o - 512 + k) for n, s in enumerate(every) for o, _ in s.parts.values() for k in range(512)]:
            os.pwrite(f.fileno(), bytes([whole[at] ^ 1 << at % 8]), at)
            with pytest.raises(CorruptSample):
                reader.image(n)
            if at % 64 == 3:
                (fault,) = verify.verify(small / "train")
                assert fault.startswith(f"{path.name}: sample {n}")
                assert fault.endswith(f"bytes {every[n].start}-{every[n].end} differ")
            os.pwrite(f.fileno(), whole[at : at + 1], at)
        os.pwrite(f.fileno(), b"\xff", every[1].parts["cls"][0] - 512 + 3)
    (fault,) = verify.verify(small / "train")
    assert f"{path.name}: sample 1 (class" in fault
    assert epoch(small) == 1 and manifest.read(small / "train").images == 4


def test_a_shard_cut_at_any_member_boundary_is_refused_by_name(small: Path):
    """A clean cut, where a plain tar reader sees a shorter archive and no error."""
    path, whole = shard(small), shard(small).read_bytes()
    cuts = {0} | {offset - 512 for s in samples(path) for offset, _ in s.parts.values()}
    cuts |= {s.end for s in samples(path)}
    assert len(cuts) == 4 * 3 + 1
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        faults = verify.verify(small / "train")
        assert path.name in faults[0] and f"{cut} bytes" in faults[0]
        with pytest.raises(DataError, match=path.name):
            epoch(small)
        if cut:
            with pytest.raises(DataError, match=r"does not end there|not a readable tar"):
                indexing.index(small / "train", workers=1)  # nor can it be indexed away


def test_zeroed_blocks_are_named_with_their_sample(small: Path):
    """A header, a block of an image, a label: verify names the sample and its bytes, training counts it."""
    path, whole = shard(small), shard(small).read_bytes()
    third = list(samples(path))[2]
    image, label = third.parts["jpg"][0], third.parts["cls"][0]
    for at in (image - 512, image + 512, label - 512):
        path.write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
        (fault,) = verify.verify(small / "train")
        assert "sample 2" in fault and fault.endswith(f"bytes {third.start}-{third.end} differ")
        assert epoch(small) == 1
    path.write_bytes(whole[: image - 512] + bytes(512) + whole[image:])
    with pytest.raises(DataError, match="damaged at byte"):
        indexing.index(small / "train", workers=1)


def test_a_missing_a_swapped_and_a_foreign_shard_are_named(tmp_path: Path):
    """Two shards: one gone, then exchanged, then one that the manifest does not know."""
    made = packed(tmp_path, images=12, shard_bytes=12_000)
    folder = tmp_path / "train"
    a, b = (folder / s.name for s in made.shards[:2])
    kept = a.read_bytes(), b.read_bytes()
    a.unlink()
    assert verify.verify(folder) == [f"{a.name}: missing"]
    with pytest.raises(DataError, match=rf"{a.name}: missing"):
        epoch(tmp_path)
    size = max(map(len, kept))
    for path, data in ((a, kept[1]), (b, kept[0])):
        path.write_bytes(data.ljust(size, b"\0")[: made.shards[path == b].bytes])
    faults = "\n".join(verify.verify(folder))
    assert f"{a.name}: not one sample is as indexed" in faults and f"{b.name}: not one sample" in faults
    with pytest.raises(DataError, match="jepa shards verify"):
        next(pipeline.stream(config(tmp_path, batch=12), 0, 1, 0))
    a.write_bytes(kept[0])
    b.write_bytes(kept[1])
    shutil.copy(a, folder / "shard-000077.tar")
    assert verify.verify(folder) == ["shard-000077.tar: not in the manifest; `jepa shards index` would add it"]


def test_a_stale_index_is_refused_before_the_first_batch(tmp_path: Path):
    """index.npz of another build, a torn index.npz, none, and no manifest: each says what to type."""
    packed(tmp_path / "a", images=8)
    packed(tmp_path / "b", images=8, first=50)
    folder = tmp_path / "a" / "train"
    index = folder / manifest.INDEX
    torn = index.read_bytes()[:-200]
    for change, says in (
        (
            lambda: shutil.copy(tmp_path / "b" / "train" / manifest.INDEX, index),
            "is not the one the manifest speaks of",
        ),
        (lambda: index.write_bytes(torn), "is damaged"),
        (index.unlink, "no index.npz"),
        ((folder / manifest.MANIFEST).unlink, "no manifest.json"),
    ):
        trial = config(tmp_path / "a") if (folder / manifest.MANIFEST).exists() else trial  # noqa: F821
        change()
        for read in (lambda: verify.verify(folder), lambda t=trial: next(pipeline.stream(t, 0, 1, 0))):
            with pytest.raises(DataError) as e:
                read()
            assert says in str(e.value) and f"jepa shards index {folder}" in str(e.value)
