from __future__ import annotations

import itertools

import numpy as np
import pytest

from dimefm_edge.data.scene_drawing import COLOURS, IMAGE_SIZE, Scene, SceneObject, render
from dimefm_edge.data.scenes import BACKGROUNDS, SHAPES, TEXTURES


def one(shape: str, *, texture: str = "plain", colour: str = "red", x: float = 0.5) -> SceneObject:
    return SceneObject(texture, colour, shape, "large", x=x, y=0.5, radius=0.3)


def drawn(*items: SceneObject, background: str = "grey paper", seed: int = 0) -> np.ndarray:
    image = render(Scene(items, background, None), np.random.default_rng(seed))
    return np.asarray(image, np.float32)


def redness(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] - pixels[..., 1:].max(-1)) > 60


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_drawn_where_it_belongs(shape):
    places = [np.nonzero(redness(drawn(one(shape, x=x))))[1] / IMAGE_SIZE for x in (0.3, 0.7)]
    assert min(len(columns) for columns in places) > 60
    assert places[1].mean() - places[0].mean() == pytest.approx(0.4, abs=0.03)
    assert places[0].mean() == pytest.approx(0.3, abs=0.18)  # a crescent lies beside its centre


def test_shapes_differ_from_one_another():
    masks = {shape: redness(drawn(one(shape))) for shape in SHAPES}
    for a, b in itertools.combinations(SHAPES, 2):
        union = (masks[a] | masks[b]).sum()
        assert (masks[a] ^ masks[b]).sum() > 0.08 * union, (a, b)


def test_textures_darken_some_of_the_shape_and_plain_none():
    def spread(texture: str) -> float:
        inside = drawn(one("square", texture=texture))[26:38, 26:38, 0]
        return float(inside.std())

    assert spread("plain") < 20
    assert all(spread(texture) > 30 for texture in TEXTURES if texture != "plain")


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_colour_is_what_is_asked_for(colour):
    inside = np.mean([drawn(one("square", colour=colour), seed=s)[28:36, 28:36] for s in range(8)],
                     axis=(0, 1, 2))  # fmt: skip
    distances = {name: np.abs(inside - np.asarray(rgb)).sum() for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_render_and_repeat(background):
    first, again = (drawn(one("star"), background=background, seed=3) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, drawn(one("star"), background=background, seed=4))
