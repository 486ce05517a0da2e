"""The synthetic set: the same files for the same seed, whatever happened in between, and labels that are true."""

from __future__ import annotations

import hashlib
import json
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

TRAIN, VAL = 80, 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small set for the whole file."""
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    assert synthetic.render(folder, train=TRAIN, val=VAL, seed=3)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(images: Path, tmp_path: Path) -> None:
    """One process or many, all images or few: an image depends on (seed, split, number) alone."""
    synthetic.render(tmp_path / "again", train=TRAIN, val=VAL, seed=3, workers=1)
    synthetic.render(tmp_path / "fewer", train=20, val=0, seed=3)
    synthetic.render(tmp_path / "other", train=20, val=0, seed=4)
    whole = digests(images)
    assert digests(tmp_path / "again") == whole
    pictures = {k: v for k, v in digests(tmp_path / "fewer").items() if k.endswith(".JPEG")}
    assert len(pictures) == 20
    assert pictures.items() <= whole.items()
    assert not {v for k, v in digests(tmp_path / "other").items() if k.endswith(".JPEG")} & set(whole.values())


def test_a_complete_set_is_left_alone_and_another_one_is_refused(images: Path, tmp_path: Path) -> None:
    """Running again does nothing; other numbers, or a folder of somebody else's, are an error with the numbers."""
    before = {p: p.stat().st_mtime_ns for p in images.rglob("*")}
    assert not synthetic.render(images, train=TRAIN, val=VAL, seed=3)
    assert {p: p.stat().st_mtime_ns for p in images.rglob("*")} == before
    with pytest.raises(DataError, match="seed 3 instead of 5"):
        synthetic.render(images, train=TRAIN, val=VAL, seed=5)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"no synthetic\.json"):
        synthetic.render(tmp_path, train=1, val=1)


def test_a_killed_rendering_goes_on_where_it_stopped(images: Path, tmp_path: Path) -> None:
    """Nothing stands under the final name before all of it does, and the end is as if nothing had happened."""
    folder = tmp_path / "images"
    code = f"from pathlib import Path; from jepa_cluster.data import synthetic as s; s.render(Path({str(folder)!r}),"
    child = subprocess.Popen([sys.executable, "-c", f"{code} train={TRAIN}, val={VAL}, seed=3, workers=1)"])
    part = tmp_path / "images.part"
    while len(list(part.glob("train/*/train_*.JPEG"))) < 5:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not folder.exists()
    drawn = {p.relative_to(part): p.stat().st_mtime_ns for p in part.glob("train/*/train_*.JPEG")}
    time.sleep(0.2)  # its worker may still be writing; both write whole files
    assert synthetic.render(folder, train=TRAIN, val=VAL, seed=3)
    assert all((folder / p).stat().st_mtime_ns == t for p, t in drawn.items())
    assert {k: v for k, v in digests(folder).items() if "/." not in k} == digests(images)
    assert not part.exists()


def test_labels_say_what_was_drawn(images: Path) -> None:
    """Each file once, classes in equal shares, one to six objects, five distances."""
    rows = [json.loads(line) for line in (images / "train/labels.jsonl").read_text().splitlines()]
    assert {r["file"] for r in rows} == {p.relative_to(images / "train").as_posix() for p in images.glob("train/*/*")}
    shares = Counter(Path(r["file"]).parent.name for r in rows)
    assert shares == dict.fromkeys(synthetic.CLASSES, TRAIN // len(synthetic.CLASSES))
    assert {r["count"] for r in rows} == set(range(1, synthetic.MAX_OBJECTS + 1))
    assert {r["distance"] for r in rows} == set(range(synthetic.DISTANCES))


def test_objects_lie_inside_the_central_square_and_none_hides_another_whole() -> None:
    """So a centred square crop shows as many objects as the label says, the nearest one largest."""
    for number in range(300):
        things = synthetic.compose(0, "val", number).things
        assert all(max(abs(t.look.x), abs(t.look.y)) + t.radius <= 0.5 for t in things)
        assert max(things, key=lambda t: t.radius) is things[-1]
        for i, one in enumerate(things):
            for other in things[i + 1 :]:
                assert np.hypot(one.look.x - other.look.x, one.look.y - other.look.y) + one.radius > other.radius


def test_sizes_are_mixed_and_the_known_oddities_stand_at_their_places(images: Path) -> None:
    """Grayscale, CMYK, EXIF rotation and a PNG named .JPEG, as in ImageNet."""
    opened = {int(p.stem[-6:]): Image.open(p) for p in images.glob("train/*/*.JPEG")}
    assert len({i.size for i in opened.values()}) > TRAIN // 2
    assert all(min(i.size) >= 96 * 2 / 3 and max(i.size) <= 200 for i in opened.values())
    assert (opened[3].mode, opened[7].mode) == ("L", "CMYK")
    assert opened[11].getexif()[0x0112] == 6
    assert opened[13].format == "PNG"
    usual = [i for n, i in opened.items() if n not in synthetic.ODDITIES]
    assert all((i.mode, i.format) == ("RGB", "JPEG") for i in usual)


def test_mean_colour_and_its_spread_do_not_tell_the_class() -> None:
    """A linear probe on each image's mean and deviation of colour stays near chance."""
    scenes = [synthetic.compose(0, "train", n) for n in range(240)]
    pixels = [synthetic.paint(s).reshape(-1, 3) / 255 for s in scenes]
    x = np.array([[1, *p.mean(0), *p.std(0)] for p in pixels])
    names = np.array([synthetic.CLASSES.index(s.name) for s in scenes])
    fit = np.linalg.lstsq(x[::2], np.eye(len(synthetic.CLASSES))[names[::2]], rcond=None)[0]
    assert ((x[1::2] @ fit).argmax(1) == names[1::2]).mean() < 2.5 / len(synthetic.CLASSES)
