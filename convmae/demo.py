"""A demonstration set that is drawn, not downloaded: textured shapes that move over textured grounds.

What a clip shows at any one moment says nothing about its class, which is the *motion* of the shapes. The frame is
a torus (what leaves on one side returns on the other); places, orientations, shapes, sizes and textures are drawn
uniformly and before the motion; and a motion only shifts places or orientations, all shapes by the same amount. A
shifted uniform place on a torus is still uniform, so each single frame has exactly the same law for every class.

Stills drawn the same way, of one shape each, make an image set whose classes are the shapes.
"""

from __future__ import annotations

import colorsys
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .files import cache

SEED = 2205
SHAPES = ("cross", "disc", "hexagon", "moon", "ring", "square", "star", "triangle")
MOTIONS = ("circle_left", "circle_right", "down", "left", "right", "turn_left", "turn_right", "up")

Pixels = NDArray[np.uint8]
Plane = NDArray[np.floating[Any]]


log = logging.getLogger(__name__)


def clip(motion: str, random: np.random.Generator, *, frames: int = 32, size: int = 96) -> Pixels:
    """Draw a clip of one of `MOTIONS`, RGB uint8 `(T, H, W, 3)`, H = W = `size` pixels."""
    time = np.arange(frames, dtype=np.float32) / 32
    canvas = _ground(random, time, size)
    sprites = [_Sprite.draw(random, str(random.choice(SHAPES)), random.uniform(0.13, 0.21)) for _ in range(3)]
    shift, turn = _motion(motion, random, time)
    for sprite in sprites:
        sprite.paint(canvas, shift, turn)
    return _bytes(canvas)


def still(shape: str, random: np.random.Generator, *, size: int = 96) -> Pixels:
    """Draw a picture of one of `SHAPES`, RGB uint8 `(H, W, 3)`, H = W = `size` pixels."""
    time = np.zeros(1, np.float32)
    sprite = _Sprite.draw(random, shape, random.uniform(0.22, 0.38), pixels=256)
    shift = np.array([[0.5, 0.5]], np.float32) - sprite.place + random.uniform(-0.15, 0.15, 2)
    canvas = _ground(random, time, size)
    sprite.paint(canvas, shift.astype(np.float32), time)
    picture: Pixels = _bytes(canvas)[0]
    return picture


def _bytes(canvas: Plane) -> Pixels:
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _motion(motion: str, random: np.random.Generator, time: Plane) -> tuple[Plane, Plane]:
    """Shift `(T, 2)` in frame widths, x and y, and turn `(T,)` in radians, both 0 at time 0."""
    speed, start = random.uniform(0.5, 0.9), random.uniform(0, 2 * np.pi)
    angle = (2 * np.pi * speed * time).astype(np.float32)
    still = np.zeros_like(time)
    x, y, turn = still, still, still
    match motion:
        case "left" | "right":
            x = speed * time * (1 if motion == "right" else -1)
        case "up" | "down":
            y = speed * time * (1 if motion == "down" else -1)
        case "turn_left" | "turn_right":
            turn = angle * (1 if motion == "turn_right" else -1)
        case "circle_left" | "circle_right":
            phase = start + angle * (1 if motion == "circle_right" else -1)
            x, y = 0.2 * (np.cos(phase) - np.cos(start)), 0.2 * (np.sin(phase) - np.sin(start))
        case _:
            raise ValueError(f"{motion=} is not one of {MOTIONS}")
    return np.stack([x, y], 1).astype(np.float32), turn


def _ground(random: np.random.Generator, time: Plane, size: int) -> Plane:
    """A smooth periodic texture that drifts slowly, in a direction of its own, `(T, H, W, 3)` from 0 to 1."""
    ys, xs = np.mgrid[: 2 * size, : 2 * size].astype(np.float32) / (2 * size)
    bend = 0.06 * _waves(random, xs, ys, count=2, highest=2)
    value = _waves(random, xs + bend, ys - bend, count=5, highest=3)
    texture = _coloured(random, value, light=(0.2, 0.62), colourful=0.55)
    # Twice as fine as needed, so that every second pixel, from any start, is the ground moved by half pixels.
    tiled = np.tile(texture, (2, 2, 1))
    drift = 2 * size * random.uniform(0.05, 0.2) * np.exp(1j * random.uniform(0, 2 * np.pi)) * time
    starts = [(round(step.real) % (2 * size), round(step.imag) % (2 * size)) for step in drift.tolist()]
    return np.stack([tiled[y : y + 2 * size : 2, x : x + 2 * size : 2] for x, y in starts])


def _waves(random: np.random.Generator, x: Plane, y: Plane, *, count: int, highest: int) -> Plane:
    """A sum of plane waves of period 1, of random direction and phase, from about -1 to 1."""
    total = np.zeros_like(x)
    for _ in range(count):
        kx, ky = random.integers(-highest, highest + 1, 2)
        phase, weight = random.uniform(0, 2 * np.pi), 1 / np.sqrt(1 + kx**2 + ky**2)
        total += np.float32(weight) * np.sin(np.float32(2 * np.pi) * (kx * x + ky * y) + np.float32(phase))
    return total / np.float32(np.sqrt(count) * 0.55)


def _coloured(random: np.random.Generator, value: Plane, *, light: tuple[float, float], colourful: float) -> Plane:
    """Values from -1 to 1 as colours `(H, W, 3)` between two neighbouring hues, dark to light."""
    hue, step = random.uniform(), random.uniform(0.08, 0.22) * random.choice([-1, 1])
    dark = np.array(colorsys.hsv_to_rgb(hue, colourful + 0.25, light[0]), np.float32)
    bright = np.array(colorsys.hsv_to_rgb((hue + step) % 1, colourful, light[1]), np.float32)
    mix = 0.5 + 0.5 * value.clip(-1, 1)
    return dark + (bright - dark) * mix[..., None]


@dataclass(frozen=True, kw_only=True)
class _Sprite:
    """A textured shape with a soft shadow around it."""

    colours: Plane
    """`(S, S, 4)`: RGB multiplied by opacity, and opacity."""
    place: Plane
    """Of its centre at time 0, x and y from 0 to 1."""
    angle: float
    radius: float
    """In frame widths."""

    @staticmethod
    def draw(random: np.random.Generator, shape: str, radius: float, pixels: int = 112) -> _Sprite:
        y, x = (np.mgrid[:pixels, :pixels].astype(np.float32) + 0.5) * (2 / pixels) - 1
        outside = _distance(shape, x, y)
        colour = _coloured(random, _pattern(random, x, y), light=(0.5, 1.0), colourful=0.6)
        opaque = np.clip(0.5 - outside * 30, 0, 1)
        rim = 1 - 0.45 * np.exp(-((outside / 0.07) ** 2))
        shadow = 0.5 * np.exp(-((np.maximum(outside, 0) / 0.13) ** 2)) * (1 - opaque) * (np.hypot(x, y) < 0.98)
        planes = np.dstack([colour * (rim * opaque)[..., None], opaque + shadow]).astype(np.float32)
        place = random.uniform(0, 1, 2).astype(np.float32)
        return _Sprite(colours=planes, place=place, angle=random.uniform(0, 2 * np.pi), radius=radius)

    def paint(self, canvas: Plane, shift: Plane, turn: Plane) -> None:
        """Paint it onto a canvas `(T, H, W, 3)`, shifted by `(T, 2)` and turned by `(T,)`."""
        count, size, _, _ = canvas.shape
        reach = self.radius / 0.78 * size
        centre = (self.place + shift) * size
        box = np.floor(centre - reach).astype(np.int32)[:, :, None] + np.arange(int(2 * reach) + 2, dtype=np.int32)
        x, y = np.moveaxis((box.astype(np.float32) + 0.5 - centre[:, :, None]) / reach, 1, 0)
        # The sprite is finer than what is painted: its nearest pixel will do.
        side = len(self.colours)
        angle = turn[:, None, None] + np.float32(self.angle)
        cos, sin, x, y = np.cos(angle), np.sin(angle), x[:, None, :], y[:, :, None]
        across, down = (
            ((at + 1) * (side / 2)).astype(np.int32).clip(0, side - 1) for at in (cos * x + sin * y, cos * y - sin * x)
        )
        drawn = self.colours.reshape(-1, 4).take(down * side + across, 0)
        columns, rows = np.moveaxis(box % size, 1, 0)
        rows += size * np.arange(count, dtype=np.int32)[:, None]
        flat, places = canvas.reshape(-1, 3), rows[:, :, None] * size + columns[:, None, :]
        flat[places] = drawn[..., :3] + flat.take(places, 0) * (1 - drawn[..., 3:])


def _pattern(random: np.random.Generator, x: Plane, y: Plane) -> Plane:
    """Stripes, spots or rings, light at one end: no turn but a whole one looks the same."""
    across = np.float32(random.uniform(1.3, 2.0) * np.pi)
    match random.integers(3):
        case 0:
            marks = np.sin(across * x * 1.3)
        case 1:
            marks = np.sin(across * x) * np.sin(across * y) * 1.4
        case _:
            marks = np.cos(across * 1.4 * np.hypot(x - 0.5, y))
    pattern: Plane = 0.75 * np.tanh(2 * marks) + 0.5 * y
    return pattern


def _distance(shape: str, x: Plane, y: Plane) -> Plane:
    """About the distance to the outline of a shape of radius about 0.75, negative inside."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)

    def polygon(corners: int, reach: float) -> Plane:
        sector = 2 * np.pi / corners
        distance: Plane = r * np.cos((angle + np.pi / 2) % sector - sector / 2) - reach
        return distance

    def bar(a: Plane, b: Plane, half: tuple[float, float]) -> Plane:
        distance: Plane = np.hypot(np.maximum(abs(a) - half[0] + 0.1, 0), np.maximum(abs(b) - half[1] + 0.1, 0)) - 0.1
        return distance

    match shape:
        case "cross":
            cross: Plane = np.minimum(bar(x, y, (0.75, 0.25)), bar(y, x, (0.75, 0.25)))
            return cross
        case "disc":
            return r - 0.68
        case "hexagon":
            return polygon(6, 0.64)
        case "moon":
            moon: Plane = np.maximum(r - 0.74, 0.58 - np.hypot(x - 0.38, y)) + np.maximum(x - 0.45, 0)
            return moon
        case "ring":
            return abs(r - 0.54) - 0.2
        case "square":
            return bar(x, y, (0.6, 0.6))
        case "star":
            return 0.7 * (r - 0.54 - 0.22 * np.cos(5 * (angle + np.pi / 2)))
        case "triangle":
            return polygon(3, 0.39)
    raise ValueError(f"{shape=} is not one of {SHAPES}")


def cached(name: str, make: Callable[[Path], None], folder: Path | None = None) -> Path:
    """The folder that `make` fills, filled on first use: `folder`, or `name` in `convmae.files.cache()`.

    The folder is filled under another name and then
    renamed: it is never there by halves, and of several processes that make it at once, all get the first one's.

    Raises ValueError where that cannot be written.
    """
    folder = cache() / name if folder is None else Path(folder)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot make {folder}: {error}; set CONVMAE_CACHE to a folder to write to") from error
    log.info("making the demonstration set in %s: once, in well under a minute", folder)
    try:
        make(making)
        making.chmod(0o755)
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def make(folder: Path | None = None) -> Path:
    """Make the stills in `folder`, or in the cache (see `cached`), unless they are there; return where.

    Below are `train/SHAPE/000.jpg` and so on, 60 stills of each of 8 shapes, and `val/` with 15; 96 pixels. The
    content is the same each time.

    Raises ValueError where the folder cannot be written.
    """
    return cached("demo-images-v1", _fill, folder)


def _fill(folder: Path) -> None:
    for split, (name, count) in enumerate([("train", 60), ("val", 15)]):
        for label, shape in enumerate(SHAPES):
            below = folder / name / shape
            below.mkdir(parents=True)
            for number in range(count):
                random = np.random.default_rng([SEED, split, label, number])
                Image.fromarray(still(shape, random)).save(below / f"{number:03}.jpg", quality=90)
