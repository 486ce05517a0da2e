"""Shards that webdataset reads, and shards of other writers that are indexed in place."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from support.image_sets import encoded, packed, picture
from webdataset.tariterators import base_plus_ext

from jepa_cluster.data import decode, indexing, manifest, tar_samples, verify
from jepa_cluster.data.reader import open_split


def test_our_shards_read_back_in_the_plain_webdataset_library(tmp_path: Path):
    """Keys, labels and bytes, by webdataset's own reader and its own decoder."""
    made = packed(tmp_path)
    urls = [str(tmp_path / "train" / shard.name) for shard in made.shards]
    source = tmp_path / "images-train"
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(rows) == 40
    labels = manifest.load(tmp_path / "train")[1].labels
    for row, number, count in zip(rows, labels["class"], labels["count"], strict=True):
        about = json.loads(row["json"])
        assert row["__key__"] == about["file"].replace("/", "_").removesuffix(".JPEG")
        assert row["jpg"] == (source / about["file"]).read_bytes()
        assert int(row["cls"]) == number
        assert made.classes[number] == about["class"]
        assert about["count"] == count
    decoded = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    first = next(iter(decoded))
    assert np.array_equal(first["jpg"], decode.decode_rgb(rows[0]["jpg"]))
    assert isinstance(first["cls"], int)


def write_shard(path: Path, first: int, extension: str, named: bool) -> dict[bytes, int]:
    """Write five samples with webdataset. Returns image bytes -> class number."""
    written = {}
    with webdataset.TarWriter(str(path)) as tar:
        for n in range(5):
            key = f"n{n:08d}_{first}"
            data = encoded(picture(first + n))
            written[data] = n
            sample = {
                "__key__": key,
                extension: data,
                "cls": f"name{n}".encode() if named else n,
                "json": {
                    "label": n,
                    "width": 80,
                    "height": 60,
                    "filename": f"{key}.JPEG",
                },
            }
            tar.write(sample)
    return written


@pytest.mark.parametrize(
    ("extension", "named"),
    [
        ("jpg", False),
        ("jpeg", True),
    ],
    ids=["public", "named"],
)
def test_shards_of_webdataset_and_of_public_imagenet_are_indexed_in_place(
    tmp_path: Path, extension: str, named: bool
):
    """Image as jpg or jpeg, class as number or name, json of any content."""
    folder = tmp_path / "train"
    folder.mkdir()
    written = write_shard(folder / "imagenet1k-train-0000.tar", 0, extension, named)
    written |= write_shard(folder / "imagenet1k-train-0001.tar", 10, extension, named)
    made = indexing.index(folder, workers=1)
    assert made.images == 10
    assert "class" in made.labels
    assert not verify.verify(folder)
    reader = open_split(folder)
    found = {}
    for k in range(10):
        found[bytes(reader.image(k))] = int(reader.index.labels["class"][k])
    assert found == written
    if named:
        classes = manifest.read(folder).classes
        assert classes == ("name0", "name1", "name2", "name3", "name4")


def test_directories_and_long_names_between_samples_are_indexed(tmp_path: Path):
    """A name with two dots is no image to webdataset, and is left out here too."""
    folder = tmp_path / "deep"
    folder.mkdir()
    names = ["0.jpg", f"{'long' * 40}/1.x.jpg", f"{'long' * 40}/2.x.jpg"]
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for n, name in enumerate(names):
            path = tmp_path / f"{n}.jpg"
            path.write_bytes(encoded(picture(n)))
            tar.add(path, name)
    made = indexing.index(folder, workers=1)
    assert made.images == 1
    assert len(made.report["left_out"]) == 2


def test_indexing_our_own_shards_again_keeps_class_names_and_history(tmp_path: Path):
    """With a damaged index, indexing again gives the same digest, class names and plan."""
    made = packed(tmp_path, images=8)
    (tmp_path / "train" / manifest.INDEX).write_bytes(b"torn")
    again = indexing.index(tmp_path / "train", workers=1)
    assert again.digest == made.digest
    assert again.classes == made.classes
    assert again.report["plan"] == made.report["plan"]


@pytest.mark.parametrize(
    "path", ["a.jpg", "n01/a.jpg", "n.01/a.b.jpg", "./a.seg.png", "x/.hidden", "x/none", "x/a."]
)
def test_names_are_split_as_webdataset_splits_them(path: str):
    """We do it without webdataset, which `make gpu` does not need."""
    stem, extension = base_plus_ext(path)
    assert tar_samples.split_name(path) == (stem or "", extension or "")
