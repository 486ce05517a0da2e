"""JPEG bytes -> a square uint8 crop, within 50 dB PSNR of Pillow's antialiased bilinear.

simplejpeg decodes (bit-identical to Pillow), torch resizes uint8 with antialiasing. Rows below a
crop are not decoded: the header is changed to say that the image ends there. Pillow decodes what
simplejpeg refuses (PNG in disguise, CMYK, odd headers), and everything where simplejpeg is not
installed. What both refuse is a CorruptSample. EXIF
orientation is ignored, as in the paper's pipeline. Randomness is an argument: a row of uniform
draws.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from jepa_cluster.errors import CorruptSample

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

ATTEMPTS = 10  # of the random crop, then a centred one; as in torchvision's RandomResizedCrop
DRAWS = 4 * ATTEMPTS + 1  # uniform draws a random crop takes; the last one flips
MAX_PIXELS = 100_000_000  # an image that claims more counts as damaged (a bomb, or a flipped byte)
START, END = b"\xff\xd8", b"\xff\xd9"  # markers at both ends of a JPEG
BASELINE = (0xC0, 0xC1)  # markers of frames that are decoded row by row
SCAN = 0xDA  # marker of the pixels

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Decode an image to uint8[h, w, 3]. Raises CorruptSample when no decoder accepts it."""
    if simplejpeg:
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
            if int(height) * int(width) <= MAX_PIXELS and colour in ("YCbCr", "RGB", "Gray"):
                return _decode_jpeg(data)
        except Exception:  # KeyError for a rare subsampling, ValueError for the rest
            pass
    return _decode_with_pillow(data)


def decode_for_crop(
    data: bytes | memoryview,
    choose: Callable[[int, int], Box],
) -> tuple[np.ndarray, Box]:
    """Decode the part of an image that `choose(height, width)` picks -> (image, box).

    Rows below the box may be missing. Inside the box the pixels are those of `decode_rgb`. Raises
    CorruptSample when no decoder accepts the image.
    """
    frame = _find_frame(data)
    if simplejpeg and frame is not None:
        box = choose(frame.height, frame.width)
        bottom = box[0] + box[2] + 1  # one row more, which upsampling reads
        rows = -(-bottom // frame.step) * frame.step
        if rows < frame.height:
            short = bytearray(data)
            short[frame.at : frame.at + 2] = rows.to_bytes(2, "big")
            try:  # not strict: data after the last row is only a warning
                return _decode_jpeg(short, strict=False), box
            except Exception:
                pass
    image = decode_rgb(data)
    height, width, _ = image.shape
    return image, choose(height, width)


def _decode_jpeg(data: bytes | bytearray | memoryview, strict: bool = True) -> np.ndarray:
    assert simplejpeg
    return simplejpeg.decode_jpeg(
        data, colorspace="RGB", fastdct=False, fastupsample=False, strict=strict
    )


class Frame(NamedTuple):
    """Where a JPEG states its height, its size, and how many rows are decoded together."""

    at: int
    height: int
    width: int
    step: int


def _find_frame(data: bytes | memoryview) -> Frame | None:
    """Return the frame of a complete baseline JPEG, grey or in three colours; None otherwise."""
    if data[:2] != START or data[-2:] != END:
        return None
    at = 2
    while at + 20 < len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] in BASELINE:
            return _read_frame(data, at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _read_frame(data: bytes | memoryview, at: int) -> Frame | None:
    precision, colours = data[at + 4], data[at + 9]
    height = int.from_bytes(data[at + 5 : at + 7], "big")
    width = int.from_bytes(data[at + 7 : at + 9], "big")
    samplings = bytes(data[at + 11 : at + 20 : 3])  # of each colour: 16 * horizontal + vertical
    step = 8 * max(sampling & 15 for sampling in samplings)
    if precision != 8 or colours not in (1, 3) or step == 0:
        return None
    if not 0 < height * width <= MAX_PIXELS:
        return None
    return Frame(at + 5, height, width, step)


def _decode_with_pillow(data: bytes | memoryview) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks, palettes with transparency
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise CorruptSample(f"an image of {image.width}x{image.height} pixels")
                if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                    return _from_wide_pixels(image)
                return np.array(image.convert("RGB"))
    except CorruptSample:
        raise
    except UnidentifiedImageError as error:  # its text has an address in memory
        raise CorruptSample("no decoder knows this format") from error
    except Exception as error:  # Pillow's plugins raise errors of any type for a broken file
        what = f"no decoder reads it: {type(error).__name__}: {error}"
        raise CorruptSample(what) from error


def _from_wide_pixels(image: Image.Image) -> np.ndarray:
    """Return a grey image of 16-bit numbers, 32-bit numbers or floats as uint8[h, w, 3].

    Pillow would cut such numbers off at 255. White is 65535 for 16 bits, 1 for floats up to 1, and
    255 for others up to 255. Raises CorruptSample for a range whose white cannot be known.
    """
    grey = np.asarray(image).astype(np.float64)
    low, high = float(grey.min()), float(grey.max())
    white = 255.0
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        white = 65535.0
    elif image.mode == "F" and high <= 1:
        white = 1.0
    if not 0.0 <= low <= high <= white:
        raise CorruptSample(f"numbers from {low:g} to {high:g}; 0 to {white:g} are read")
    grey = np.rint(grey * (255.0 / white)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def random_box(
    height: int,
    width: int,
    draws: np.ndarray,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """Return the box of RandomResizedCrop: area uniform in `scale`, log aspect in `aspect`.

    draws: float[DRAWS], uniform.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    values = draws.tolist()
    for k in range(0, 4 * ATTEMPTS, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * values[k])
        ratio = math.exp(low + (high - low) * values[k + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(values[k + 2] * (height - h + 1))
            left = int(values[k + 3] * (width - w + 1))
            return top, left, h, w
    return centred_box(height, width, aspect)


def centred_box(
    height: int,
    width: int,
    aspect: tuple[float, float] = (1.0, 1.0),
) -> Box:
    """Return the largest centred box whose aspect is allowed: a square, by default."""
    w, h = width, height
    if width / height > aspect[1]:
        w = round(height * aspect[1])
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def crop_resize(
    image: np.ndarray,
    box: Box,
    size: int,
    flip: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cut the box out of uint8[h, w, 3], resize and perhaps mirror it -> uint8[3, size, size].

    The pixels stay interleaved in memory, as they are decoded and resized. out: a tensor of that
    layout to write into.
    """
    top, left, height, width = box
    if out is None:
        out = empty(1, size)[0]
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    part = torch.from_numpy(cut).permute(2, 0, 1)
    if (height, width) == (size, size):
        out.copy_(part)
    else:
        # interpolate(mode="bilinear", antialias=True) calls this and then copies the result
        resize = torch.ops.aten._upsample_bilinear2d_aa.out
        resize(part[None], [size, size], False, None, None, out=out[None])
    if flip:
        out.copy_(out.flip(2))
    return out


def empty(images: int, size: int) -> torch.Tensor:
    """Return uint8[images, 3, size, size] for crops, interleaved in memory."""
    shape = (images, 3, size, size)
    return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)


def resize_jpeg(data: bytes, image: np.ndarray, side: int, quality: int) -> bytes:
    """Shrink the shorter side to `side` pixels, as a JPEG; smaller images keep their bytes.

    image: what `decode_rgb` made of the bytes.
    """
    height, width, _ = image.shape
    factor = side / min(height, width)
    if factor >= 1:
        return data
    size = (max(side, round(width * factor)), max(side, round(height * factor)))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    resized.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()
