"""Scenes: procedural images and sentences, the embedded default of the product.

A scene is a background, some clutter and one or two textured shapes; a sentence names
some of what a scene holds. Both are pure functions of (seed, split, index), so a pool
needs no disk and no download. Object combinations (texture, colour, shape) and relation
triples (shape, relation, shape) on the held-out lists never occur in a training image
or sentence: the zero-shot test sets are made of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dimefm_edge.data.scene_drawing import (
    COLOURS,
    Combo,
    Scene,
    SceneObject,
    render,
)

DEFAULT_NUM_IMAGES = 12_000
DEFAULT_NUM_SENTENCES = 20_000

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "crescent", "hexagon", "arrow", "diamond", "ladder",
)  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("grey paper", "grass", "sand", "water", "a night sky", "bricks")
RELATIONS = ("left of", "right of", "above", "below")
SIZES = ("small", "large")
TEMPLATES = ("a {c}.", "a picture of a {c}.", "there is a {c} here.", "a drawing of one {c}.")

# One child stream each, so that no training image or sentence shares randomness with a test.
_SPLITS = {"images": 0, "sentences": 1, "pairs": 2, "test": 3, "captioned": 4}
# Each test set draws from indices of its own: no two share an image.
_TEST_OFFSETS = {"scenes": 0, "scenes-relations": 10_000_000, "scenes-train": 20_000_000}
_NUM_HELD_OUT_OBJECTS = 96
_NUM_HELD_OUT_RELATIONS = 48
_SEED = 20230402  # the day of the method's preprint; any constant would do


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
    """Image `index` of the unpaired image pool, RGB, IMAGE_SIZE x IMAGE_SIZE."""
    rng = _rng("images", index, seed)
    return render(sample_scene(rng), rng)


def scene_pair(index: int, *, seed: int = 0) -> tuple[Image.Image, Scene]:
    """Image and scene `index` of the paired pool that the sample teacher is trained on."""
    rng = _rng("pairs", index, seed)
    scene = sample_scene(rng)
    return render(scene, rng), scene


def captioned_scene(index: int, *, num_captions: int = 5) -> tuple[Image.Image, tuple[str, ...]]:
    """Image and sentences `index` of the retrieval test set, which no training pool shares."""
    rng = _rng("captioned", index, 0)
    scene = sample_scene(rng)
    image = render(scene, rng)
    return image, tuple(describe(scene, rng) for _ in range(num_captions))


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
        rng = _rng("test", index + _TEST_OFFSETS[self.name], 0)
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
    """A test set by name: `scenes` (96 objects) or `scenes-relations` (48 relations).

    `scenes-train` has other images of the classes of `scenes`, for a linear probe to learn from.
    """
    if name == "scenes-relations":
        names = tuple(f"{a} {r} a {b}" for a, r, b in held_out_relations())
    else:
        names = tuple(scene_name(combo) for combo in held_out_objects())
    return SceneTestSet(name, names, num_per_class)
