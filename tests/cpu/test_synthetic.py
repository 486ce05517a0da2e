"""Synthetic images: a function of the seed, complete or absent, with labels that are true."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa_cluster.data import synthetic
from jepa_cluster.errors import DataError

TRAIN = 80
VAL = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small set for the whole file."""
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    assert synthetic.render(folder, train=TRAIN, val=VAL, seed=3)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of each file."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def image_digests(folder: Path) -> dict[str, str]:
    return {name: d for name, d in digests(folder).items() if name.endswith(".JPEG")}


def write_times(folder: Path, pattern: str) -> dict[Path, int]:
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.glob(pattern)}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(
    images: Path, tmp_path: Path
) -> None:
    """With any number of processes and images, an image depends on (seed, split, number) alone."""
    synthetic.render(
        tmp_path / "again",
        train=TRAIN,
        val=VAL,
        seed=3,
        workers=1,
    )
    synthetic.render(tmp_path / "fewer", train=20, val=0, seed=3)
    synthetic.render(tmp_path / "other", train=20, val=0, seed=4)
    whole = digests(images)
    assert digests(tmp_path / "again") == whole
    fewer = image_digests(tmp_path / "fewer")
    assert len(fewer) == 20
    assert fewer.items() <= whole.items()
    other = image_digests(tmp_path / "other")
    assert not set(other.values()) & set(whole.values())


def test_a_complete_set_is_left_alone_and_another_one_is_refused(
    images: Path, tmp_path: Path
) -> None:
    """Running again does nothing; other numbers, or a folder with other files, are an error."""
    before = write_times(images, "**/*")
    assert not synthetic.render(images, train=TRAIN, val=VAL, seed=3)
    assert write_times(images, "**/*") == before
    with pytest.raises(DataError, match="seed 3 instead of 5"):
        synthetic.render(images, train=TRAIN, val=VAL, seed=5)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"no synthetic\.json"):
        synthetic.render(tmp_path, train=1, val=1)


RENDER = f"""
import sys
from pathlib import Path
from jepa_cluster.data import synthetic
synthetic.render(Path(sys.argv[1]), train={TRAIN}, val={VAL}, seed=3, workers=1)
"""


def test_a_killed_rendering_goes_on_where_it_stopped(images: Path, tmp_path: Path) -> None:
    """The final name appears only when the set is complete; the bytes are those of a calm run."""
    folder = tmp_path / "images"
    child = subprocess.Popen([sys.executable, "-c", RENDER, str(folder)])
    part = tmp_path / "images.part"
    while len(list(part.glob("train/*/train_*.JPEG"))) < 5:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not folder.exists()
    rendered = write_times(part, "train/*/train_*.JPEG")
    time.sleep(0.2)  # its worker may still be writing; both write whole files
    assert synthetic.render(folder, train=TRAIN, val=VAL, seed=3)
    for path, written in rendered.items():
        assert (folder / path).stat().st_mtime_ns == written
    visible = {name: d for name, d in digests(folder).items() if "/." not in name}
    assert visible == digests(images)
    assert not part.exists()


def test_labels_say_what_was_drawn(images: Path) -> None:
    """Each file once, classes in equal shares, two to six copies, distances by the radius."""
    lines = (images / "train/labels.jsonl").read_text().splitlines()
    labels = [json.loads(line) for line in lines]
    labelled = {label["file"] for label in labels}
    files = {p.relative_to(images / "train").as_posix() for p in images.glob("train/*/*")}
    assert labelled == files
    shares = Counter(Path(label["file"]).parent.name for label in labels)
    assert shares == dict.fromkeys(synthetic.CLASSES, TRAIN // len(synthetic.CLASSES))
    assert {label["count"] for label in labels} == {2, 3, 4, 5, 6}
    nearest, farthest = (synthetic.SIDE / radius for radius in reversed(synthetic.RADII))
    for label in labels:
        assert nearest <= math.exp(label["distance"]) * 1.001
        assert math.exp(label["distance"]) <= farthest * 1.001


def test_copies_lie_inside_the_image_and_apart() -> None:
    """So an image shows as many copies as the label says."""
    for number in range(300):
        copies = synthetic.compose(0, "val", number).copies
        for copy in copies:
            for place in (copy.x, copy.y):
                assert copy.radius * 0.9 <= place <= synthetic.SIDE - copy.radius * 0.9
        for one, other in itertools.combinations(copies, 2):
            apart = math.hypot(one.x - other.x, one.y - other.y)
            assert apart >= synthetic.APART * one.radius / 1.07


def test_every_count_is_in_a_tenth_of_the_images_or_more() -> None:
    """Large copies have less room, so six are rarer than four."""
    counts = Counter(len(synthetic.compose(0, "train", k).copies) for k in range(2000))
    assert set(counts) == {2, 3, 4, 5, 6}
    assert min(counts.values()) > 200


def test_the_known_oddities_have_fixed_numbers(images: Path) -> None:
    """Grayscale, CMYK, EXIF rotation and a PNG named .JPEG, as in ImageNet."""
    opened = {}
    for path in images.glob("train/*/*.JPEG"):
        opened[int(path.stem[-6:])] = Image.open(path)
    assert {image.size for image in opened.values()} == {(synthetic.SIDE, synthetic.SIDE)}
    assert opened[3].mode == "L"
    assert opened[7].mode == "CMYK"
    assert opened[11].getexif()[0x0112] == 6
    assert opened[13].format == "PNG"
    for number, image in opened.items():
        if number not in synthetic.ODDITIES:
            assert image.mode == "RGB"
            assert image.format == "JPEG"


@pytest.mark.parametrize(
    ("layout", "expected"), [("scattered", "d359cbf656e4e7ba"), ("arranged", "2e6e09a2c8c1ea15")]
)
def test_the_same_pixels_on_every_machine(layout: str, expected: str) -> None:
    """The digest of one image of each class. Raise VERSION when it changes."""
    digest = hashlib.sha256()
    for number in range(len(synthetic.LAYOUTS[layout])):
        digest.update(synthetic.paint(synthetic.compose(0, "train", number, layout)).tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(("layout", "known"), [("scattered", 0.33), ("arranged", 0.15)])
def test_colours_do_not_tell_the_class(layout: str, known: float) -> None:
    """What a linear probe on the first four moments of each channel knows at most."""
    rows = []
    classes = []
    for number in range(1200):
        scene = synthetic.compose(0, "train", number, layout)
        pixels = synthetic.paint(scene).reshape(-1, 3) / 255
        pixels = np.concatenate([pixels, pixels.mean(1, keepdims=True)], 1)
        scaled = (pixels - pixels.mean(0)) / pixels.std(0)
        higher = [(scaled**3).mean(0), (scaled**4).mean(0)]
        rows.append(np.concatenate([[1], pixels.mean(0), pixels.std(0), *higher]))
        classes.append(synthetic.LAYOUTS[layout].index(scene.name))
    x = np.array(rows)
    y = np.array(classes)
    one_hot = np.eye(len(synthetic.LAYOUTS[layout]))
    fit = np.linalg.lstsq(x[::2], one_hot[y[::2]], rcond=None)[0]
    predicted = (x[1::2] @ fit).argmax(1)
    assert (predicted == y[1::2]).mean() < known


def test_of_an_arrangement_two_places_tell_the_rest_and_one_does_not() -> None:
    """Twelve classes of the same four kinds."""
    classes = [name.split("-") for name in synthetic.LAYOUTS["arranged"]]
    assert len(classes) == 12
    for place in range(4):
        shares = Counter(kinds[place] for kinds in classes)
        assert shares == dict.fromkeys(synthetic.ARRANGED_KINDS, 3)
    for one, other in itertools.combinations(range(4), 2):
        assert len({(kinds[one], kinds[other]) for kinds in classes}) == 12


def test_an_arranged_image_shows_the_kinds_of_its_class_at_their_places() -> None:
    """From top left to bottom right, in the image and not over one another."""
    for number in range(300):
        scene = synthetic.compose(0, "val", number, "arranged")
        copies = scene.copies
        assert [copy.kind for copy in copies] == scene.name.split("-")
        for copy, (right, down) in zip(copies, synthetic.PLACES, strict=True):
            x, y = copy.x - synthetic.SIDE / 2, copy.y - synthetic.SIDE / 2
            assert (np.sign([x, y]) == (right, down)).all()
            assert max(abs(x), abs(y)) + copy.radius <= synthetic.SIDE / 2 + 1
        for one, other in itertools.combinations(copies, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) >= 2 * synthetic.STEP - 3


def test_arranged_images_have_the_class_alone(images: Path, tmp_path: Path) -> None:
    """The folder of another layout is refused."""
    folder = tmp_path / "arranged"
    assert synthetic.render(folder, train=24, val=12, layout="arranged")
    shares = Counter(path.parent.name for path in folder.glob("train/*/*.JPEG"))
    assert shares == dict.fromkeys(synthetic.LAYOUTS["arranged"], 2)
    assert not list(folder.glob("*/labels.jsonl"))
    with pytest.raises(DataError, match="another synthetic set: classes"):
        synthetic.render(images, train=TRAIN, val=VAL, seed=3, layout="arranged")
