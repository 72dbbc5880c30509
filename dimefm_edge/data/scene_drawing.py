"""Drawing a scene: what `scenes.py` decides, as 64 x 64 pixels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
COLOURS = {
    "red": (214, 36, 40), "orange": (245, 138, 28), "yellow": (245, 222, 50),
    "green": (48, 160, 60), "cyan": (60, 208, 214), "blue": (36, 72, 210),
    "purple": (130, 50, 165), "pink": (248, 140, 190), "brown": (122, 76, 38),
    "white": (245, 245, 245),
}  # fmt: skip
_BACKGROUND_COLOURS = {
    "grey paper": (150, 150, 152), "grass": (92, 128, 70), "sand": (205, 182, 140),
    "water": (90, 130, 160), "a night sky": (24, 26, 46), "bricks": (140, 96, 84),
}  # fmt: skip

Combo = tuple[str, str, str]


@dataclass(frozen=True)
class SceneObject:
    """One shape in a scene; centre and radius are fractions of the image side."""

    texture: str
    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def combo(self) -> Combo:
        return (self.texture, self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """What an image shows; `relation` says where the first object is, seen from the second."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None


Pixels = npt.NDArray[np.float32]


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene, RGB, 64 x 64, with clutter, shading and noise."""
    canvas = _background(scene.background, rng)
    _add_clutter(canvas, rng)
    for item in scene.objects:
        mask = _shape_mask(item, rng)[..., None]
        canvas = canvas * (1 - mask) + _texture(item, rng) * mask
    canvas *= float(rng.uniform(0.85, 1.1))
    canvas += rng.normal(0, 5, canvas.shape).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


@functools.cache
def _grid() -> tuple[Pixels, Pixels]:
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    return rows, columns


def _background(name: str, rng: np.random.Generator) -> Pixels:
    rows, columns = _grid()
    base = np.asarray(_BACKGROUND_COLOURS[name], np.float32) + rng.normal(0, 8, 3).astype(
        np.float32
    )
    pattern: Pixels = np.zeros_like(rows)
    if name == "grass":
        pattern = rng.normal(0, 20, rows.shape).astype(np.float32)
    elif name == "sand":
        pattern = rng.normal(0, 7, rows.shape).astype(np.float32) + 5 * np.sin(columns / 9)
    elif name == "water":
        phase = float(rng.uniform(0, 6))
        pattern = 18 * np.sin(rows / 2.2 + phase + 1.5 * np.sin(columns / 7))
    elif name == "a night sky":
        pattern = np.where(rng.random(rows.shape) > 0.985, 190, 0).astype(np.float32)
    elif name == "bricks":
        offset = np.where((rows // 8) % 2 == 0, 0, 8)
        mortar = (rows % 8 < 1) | ((columns + offset) % 16 < 1)
        pattern = np.where(mortar, 45, 0).astype(np.float32)
    shade = (rows * float(rng.uniform(-0.35, 0.35)) + columns * float(rng.uniform(-0.35, 0.35)))[
        ..., None
    ]
    return np.asarray(base + pattern[..., None] + shade, np.float32)


def _add_clutter(canvas: Pixels, rng: np.random.Generator) -> None:
    """Draw up to four short lines and specks of any colour, in place."""
    count = int(rng.integers(0, 5))
    if count == 0:
        return
    overlay = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    draw = ImageDraw.Draw(overlay)
    for _ in range(count):
        x, y, dx, dy = rng.uniform([0, 0, -9, -9], [IMAGE_SIZE, IMAGE_SIZE, 9, 9])
        draw.line((x, y, x + dx, y + dy), fill=200, width=int(rng.integers(1, 3)))
    colour = rng.uniform(30, 230, 3).astype(np.float32)
    mask = np.asarray(overlay, np.float32)[..., None] / 255
    canvas *= 1 - mask
    canvas += colour * mask


def _texture(item: SceneObject, rng: np.random.Generator) -> Pixels:
    """(64, 64, 3) pixels of the object's colour with its texture in a darker or lighter tone."""
    rows, columns = _grid()
    colour = np.asarray(COLOURS[item.colour], np.float32)
    colour = np.clip(colour + rng.normal(0, 9, 3).astype(np.float32), 0, 255)
    dark = colour * 0.42
    angle = float(rng.uniform(0, math.pi))
    u = columns * math.cos(angle) + rows * math.sin(angle)
    v = -columns * math.sin(angle) + rows * math.cos(angle)
    period = float(rng.uniform(5.5, 8.0))
    if item.texture == "striped":
        is_dark = (u % period) < period * 0.45
    elif item.texture == "dotted":
        half = period / 2
        is_dark = ((u % period) - half) ** 2 + ((v % period) - half) ** 2 < (0.30 * period) ** 2
    elif item.texture == "checkered":
        is_dark = ((u // (period * 0.6)) + (v // (period * 0.6))) % 2 < 1
    else:
        is_dark = np.zeros(rows.shape, bool)
    return np.where(is_dark[..., None], dark, colour).astype(np.float32)


def _shape_mask(item: SceneObject, rng: np.random.Generator) -> Pixels:
    """(64, 64) coverage in [0, 1], drawn at twice the size and reduced."""
    scale = 2 * IMAGE_SIZE
    image = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(image)
    angle = float(rng.normal(0, 0.22))
    centre = (item.x * scale, item.y * scale)
    radius = item.radius * scale
    polygons, holes = _shape_polygons(item.shape)
    for points, fill in [(p, 255) for p in polygons] + [(h, 0) for h in holes]:
        turned = [
            (
                centre[0] + radius * (px * math.cos(angle) - py * math.sin(angle)),
                centre[1] + radius * (px * math.sin(angle) + py * math.cos(angle)),
            )
            for px, py in points
        ]
        draw.polygon(turned, fill=fill)
    return np.asarray(image.reduce(2), np.float32) / np.float32(255)


Polygon = tuple[tuple[float, float], ...]


def _regular(count: int, radius: float = 1.0, turn: float = 0.0, x: float = 0.0) -> Polygon:
    angles = (turn + 2 * math.pi * k / count for k in range(count))
    return tuple((x + radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


@functools.cache
def _shape_polygons(shape: str) -> tuple[tuple[Polygon, ...], tuple[Polygon, ...]]:
    """Filled polygons and holes of a shape in the unit circle, y down."""
    up = -math.pi / 2
    if shape == "circle":
        return (_regular(40, 0.95),), ()
    if shape == "square":
        return (_box(-0.8, -0.8, 0.8, 0.8),), ()
    if shape == "triangle":
        return (_regular(3, 1.05, up),), ()
    if shape == "star":
        points = [
            (r * math.cos(up + k * math.pi / 5), r * math.sin(up + k * math.pi / 5))
            for k, r in enumerate([1.05, 0.45] * 5)
        ]
        return (tuple(points),), ()
    if shape == "heart":
        ts = [2 * math.pi * k / 40 for k in range(40)]
        points = [
            (
                16 * math.sin(t) ** 3 / 17,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 17,
            )
            for t in ts
        ]
        return (tuple(points),), ()
    if shape == "cross":
        return (_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)), ()
    if shape == "ring":
        return (_regular(40),), (_regular(40, 0.5),)
    if shape == "crescent":
        return (_regular(40),), (_regular(40, 0.85, x=0.5),)
    if shape == "hexagon":
        return (_regular(6),), ()
    if shape == "arrow":
        return (_box(-1.0, -0.25, 0.1, 0.25), ((0.0, -0.75), (1.0, 0.0), (0.0, 0.75))), ()
    if shape == "diamond":
        return (((0.0, -1.05), (0.62, 0.0), (0.0, 1.05), (-0.62, 0.0)),), ()
    rungs = tuple(_box(-0.6, y - 0.1, 0.6, y + 0.1) for y in (-0.6, 0.0, 0.6))
    return (_box(-0.75, -1.0, -0.45, 1.0), _box(0.45, -1.0, 0.75, 1.0), *rungs), ()
