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
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_cluster.data.worker_processes import processes
from jepa_cluster.errors import DataError
from jepa_cluster.trial.layout import open_atomic, write_atomic, write_json

VERSION = 1  # raise it when the same seed would draw other pixels
SPLITS = ("train", "val")
SHAPES = ("disc", "square", "triangle", "cross")
CLASSES = ("bars", "posts", "slants", "falls", "checks", "rings", "spokes", "waves")
OTHERS = ("plain", "halves")
DISTANCES = 5  # classes of distance, nearest first
MOST = 6  # objects in a scene
ODDITIES = {3: "gray", 7: "cmyk", 11: "exif", 13: "png"}  # by number, again in every EVERY images
EVERY = 500
CHUNK = 64  # images a process draws at a time
ABOUT, PART = "synthetic.json", ".part"

Floats = np.ndarray[Any, np.dtype[np.float32]]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Look:
    """A texture in two colours, where its middle lies and how it is turned. Lengths in shorter sides of the image."""

    texture: str
    x: float
    y: float
    angle: float  # radians
    period: float
    phase: tuple[float, float]
    colours: Floats  # [2, 3], 0..255


@dataclass(frozen=True)
class Thing:
    """An object: a shape of this radius around the middle of its look."""

    shape: str
    radius: float
    look: Look


@dataclass(frozen=True)
class Scene:
    """What an image shows. Places count from its centre; the nearest object comes last and hides the others."""

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
    progress: Progress | None = None,
) -> bool:
    """Draw the set into `dst`; True if anything had to be drawn, False if it already stood there.

    Images appear in `<dst>.part` and move to `dst` in one rename when all are there; a killed call
    goes on where it stopped. Raises DataError when `dst` holds something else, or cannot be
    written.
    """
    asked: dict[str, Any] = {"version": VERSION, "train": train, "val": val, "seed": seed, "classes": list(CLASSES)}
    if min(train, val) < 0 or train + val == 0:
        raise DataError(f"cannot draw {train} + {val} images", now="ask for at least one image")
    if _complete(dst, asked):
        return False
    part = dst.with_name(dst.name + PART)
    try:
        if part.exists() and _about(part) != asked:
            shutil.rmtree(part)  # an unfinished set that nobody asks for any more
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / ABOUT, asked)
        sizes = {"train": train, "val": val}
        for split in SPLITS:
            for name in CLASSES:
                (part / split / name).mkdir(parents=True, exist_ok=True)
        _draw_all(part, sizes, seed, workers, progress or (lambda done, total: None))
        if not _complete(dst, asked):  # nobody else was faster
            part.replace(dst)
    except OSError as e:
        raise DataError(
            f"cannot write the synthetic set: {e}", where=str(dst), now="see to disk space and rights"
        ) from e
    return True


def _complete(dst: Path, asked: dict[str, Any]) -> bool:
    """Does `dst` hold the set asked for? DataError when it holds another one, or anything else."""
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return False
    found = _about(dst)
    if found == asked:
        return True
    where = str(dst.absolute())
    if not found:
        raise DataError(f"the folder is not empty and has no {ABOUT}", where=where, now="choose another folder")
    other = ", ".join(f"{k} {found.get(k)} instead of {v}" for k, v in asked.items() if found.get(k) != v)
    raise DataError(
        f"another synthetic set stands there: {other}", where=where, now="remove it or choose another folder"
    )


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}


def _draw_all(part: Path, sizes: dict[str, int], seed: int, workers: int | None, progress: Progress) -> None:
    jobs = [(s, range(k, min(k + CHUNK, n))) for s, n in sizes.items() for k in range(0, n, CHUNK)]
    labels: dict[tuple[str, int], list[str]] = {}
    done = 0
    with processes(workers) as pool:
        waiting = {pool.submit(_draw_some, part, seed, s, numbers): (s, numbers) for s, numbers in jobs}
        for ready in as_completed(waiting):
            split, numbers = waiting[ready]
            labels[split, numbers.start] = ready.result()
            done += len(numbers)
            progress(done, sum(sizes.values()))
    for split in sizes:
        lines = [line for key in sorted(labels) if key[0] == split for line in labels[key]]
        write_atomic(part / split / "labels.jsonl", "".join(lines))


def _draw_some(part: Path, seed: int, split: str, numbers: range) -> list[str]:
    """Draw what is missing of these images; their lines of labels.jsonl."""
    lines: list[str] = []
    for number in numbers:
        scene = compose(seed, split, number)
        file = f"{scene.name}/{split}_{number:06d}.JPEG"
        lines.append(json.dumps({"file": file, "count": len(scene.things), "distance": scene.distance}) + "\n")
        path = part / split / file
        if not path.exists():
            _save(paint(scene), path, ODDITIES.get(number % EVERY, ""))
    return lines


def _save(pixels: np.ndarray[Any, np.dtype[np.uint8]], path: Path, oddity: str) -> None:
    image, options = Image.fromarray(pixels), dict[str, Any](format="JPEG", quality=90)
    if oddity in ("gray", "cmyk"):
        image = image.convert({"gray": "L", "cmyk": "CMYK"}[oddity])
    elif oddity == "exif":
        image, options["exif"] = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        options["exif"][0x0112] = 6  # orientation: turn by 90 degrees clockwise to look at it
    elif oddity == "png":
        options = {"format": "PNG"}
    with open_atomic(path, durable=False) as file:
        image.save(file, **options)


# ---- what a scene holds


def compose(seed: int, split: str, number: int) -> Scene:
    """The scene of an image, without its pixels. Classes take turns, everything else is drawn."""
    random = np.random.default_rng([VERSION, seed, SPLITS.index(split), number])
    width, height = (int(v) for v in random.integers(96, 201, 2))
    width, height = min(width, height * 3 // 2), min(height, width * 3 // 2)
    ground = _ground(random, CLASSES[number % len(CLASSES)])
    distance = int(random.integers(DISTANCES))
    radius = 0.2 / (1 + 0.3 * (distance + random.uniform(-0.4, 0.4)))
    things: list[Thing] = []
    for k in range(int(random.integers(1, MOST + 1))):
        things.append(_thing(random, radius * (random.uniform(0.5, 0.9) if k else 1), things))
    return Scene(width, height, ground, tuple(things[::-1]), distance, int(random.integers(1 << 62)))


def _ground(random: np.random.Generator, texture: str) -> Look:
    """Near grey, in stripes of like contrast whatever the class."""
    tint = random.uniform(0.6, 1.0, 3)
    swing = tint / tint.mean() * random.uniform(40, 60)
    middle = 128 + random.uniform(-12, 12) + random.uniform(-12, 12, 3)
    x, y = random.uniform(-0.3, 0.3, 2)
    period = 0.17 * random.uniform(0.85, 1.15)
    return Look(
        texture, x, y, random.uniform(-0.2, 0.2), period, _phase(random), _colours(middle - swing, middle + swing)
    )


def _thing(random: np.random.Generator, radius: float, others: list[Thing]) -> Thing:
    """An object inside the central square, clear of the others where there is room: it shrinks until there is."""
    x = y = 0.0
    for attempt in range(200):
        x, y = random.uniform(-1, 1, 2) * (0.5 - radius)
        if all(math.hypot(x - o.look.x, y - o.look.y) > 0.8 * (radius + o.radius) for o in others):
            break
        radius *= 0.97 if attempt > 20 else 1
    colours = _colours(*random.uniform(0, 255, (2, 3)))
    look = Look(str(random.choice(OTHERS)), x, y, random.uniform(-0.3, 0.3), 1.0, _phase(random), colours)
    return Thing(str(random.choice(SHAPES)), radius, look)


def _phase(random: np.random.Generator) -> tuple[float, float]:
    return random.uniform(0, 2 * math.pi), random.uniform(0, 2 * math.pi)


def _colours(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Floats:
    return np.stack([one, other]).clip(0, 255).astype(np.float32)


# ---- its pixels


def paint(scene: Scene) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[height, width, 3]."""
    random = np.random.default_rng(scene.pixels)
    x, y, side = _axes(scene.width, scene.height)
    canvas = _shade(scene.ground, *_turned(scene.ground, x, y))
    for _ in range(int(random.integers(6, 15))):
        _scratch(random, canvas, x, y)
    for thing in scene.things:
        _place(canvas, x, y, side, thing)
    canvas += random.standard_normal((scene.height, scene.width, 1), np.float32) * np.float32(random.uniform(2, 8))
    return canvas.clip(0, 255).astype(np.uint8)


@functools.lru_cache(512)
def _axes(width: int, height: int) -> tuple[Floats, Floats, int]:
    side = min(width, height)
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side
    return x, y, side


def _turned(look: Look, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Columns [w] and rows [h] -> coordinates [h, w] along and across the look, from its middle."""
    dx, dy = x[None] - np.float32(look.x), y[:, None] - np.float32(look.y)
    cos, sin = np.float32(math.cos(look.angle)), np.float32(math.sin(look.angle))
    return cos * dx + sin * dy, cos * dy - sin * dx


def _shade(look: Look, u: Floats, v: Floats) -> Floats:
    """Colours [h, w, 3] of a look."""
    wave = np.float32(2 * math.pi / look.period)
    share = (0.5 + _texture(look.texture, u * wave, v * wave, look.phase) * np.float32(2)).clip(0, 1)[..., None]
    return look.colours[0] + (look.colours[1] - look.colours[0]) * share


def _scratch(random: np.random.Generator, canvas: Floats, x: Floats, y: Floats) -> None:
    """A piece of clutter: a small rectangle of one colour, half transparent."""
    left, top = random.uniform(x[0], x[-1]), random.uniform(y[0], y[-1])
    wide, high = random.uniform(0.01, 0.08, 2)
    columns = slice(*np.searchsorted(x, (left, left + wide)))
    rows = slice(*np.searchsorted(y, (top, top + high)))
    canvas[rows, columns] += (random.uniform(0, 255, 3).astype(np.float32) - canvas[rows, columns]) * np.float32(0.6)


def _place(canvas: Floats, x: Floats, y: Floats, side: int, thing: Thing) -> None:
    """Draw one object, edges antialiased."""
    look, reach = thing.look, thing.radius * 1.05 + 1 / side
    columns = slice(*np.searchsorted(x, (look.x - reach, look.x + reach)))
    rows = slice(*np.searchsorted(y, (look.y - reach, look.y + reach)))
    u, v = _turned(look, x[columns], y[rows])
    cover = (0.5 - _outside(thing.shape, u, v, thing.radius) * side).clip(0, 1)[..., None]
    part = canvas[rows, columns]
    part += (_shade(look, u, v) - part) * cover


def _outside(shape: str, u: Floats, v: Floats, radius: float) -> Floats:
    """Distance from the edge, negative inside. All shapes fit the circle of this radius and have like areas."""
    r = np.float32(radius)
    if shape == "disc":
        return np.hypot(u, v) - r * np.float32(0.9)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - r * np.float32(0.8)
    if shape == "triangle":
        slope = abs(u) * np.float32(0.894) - (v + r) * np.float32(0.447)
        return np.maximum(slope, v - r * np.float32(0.8))
    a, b = abs(u), abs(v)
    long, thin = r * np.float32(0.98), r * np.float32(0.42)
    return np.minimum(np.maximum(a - long, b - thin), np.maximum(a - thin, b - long))


def _texture(texture: str, u: Floats, v: Floats, phase: tuple[float, float]) -> Floats:
    """-1..1, positive on half of the area (but for `plain`). u, v: radians of the texture's wave from the centre."""
    p, q = np.float32(phase[0]), np.float32(phase[1])
    if texture == "bars":
        return np.sin(v + p)
    if texture == "posts":
        return np.sin(u + p)
    if texture in ("slants", "falls"):
        return np.sin((u + v if texture == "slants" else u - v) * np.float32(0.707) + p)
    if texture == "checks":
        return np.sin(u + p) * np.sin(v + q)
    if texture == "rings":
        return np.sin(np.hypot(u, v) + p)
    if texture == "spokes":
        return np.sin(9 * np.arctan2(u, v) + p)
    if texture == "waves":
        return np.sin(v + p + 2 * np.sin(u * np.float32(0.6) + q))
    return np.sign(u) if texture == "halves" else np.ones_like(u)
