"""Images -> shards: every source, deterministic, readable by the webdataset library, resumable after kill -9."""

import io
import json
import multiprocessing
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from filelock import FileLock
from PIL import Image
from scipy.io import savemat
from support.image_sets import config, encoded, packed, picture, tree

from jepa_cluster.cli import main
from jepa_cluster.data import decode, indexing, manifest, pipeline, shards, verify
from jepa_cluster.data.pipeline import open_split
from jepa_cluster.errors import DataError, ExitCode


def contents(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """image bytes -> its labels, through our reader."""
    reader = open_split(folder)
    labels = reader.index.labels
    return {bytes(reader.image(k)): tuple(labels[n][k] for n in sorted(labels)) for k in range(len(reader.index))}


def test_a_tree_a_tar_of_tars_a_list_and_shards_give_the_same_set(tmp_path: Path):
    """Four sources, one set: the same images with the same labels."""
    packed(tmp_path, images=24)
    source, wanted = tmp_path / "images-train", contents(tmp_path / "train")
    assert len(wanted) == 24
    with tarfile.open(tmp_path / "outer.tar", "w") as outer:
        for folder in sorted(p for p in source.iterdir() if p.is_dir()):
            inner = tmp_path / f"{folder.name}.tar"
            with tarfile.open(inner, "w") as tar:
                for image in folder.iterdir():
                    tar.add(image, image.name)
            outer.add(inner, inner.name)
    (tmp_path / "list.txt").write_text(
        "".join(f"images-train/{p.relative_to(source)}\t{p.parent.name}\n" for p in source.glob("*/*.JPEG"))
    )
    for name, path in (("tar", tmp_path / "outer.tar"), ("list", tmp_path / "list.txt"), ("again", tmp_path / "train")):
        made = shards.build(path, tmp_path / name, workers=1, labels=source / "labels.jsonl" if name == "tar" else None)
        found = contents(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert {v[0] for v in found.values()} == {0, 1, 2, 3}
        assert name == "list" or found == wanted
        assert name == "again" or made.classes == ("class0", "class1", "class2", "class3")


def test_the_same_source_and_seed_give_the_same_bytes_and_a_second_build_does_nothing(tmp_path: Path):
    """Digest, shards and index are functions of source, options and seed, not of workers or time."""
    source = tree(tmp_path / "images")
    options = shards.Options(shard_bytes=20_000)
    made = [shards.build(source, tmp_path / f"{w}", options, workers=w) for w in (1, 2)]
    assert made[0].digest == made[1].digest and len(made[0].shards) > 2
    for shard in made[0].shards:
        assert (tmp_path / "1" / shard.name).read_bytes() == (tmp_path / "2" / shard.name).read_bytes()
    assert shards.build(source, tmp_path / "other", shards.Options(20_000, seed=1), workers=1).digest != made[0].digest
    before = (tmp_path / "1" / "manifest.json").stat().st_mtime_ns
    said: list[str] = []
    assert shards.build(source, tmp_path / "1", options, workers=1, progress=said.append).digest == made[0].digest
    assert (tmp_path / "1" / "manifest.json").stat().st_mtime_ns == before and "already built" in said[-1]
    with pytest.raises(DataError, match="already holds another set"):
        shards.build(source, tmp_path / "1", shards.Options(20_000, seed=5), workers=1)


def test_our_shards_read_back_in_the_plain_webdataset_library(tmp_path: Path):
    """Keys, labels and bytes, by webdataset's own reader and its own decoder."""
    made = packed(tmp_path)
    urls = [str(tmp_path / "train" / s.name) for s in made.shards]
    source = tmp_path / "images-train"
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(rows) == 40
    index = manifest.load(tmp_path / "train")[1]
    for row, number, count in zip(rows, index.labels["class"], index.labels["count"], strict=True):
        about = json.loads(row["json"])
        assert row["__key__"] == about["file"].replace("/", "_").removesuffix(".JPEG")
        assert row["jpg"] == (source / about["file"]).read_bytes()
        assert int(row["cls"]) == number and made.classes[number] == about["class"] and about["count"] == count
    first = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")))
    assert np.array_equal(first["jpg"], decode.decode_rgb(rows[0]["jpg"])) and isinstance(first["cls"], int)


def test_shards_of_the_webdataset_library_and_of_the_public_imagenet_layout_are_indexed_in_place(tmp_path: Path):
    """jpg or jpeg, cls as number or name, json of any content, directories and long names between the samples."""
    wrote: dict[str, tuple[bytes, int]] = {}
    for layout, image, labels in (("public", "jpg", "number"), ("named", "jpeg", "name")):
        folder = tmp_path / layout
        folder.mkdir()
        for k in range(2):
            with webdataset.TarWriter(str(folder / f"imagenet1k-train-{k:04d}.tar")) as tar:
                for n in range(5):
                    key, data = f"n{n:08d}_{k}", encoded(picture(10 * k + n))
                    wrote[f"{layout}/{key}"] = (data, n)
                    about = {"label": n, "width": 80, "height": 60, "filename": f"{key}.JPEG"}
                    cls = n if labels == "number" else f"name{n}".encode()
                    tar.write({"__key__": key, image: data, "cls": cls, "json": about})
        made = indexing.index(folder, workers=1)
        assert made.images == 10 and "class" in made.labels and not verify.verify(folder)
        reader = open_split(folder)
        found = {bytes(reader.image(k)): int(reader.index.labels["class"][k]) for k in range(10)}
        assert found == {d: n for name, (d, n) in wrote.items() if name.startswith(layout)}
    assert manifest.read(tmp_path / "named").classes == tuple(f"name{n}" for n in range(5))
    deep = tmp_path / "deep"
    deep.mkdir()
    with tarfile.open(deep / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for n in range(3):
            path = tmp_path / f"{n}.jpg"
            path.write_bytes(encoded(picture(n)))
            tar.add(path, f"{'long' * 40}/{n}.x.jpg" if n else "0.jpg")
    made = indexing.index(deep, workers=1)
    assert made.images == 1 and len(made.report["left_out"]) == 2  # 'x.jpg' is no image extension to webdataset either


def test_odd_files_are_kept_and_broken_ones_are_left_out_by_name(tmp_path: Path):
    """CMYK, grayscale, rotated EXIF and a PNG in disguise decode; a cut and an empty file are reported."""
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
    made = shards.build(tmp_path / "images", tmp_path / "train", workers=1)
    assert made.images == 5 and {x["file"] for x in made.report["left_out"]} == {"c/cut.JPEG", "c/empty.JPEG"}
    reader = open_split(tmp_path / "train")
    for k in range(5):
        assert decode.decode_rgb(reader.image(k)).shape == (60, 80, 3)
        assert bytes(reader.image(k)) in files.values()


def test_a_resize_is_recorded_and_shrinks_only_what_is_larger(tmp_path: Path):
    """Shorter side 40; the small image keeps its bytes."""
    source = tree(tmp_path / "images", images=6)
    (source / "class0" / "small.JPEG").write_bytes(small := encoded(picture(9, 30, 30)))
    made = shards.build(source, tmp_path / "train", shards.Options(resize=40), workers=1)
    images = [bytes(open_split(tmp_path / "train").image(k)) for k in range(7)]
    shapes = sorted(decode.decode_rgb(i).shape for i in images)
    assert shapes == [(30, 30, 3)] + [(40, 53, 3)] * 6 and small in images and made.report["options"]["resize"] == 40


def test_a_mix_holds_each_image_as_often_as_its_weight(tmp_path: Path):
    """One copy on disk, two sets in an epoch, labels that both have."""
    packed(tmp_path / "a", images=10)
    packed(tmp_path / "b", images=6, first=100)
    made = indexing.mix(tmp_path / "mixed" / "train", {tmp_path / "a" / "train": 1, tmp_path / "b" / "train": 3})
    assert made.images == 10 + 18 and made.labels == ("class", "count", "distance")
    assert not verify.verify(tmp_path / "mixed" / "train")
    reader = open_split(tmp_path / "mixed" / "train")
    images = [bytes(reader.image(k)) for k in range(28)]
    assert sorted({images.count(i) for i in images}) == [1, 3]
    assert sorted(next(pipeline.stream(config(tmp_path / "mixed", batch=28), 0, 1, 28)).index.tolist()) == [*range(28)]


def test_the_digest_of_a_set_never_changes_between_versions(tmp_path: Path):
    """It is pinned: a changed digest would refuse every trial that was planned with the set."""
    columns = {"start": [0, 2048], "size": [2048, 1024], "skip": [512, 512], "length": [100, 200], "crc": [1, 2]}
    index = manifest.Index(
        (manifest.Shard("shard-000000.tar", 4096, 2),),
        {k: np.array(v, manifest.COLUMNS[k]) for k, v in columns.items()},
    )
    assert index.digest() == "f22ea3c000efc889"
    assert manifest.write(tmp_path, index, (), {}) == manifest.load(tmp_path)[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a=1", "b=0.5"], "'b=0.5' is not SPLIT=WEIGHT with a whole number between 1 and 100"),
        (["a=4/3"], "'a=4/3' is not SPLIT=WEIGHT"),
        (["a=1", "b=0"], "'b=0' is not SPLIT=WEIGHT"),
        (["a=-1"], "'a=-1' is not SPLIT=WEIGHT"),
        (["a=half"], "'a=half' is not SPLIT=WEIGHT"),
        (["a=101"], "'a=101' is not SPLIT=WEIGHT"),
        (["=1"], "'=1' is not SPLIT=WEIGHT"),
        (["a=1", "b=1", "a=2"], "a is named twice"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
):
    """With the word that is wrong, and nothing written."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shards.build(tree(tmp_path / "images", images=4), tmp_path / name, workers=1)
    assert main(["shards", "mix", "mixed", *words]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert says in said and said.count("jepa:") == 1 and not Path("mixed").exists()


def build_slowly(source: Path, target: Path, options: shards.Options) -> None:
    plain = decode.decode_rgb

    def pixels(data: bytes) -> np.ndarray:
        time.sleep(0.01)
        return plain(data)

    decode.decode_rgb = pixels
    shards.build(source, target, options, workers=2)


@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_a_build_killed_with_sigkill_goes_on_and_leaves_nothing_behind(tmp_path: Path, moment: float):
    """Killed at its start or between shards: the next build keeps finished shards and ends with the same digest."""
    source = tree(tmp_path / "images", images=120)
    options = shards.Options(shard_bytes=6_000)
    wanted = shards.build(source, tmp_path / "calm", options, workers=1)
    target = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(source, target, options))
    process.start()
    ready = 1 + int(moment * len(wanted.shards))
    while len(list((target / shards.WORK).glob("shard-*"))) < ready and process.is_alive():
        time.sleep(0.005)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.join()
    assert children and not (target / "manifest.json").exists()
    (target / shards.WORK / ".shard-000099.tar.torn").write_bytes(b"torn")
    deadline = time.monotonic() + 30
    while any(_alive(c) for c in children):
        assert time.monotonic() < deadline, "packing processes outlived their parent"
        time.sleep(0.05)
    said: list[str] = []
    made = shards.build(source, target, options, workers=1, progress=said.append)
    assert made.digest == wanted.digest
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in (tmp_path / "calm").iterdir())
    assert not verify.verify(target)


def test_a_second_build_of_the_same_folder_is_refused_while_the_first_one_runs(tmp_path: Path):
    """The lock is the kernel's: it is free again when its holder is gone."""
    source, work = tree(tmp_path / "images", images=4), tmp_path / "train" / shards.WORK
    work.mkdir(parents=True)
    with FileLock(work / "lock"), pytest.raises(DataError, match="another process is building"):
        shards.build(source, tmp_path / "train", workers=1)
    assert shards.build(source, tmp_path / "train", workers=1).images == 4


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_verbs_build_verify_and_show_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What a person types, in the order of the how-to; verify answers 1 once a byte has changed."""
    for split, images in (("train", 12), ("val", 4)):
        tree(tmp_path / "images" / split, images)
    root = tmp_path / "data"
    assert main(["shards", "build", str(tmp_path / "images"), str(root), "--workers", "1"]) == 0
    assert main(["shards", "verify", str(root)]) == 0
    assert main(["shards", "info", str(root)]) == 0
    assert main(["shards", "sample", str(root / "train"), str(tmp_path / "sheet.png"), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "12 images, 4 classes" in said and "every byte as indexed" in said and "classes in 12 images" in said
    assert Image.open(tmp_path / "sheet.png").size == (320, 348)
    shard = root / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000] + b"x" + shard.read_bytes()[-1999:])
    assert main(["shards", "verify", str(root)]) == 1
    assert main(["shards", "build", str(tmp_path), str(root)]) == ExitCode.CONFIG
    assert "--split train" in capsys.readouterr().err


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_the_archives_as_they_are_downloaded_become_a_verified_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A miniature of ImageNet's three files, by the commands of the how-to: nothing is unpacked by hand."""
    monkeypatch.chdir(tmp_path)
    wnids = ["n01440764", "n01443537", "n01484850"]
    with tarfile.open("ILSVRC2012_img_train.tar", "w") as outer:
        for k, wnid in enumerate(wnids):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for n in range(4):
                    add(tar, f"{wnid}_{n}.JPEG", encoded(picture(10 * k + n)))
            add(outer, f"{wnid}.tar", inner.getvalue())
    truth = [3, 1, 1, 2, 3]  # the kit numbers classes otherwise than sorted WordNet ids do
    with tarfile.open("ILSVRC2012_img_val.tar", "w") as tar:
        for n in range(1, 6):
            add(tar, f"ILSVRC2012_val_{n:08d}.JPEG", encoded(picture(100 + n)))
    synsets = np.array([(1, wnids[2]), (2, wnids[0]), (3, wnids[1])], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open("ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{t}\n" for t in truth).encode())
        add(tar, "kit/data/meta.mat", meta.getvalue())
    build = ["shards", "build", "--workers", "1"]
    assert main([*build, "ILSVRC2012_img_train.tar", "data", "--split", "train"]) == 0
    kit = ["--labels", "ILSVRC2012_devkit_t12.tar.gz"]
    assert main([*build, "ILSVRC2012_img_val.tar", "data", "--split", "val", *kit]) == 0
    assert main(["shards", "verify", "data"]) == 0
    assert contents(Path("data/val")) == {
        encoded(picture(101 + n)): (number,) for n, number in enumerate([1, 2, 2, 0, 1])
    }
    assert manifest.read("data/val").classes == tuple(wnids)
    assert main([*build, "ILSVRC2012_img_val.tar", "bare", "--split", "val"]) == 0
    said = capsys.readouterr().out
    assert "12 images, 3 classes" in said and "no classes" in said and "--labels ILSVRC2012_devkit" in said
    Path("ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"a page that says log in")
    assert main([*build, "ILSVRC2012_img_val.tar", "other", "--split", "val", *kit]) == ExitCode.CONFIG
    assert "not the development kit" in capsys.readouterr().err


def test_labels_that_leave_images_without_a_class_are_refused_with_the_first_of_them(tmp_path: Path):
    """A list that is short, one that is not there, one that is no text."""
    source = tree(tmp_path / "images", images=4)
    (source / "stray.JPEG").write_bytes(encoded(picture(9)))
    with pytest.raises(DataError, match=r"1 of 5 images have no class, e.g. stray.JPEG"):
        shards.build(source, tmp_path / "train", workers=1)
    (tmp_path / "noise").write_bytes(b"\x8b\xff")
    for labels in ("none.txt", "noise"):
        with pytest.raises(DataError, match="no list of images or labels"):
            shards.build(source, tmp_path / "train", labels=tmp_path / labels, workers=1)


def test_indexing_our_own_shards_again_keeps_class_names_and_history(tmp_path: Path):
    """The way out of a stale index costs nothing: the same digest, the same names, how it was made."""
    made = packed(tmp_path, images=8)
    (tmp_path / "train" / manifest.INDEX).write_bytes(b"torn")
    again = indexing.index(tmp_path / "train", workers=1)
    assert (again.digest, again.classes) == (made.digest, made.classes) and again.report["plan"] == made.report["plan"]


def test_numbers_that_make_no_sense_and_a_mix_into_a_set_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before anything is written."""
    made = packed(tmp_path, images=4)
    train = str(tmp_path / "train")
    build, draw = ["build", "a", "b"], ["synthetic", "c"]
    for words in ([*build, "--shard-mb", "0"], [*build, "--quality", "101"], [*build, "--seed", "-1"],
                  [*build, "--seed", str(2**64)], [*build, "--resize", "0"], [*build, "--workers", "0"],
                  [*build, "--workers", "9999"], ["index", train, "--workers", "-3"], ["info", train, "--batch", "0"],
                  ["sample", train, "x.png", "--rows", "0"], ["sample", train, "x.png", "--rows", "1e9"],
                  ["sample", train, "x.png", "--seed", "-1"], [*draw, "--train", "0"], [*draw, "--val", "many"],
                  [*draw, "--seed", "-1"], [*draw, "--seed", "0.5"], [*draw, "--workers", ""]):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["shards", *words])
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {words[-2]}: {words[-1]!r} is not a whole number between" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images-train", "train"]
    assert main(["shards", "mix", train, f"{train}=2"]) == ExitCode.CONFIG
    assert main(["shards", "sample", train, str(tmp_path / "no" / "x.png")]) == ExitCode.CONFIG
    assert "shards of its own" in capsys.readouterr().err and manifest.read(train) == made


def test_train_and_val_agree_on_class_numbers(tmp_path: Path):
    """A validation split that lacks a class keeps the training split's numbers; one with a new class is refused."""
    shards.build(tree(tmp_path / "a", images=8), tmp_path / "train", workers=1)
    few = tree(tmp_path / "b", images=4)
    (few / "class0" / "image0000.JPEG").unlink()
    shards.build(few, tmp_path / "val", workers=1)
    assert sorted(manifest.load(tmp_path / "val")[1].labels["class"].tolist()) == [1, 2, 3]
    (tmp_path / "val").rename(tmp_path / "old")
    with pytest.raises(DataError, match="class4 is not among"):
        shards.build(tree(tmp_path / "c", images=5, classes=5), tmp_path / "val", workers=1)


def test_shards_of_others_are_never_overwritten(tmp_path: Path):
    """A folder with tars and no manifest is not ours to fill."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="without a manifest"):
        shards.build(tree(tmp_path / "images", images=2), tmp_path / "train", workers=1)
    assert (tmp_path / "train" / "shard-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("source", "says"),
    [("nothing", "no source"), ("void", "no images found"), ("list.txt", "neither 'file class' nor JSON")],
)
def test_a_source_that_cannot_be_packed_is_one_clear_error(tmp_path: Path, source: str, says: str):
    """What is wrong with it, and what a source looks like."""
    (tmp_path / "void").mkdir()
    (tmp_path / "list.txt").write_text('{"image": 3}\n')
    with pytest.raises(DataError) as e:
        shards.build(tmp_path / source, tmp_path / "train", workers=1)
    assert says in str(e.value) and source in str(e.value)
    assert not (tmp_path / "train").exists()
