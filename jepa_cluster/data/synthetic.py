"""A tiny honest ImageNet: scenes drawn from a seed, as real JPEG files in class folders.

In: a folder, numbers of images and a seed. Out: `<folder>/<split>/<class>/<name>.JPEG`, for each
split the labels "count" and "distance" in labels.jsonl, and synthetic.json, which says what was
asked for. Every image is a function of (seed, split, number) alone. Nothing is known here of masks,
models or torch.

A scene holds one to six objects, seen from one of five distances, on a textured ground with
clutter. The class is the texture of the ground, the scene as in scene recognition; distance is that
of the nearest object. Colours, shapes and places are drawn without regard to the class and every
texture is half light, half dark, so mean colours say nothing: telling classes apart takes
structure. Some images are odd the way ImageNet's are.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_cluster.data.manifest import SPLITS
from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import DataError
from jepa_cluster.trial.files import open_atomic, read_json, write_atomic, write_json

VERSION = 1  # raise it when the same seed would draw other pixels
SHAPES = ("disc", "square", "triangle", "cross")
CLASSES = ("bars", "posts", "slants", "falls", "checks", "rings", "spokes", "waves")
OTHERS = ("plain", "halves")
DISTANCES = 5  # classes of distance, nearest first
MAX_OBJECTS = 6  # in a scene
ODDITIES = {3: "gray", 7: "cmyk", 11: "exif", 13: "png"}  # by number, again in every EVERY images
EVERY = 500
CHUNK = 64  # images a process draws at a time
ABOUT, PART = "synthetic.json", ".part"

Floats = NDArray[np.floating]  # float32: numpy's type stubs widen them
Pixels = NDArray[np.uint8]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Look:
    """A texture in two colours. Lengths are in shorter sides of the image."""

    texture: str
    x: float
    y: float
    angle: float  # radians
    period: float
    phase: Floats  # [2]
    colours: Floats  # [2, 3], 0..255


@dataclass(frozen=True)
class Thing:
    """An object: a shape of this radius around the middle of its look."""

    shape: str
    radius: float
    look: Look


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Positions count from its centre. The nearest object comes last and hides the others.
    """

    width: int
    height: int
    ground: Look
    things: tuple[Thing, ...]
    distance: int  # 0 .. DISTANCES - 1
    pixels: int  # seed of what has no label: clutter, noise

    @property
    def name(self) -> str:
        """The class."""
        return self.ground.texture


def render(
    dst: Path,
    *,
    train: int = 4000,
    val: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Draw the set into `dst`. Returns whether anything was drawn: False when it was complete.

    Images appear in `<dst>.part`, which is renamed to `dst` when all are there. A killed call
    continues where it stopped. Raises DataError when `dst` holds something else, or cannot be
    written.
    """
    sizes = {"train": train, "val": val}
    asked = {"version": VERSION, **sizes, "seed": seed, "classes": list(CLASSES)}
    if min(train, val) < 0 or train + val == 0:
        raise DataError(f"cannot draw {train} + {val} images", hint="ask for at least one image")
    if _complete(dst, asked):
        return False
    part = dst.with_name(dst.name + PART)
    try:
        if part.exists() and read_json(part / ABOUT) != asked:
            shutil.rmtree(part)  # unfinished, and another set than the one asked for
        for split in SPLITS:
            for name in CLASSES:
                (part / split / name).mkdir(parents=True, exist_ok=True)
        write_json(part / ABOUT, asked)
        _draw_all(part, sizes, seed, workers, progress)
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
    wrong = [key for key in asked if found.get(key) != asked[key]]
    differences = [f"{key} {found.get(key)} instead of {asked[key]}" for key in wrong]
    what = f"the folder holds another synthetic set: {', '.join(differences)}"
    raise DataError(what, where=where, hint="remove it or choose another folder")


def _draw_all(
    part: Path,
    sizes: dict[str, int],
    seed: int,
    workers: int | None,
    progress: Progress,
) -> None:
    total, done = sum(sizes.values()), 0
    with processes(workers) as pool:
        for split, images in sizes.items():
            draw = functools.partial(_draw_some, part, seed, split)
            chunks = [range(images)[k : k + CHUNK] for k in range(0, images, CHUNK)]
            labels: list[str] = []
            for lines in pool.map(draw, chunks):
                labels += lines
                done += len(lines)
                progress(done, total)
            write_atomic(part / split / "labels.jsonl", "".join(labels))


def _draw_some(part: Path, seed: int, split: str, numbers: range) -> list[str]:
    """Draw what is missing of these images. Returns their lines of labels.jsonl."""
    lines: list[str] = []
    for number in numbers:
        scene = compose(seed, split, number)
        file = f"{scene.name}/{split}_{number:06d}.JPEG"
        labels = {"file": file, "count": len(scene.things), "distance": scene.distance}
        lines.append(json.dumps(labels) + "\n")
        path = part / split / file
        if not path.exists():
            _save(paint(scene), path, ODDITIES.get(number % EVERY, ""))
    return lines


def _save(pixels: Pixels, path: Path, oddity: str) -> None:
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {"format": "JPEG", "quality": 90}
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


def compose(seed: int, split: str, number: int) -> Scene:
    """Return the scene of an image, without its pixels. Classes alternate, all else is random."""
    random = np.random.default_rng([VERSION, seed, SPLITS.index(split), number])
    width, height = random.integers(96, 201, 2).tolist()
    width, height = min(width, height * 3 // 2), min(height, width * 3 // 2)
    ground = _ground(random, CLASSES[number % len(CLASSES)])
    distance = int(random.integers(DISTANCES))
    radius = 0.2 / (1 + 0.3 * (distance + random.uniform(-0.4, 0.4)))
    count = random.integers(1, MAX_OBJECTS + 1)
    things = [_thing(random, radius, [])]  # the nearest
    while len(things) < count:
        things.append(_thing(random, radius * random.uniform(0.5, 0.9), things))
    pixels = int(random.integers(1 << 62))
    return Scene(width, height, ground, tuple(things[::-1]), distance, pixels)


def _ground(random: np.random.Generator, texture: str) -> Look:
    """Return a ground near grey, in stripes of equal contrast in every class."""
    tint = random.uniform(0.6, 1.0, 3)
    swing = tint / tint.mean() * random.uniform(40, 60)
    middle = 128 + random.uniform(-12, 12) + random.uniform(-12, 12, 3)
    x, y = random.uniform(-0.3, 0.3, 2).tolist()
    period = 0.17 * random.uniform(0.85, 1.15)
    angle = random.uniform(-0.2, 0.2)
    return Look(
        texture, x, y, angle, period, _phase(random), _colours(middle - swing, middle + swing)
    )


def _thing(random: np.random.Generator, radius: float, others: list[Thing]) -> Thing:
    """Return an object in the central square; it shrinks until it is clear of the others."""
    x = y = 0.0
    for attempt in range(200):
        x, y = (random.uniform(-1, 1, 2) * (0.5 - radius)).tolist()
        if _is_clear(x, y, radius, others):
            break
        if attempt > 20:
            radius *= 0.97
    first, second = random.uniform(0, 255, (2, 3))
    texture = str(random.choice(OTHERS))
    angle = random.uniform(-0.3, 0.3)
    look = Look(texture, x, y, angle, 1.0, _phase(random), _colours(first, second))
    return Thing(str(random.choice(SHAPES)), radius, look)


def _is_clear(x: float, y: float, radius: float, others: list[Thing]) -> bool:
    for other in others:
        gap = math.hypot(x - other.look.x, y - other.look.y)
        if gap <= 0.8 * (radius + other.radius):
            return False
    return True


def _phase(random: np.random.Generator) -> Floats:
    return random.uniform(0, 2 * math.pi, 2).astype(np.float32)


def _colours(first: Floats, second: Floats) -> Floats:
    return np.stack([first, second]).clip(0, 255).astype(np.float32)


def paint(scene: Scene) -> Pixels:
    """Return the pixels of a scene, uint8[height, width, 3]."""
    random = np.random.default_rng(scene.pixels)
    side = min(scene.width, scene.height)
    x, y = _axis(scene.width, side), _axis(scene.height, side)
    canvas = _shade(scene.ground, *_rotated(scene.ground, x, y))
    for _ in range(random.integers(6, 15)):
        _add_clutter(random, canvas, x, y)
    for thing in scene.things:
        _add_object(canvas, x, y, side, thing)
    noise = random.standard_normal((scene.height, scene.width, 1), np.float32)
    canvas += noise * random.uniform(2, 8)
    return canvas.clip(0, 255).astype(np.uint8)


def _axis(length: int, side: int) -> Floats:
    """Return the coordinates of pixels along one side."""
    return (np.arange(length, dtype=np.float32) + 0.5 - length / 2) / side


def _rotated(look: Look, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Map columns [w] and rows [h] to coordinates [h, w] along and across the look."""
    dx, dy = x[None] - look.x, y[:, None] - look.y
    cos, sin = math.cos(look.angle), math.sin(look.angle)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _shade(look: Look, u: Floats, v: Floats) -> Floats:
    """Return the colours [h, w, 3] of a look."""
    wave = 2 * math.pi / look.period
    texture = _texture(look.texture, u * wave, v * wave, *look.phase)
    share = (0.5 + texture * 2).clip(0, 1)[..., None]
    first, second = look.colours
    return first + (second - first) * share


def _window(axis: Floats, low: float, high: float) -> slice:
    """Return the pixels of an axis between two coordinates."""
    return slice(*np.searchsorted(axis, (low, high)))


def _add_clutter(
    random: np.random.Generator,
    canvas: Floats,
    x: Floats,
    y: Floats,
) -> None:
    """Draw a small rectangle of one colour, half transparent."""
    left, top = random.uniform(x[0], x[-1]), random.uniform(y[0], y[-1])
    wide, high = random.uniform(0.01, 0.08, 2)
    part = canvas[_window(y, top, top + high), _window(x, left, left + wide)]
    colour = random.uniform(0, 255, 3).astype(np.float32)
    part += (colour - part) * 0.6


def _add_object(
    canvas: Floats,
    x: Floats,
    y: Floats,
    side: int,
    thing: Thing,
) -> None:
    """Draw one object, edges antialiased."""
    look = thing.look
    reach = thing.radius * 1.05 + 1 / side
    columns = _window(x, look.x - reach, look.x + reach)
    rows = _window(y, look.y - reach, look.y + reach)
    u, v = _rotated(look, x[columns], y[rows])
    edge = _distance_to_edge(thing.shape, u, v, thing.radius)
    cover = (0.5 - edge * side).clip(0, 1)[..., None]
    part = canvas[rows, columns]
    part += (_shade(look, u, v) - part) * cover


def _distance_to_edge(shape: str, u: Floats, v: Floats, radius: float) -> Floats:
    """Return the distance from the edge of a shape, negative inside.

    All shapes fit the circle of this radius and have similar areas.
    """
    r = np.float32(radius)
    if shape == "disc":
        return np.hypot(u, v) - r * np.float32(0.9)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - r * np.float32(0.8)
    if shape == "triangle":
        slope = abs(u) * 0.894 - (v + r) * 0.447
        return np.maximum(slope, v - r * np.float32(0.8))
    long, thin = r * np.float32(0.98), r * np.float32(0.42)
    horizontal = np.maximum(abs(u) - long, abs(v) - thin)
    vertical = np.maximum(abs(u) - thin, abs(v) - long)
    return np.minimum(horizontal, vertical)


def _texture(texture: str, u: Floats, v: Floats, p: float, q: float) -> Floats:
    """Return -1..1, positive on half of the area (except `plain`).

    u, v: radians of the texture's wave from the centre. p, q: its phase.
    """
    match texture:
        case "bars":
            return np.sin(v + p)
        case "posts":
            return np.sin(u + p)
        case "slants":
            return np.sin((u + v) * 0.707 + p)
        case "falls":
            return np.sin((u - v) * 0.707 + p)
        case "checks":
            return np.sin(u + p) * np.sin(v + q)
        case "rings":
            return np.sin(np.hypot(u, v) + p)
        case "spokes":
            return np.sin(9 * np.arctan2(u, v) + p)
        case "waves":
            return np.sin(v + p + 2 * np.sin(u * 0.6 + q))
        case "halves":
            return np.sign(u)
        case _:
            return np.ones_like(u)
