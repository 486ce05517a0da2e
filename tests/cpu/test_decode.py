"""JPEG -> crop: as Pillow would, fast or not; hostile bytes end in CorruptSample, never in a crash or a leak."""

import gc
import io
import resource
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from support.image_sets import encoded, picture

from jepa_cluster.data import decode
from jepa_cluster.errors import CorruptSample


def detailed(seed: int, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.blend(picture(seed, width, height), Image.fromarray(noise), 0.3)


@pytest.mark.parametrize(("width", "height", "size"), [(500, 375, 224), (333, 500, 224), (64, 64, 64), (90, 70, 128)])
def test_crops_are_within_50_db_of_pillows_antialiased_bilinear(width: int, height: int, size: int):
    """Random crops, shrinking and growing, against Image.resize of the same box."""
    image = detailed(width, width, height)
    data = encoded(image, quality=90)
    for n in range(6):
        box = decode.random_box(height, width, np.random.default_rng(n).random(decode.DRAWS), (0.3, 1.0), (0.75, 4 / 3))
        top, left, h, w = box
        ours = decode.crop_resize(decode.decode_rgb(data), box, size).permute(1, 2, 0).numpy().astype(float)
        with Image.open(io.BytesIO(data)) as opened:
            part = opened.convert("RGB").crop((left, top, left + w, top + h))
            theirs = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), float)
        error = np.mean((ours - theirs) ** 2)
        assert error == 0 or 10 * np.log10(255**2 / error) > 50


@pytest.mark.parametrize("kind", ["444", "422", "420", "440", "411", "Gray", "restarts", "progressive", "tail"])
def test_a_box_decoded_without_the_rows_below_it_has_the_pixels_of_the_whole_image(kind: str):
    """Every end of a box, every sampling of colours; where rows may be left out, they really are."""
    image = detailed(3, 61, 97)
    if kind in ("restarts", "progressive", "tail"):
        data = encoded(image, restart_marker_rows=1, progressive=kind == "progressive") + b"tail" * (kind == "tail")
    elif kind == "Gray":
        data = encoded(image.convert("L"))
    else:
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 80, colorsubsampling=kind)
    whole, short = decode.decode_rgb(data), 0
    for bottom in range(1, 98):
        top = bottom // 2
        part, box = decode.decode_for_crop(
            memoryview(data), lambda h, w, top=top, bottom=bottom: (top, 0, bottom - top, w)
        )
        assert box == (top, 0, bottom - top, 61) and np.array_equal(part[top:bottom], whole[top:bottom])
        short += len(part) < 97
    assert short == 0 if kind in ("progressive", "tail") else short >= 60


def test_random_boxes_have_the_areas_and_aspects_asked_for_and_stay_inside():
    """Area uniform in (.3, 1), log aspect uniform in (3/4, 4/3), for wide, tall and tiny images."""
    draws = np.random.default_rng(0).random((4000, decode.DRAWS))
    areas: list[float] = []
    for height, width in ((300, 400), (400, 300), (7, 3), (1, 1)):
        for row in draws:
            top, left, h, w = decode.random_box(height, width, row, (0.3, 1.0), (0.75, 4 / 3))
            assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
            if (height, width) == (300, 400):
                areas.append(h * w / height / width)
                assert 0.74 < w / h < 1.35
    assert 0.29 < min(areas) < 0.31 and 0.5 < float(np.mean(areas)) < 0.67
    assert decode.random_box(10, 1000, draws[0], (0.9, 1.0), (0.75, 4 / 3)) == (0, 493, 10, 13)  # none fits: centred


def test_a_flip_is_the_mirror_image():
    """The same box, left and right exchanged."""
    image = np.asarray(picture(0))
    plain, flipped = (decode.crop_resize(image, (0, 0, 60, 60), 32, flip) for flip in (False, True))
    assert bool((plain.flip(2) == flipped).all())


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_every_format_that_pillow_reads_decodes(form: str):
    """The fallback, whatever the file is called."""
    assert decode.decode_rgb(encoded(picture(1), form)).shape == (60, 80, 3)


def held() -> tuple[int, int]:
    """KiB of memory in use now, and open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024, len(list(Path("/proc/self/fd").iterdir()))


def test_fuzzed_images_never_crash_the_process_nor_leak():
    """3000 mutated JPEGs and PNGs: pixels or CorruptSample, and memory that stays where it was."""
    rng = np.random.default_rng(0)
    seeds = [
        encoded(picture(1), quality=90),
        encoded(picture(2), progressive=True),
        encoded(picture(3).convert("CMYK")),
        encoded(picture(4).convert("L")),
        encoded(picture(5), "PNG"),
        encoded(picture(6).convert("P"), "PNG"),
    ]
    refused, before = 0, (0, 0)
    for n in range(3000):
        data = bytearray(seeds[n % len(seeds)])
        kind = n // len(seeds) % 4
        if kind == 0:
            for at in rng.integers(0, len(data), rng.integers(1, 20)):
                data[at] = rng.integers(256)
        elif kind == 1:
            data = data[: rng.integers(0, len(data))]
        elif kind == 2:
            at, size = rng.integers(0, len(data)), rng.integers(1, 600)
            data[at : at + size] = bytes(size)
        else:
            at = rng.integers(0, len(data))
            data[at:at] = rng.bytes(rng.integers(1, 100))
        try:
            image, box = decode.decode_for_crop(bytes(data), lambda h, w, n=n: (0, 0, -(-h // (1 + n % 3)), w))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            decode.crop_resize(image, box, 32)
        except CorruptSample:
            refused += 1
        if n == 1000:
            before = held()
    after = held()
    assert 300 < refused < 2900
    assert after[0] - before[0] < 20_000 and after[1] == before[1]


def test_an_image_that_claims_a_billion_pixels_is_corrupt_and_allocates_nothing():
    """A flipped size byte, or a bomb: refused from the header."""
    data = bytearray(encoded(picture(0)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(CorruptSample):
        decode.decode_rgb(bytes(data))
