"""`jepa shards`: build, verify, info, sample and index from the command line."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from support.image_sets import encoded, packed, picture, tree
from test_shards import contents, file_names

from jepa_cluster.cli import main
from jepa_cluster.data import manifest
from jepa_cluster.errors import ExitCode

BUILD = ["shards", "build", "--workers", "1"]


def test_the_verbs_build_verify_and_show_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The commands of the how-to in their order; verify exits with 1 once a byte has changed."""
    images = tmp_path / "images"
    tree(images / "train", 12)
    tree(images / "val", 4)
    root = tmp_path / "data"
    sheet = tmp_path / "sheet.png"
    train = root / "train"
    assert main([*BUILD, str(images), str(root)]) == 0
    assert main(["shards", "verify", str(root)]) == 0
    assert main(["shards", "info", str(root)]) == 0
    assert main(["shards", "sample", str(train), str(sheet), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "12 images, 4 classes" in out
    assert "every byte as indexed" in out
    assert "classes in 12 images" in out
    assert Image.open(sheet).size == (320, 348)

    shard = train / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[-2000:-1999] = b"x"
    shard.write_bytes(data)
    assert main(["shards", "verify", str(root)]) == 1
    assert main(["shards", "build", str(tmp_path), str(root)]) == ExitCode.CONFIG
    assert "--split train" in capsys.readouterr().err


# ---- the archives of ImageNet

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRUTH = [
    3,
    1,
    1,
    2,
    3,
]  # by the class numbers of the kit; those of the set follow sorted WordNet ids


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_train_archive(path: Path) -> None:
    with tarfile.open(path, "w") as outer:
        for k, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for n in range(4):
                    add(tar, f"{wnid}_{n}.JPEG", encoded(picture(10 * k + n)))
            add(outer, f"{wnid}.tar", inner.getvalue())


def write_val_archive(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for n in range(1, 6):
            add(tar, f"ILSVRC2012_val_{n:08d}.JPEG", encoded(picture(100 + n)))


def write_devkit(path: Path) -> None:
    numbers = [
        (1, WNIDS[2]),
        (2, WNIDS[0]),
        (3, WNIDS[1]),
    ]
    synsets = np.array(numbers, [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", truth)
        add(tar, "kit/data/meta.mat", meta.getvalue())


def test_the_archives_as_they_are_downloaded_become_a_verified_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """ImageNet's three files, in miniature, by the commands of the how-to: no unpacking by hand."""
    monkeypatch.chdir(tmp_path)
    kit = Path("ILSVRC2012_devkit_t12.tar.gz")
    write_train_archive(Path("ILSVRC2012_img_train.tar"))
    write_val_archive(Path("ILSVRC2012_img_val.tar"))
    write_devkit(kit)
    build_val = [*BUILD, "ILSVRC2012_img_val.tar"]
    split = ["--split", "val"]
    labels = ["--labels", str(kit)]
    assert main([*BUILD, "ILSVRC2012_img_train.tar", "data", "--split", "train"]) == 0
    assert main([*build_val, "data", *split, *labels]) == 0
    assert main(["shards", "verify", "data"]) == 0
    wanted = {}
    for n, number in enumerate([1, 2, 2, 0, 1]):
        wanted[encoded(picture(101 + n))] = (number,)
    assert contents(Path("data/val")) == wanted
    assert manifest.read("data/val").classes == tuple(WNIDS)

    assert main([*build_val, "bare", *split]) == 0
    out = capsys.readouterr().out
    assert "12 images, 3 classes" in out
    assert "no classes" in out
    assert "--labels ILSVRC2012_devkit" in out

    kit.write_bytes(b"a page that says log in")
    assert main([*build_val, "other", *split, *labels]) == ExitCode.CONFIG
    assert "not the development kit" in capsys.readouterr().err


# ---- arguments that are refused


@pytest.mark.parametrize(
    "words",
    [
        ["build", "a", "b", "--shard-mb", "0"],
        ["build", "a", "b", "--quality", "101"],
        ["build", "a", "b", "--seed", "-1"],
        ["build", "a", "b", "--seed", str(2**64)],
        ["build", "a", "b", "--resize", "0"],
        ["build", "a", "b", "--workers", "0"],
        ["build", "a", "b", "--workers", "9999"],
        ["index", "train", "--workers", "-3"],
        ["info", "train", "--batch", "0"],
        ["sample", "train", "x.png", "--rows", "0"],
        ["sample", "train", "x.png", "--rows", "1e9"],
        ["sample", "train", "x.png", "--seed", "-1"],
        ["synthetic", "c", "--train", "0"],
        ["synthetic", "c", "--val", "many"],
        ["synthetic", "c", "--seed", "-1"],
        ["synthetic", "c", "--seed", "0.5"],
        ["synthetic", "c", "--workers", ""],
    ],
    ids=" ".join,
)
def test_numbers_that_make_no_sense_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
):
    """The error has the argument and its range; nothing is written."""
    monkeypatch.chdir(tmp_path)
    packed(tmp_path, images=4)
    with pytest.raises(SystemExit):
        main(["shards", *words])
    *_, option, value = words
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: {value!r} is not a whole number between" in last_line
    assert file_names(tmp_path) == ["images-train", "train"]


def test_a_sheet_without_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = packed(tmp_path, images=4)
    train = str(tmp_path / "train")
    sheet = str(tmp_path / "no" / "x.png")
    assert main(["shards", "sample", train, sheet]) == ExitCode.CONFIG
    assert "cannot write the sheet" in capsys.readouterr().err
    assert manifest.read(train) == made
