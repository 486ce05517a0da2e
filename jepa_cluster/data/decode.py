"""JPEG bytes -> a square uint8 crop, fast, and within 50 dB PSNR of Pillow's antialiased bilinear.

simplejpeg decodes (bit-identical to Pillow), torch resizes uint8 with antialiasing. Rows below a crop are not decoded:
the header is told that the image ends there. Whatever simplejpeg refuses (PNG in disguise, CMYK, odd headers) Pillow
gets a second look at; what both refuse is a CorruptSample. EXIF orientation is ignored, as in the paper's pipeline.
Randomness is an argument: a row of uniform draws.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from jepa_cluster.errors import CorruptSample

if TYPE_CHECKING:
    import torch

ATTEMPTS = 10  # of the random crop, then a centred one; as in torchvision's RandomResizedCrop
DRAWS = 4 * ATTEMPTS + 1  # uniform draws a random crop takes; the last one flips
MAX_PIXELS = 100_000_000  # an image that claims more is taken for damage (a bomb, or a flipped size byte)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def pixels(data: bytes | memoryview) -> np.ndarray:
    """An encoded image -> uint8[h, w, 3]. Raises CorruptSample when no decoder accepts it."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if height * width <= MAX_PIXELS and colour in ("YCbCr", "RGB", "Gray"):
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        pass
    return _by_pillow(data)


def boxed(data: bytes | memoryview, choose: Callable[[int, int], Box]) -> tuple[np.ndarray, Box]:
    """The image, and the box in it that `choose(height, width)` picks; rows below the box may be missing.

    Inside the box the pixels are those of `pixels`. Raises CorruptSample when no decoder accepts the image.
    """
    frame = _frame(data)
    if frame is not None:
        box = choose(frame.height, frame.width)
        rows = -(-(box[0] + box[2] + 1) // frame.step) * frame.step  # a row more, which upsampling looks at
        if rows < frame.height:
            short = bytearray(data)
            short[frame.at : frame.at + 2] = rows.to_bytes(2, "big")
            try:  # not strict: the rest of the file is met where its end should be, which is worth a warning
                return simplejpeg.decode_jpeg(short, "RGB", fastdct=False, fastupsample=False, strict=False), box
            except ValueError:
                pass
    image = pixels(data)
    return image, choose(*image.shape[:2])


class Frame(NamedTuple):
    """Where a JPEG says its height, what its size is, and how many rows are decoded together."""

    at: int
    height: int
    width: int
    step: int


def _frame(data: bytes | memoryview) -> Frame | None:
    """The frame of a whole baseline JPEG in grey or three colours; None for any other file."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    at = 2
    while at + 20 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # segments before the scan
        if data[at + 1] in (0xC0, 0xC1):
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            step = 8 * max(v & 15 for v in data[at + 11 : at + 20 : 3])  # by the finest sampling of a component
            known = data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= MAX_PIXELS
            return Frame(at + 5, height, width, step) if known and step else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _by_pillow(data: bytes | memoryview) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks, palettes with transparency
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise CorruptSample(f"an image of {image.width}x{image.height} pixels")
                return np.array(image.convert("RGB"))
    except CorruptSample:
        raise
    except Exception as e:  # Pillow's plugins raise whatever their parsers meet: that is the file's fault
        raise CorruptSample(f"no decoder reads it: {type(e).__name__}: {e}") from e


def random_box(
    height: int, width: int, draws: np.ndarray, scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """The box of RandomResizedCrop: area uniform in `scale`, log aspect uniform in `aspect`. draws: float[DRAWS]."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    values = draws.tolist()
    for k in range(0, 4 * ATTEMPTS, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * values[k])
        ratio = math.exp(low + (high - low) * values[k + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(values[k + 2] * (height - h + 1)), int(values[k + 3] * (width - w + 1)), h, w
    ratio = width / height
    w = width if ratio <= aspect[1] else round(height * aspect[1])
    h = height if ratio >= aspect[0] else round(width / aspect[0])
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def centre_box(height: int, width: int) -> Box:
    """The largest centred square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crop(image: np.ndarray, box: Box, size: int, flip: bool = False, into: torch.Tensor | None = None) -> torch.Tensor:
    """uint8[h, w, 3] -> uint8[3, size, size]: the box, resized by antialiased bilinear, mirrored when asked.

    The pixels stay interleaved in memory, as they are decoded and resized. into: a place in a batch that lies so.
    """
    import torch  # here, because packing shards decodes too and needs no torch

    top, left, height, width = box
    into = empty(1, size)[0] if into is None else into
    part = torch.from_numpy(np.ascontiguousarray(image[top : top + height, left : left + width])).permute(2, 0, 1)
    if (height, width) == (size, size):
        into.copy_(part)
    else:  # what interpolate(mode="bilinear", antialias=True) calls, here without a copy of the result
        torch.ops.aten._upsample_bilinear2d_aa.out(part[None], [size, size], False, None, None, out=into[None])
    return into.copy_(into.flip(2)) if flip else into


def empty(images: int, size: int) -> torch.Tensor:
    """uint8[images, 3, size, size] for crops, interleaved in memory."""
    import torch

    return torch.empty((images, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)


def oddities(data: bytes) -> list[str]:
    """What is unusual about an encoded image: 'gray', 'cmyk', 'exif-rotated', 'png in jpeg's place' and the like."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                found = [] if image.mode == "RGB" else [image.mode.lower()]
                if image.format != "JPEG":
                    found.append(f"format {(image.format or 'unknown').lower()}")
                if image.getexif().get(0x0112, 1) != 1:
                    found.append("exif orientation")
                return found
    except Exception:  # a broken EXIF block, or no image at all: decoding decides which
        return ["unreadable header"]


def shrink(data: bytes, side: int, quality: int) -> bytes:
    """Shorter side down to `side` pixels, as a JPEG; images that are smaller keep their bytes."""
    with Image.open(io.BytesIO(data)) as image:
        factor = side / min(image.size)
        if factor >= 1:
            return data
        size = (max(side, round(image.width * factor)), max(side, round(image.height * factor)))
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()
