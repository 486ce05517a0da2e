"""JPEG -> crop: the pixels of Pillow; damaged bytes are CorruptSample, never a crash or a leak."""

import ctypes
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

SCALE = (0.3, 1.0)
ASPECT = (0.75, 4 / 3)


def detailed(
    seed: int,
    width: int,
    height: int,
) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.blend(picture(seed, width, height), Image.fromarray(noise), 0.3)


def pillow_crop(
    data: bytes,
    box: tuple[int, int, int, int],
    size: int,
) -> np.ndarray:
    top, left, height, width = box
    with Image.open(io.BytesIO(data)) as image:
        part = image.convert("RGB").crop((left, top, left + width, top + height))
    resized = part.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, float)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (500, 375, 224),
        (333, 500, 224),
        (64, 64, 64),
        (90, 70, 128),
    ],
)
def test_crops_are_within_50_db_of_pillows_antialiased_bilinear(width: int, height: int, size: int):
    """Random crops, shrinking and growing, against Image.resize of the same box."""
    data = encoded(detailed(width, width, height), quality=90)
    for seed in range(6):
        draws = np.random.default_rng(seed).random(decode.DRAWS)
        box = decode.random_box(
            height,
            width,
            draws,
            SCALE,
            ASPECT,
        )
        crop = decode.crop_resize(decode.decode_rgb(data), box, size)
        ours = crop.permute(1, 2, 0).numpy().astype(float)
        theirs = pillow_crop(data, box, size)
        error = np.mean((ours - theirs) ** 2)
        assert error == 0 or 10 * np.log10(255**2 / error) > 50


def encoded_as(
    kind: str,
    image: Image.Image,
) -> bytes:
    """Return a JPEG with this sampling of colours or this kind of scans."""
    if kind == "restarts":
        return encoded(image, restart_marker_rows=1)
    if kind == "progressive":
        return encoded(image, restart_marker_rows=1, progressive=True)
    if kind == "tail":
        return encoded(image, restart_marker_rows=1) + b"tail"
    if kind == "Gray":
        return encoded(image.convert("L"))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), 80, colorsubsampling=kind)


@pytest.mark.parametrize(
    "kind", ["444", "422", "420", "440", "411", "Gray", "restarts", "progressive", "tail"]
)
def test_a_box_decoded_without_the_rows_below_has_the_same_pixels(kind: str):
    """For every end of a box; where rows can be left out, most boxes leave them out."""
    data = encoded_as(kind, detailed(3, 61, 97))
    whole = decode.decode_rgb(data)
    shortened = 0
    for bottom in range(1, 98):
        top = bottom // 2

        def choose_box(
            height: int,
            width: int,
            top=top,
            bottom=bottom,
        ):
            return top, 0, bottom - top, width

        part, box = decode.decode_for_crop(memoryview(data), choose_box)
        assert box == (top, 0, bottom - top, 61)
        assert np.array_equal(part[top:bottom], whole[top:bottom])
        if len(part) < 97:
            shortened += 1
    if kind in ("progressive", "tail"):
        assert shortened == 0
    else:
        assert shortened >= 60


def test_random_boxes_have_the_areas_and_aspects_asked_for_and_stay_inside():
    """Area uniform in (.3, 1), log aspect uniform in (3/4, 4/3), for wide, tall and tiny images."""
    draws = np.random.default_rng(0).random((4000, decode.DRAWS))
    areas: list[float] = []
    for height, width in (
        (300, 400),
        (400, 300),
        (7, 3),
        (1, 1),
    ):
        for row in draws:
            top, left, h, w = decode.random_box(
                height,
                width,
                row,
                SCALE,
                ASPECT,
            )
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert h > 0
            assert w > 0
            if (height, width) == (300, 400):
                areas.append(h * w / height / width)
                assert 0.74 < w / h < 1.35
    assert 0.29 < min(areas) < 0.31
    assert 0.5 < float(np.mean(areas)) < 0.67


def test_a_box_that_fits_nowhere_is_centred():
    """A very wide image has no box of the area and aspect asked for."""
    draws = np.random.default_rng(0).random(decode.DRAWS)
    box = decode.random_box(
        10,
        1000,
        draws,
        (0.9, 1.0),
        ASPECT,
    )
    assert box == (0, 493, 10, 13)


def test_a_flip_is_the_mirror_image():
    """The same box, left and right exchanged."""
    image = np.asarray(picture(0))
    plain = decode.crop_resize(image, (0, 0, 60, 60), 32, False)
    flipped = decode.crop_resize(image, (0, 0, 60, 60), 32, True)
    assert bool((plain.flip(2) == flipped).all())


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_every_format_that_pillow_reads_decodes(form: str):
    """The decoder looks at the bytes, not at the name of the file."""
    assert decode.decode_rgb(encoded(picture(1), form)).shape == (60, 80, 3)


def used_memory_and_files() -> tuple[int, int]:
    """Return KiB of memory in use now, and the number of open files."""
    gc.collect()
    # Freed memory that the C library keeps for the next call is no leak.
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(list(Path("/proc/self/fd").iterdir()))
    return pages * resource.getpagesize() // 1024, files


def mutated(
    data: bytes,
    kind: int,
    rng: np.random.Generator,
) -> bytes:
    """Change, cut, zero or insert bytes."""
    changed = bytearray(data)
    if kind == 0:
        for position in rng.integers(0, len(data), rng.integers(1, 20)):
            changed[position] = rng.integers(256)
        return bytes(changed)
    if kind == 1:
        return data[: rng.integers(0, len(data))]
    start = rng.integers(0, len(data))
    if kind == 2:
        size = rng.integers(1, 600)
        changed[start : start + size] = bytes(size)
    else:
        changed[start:start] = rng.bytes(rng.integers(1, 100))
    return bytes(changed)


def decode_mutated_images() -> int:
    """Decode 2000 mutated JPEGs and PNGs, the same in each call. Return how many were refused."""
    rng = np.random.default_rng(0)
    seeds = [
        encoded(picture(1), quality=90),
        encoded(picture(2), progressive=True),
        encoded(picture(3).convert("CMYK")),
        encoded(picture(4).convert("L")),
        encoded(picture(5), "PNG"),
        encoded(picture(6).convert("P"), "PNG"),
    ]
    refused = 0
    for n in range(2000):
        data = mutated(seeds[n % len(seeds)], n // len(seeds) % 4, rng)
        divisor = 1 + n % 3

        def choose_box(height: int, width: int, divisor=divisor):
            return 0, 0, -(-height // divisor), width

        try:
            image, box = decode.decode_for_crop(data, choose_box)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            decode.crop_resize(image, box, 32)
        except CorruptSample:
            refused += 1
    return refused


def test_mutated_images_never_crash_the_process_nor_leak():
    """Each gives pixels or CorruptSample, and the same images again need no more memory."""
    refused = decode_mutated_images()
    assert 200 < refused < 1900
    memory, files = used_memory_and_files()
    assert decode_mutated_images() == refused
    memory_after, files_after = used_memory_and_files()
    # One leaked image of 60x80 pixels per call would be 28 000 KiB.
    assert memory_after - memory < 14_000
    assert files_after == files


def test_an_image_that_claims_a_billion_pixels_is_corrupt():
    """A size far too large is refused from the header."""
    data = bytearray(encoded(picture(0)))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(CorruptSample):
        decode.decode_rgb(bytes(data))
