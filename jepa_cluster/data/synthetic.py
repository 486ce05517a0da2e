"""A small world to train in: pictures drawn from a seed, as real JPEG files in class folders.

In: a folder, numbers of images, a seed and a layout. Out: `<folder>/<split>/<class>/<name>.JPEG`,
for each split the labels "count" and "distance" in labels.jsonl, and synthetic.json, which says
what was asked for. Every image is a function of (seed, split, number) and the layout alone. Nothing
is known here of masks, models or torch.

Scattered, an image shows two to six copies of one kind of object before a grey ground. The class is
the kind. The copies share a size, from which the distance follows, and nearly an orientation.
Arranged, it shows one object of each of four kinds, and the class is which kind is at which place;
there are no further labels. Each object has its own colour, and every pixel has noise of its own:
what cannot be predicted does not distract a model that predicts. docs/results/synthetic-set.md has
the figures. Some files are odd the way ImageNet's are.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jepa_cluster.data.manifest import SPLITS
from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import DataError
from jepa_cluster.trial.files import open_atomic, read_json, write_atomic, write_json

VERSION = 2  # raise it when the same seed would draw other pixels
SIDE = 56  # px
COUNTS = (2, 6)  # copies of the object
RADII = (8.0, 12.5)  # px, of the circle around an object
APART = 1.4  # distance of the centres of two copies, in radii
NOISE = (45.0, 75.0)  # standard deviation of a pixel, drawn for each image
LIGHT, DARK = 215, 45  # of the parts of an object; the ground is between them
GROUND = 120
ARRANGED_RADIUS = 12.0  # px, of each object of a figure
SHIFT = 2.0  # px, of the middle of a figure from that of the image
STEP = 13.0  # px, from the middle of a figure to that of a place
PLACES = ((-1, -1), (1, -1), (-1, 1), (1, 1))  # right and down
OVERSAMPLING = 2
ODDITIES = {3: "gray", 7: "cmyk", 11: "exif", 13: "png"}  # by number, again in every EVERY images
EVERY = 503  # a prime, so that they are of all classes
CHUNK = 64  # images a process draws at a time
ABOUT, PART = "synthetic.json", ".part"

Pixels = NDArray[np.uint8]
Point = tuple[float, float]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Part:
    """A polygon of one brightness, in a circle of radius 1. y points down."""

    brightness: int
    outline: Sequence[Point]


def _arc(x: float, y: float, rx: float, ry: float, start: int = 0, stop: int = 360) -> list[Point]:
    """Return points of an ellipse, between two angles in degrees."""
    outline: list[Point] = []
    for degrees in range(start, stop + 1, 15):
        angle = math.radians(degrees)
        outline.append((x + rx * math.cos(angle), y + ry * math.sin(angle)))
    return outline


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star(points: int, inner: float) -> list[Point]:
    outline: list[Point] = []
    for k in range(2 * points):
        angle, radius = math.pi * k / points, inner if k % 2 else 1.0
        outline.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return outline


KINDS = {
    "mushroom": (
        Part(DARK, _box(-0.22, -0.1, 0.22, 0.95)),
        Part(LIGHT, _arc(0, 0.1, 0.95, 0.95, 180, 360)),
    ),
    "fish": (
        Part(LIGHT, _arc(-0.2, 0, 0.75, 0.48)),
        Part(DARK, [(0.35, 0), (0.95, -0.55), (0.95, 0.55)]),
        Part(DARK, _arc(-0.55, -0.1, 0.11, 0.11)),
    ),
    "house": (
        Part(LIGHT, _box(-0.65, -0.1, 0.65, 0.9)),
        Part(DARK, [(-0.9, -0.1), (0, -0.95), (0.9, -0.1)]),
        Part(DARK, _box(-0.18, 0.3, 0.18, 0.9)),
    ),
    "fir": (
        Part(DARK, _box(-0.14, 0.5, 0.14, 0.97)),
        Part(LIGHT, [(-0.75, 0.6), (0, -0.3), (0.75, 0.6)]),
        Part(LIGHT, [(-0.55, 0.05), (0, -0.97), (0.55, 0.05)]),
    ),
    "dumbbell": (
        Part(DARK, _box(-0.6, -0.13, 0.6, 0.13)),
        Part(LIGHT, _arc(-0.6, 0, 0.38, 0.38)),
        Part(LIGHT, _arc(0.6, 0, 0.38, 0.38)),
    ),
    "cross": (
        Part(LIGHT, _box(-0.25, -0.95, 0.25, 0.95)),
        Part(LIGHT, _box(-0.95, -0.25, 0.95, 0.25)),
    ),
    "ring": (Part(LIGHT, _arc(0, 0, 0.92, 0.92) + _arc(0, 0, 0.5, 0.5)[::-1]),),
    "star": (Part(LIGHT, _star(5, 0.42)),),
    "snowman": (
        Part(LIGHT, _arc(0, 0.42, 0.52, 0.52)),
        Part(LIGHT, _arc(0, -0.5, 0.36, 0.36)),
        Part(DARK, _box(-0.3, -0.98, 0.3, -0.78)),
    ),
    "lamp": (
        Part(DARK, _box(-0.08, -0.1, 0.08, 0.8)),
        Part(DARK, _box(-0.45, 0.78, 0.45, 0.95)),
        Part(LIGHT, [(-0.4, -0.95), (0.4, -0.95), (0.75, -0.05), (-0.75, -0.05)]),
    ),
}
CLASSES = tuple(KINDS)
ARRANGED_KINDS = ("mushroom", "fish", "house", "ring")


def _arrangements() -> tuple[str, ...]:
    """Return the classes of arranged images: kinds at top left, top right, bottom left and right.

    The even permutations: each kind is at each place in a quarter of the classes, and two places
    tell the other two.
    """
    found: list[str] = []
    for order in itertools.permutations(range(4)):
        swaps = sum(a > b for a, b in itertools.combinations(order, 2))
        if swaps % 2 == 0:
            found.append("-".join(map(ARRANGED_KINDS.__getitem__, order)))
    return tuple(found)


LAYOUTS = {"scattered": CLASSES, "arranged": _arrangements()}  # name -> classes


@dataclass(frozen=True)
class Copy:
    """One object: its centre and radius in px, its turn in radians, what its colour adds."""

    kind: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, ...]


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    name: str  # the class
    copies: tuple[Copy, ...]
    labels: dict[str, float]
    ground: tuple[int, ...]
    noise: float
    pixels: int  # seed of the noise


def render(
    dst: Path,
    *,
    train: int = 4000,
    val: int = 4000,
    seed: int = 0,
    layout: str = "scattered",
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Draw the set into `dst`. Returns whether anything was drawn: False when it was complete.

    Images appear in `<dst>.part`, which is renamed to `dst` when all are there. A killed call
    continues where it stopped. Raises DataError when `dst` holds something else, or cannot be
    written.
    """
    sizes = {"train": train, "val": val}
    asked = {"version": VERSION, **sizes, "seed": seed, "classes": list(LAYOUTS[layout])}
    if min(train, val) < 0 or train + val == 0:
        raise DataError(f"cannot draw {train} + {val} images", hint="ask for at least one image")
    if _complete(dst, asked):
        return False
    part = dst.with_name(dst.name + PART)
    try:
        if part.exists() and read_json(part / ABOUT) != asked:
            shutil.rmtree(part)  # unfinished, and another set than the one asked for
        for split in SPLITS:
            for name in LAYOUTS[layout]:
                (part / split / name).mkdir(parents=True, exist_ok=True)
        write_json(part / ABOUT, asked)
        draw = functools.partial(_draw_some, part, seed, layout)
        _draw_all(part, sizes, draw, workers, progress)
        if not _complete(dst, asked):  # no other process was faster
            part.replace(dst)
    except OSError as error:
        what = f"cannot write the synthetic set: {error}"
        raise DataError(what, where=str(dst), hint="see to disk space and rights") from error
    return True


def _complete(dst: Path, asked: dict[str, Any]) -> bool:
    """Return whether `dst` holds the set asked for. Raises DataError when it holds another."""
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return False
    found = read_json(dst / ABOUT)
    if found == asked:
        return True
    where = str(dst.absolute())
    if found is None:
        what = f"the folder is not empty and has no {ABOUT}"
        raise DataError(what, where=where, hint="choose another folder")
    differences: list[str] = []
    for key, value in asked.items():
        if found.get(key) != value:
            differences.append(f"{key} {found.get(key)} instead of {value}")
    what = f"the folder holds another synthetic set: {', '.join(differences)}"
    raise DataError(what, where=where, hint="remove it or choose another folder")


def _draw_all(
    part: Path,
    sizes: dict[str, int],
    draw: Callable[[str, range], list[str]],
    workers: int | None,
    progress: Progress,
) -> None:
    total, done = sum(sizes.values()), 0
    with processes(workers) as pool:
        for split, images in sizes.items():
            chunks = [range(images)[k : k + CHUNK] for k in range(0, images, CHUNK)]
            labels: list[str] = []
            for lines in pool.map(functools.partial(draw, split), chunks):
                labels += lines
                done += len(lines)
                progress(done, total)
            if labels:
                write_atomic(part / split / "labels.jsonl", "".join(labels))


def _draw_some(part: Path, seed: int, layout: str, split: str, numbers: range) -> list[str]:
    """Draw what is missing of these images. Returns their lines of labels.jsonl."""
    lines: list[str] = []
    for number in numbers:
        scene = compose(seed, split, number, layout)
        file = f"{scene.name}/{split}_{number:06d}.JPEG"
        if scene.labels:
            lines.append(json.dumps({"file": file, **scene.labels}) + "\n")
        path = part / split / file
        if not path.exists():
            _save(paint(scene), path, ODDITIES.get(number % EVERY, ""))
    return lines


def _save(pixels: Pixels, path: Path, oddity: str) -> None:
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": 0}
    if oddity == "gray":
        image = image.convert("L")
    elif oddity == "cmyk":
        image = image.convert("CMYK")
    elif oddity == "exif":
        image = image.transpose(Image.Transpose.ROTATE_90)
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # orientation: turn by 90 degrees clockwise to look at it
    elif oddity == "png":
        options = {"format": "PNG"}
    with open_atomic(path, durable=False) as file:
        image.save(file, **options)


def compose(seed: int, split: str, number: int, layout: str = "scattered") -> Scene:
    """Return the scene of an image, without its pixels. Classes alternate, all else is random."""
    random = np.random.default_rng([VERSION, seed, SPLITS.index(split), number])
    classes = LAYOUTS[layout]
    name = classes[number % len(classes)]
    labels: dict[str, float] = {}
    if layout == "arranged":
        copies = _arranged(random, name.split("-"))
    else:
        low, high = RADII
        radius = low * (high / low) ** random.uniform()
        copies = _scattered(random, name, radius)
        labels = {"count": len(copies), "distance": round(math.log(SIDE / radius), 4)}
    ground = random.normal(GROUND, 4) + random.normal(0, 3, 3)
    return Scene(
        name=name,
        copies=tuple(copies),
        labels=labels,
        ground=tuple(ground.round().astype(int).tolist()),
        noise=random.uniform(*NOISE),
        pixels=int(random.integers(1 << 62)),
    )


def _scattered(random: np.random.Generator, kind: str, radius: float) -> list[Copy]:
    """Return copies of one kind, at free places."""
    wanted = random.integers(COUNTS[0], COUNTS[1] + 1)
    turn = random.uniform(-12, 12)
    copies: list[Copy] = []
    for _ in range(60 * wanted):
        x, y = random.uniform(radius, SIDE - radius, 2).tolist()
        clear = [math.hypot(x - c.x, y - c.y) >= APART * radius for c in copies]
        if len(copies) == wanted:
            break
        if all(clear):
            copies.append(_copy(random, kind, (x, y), radius, turn))
    return copies


def _arranged(random: np.random.Generator, kinds: Sequence[str]) -> list[Copy]:
    """Return one copy of each kind, at the four places of a figure near the centre."""
    copies: list[Copy] = []
    middle = SIDE / 2 + random.uniform(-SHIFT, SHIFT, 2)
    for kind, place in zip(kinds, PLACES, strict=True):
        centre = middle + STEP * np.array(place) + random.uniform(-1, 1, 2)
        copies.append(_copy(random, kind, centre.tolist(), ARRANGED_RADIUS, 0))
    return copies


def _copy(
    random: np.random.Generator,
    kind: str,
    centre: Point,
    radius: float,
    turn: float,
) -> Copy:
    own_radius = radius * random.uniform(0.93, 1.07)
    angle = math.radians(turn + random.uniform(-8, 8))
    tint = random.normal(0, 40) + random.normal(0, 25, 3)
    return Copy(kind, *centre, own_radius, angle, tuple(tint.tolist()))


def paint(scene: Scene) -> Pixels:
    """Return the pixels of a scene, uint8[SIDE, SIDE, 3]."""
    size = (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING)
    image = Image.new("RGB", size, scene.ground)
    canvas = ImageDraw.Draw(image)
    for copy in scene.copies:
        for part in KINDS[copy.kind]:
            colour = (part.brightness + np.array(copy.tint)).clip(0, 255).astype(int)
            canvas.polygon(_placed(copy, part.outline), fill=tuple(colour.tolist()))
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    # A sum of four integers is nearly normal, and the same on every machine.
    random = np.random.default_rng(scene.pixels)
    grain = random.integers(-128, 128, (4, SIDE, SIDE, 3)).sum(0) / (2 * 73.9)
    return (np.asarray(image) + scene.noise * grain).clip(0, 255).astype(np.uint8)


def _placed(copy: Copy, outline: Sequence[Point]) -> list[Point]:
    """Map points of the unit circle to the oversampled image."""
    cos, sin = copy.radius * math.cos(copy.angle), copy.radius * math.sin(copy.angle)
    points: list[Point] = []
    for u, v in outline:
        x, y = copy.x + cos * u - sin * v, copy.y + sin * u + cos * v
        points.append((x * OVERSAMPLING, y * OVERSAMPLING))
    return points
