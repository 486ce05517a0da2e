"""Image files of many kinds, each made by the tool that people make it with.

In: a folder. Out: one file per kind, and what Pillow reads from it.
"""

import subprocess
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from support.image_sets import picture

PROGRAMS = ("cjpeg", "cwebp", "convert")
WIDTH, HEIGHT = 83, 61  # no multiples of a block

# arguments of cjpeg, which reads a PPM
CJPEG = {
    "baseline": "-quality 80",
    "grey": "-grayscale",
    "progressive": "-progressive",
    "progressive-grey": "-progressive -grayscale",
    "arithmetic": "-arithmetic",
    "optimized": "-optimize",
    "restarts": "-restart 1B",
    "rgb": "-rgb",
    "quality-5": "-quality 5",
    "quality-100": "-quality 100 -sample 1x1",
    "float-dct": "-dct float",
    "444": "-sample 1x1",
    "422": "-sample 2x1",
    "440": "-sample 1x2",
    "420": "-sample 2x2",
    "411": "-sample 4x1",
    "441": "-sample 1x4",
    "410": "-sample 4x2",
    "chroma-finer": "-sample 1x1,2x2,2x2",
    "three-in-two": "-sample 3x1",
    "progressive-441": "-progressive -sample 1x4",
}
CWEBP = {"lossy": "-q 80", "lossless": "-lossless", "near-lossless": "-near_lossless 40"}
# suffix and arguments of ImageMagick's convert
CONVERT = {
    "png-rgb": ("png", ""),
    "png-interlaced": ("png", "-interlace PNG"),
    "png-palette": ("png", "-colors 16 PNG8:"),
    "png-grey": ("png", "-colorspace Gray"),
    "png-1-bit": ("png", "-monochrome"),
    "png-grey-16": ("png", "-colorspace Gray -depth 16 -define png:bit-depth=16"),
    "png-rgb-16": ("png", "-depth 16 PNG48:"),
    "png-alpha": ("png", "-alpha set -channel A -evaluate set 60% PNG32:"),
    "gif": ("gif", ""),
    "gif-two-frames": ("gif", "( +clone -negate )"),
    "bmp": ("bmp", ""),
    "bmp-3": ("bmp", "BMP3:"),
    "tiff": ("tif", "-compress none"),
    "tiff-lzw": ("tiff", "-compress LZW"),
    "tiff-zip": ("tif", "-compress Zip"),
    "tiff-jpeg": ("tif", "-compress JPEG"),
    "tiff-cmyk": ("tif", "-colorspace CMYK -compress none"),
    "tiff-fax": ("tif", "-monochrome -compress Group4"),
    "ppm-ascii": ("ppm", "-compress none"),
    "pgm": ("pgm", ""),
    "pgm-16": ("pgm", "-depth 16"),
    "pbm": ("pbm", ""),
    "tga": ("tga", ""),
    "tga-rle": ("tga", "-compress RLE"),
    "jpeg-cmyk": ("jpg", "-colorspace CMYK"),
    "jpeg-rotated": ("jpg", "-orient RightTop"),
    "jfif": ("jfif", "JPEG:"),
    "jpeg-named-png": ("png", "JPEG:"),
    "png-named-jpeg": ("JPEG", "PNG:"),
}
# read as they are by no rule that anybody could know
LEFT_OUT = {"float-negative", "int-32"}


def make_images(folder: Path) -> dict[str, Path]:
    """Make every kind: its name -> its file. The source lies beside the folder's parent."""
    folder.mkdir(parents=True)
    source = folder.parent.with_name("source.ppm")
    picture(1, WIDTH, HEIGHT).save(source)
    made: dict[str, Path] = {}
    for name, options in CJPEG.items():
        made[f"cjpeg-{name}"] = path = folder / f"cjpeg-{name}.jpg"
        run("cjpeg", *options.split(), "-outfile", path, source)
    picture(1, WIDTH, HEIGHT).save(source.with_suffix(".png"))
    for name, options in CWEBP.items():
        made[f"webp-{name}"] = path = folder / f"webp-{name}.webp"
        run("cwebp", "-quiet", *options.split(), source.with_suffix(".png"), "-o", path)
    for name, (suffix, options) in CONVERT.items():
        made[name] = path = folder / f"{name}.{suffix}"
        *words, form = options.split(" ") if options.endswith(":") else (*options.split(), "")
        run("convert", source, *words, f"{form}{path}")
    for name, array in arrays().items():
        made[name] = path = folder / f"{name}.tif"
        tifffile.imwrite(path, array)
    for name in ("avif", "jp2"):
        made[name] = path = folder / f"{name}.{name}"
        picture(1, WIDTH, HEIGHT).save(path)
    return made


def arrays() -> dict[str, np.ndarray]:
    """What tifffile writes: grey pictures of several number types."""
    grey = np.asarray(picture(1, WIDTH, HEIGHT).convert("L"))
    wide = grey.astype(np.uint16) * 257
    unit = (grey / 255).astype(np.float32)
    return {
        "tifffile-8": grey,
        "tifffile-16": wide,
        "tifffile-16-big-endian": wide.astype(">u2"),
        "tifffile-float": unit,
        "float-255": grey.astype(np.float32),
        "float-negative": unit - 0.5,
        "int-32": wide.astype(np.int32),
        "rgb-16": np.repeat(wide[:, :, None], 3, axis=2),
    }


def expected(path: Path) -> np.ndarray:
    """What Pillow reads as RGB; of the wide kinds, which Pillow cuts off at 255, the grey picture.

    Pillow reads the high byte of 16-bit colours.
    """
    with Image.open(path) as image:
        wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
        if not wide:
            return np.asarray(image.convert("RGB"))
        white = 65535.0
        if image.mode == "F":
            white = 1.0 if np.asarray(image).max() <= 1 else 255.0
        grey = np.rint(np.asarray(image) * (255.0 / white)).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=60)
