"""JPEG bytes -> a square uint8 crop, fast, and within 50 dB PSNR of Pillow's antialiased bilinear.

simplejpeg decodes (bit-identical to Pillow), torch resizes uint8 with antialiasing. Whatever simplejpeg refuses
(PNG in disguise, CMYK, odd headers) Pillow gets a second look at; what both refuse is a CorruptSample. EXIF
orientation is ignored, as in the paper's pipeline. Randomness is an argument: a row of uniform draws.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import TYPE_CHECKING

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
