"""More than sixty kinds of files, from the source folder to the tensor, against Pillow.

The files are made by cjpeg, cwebp, ImageMagick, tifffile and Pillow.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.image_kinds import LEFT_OUT, PROGRAMS, expected, make_images
from support.image_sets import picture

from jepa_cluster.data import decode, shards
from jepa_cluster.data.reader import open_split
from jepa_cluster.data.sources import scan

missing = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing) and not os.environ.get("JEPA_REQUIRE_IMAGES"),
    reason=f"needs {', '.join(missing)} (libjpeg-turbo-progs, webp, imagemagick)",
)


def test_every_kind_of_file_reaches_the_tensor_as_pillow_reads_it(tmp_path: Path) -> None:
    """Whole images are equal bit by bit, and so is the part that a crop decodes.

    Numbers without a known white are left out by name.
    """
    made = make_images(tmp_path / "images" / "c")
    assert len(made) > 60
    source = scan(tmp_path / "images")
    assert len(source.items) == len(made)
    assert not source.skipped
    built = shards.build(source, tmp_path / "train", workers=1)
    left_out = {Path(entry["file"]).stem for entry in built.report["left_out"]}
    assert left_out == LEFT_OUT
    assert built.images == len(made) - len(LEFT_OUT)
    stored = {path.read_bytes(): path for path in made.values()}
    mean = np.asarray(picture(1)).mean()
    reader = open_split(tmp_path / "train")
    for sample in range(built.images):
        data = bytes(reader.image(sample))
        wanted = expected(stored[data])
        assert np.array_equal(decode.decode_rgb(data), wanted), stored[data].name
        assert abs(wanted.mean() - mean) < 15, stored[data].name
        part, (top, left, height, width) = decode.decode_for_crop(data, lambda h, w: (3, 5, 20, 30))
        rows, columns = slice(top, top + height), slice(left, left + width)
        assert np.array_equal(part[rows, columns], wanted[rows, columns]), stored[data].name


def test_a_resize_keeps_the_brightness_of_every_kind(tmp_path: Path) -> None:
    """Also of 16-bit images, which Pillow would make white."""
    made = make_images(tmp_path / "images" / "c")
    options = shards.Options(resize=16)
    built = shards.build(scan(tmp_path / "images"), tmp_path / "train", options, workers=1)
    assert built.images == len(made) - len(LEFT_OUT)
    mean = np.asarray(picture(1)).mean()
    reader = open_split(tmp_path / "train")
    for sample in range(built.images):
        image = decode.decode_rgb(reader.image(sample))
        assert min(image.shape[:2]) == 16
        assert abs(image.mean() - mean) < 15
