"""Images -> shards: every source, deterministic, resumable after kill -9."""

import multiprocessing
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from support.image_sets import config, encoded, packed, picture, tree

from jepa_cluster.data import decode, indexing, manifest, pipeline, shards, verify
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.sources import scan
from jepa_cluster.errors import DataError


def contents(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """Return image bytes -> labels, as the package reads them."""
    reader = open_split(folder)
    labels = reader.index.labels
    found = {}
    for k in range(len(reader.index)):
        image = bytes(reader.image(k))
        found[image] = tuple(labels[name][k] for name in sorted(labels))
    return found


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- sources


def write_tar_of_tars(source: Path, target: Path) -> None:
    with tarfile.open(target, "w") as outer:
        for folder in sorted(p for p in source.iterdir() if p.is_dir()):
            inner = target.parent / f"{folder.name}.tar"
            with tarfile.open(inner, "w") as tar:
                for image in folder.iterdir():
                    tar.add(image, image.name)
            outer.add(inner, inner.name)


def write_list(source: Path, target: Path) -> None:
    lines = []
    for path in source.glob("*/*.JPEG"):
        name = path.relative_to(source)
        lines.append(f"images-train/{name}\t{path.parent.name}\n")
    target.write_text("".join(lines))


def test_a_tree_a_tar_of_tars_a_list_and_shards_give_the_same_set(tmp_path: Path):
    """Four sources, one set: the same images with the same labels."""
    packed(tmp_path, images=24)
    source = tmp_path / "images-train"
    wanted = contents(tmp_path / "train")
    assert len(wanted) == 24
    write_tar_of_tars(source, tmp_path / "outer.tar")
    write_list(source, tmp_path / "list.txt")
    sources = {
        "tar": tmp_path / "outer.tar",
        "list": tmp_path / "list.txt",
        "again": tmp_path / "train",
    }
    for name, path in sources.items():
        labels = source / "labels.jsonl" if name == "tar" else None
        made = shards.build(scan(path, labels), tmp_path / name, workers=1)
        found = contents(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert {values[0] for values in found.values()} == {0, 1, 2, 3}
        if name != "list":
            assert found == wanted
        if name != "again":
            assert made.classes == ("class0", "class1", "class2", "class3")


def test_the_same_source_and_seed_give_the_same_bytes_and_build_once(tmp_path: Path):
    """Digest, shards and index depend on source, options and seed, not on workers or time."""
    source = tree(tmp_path / "images")
    options = shards.Options(shard_bytes=20_000)
    one = shards.build(scan(source), tmp_path / "1", options, workers=1)
    two = shards.build(scan(source), tmp_path / "2", options, workers=2)
    assert one.digest == two.digest
    assert len(one.shards) > 2
    for shard in one.shards:
        first = (tmp_path / "1" / shard.name).read_bytes()
        assert first == (tmp_path / "2" / shard.name).read_bytes()

    other_seed = shards.Options(20_000, seed=1)
    other = shards.build(scan(source), tmp_path / "other", other_seed, workers=1)
    assert other.digest != one.digest

    written = (tmp_path / "1" / "manifest.json").stat().st_mtime_ns
    lines: list[str] = []
    again = shards.build(scan(source), tmp_path / "1", options, workers=1, progress=lines.append)
    assert again.digest == one.digest
    assert (tmp_path / "1" / "manifest.json").stat().st_mtime_ns == written
    assert "already built" in lines[-1]
    with pytest.raises(DataError, match="already holds another set"):
        shards.build(scan(source), tmp_path / "1", shards.Options(20_000, seed=5), workers=1)


def test_odd_files_are_kept_and_broken_ones_are_left_out_by_name(tmp_path: Path):
    """CMYK, grayscale, rotated EXIF and a PNG named .JPEG decode; broken files are reported."""
    folder = tmp_path / "images" / "c"
    folder.mkdir(parents=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = {
        "cmyk": encoded(picture(1).convert("CMYK")),
        "gray": encoded(picture(2).convert("L")),
        "exif": encoded(picture(3), exif=rotated),
        "png": encoded(picture(4), "PNG"),
        "plain": encoded(picture(5)),
        "cut": encoded(picture(6))[:-400],
        "empty": b"",
    }
    for name, data in files.items():
        (folder / f"{name}.JPEG").write_bytes(data)
    made = shards.build(scan(tmp_path / "images"), tmp_path / "train", workers=1)
    assert made.images == 5
    left_out = {entry["file"] for entry in made.report["left_out"]}
    assert left_out == {"c/cut.JPEG", "c/empty.JPEG"}
    reader = open_split(tmp_path / "train")
    for k in range(5):
        assert decode.decode_rgb(reader.image(k)).shape == (60, 80, 3)
        assert bytes(reader.image(k)) in files.values()


def test_a_resize_is_recorded_and_shrinks_only_what_is_larger(tmp_path: Path):
    """Shorter side 40; the small image keeps its bytes."""
    source = tree(tmp_path / "images", images=6)
    small = encoded(picture(9, 30, 30))
    (source / "class0" / "small.JPEG").write_bytes(small)
    made = shards.build(scan(source), tmp_path / "train", shards.Options(resize=40), workers=1)
    reader = open_split(tmp_path / "train")
    images = [bytes(reader.image(k)) for k in range(7)]
    shapes = sorted(decode.decode_rgb(image).shape for image in images)
    assert shapes == [(30, 30, 3)] + [(40, 53, 3)] * 6
    assert small in images
    assert made.report["options"]["resize"] == 40


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "no source"),
        ("void", "no images found"),
        ("list.txt", "neither 'file class' nor JSON"),
    ],
)
def test_a_source_that_cannot_be_packed_is_one_clear_error(
    tmp_path: Path, source: str, message: str
):
    """The error has the source and what is wrong with it."""
    (tmp_path / "void").mkdir()
    (tmp_path / "list.txt").write_text('{"image": 3}\n')
    with pytest.raises(DataError) as e:
        shards.build(scan(tmp_path / source), tmp_path / "train", workers=1)
    assert message in str(e.value)
    assert source in str(e.value)
    assert not (tmp_path / "train").exists()


# ---- linked shards, digests, labels


def test_links_to_the_shards_of_two_sets_are_one_set(tmp_path: Path):
    """One copy on disk; a shard that is linked three times is shown three times per epoch."""
    train = tmp_path / "both" / "train"
    train.mkdir(parents=True)
    for name, images, first, links in (("a", 10, 0, 1), ("b", 6, 100, 3)):
        packed(tmp_path / name, images=images, first=first)
        for shard in (tmp_path / name / "train").glob("*.tar"):
            for n in range(links):
                (train / f"{name}{n}-{shard.name}").symlink_to(shard)
    made = indexing.index(train, workers=1)
    assert made.images == 10 + 18
    assert made.labels == ("class", "count", "distance")
    assert not verify.verify(train)
    reader = open_split(train)
    images = [bytes(reader.image(k)) for k in range(28)]
    assert {images.count(image) for image in images} == {1, 3}
    batch = next(pipeline.stream(config(tmp_path / "both", batch=28), 0, 1, 28))
    assert sorted(batch.index.tolist()) == list(range(28))


def test_the_digest_of_a_set_never_changes_between_versions(tmp_path: Path):
    """A changed digest would refuse every trial that was planned with the set."""
    values = {
        "start": [0, 2048],
        "size": [2048, 1024],
        "skip": [512, 512],
        "length": [100, 200],
        "crc": [1, 2],
    }
    columns = {name: np.array(v, manifest.COLUMNS[name]) for name, v in values.items()}
    index = manifest.Index((manifest.Shard("shard-000000.tar", 4096, 2),), columns)
    assert index.digest() == "f22ea3c000efc889"
    assert manifest.write(tmp_path, index, (), {}) == manifest.load(tmp_path)[0]


def test_labels_that_leave_images_without_a_class_are_refused(tmp_path: Path):
    """The error has the first image without a class; a missing or binary list is refused too."""
    source = tree(tmp_path / "images", images=4)
    (source / "stray.JPEG").write_bytes(encoded(picture(9)))
    with pytest.raises(DataError, match=r"1 of 5 images have no class, e.g. stray.JPEG"):
        shards.build(scan(source), tmp_path / "train", workers=1)
    (tmp_path / "noise").write_bytes(b"\x8b\xff")
    for labels in ("none.txt", "noise"):
        with pytest.raises(DataError, match="no list of images or labels"):
            shards.build(scan(source, tmp_path / labels), tmp_path / "train", workers=1)


def test_train_and_val_agree_on_class_numbers(tmp_path: Path):
    """A val split without one class keeps the numbers of train; one with a new class is refused."""
    shards.build(scan(tree(tmp_path / "a", images=8)), tmp_path / "train", workers=1)
    few = tree(tmp_path / "b", images=4)
    (few / "class0" / "image0000.JPEG").unlink()
    shards.build(scan(few), tmp_path / "val", workers=1)
    numbers = manifest.load(tmp_path / "val")[1].labels["class"]
    assert sorted(numbers.tolist()) == [1, 2, 3]
    (tmp_path / "val").rename(tmp_path / "old")
    more = tree(tmp_path / "c", images=5, classes=5)
    with pytest.raises(DataError, match="class4 is not among"):
        shards.build(scan(more), tmp_path / "val", workers=1)


# ---- builds that are killed, concurrent, or in the wrong folder


def build_slowly(source: Path, target: Path, options: shards.Options) -> None:
    plain = decode.decode_rgb

    def slow_decode(data: bytes) -> np.ndarray:
        time.sleep(0.01)
        return plain(data)

    decode.decode_rgb = slow_decode
    shards.build(scan(source), target, options, workers=2)


def is_alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return False
    return fields[0] != "Z"


@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_a_build_killed_with_sigkill_goes_on_and_leaves_nothing_behind(
    tmp_path: Path, moment: float
):
    """Killed at its start or between shards, the next build ends with the same digest."""
    source = tree(tmp_path / "images", images=120)
    options = shards.Options(shard_bytes=6_000)
    wanted = shards.build(scan(source), tmp_path / "calm", options, workers=1)
    target = tmp_path / "killed"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=build_slowly, args=(source, target, options))
    process.start()
    ready = 1 + int(moment * len(wanted.shards))
    while len(list((target / shards.WORK).glob("shard-*"))) < ready and process.is_alive():
        time.sleep(0.005)
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(pid) for pid in listing.read_text().split()]
    process.kill()
    process.join()
    assert children
    assert not (target / "manifest.json").exists()
    (target / shards.WORK / ".shard-000099.tar.torn").write_bytes(b"torn")
    deadline = time.monotonic() + 30
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline, "packing processes outlived their parent"
        time.sleep(0.05)

    made = shards.build(scan(source), target, options, workers=1)
    assert made.digest == wanted.digest
    assert file_names(target) == file_names(tmp_path / "calm")
    assert not verify.verify(target)


def test_a_second_build_is_refused_while_the_first_one_runs(tmp_path: Path):
    """The kernel releases the lock when its holder ends."""
    source = tree(tmp_path / "images", images=4)
    work = tmp_path / "train" / shards.WORK
    work.mkdir(parents=True)
    with FileLock(work / "lock"), pytest.raises(DataError, match="another process is building"):
        shards.build(scan(source), tmp_path / "train", workers=1)
    assert shards.build(scan(source), tmp_path / "train", workers=1).images == 4


def test_shards_of_others_are_never_overwritten(tmp_path: Path):
    """A folder with tars and no manifest is refused."""
    shard = tmp_path / "train" / "shard-000000.tar"
    shard.parent.mkdir()
    shard.write_bytes(b"precious")
    with pytest.raises(DataError, match="without a manifest"):
        shards.build(scan(tree(tmp_path / "images", images=2)), tmp_path / "train", workers=1)
    assert shard.read_bytes() == b"precious"
