"""What a lab's folder holds besides images: everything is read, or counted and named."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.image_kinds import run
from support.image_sets import encoded, picture, tree

from jepa_cluster.cli import main
from jepa_cluster.data import manifest, shards
from jepa_cluster.data.sources import Scan, scan
from jepa_cluster.errors import DataError, ExitCode


def labels_of(source: Scan) -> dict[str, Any]:
    return {item.file: item.label for item in source.items}


# ---- folders


def test_links_are_followed_and_loops_are_named(tmp_path: Path) -> None:
    """Class folders are often links to another disk."""
    tree(tmp_path / "disk", images=8)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("class0", "class1"):
        (source / name).symlink_to(tmp_path / "disk" / name)
    (source / "class0" / "back").symlink_to(source)
    (tmp_path / "disk" / "class1" / "up").symlink_to(tmp_path / "disk" / "class1")
    (source / "class1" / "gone.jpg").symlink_to("nothing.jpg")
    (source / "class1" / "itself.jpg").symlink_to("itself.jpg")
    (source / "class1" / "one.jpg").symlink_to("image0001.JPEG")
    os.mkfifo(source / "class1" / "pipe.jpg")
    found = scan(source)
    assert sorted(labels_of(found).values()) == ["class0"] * 2 + ["class1"] * 3
    assert found.skipped == {
        "a link to a folder of this source": "class0/back",
        "a link to a folder that contains it": "class1/up",
        "a link to nothing": "2 files, the first is class1/gone.jpg",
        "not a regular file": "class1/pipe.jpg",
    }


def test_hidden_and_system_folders_are_no_classes(tmp_path: Path) -> None:
    """Files that are no images are counted by suffix."""
    source = tree(tmp_path / "source", images=4)
    for name in (".thumbnails/a.jpg", "__MACOSX/b.jpg", "@eaDir/c.jpg", "class0/._d.jpg"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    for name in ("class0/notes.txt", "class1/raw.NEF", "class1/raw2.nef", "README"):
        (source / name).write_text("x")
    found = scan(source)
    assert found.classes == ("class0", "class1", "class2", "class3")
    assert found.skipped == {
        "hidden, or of the system": "4 files, the first is .thumbnails",
        "no image by its name (.nef)": "2 files, the first is class1/raw.NEF",
        "no image by its name (.txt)": "class0/notes.txt",
        "no image by its name (without a suffix)": "README",
    }


def test_a_build_prints_and_records_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "source", images=8)
    (source / "class0" / "notes.txt").write_text("x")
    assert main(["shards", "build", str(source), str(tmp_path / "data"), "--val", "0.25"]) == 0
    line = "skipped: class0/notes.txt: no image by its name (.txt)"
    assert capsys.readouterr().out.count(line) == 1
    report = manifest.read(tmp_path / "data" / "train").report
    assert report["skipped"] == {"no image by its name (.txt)": "class0/notes.txt"}
    assert main(["shards", "info", str(tmp_path / "data")]) == 0
    assert "skipped   class0/notes.txt: no image by its name (.txt)" in capsys.readouterr().out


def test_a_folder_with_no_image_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "set.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images found; no image by its name \(.gz\)"):
        scan(tmp_path / "source")


# ---- a validation split


def test_val_holds_out_a_part_of_each_class(tmp_path: Path) -> None:
    """The same seed holds out the same images; another one others; a class keeps an image."""
    source = tree(tmp_path / "source", images=40)
    (source / "rare").mkdir()
    (source / "rare" / "one.jpg").write_bytes(encoded(picture(99)))
    labels = (source / "labels.jsonl").read_text().splitlines()
    (source / "labels.jsonl").write_text("\n".join([*labels, '{"file": "rare/one.jpg"}']))
    train, val = shards.without_validation(scan(source), 0.2, seed=0)
    assert sorted(labels_of(val).values()) == sorted([f"class{k}" for k in range(4)] * 2)
    assert not labels_of(train).keys() & labels_of(val).keys()
    assert len(train.items) + len(val.items) == 41
    assert train.classes == val.classes
    again = shards.without_validation(scan(source), 0.2, seed=0)
    assert labels_of(again[1]) == labels_of(val)
    other = shards.without_validation(scan(source), 0.2, seed=1)
    assert labels_of(other[1]) != labels_of(val)


def test_val_is_refused_where_it_has_no_meaning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "source" / "train", images=4)
    tree(tmp_path / "source" / "val", images=4)
    build = ["shards", "build", str(tmp_path / "source"), str(tmp_path / "data"), "--val"]
    assert main([*build, "0.1"]) == ExitCode.CONFIG
    assert "SOURCE/val or --split names them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*build, "10"])
    assert "'10' is not a number between 0 and 1" in capsys.readouterr().err


# ---- labels


@pytest.mark.parametrize(
    "text",
    [
        "image_id,label\n{0},cat\n{1},dog\n",
        "id,breed\n{0},cat\n{1},dog\n",
        "split,filename,class\ntrain,{0}.jpg,cat\ntrain,{1}.jpg,dog\n",
        "\ufeffsplit;filename;class\ntrain;{0}.jpg;cat\ntrain;{1}.jpg;dog\n",
        ",file,class\n0,{0}.jpg,cat\n1,{1}.jpg,dog\n,,\n",
    ],
)
def test_a_csv_gives_classes(tmp_path: Path, text: str) -> None:
    """As on Kaggle: names with or without their suffix."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "labels.csv").write_text(text.format("a", "b"))
    found = scan(folder, tmp_path / "labels.csv")
    assert labels_of(found) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_a_csv_that_cannot_be_read_and_entries_without_an_image_are_named(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", images=2)
    table = tmp_path / "labels.csv"
    table.write_text("x,y,z\n1,2,3\n")
    with pytest.raises(DataError, match="no columns for file and class among x, y, z"):
        scan(source, table)
    table.write_text("image0000.JPEG,a\nimage0001.JPEG,b\n")
    with pytest.raises(DataError, match=r"and class among image0000.JPEG, a"):
        scan(source, table)
    table.write_text("file,class\nother.JPEG,a\n")
    with pytest.raises(DataError, match="none of its 1 entries names an image; the first is other"):
        scan(source, table)
    table.write_text("file,class\nimage0000.JPEG,a\nimage0001.JPEG,b\ngone.JPEG,c\n")
    skipped = scan(source, table).skipped
    assert skipped["in labels.csv, but no such image"] == "gone.JPEG"
    table.write_text("file,class\nimage0000.JPEG,a\nimage0000.JPEG,b\n")
    with pytest.raises(DataError, match="listed before with other labels") as e:
        scan(source, table)
    assert e.value.where == f"{table}:3"


def test_a_list_may_leave_classes_out_and_have_names_with_spaces(tmp_path: Path) -> None:
    """A class for a part of the images is refused, by the first image without one."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(encoded(picture(1)))
    file = tmp_path / "list.txt"
    file.write_text("a.jpg Carabus auratus\nb.jpg Carabus nitens\n")
    assert labels_of(scan(file)) == {"a.jpg": "Carabus auratus", "b.jpg": "Carabus nitens"}
    file.write_text("a.jpg\nb.jpg\n")
    assert labels_of(scan(file)) == {"a.jpg": None, "b.jpg": None}
    file.write_text("a.jpg 1\nb.jpg\n")
    with pytest.raises(DataError, match=r"1 of 2 images have no class, e.g. b.jpg"):
        scan(file)


def test_hidden_and_system_folders_inside_a_tar_are_no_classes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("p/@eaDir/a.jpg/THUMB.jpg", "p/.thumbnails/a.jpg", "__MACOSX/p/b.jpg", "p/a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(1)))
    run("tar", "-C", folder, "-cf", tmp_path / "photos.tar", ".")
    found = scan(tmp_path / "photos.tar")
    assert labels_of(found) == {"./p/a.jpg": "p"}
    assert found.skipped["hidden, or of the system"].startswith("3 files")


def test_numbers_that_the_names_of_the_other_split_lack_are_refused(tmp_path: Path) -> None:
    """Classes of train are 0, 1, 2; val counts from 1."""
    shards.build(scan(tree(tmp_path / "a", images=6, classes=3)), tmp_path / "train", workers=1)
    (tmp_path / "list.txt").write_text("a/class0/image0000.JPEG 1\na/class1/image0001.JPEG 3\n")
    with pytest.raises(DataError, match="there is a class 3, and the split beside"):
        shards.build(scan(tmp_path / "list.txt"), tmp_path / "val", workers=1)


def test_an_empty_file_of_labels_leaves_all_images_without_a_class(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "labels.txt").write_text("\n")
    with pytest.raises(DataError, match=r"1 of 1 images have no class, e.g. a.jpg"):
        scan(tmp_path / "images", tmp_path / "labels.txt")
