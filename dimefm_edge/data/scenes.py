"""Scenes: procedural images and sentences, the embedded default of the product.

A scene is a background, some clutter and one or two textured shapes; a sentence names
some of what a scene holds. Both are pure functions of (seed, split, index), so a pool
needs no disk and no download. Object combinations (texture, colour, shape) and relation
triples (shape, relation, shape) on the held-out lists never occur in a training image
or sentence: the zero-shot test sets are made of them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
DEFAULT_NUM_IMAGES = 12_000
DEFAULT_NUM_SENTENCES = 20_000

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "crescent", "hexagon", "arrow", "diamond", "ladder",
)  # fmt: skip
COLOURS = {
    "red": (214, 36, 40), "orange": (245, 138, 28), "yellow": (245, 222, 50),
    "green": (48, 160, 60), "cyan": (60, 208, 214), "blue": (36, 72, 210),
    "purple": (130, 50, 165), "pink": (248, 140, 190), "brown": (122, 76, 38),
    "white": (245, 245, 245),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("grey paper", "grass", "sand", "water", "a night sky", "bricks")
RELATIONS = ("left of", "right of", "above", "below")
SIZES = ("small", "large")
TEMPLATES = ("a {c}.", "a picture of a {c}.", "there is a {c} here.", "a drawing of one {c}.")

_BACKGROUND_COLOURS = {
    "grey paper": (150, 150, 152), "grass": (92, 128, 70), "sand": (205, 182, 140),
    "water": (90, 130, 160), "a night sky": (24, 26, 46), "bricks": (140, 96, 84),
}  # fmt: skip
# One child stream each, so that no training image or sentence shares randomness with a test.
_SPLITS = {"images": 0, "sentences": 1, "pairs": 2, "test": 3}
_NUM_HELD_OUT_OBJECTS = 96
_NUM_HELD_OUT_RELATIONS = 48
_SEED = 20230402  # the day of the method's preprint; any constant would do

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


@functools.cache
def held_out_objects() -> tuple[Combo, ...]:
    """The (texture, colour, shape) combinations that only test sets contain, 96 of 480."""
    combos = [(t, c, s) for t in TEXTURES for c in COLOURS for s in SHAPES]
    order = np.random.default_rng(_SEED).permutation(len(combos))
    return tuple(sorted(combos[i] for i in order[:_NUM_HELD_OUT_OBJECTS]))


@functools.cache
def held_out_relations() -> tuple[Combo, ...]:
    """The (shape, relation, shape) triples that only test sets contain, 48 of 528."""
    triples = [(a, r, b) for a in SHAPES for r in RELATIONS for b in SHAPES if a != b]
    order = np.random.default_rng(_SEED + 1).permutation(len(triples))
    return tuple(sorted(triples[i] for i in order[:_NUM_HELD_OUT_RELATIONS]))


def scene_name(combo: Combo) -> str:
    """The class name of an object combination, such as `striped red star` or `red star`."""
    return " ".join(word for word in combo if word != "plain")


def _rng(split: str, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([_SEED, seed, _SPLITS[split], index])


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _opposite(relation: str) -> str:
    pairs = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return pairs[relation]


def _is_held_out_relation(a: str, relation: str, b: str) -> bool:
    held_out = held_out_relations()
    return (a, relation, b) in held_out or (b, _opposite(relation), a) in held_out


def _random_combo(rng: np.random.Generator) -> Combo:
    while True:
        combo = (_pick(rng, TEXTURES), _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES))
        if combo not in held_out_objects():
            return combo


def _place(
    rng: np.random.Generator, combo: Combo, x: float, y: float, *, shrink: float = 1.0
) -> SceneObject:
    size = _pick(rng, SIZES)
    low, high = (0.17, 0.22) if size == "small" else (0.29, 0.36)
    radius = float(rng.uniform(low, high)) * shrink
    margin = radius * 0.9
    x, y = (min(max(v + float(rng.normal(0, 0.05)), margin), 1 - margin) for v in (x, y))
    return SceneObject(*combo, size=size, x=x, y=y, radius=radius)


def _relation_centres(relation: str) -> tuple[tuple[float, float], tuple[float, float]]:
    near, far = 0.27, 0.73
    return {
        "left of": ((near, 0.5), (far, 0.5)),
        "right of": ((far, 0.5), (near, 0.5)),
        "above": ((0.5, near), (0.5, far)),
        "below": ((0.5, far), (0.5, near)),
    }[relation]


def _two_objects(
    rng: np.random.Generator, first: Combo, relation: str, second: Combo, background: str
) -> Scene:
    (x0, y0), (x1, y1) = _relation_centres(relation)
    objects = (
        _place(rng, first, x0, y0, shrink=0.68),
        _place(rng, second, x1, y1, shrink=0.68),
    )
    return Scene(objects, background, relation)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a training scene: one object, or two in a relation; nothing held out."""
    background = _pick(rng, BACKGROUNDS)
    if rng.random() < 0.6:
        x, y = rng.uniform(0.3, 0.7, size=2)
        return Scene((_place(rng, _random_combo(rng), float(x), float(y)),), background, None)
    while True:
        first, second = _random_combo(rng), _random_combo(rng)
        relation = _pick(rng, RELATIONS)
        if first[2] != second[2] and not _is_held_out_relation(first[2], relation, second[2]):
            return _two_objects(rng, first, relation, second, background)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Write one sentence about a scene; texture, size, colour and place may be left out."""

    def noun(item: SceneObject, *, terse: bool) -> str:
        words = []
        if rng.random() < 0.3:
            words.append(item.size)
        if item.texture != "plain" and rng.random() < (0.6 if terse else 0.9):
            words.append(item.texture)
        if rng.random() < (0.7 if terse else 0.95):
            words.append(item.colour)
        words.append(item.shape)
        article = "an" if words[0][0] in "aeiou" else "a"
        return f"{article} {' '.join(words)}"

    if len(scene.objects) == 1:
        text = noun(scene.objects[0], terse=False)
    else:
        first, second = scene.objects
        relation = scene.relation or "beside"
        if rng.random() < 0.5:
            first, second, relation = second, first, _opposite(relation)
        link = "and" if rng.random() < 0.2 else relation.replace("of", "of", 1)
        if link in ("left of", "right of"):
            link = f"to the {link}" if rng.random() < 0.5 else link
        text = f"{noun(first, terse=True)} {link} {noun(second, terse=True)}"
    if rng.random() < 0.4:
        text += f" on {scene.background}"
    frames = ("{}", "{}.", "a picture of {}.", "there is {}.", "a drawing of {}", "{} here")
    return _pick(rng, frames).format(text)


def scene_sentence(index: int, *, seed: int = 0) -> str:
    """Sentence `index` of the unpaired sentence pool."""
    rng = _rng("sentences", index, seed)
    return describe(sample_scene(rng), rng)


def scene_image(index: int, *, seed: int = 0) -> Image.Image:
    """Image `index` of the unpaired image pool, RGB, 64 x 64."""
    rng = _rng("images", index, seed)
    return render(sample_scene(rng), rng)


def scene_pair(index: int, *, seed: int = 0) -> tuple[Image.Image, Scene]:
    """Image and scene `index` of the paired pool that the sample teacher is trained on."""
    rng = _rng("pairs", index, seed)
    scene = sample_scene(rng)
    return render(scene, rng), scene


@dataclass(frozen=True)
class SceneTestSet:
    """A labelled zero-shot test set of held-out combinations.

    `label(i)` is an index into `classnames`; `image(i)` is RGB, 64 x 64.
    """

    name: str
    classnames: tuple[str, ...]
    num_per_class: int
    templates: tuple[str, ...] = TEMPLATES

    def __len__(self) -> int:
        return len(self.classnames) * self.num_per_class

    def label(self, index: int) -> int:
        return index % len(self.classnames)

    def image(self, index: int) -> Image.Image:
        # The relation set draws from its own indices: the two sets share no image.
        rng = _rng("test", index + (10_000_000 if self.name == "scenes-relations" else 0), 0)
        background = _pick(rng, BACKGROUNDS)
        label = self.label(index)
        if self.name == "scenes-relations":
            first, relation, second = held_out_relations()[label]
            scene = _two_objects(
                rng, _with_shape(rng, first), relation, _with_shape(rng, second), background
            )
        else:
            x, y = (float(v) for v in rng.uniform(0.3, 0.7, size=2))
            scene = Scene((_place(rng, held_out_objects()[label], x, y),), background, None)
        return render(scene, rng)


def _with_shape(rng: np.random.Generator, shape: str) -> Combo:
    while True:
        combo = _random_combo(rng)
        if combo[2] == shape:
            return combo


def scene_test_set(name: str = "scenes", *, num_per_class: int = 20) -> SceneTestSet:
    """A test set by name: `scenes` (96 objects) or `scenes-relations` (48 relations)."""
    if name == "scenes-relations":
        names = tuple(f"{a} {r} a {b}" for a, r, b in held_out_relations())
    else:
        names = tuple(scene_name(combo) for combo in held_out_objects())
    return SceneTestSet(name, names, num_per_class)


# ---------------------------------------------------------------------------- drawing

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
