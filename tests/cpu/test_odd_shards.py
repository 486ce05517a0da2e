"""Shards as other programs write them: labels of every kind, members without an image, tar's flags.

Everything is read byte by byte, or left out by name, or refused with the sample's key.
"""

import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image
from support.image_kinds import run
from support.image_sets import encoded, packed, picture

from jepa_cluster.data import indexing, manifest, tar_samples, verify
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.sources import scan
from jepa_cluster.errors import DataError


def write_shard(path: Path, *samples: tuple[str, dict[str, bytes]]) -> Path:
    """Write a tar of samples (key, {extension: bytes})."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                (path.parent / "member").write_bytes(data)
                tar.add(path.parent / "member", f"{key}.{extension}")
    (path.parent / "member").unlink()
    return path


JPEG = encoded(picture(1))


HUGE = "1" + "0" * 400
NUMBERS = ["-1", "5000000000", str(2**63 + 5), str(2**70)]


@pytest.mark.parametrize(
    "parts",
    [{"cls": number.encode()} for number in NUMBERS]
    + [
        {"json": f'{{"class": {number}}}'.encode()} for number in (*NUMBERS, "NaN", "1" + "0" * 400)
    ],
    ids=str,
)
def test_a_class_that_no_probe_can_use_is_refused_by_its_key(
    tmp_path: Path, parts: dict[str, bytes]
) -> None:
    """A number in `cls` or in `json`."""
    write_shard(
        tmp_path / "a.tar",
        (
            "good",
            {
                "jpg": JPEG,
                "cls": b"3",
            },
        ),
        (
            "bad",
            {
                "jpg": JPEG,
                **parts,
            },
        ),
    )
    with pytest.raises(DataError, match="classes are numbered from 0 to 999_999") as e:
        indexing.index_shard(tmp_path / "a.tar")
    assert e.value.where == f"{tmp_path / 'a.tar'}, sample bad"


def test_names_and_numbers_are_never_merged(tmp_path: Path) -> None:
    """They were: 0, cat, dog, 1 became 0, 0, 1, 1."""
    for name, label in (("a", b"0"), ("b", b"cat")):
        write_shard(tmp_path / f"{name}.tar", (name, {"jpg": JPEG, "cls": label}))
    message = "some classes are names (b.tar: b) and others numbers (a.tar: a)"
    with pytest.raises(DataError, match=re.escape(message)):
        indexing.index(tmp_path, workers=1)


def test_shards_of_two_splits_number_named_classes_alike(tmp_path: Path) -> None:
    """Also when val lacks a class; a name that train does not have is refused."""
    names = {"train": ("0", "10", "2"), "val": ("0", "2"), "other/val": ("cat",)}
    for split, classes in names.items():
        (tmp_path / split).mkdir(parents=True)
        samples = [
            (f"k{name}", {"jpg": JPEG, "json": json.dumps({"label": name}).encode()})
            for name in classes
        ]
        write_shard(tmp_path / split / "a.tar", *samples)
    for split, numbers in (("train", [0, 1, 2]), ("val", [0, 2])):
        assert indexing.index(tmp_path / split, workers=1).classes == ("0", "10", "2")
        assert manifest.load(tmp_path / split)[1].labels["class"].tolist() == numbers
    (tmp_path / "train").rename(tmp_path / "other" / "train")
    with pytest.raises(DataError, match="class cat is not among the 3 classes of train"):
        indexing.index(tmp_path / "other" / "val", workers=1)


def test_labels_of_some_images_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    """A column of the index needs a number of every image; NaN is none. A class too."""
    rows = [
        {
            "size": 1,
            "score": 0.5,
        },
        {
            "size": 2,
        },
        {
            "size": 3,
            "score": float("nan"),
        },
    ]
    for n, row in enumerate(rows):
        parts = {"jpg": JPEG, "json": json.dumps(row).encode()}
        if n > 0:
            parts["cls"] = b"" if n == 1 else b"4"
        write_shard(tmp_path / f"{n}.tar", (f"k{n}", parts))
    lines: list[str] = []
    made = indexing.index(tmp_path, workers=1, progress=lines.append)
    assert made.labels == ("size",)
    assert made.report["skipped"] == {
        "label score is no number of every image": "1 of 3 have it",
        "no class, so the set gets none": "2 of 3 images, the first is 0.tar: k0",
    }
    assert sum(line.startswith("skipped: ") for line in lines) == 2


def test_numbers_that_are_no_classes_are_quantities(tmp_path: Path) -> None:
    """Negative and huge whole numbers are stored as floats, which probes regress."""
    for n, value in enumerate((3, -1)):
        row = json.dumps(
            {
                "offset": value,
                "count": n,
                "huge": 2**70,
            }
        ).encode()
        write_shard(tmp_path / f"{n}.tar", (f"k{n}", {"jpg": JPEG, "json": row}))
    indexing.index(tmp_path, workers=1)
    labels = manifest.load(tmp_path)[1].labels
    assert {name: column.dtype.kind for name, column in labels.items()} == {
        "count": "i",
        "huge": "f",
        "offset": "f",
    }


# ---- tars


def test_labels_that_lie_apart_from_their_images_are_refused(tmp_path: Path) -> None:
    """A tar with all images first and all classes after them."""
    images = [(f"k{n}", {"jpg": JPEG}) for n in range(3)]
    classes = [(f"k{n}", {"cls": b"1"}) for n in range(3)]
    write_shard(tmp_path / "a.tar", *images, *classes)
    with pytest.raises(DataError, match="the members of sample k0 lie apart") as e:
        indexing.index_shard(tmp_path / "a.tar")
    assert "--sort=name" in e.value.hint
    with pytest.raises(DataError, match="lie apart"):
        scan(tmp_path)


def test_samples_without_a_usable_image_are_named_with_the_reason(tmp_path: Path) -> None:
    """Links, dots in a key, no image, a second image; and files beside the shards."""
    path = write_shard(
        tmp_path / "a.tar",
        (
            "good",
            {
                "jpg": JPEG,
                "png": encoded(picture(1), "PNG"),
            },
        ),
        (
            "dotted.v1",
            {
                "jpg": JPEG,
            },
        ),
        (
            "empty",
            {
                "cls": b"1",
            },
        ),
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "good.jpg"
        tar.addfile(link)
        for name in ("._good.jpg", "README"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "more.tar.gz").write_bytes(b"")
    made = indexing.index(tmp_path, workers=1)
    assert made.images == 1
    assert {entry["file"]: entry["why"] for entry in made.report["left_out"]} == {
        "a.tar: good.png": "a second image of its sample",
        "a.tar: dotted": "a key ends at the first dot, so the extension is .v1.jpg",
        "a.tar: empty": "no image",
        "a.tar: linked": "its .jpg is a link inside the tar",
        "a.tar: ._good.jpg": tar_samples.NAMELESS,
        "a.tar: README": tar_samples.NAMELESS,
    }
    assert made.report["skipped"] == {
        "beside the *.tar, and only they are read": "more.tar.gz",
    }
    found = scan(tmp_path).skipped
    assert found.keys() >= {"no image", "a second image of its sample"}
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("000001"))
    again = indexing.index(tmp_path, workers=1).report["left_out"]
    assert {"file": "b.tar: 000001", "why": tar_samples.NAMELESS} in again


TAR_FLAGS = {
    "gnu": "--format=gnu",
    "ustar": "--format=ustar",
    "pax": "--format=pax",
    "v7": "--format=v7",
    "blocking-factor": "--blocking-factor=1",
    "sparse-gnu": "--format=gnu --sparse",
    "sparse-0.0": "--format=pax --sparse --sparse-version=0.0",
    "sparse-0.1": "--format=pax --sparse --sparse-version=0.1",
    "sparse-1.0": "--format=pax --sparse --sparse-version=1.0",
    "links": "--format=gnu",
    "dereferenced": "--format=gnu --hard-dereference --dereference",
}


@pytest.mark.parametrize("kind", TAR_FLAGS)
def test_shards_that_tar_wrote_are_read_byte_by_byte(tmp_path: Path, kind: str) -> None:
    """Every image is the stored one, or is left out by name; the shard verifies."""
    folder = tmp_path / "files"
    folder.mkdir()
    tall = Image.new("RGB", (256, 256))
    tall.paste(picture(3), (0, 196))
    images = {
        "a": JPEG,
        "b": encoded(tall, "BMP"),  # rows of zeros, which tar --sparse leaves out
        "k" * (90 if kind in ("v7", "ustar") else 240): encoded(picture(4)),
        "ünï": encoded(picture(5)),
    }
    for key, data in images.items():
        path = folder / f"{key}.{'bmp' if key == 'b' else 'jpg'}"
        path.write_bytes(data)
        path.with_suffix(".cls").write_text("1")
    with (folder / "b.bmp").open("wb") as file:
        _write_with_holes(file, images["b"])
    os.link(folder / "a.jpg", folder / "z.jpg")
    (folder / "zz.jpg").symlink_to("a.jpg")
    shard = tmp_path / "set" / "a.tar"
    shard.parent.mkdir()
    flags = TAR_FLAGS[kind].split()
    run("tar", *flags, "--sort=name", "-C", folder, "-cf", shard, ".")
    made = indexing.index(shard.parent, workers=1)
    assert not verify.verify(shard.parent)
    left_out = {entry["file"]: entry["why"] for entry in made.report["left_out"]}
    wanted = {"a.tar: ./z": "its .jpg is a link inside the tar"}
    wanted["a.tar: ./zz"] = wanted["a.tar: ./z"]
    if kind == "dereferenced":
        wanted = {}
    if "sparse" in kind:
        wanted["a.tar: ./b"] = "its .bmp is a sparse member of the tar"
    assert left_out == wanted
    reader = open_split(shard.parent)
    read = {bytes(reader.image(sample)) for sample in range(made.images)}
    assert read == {data for key, data in images.items() if f"a.tar: ./{key}" not in wanted}


def _write_with_holes(file: BinaryIO, data: bytes) -> None:
    """Write data and skip its blocks of zeros, so that the file has holes."""
    for at in range(0, len(data), 4096):
        if data[at : at + 4096].strip(b"\0"):
            file.seek(at)
            file.write(data[at : at + 4096])
    file.truncate(len(data))


def test_a_sound_shard_whose_last_samples_have_no_image_verifies(tmp_path: Path) -> None:
    """Their bytes belong to the last span; a change of one is a fault."""
    path = write_shard(
        tmp_path / "a.tar",
        (
            "a",
            {
                "jpg": JPEG,
            },
        ),
        (
            "b",
            {
                "txt": b"x",
            },
        ),
        (
            "c",
            {
                "txt": b"y",
            },
        ),
    )
    write_shard(
        tmp_path / "b.tar",
        (
            "d",
            {
                "txt": b"x",
            },
        ),
    )
    made = indexing.index(tmp_path, workers=1)
    assert [shard.images for shard in made.shards] == [1, 0]
    assert not verify.verify(tmp_path)
    assert bytes(open_split(tmp_path).image(0)) == JPEG
    data = path.read_bytes()
    at = data.rindex(b"y")
    path.write_bytes(data[:at] + b"z" + data[at + 1 :])
    assert "sample 0" in verify.verify(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", 7, "images 7 and 8"),
        ("labels", ["class"], "labels"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    packed(tmp_path, images=8)
    path = tmp_path / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(DataError, match=f"manifest.json and index.npz disagree: {message}"):
        manifest.load(tmp_path / "train")


def test_a_class_that_is_a_link_is_named_by_index_and_by_build(tmp_path: Path) -> None:
    """tar stores equal files that are hard links once."""
    path = write_shard(tmp_path / "a.tar", ("k", {"jpg": JPEG}))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("k.cls")
        link.type, link.linkname = tarfile.LNKTYPE, "other.cls"
        tar.addfile(link)
    made = indexing.index(tmp_path, workers=1)
    named = {"file": "a.tar: k.cls", "why": "a link inside the tar"}
    assert made.report["left_out"] == [named]
    assert scan(tmp_path).skipped["a link inside the tar"] == "a.tar: k.cls"
