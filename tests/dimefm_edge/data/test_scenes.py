from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest

from dimefm_edge.data import scenes
from dimefm_edge.data.scene_drawing import COLOURS, IMAGE_SIZE

NUM = 400


def pixels_digest(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_image_is_a_function_of_its_index():
    first = [pixels_digest(scenes.scene_image(i)) for i in range(20)]
    assert first == [pixels_digest(scenes.scene_image(i)) for i in range(20)]
    assert len(set(first)) == 20
    assert pixels_digest(scenes.scene_image(0, seed=1)) != first[0]
    image = scenes.scene_image(3)
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


def test_sentence_is_a_function_of_its_index():
    first = [scenes.scene_sentence(i) for i in range(200)]
    assert first == [scenes.scene_sentence(i) for i in range(200)]
    assert len(set(first)) > 150


def test_pair_shows_what_its_scene_says():
    image, scene = scenes.scene_pair(5)
    again, same = scenes.scene_pair(5)
    assert scene == same
    assert image.tobytes() == again.tobytes()


def test_held_out_lists_have_their_size_and_every_shape():
    objects, relations = scenes.held_out_objects(), scenes.held_out_relations()
    assert len(set(objects)) == 96
    assert len(set(relations)) == 48
    assert {shape for _, _, shape in objects} <= set(scenes.SHAPES)
    assert all(a != b for a, _, b in relations)


@pytest.mark.parametrize("split", ["images", "sentences", "pairs"])
def test_nothing_held_out_occurs_in_training_scenes(split):
    objects, relations = set(scenes.held_out_objects()), set(scenes.held_out_relations())
    for index in range(NUM):
        scene = scenes.sample_scene(scenes._rng(split, index, 0))
        assert not {item.combo for item in scene.objects} & objects
        if scene.relation:
            a, b = (item.shape for item in scene.objects)
            mirrored = (b, scenes._opposite(scene.relation), a)
            assert (a, scene.relation, b) not in relations
            assert mirrored not in relations


def test_no_sentence_names_a_held_out_object_or_relation():
    # A sentence may leave words out, so only its full names are compared: texture (or none),
    # colour and shape next to each other.
    text = " ".join(scenes.scene_sentence(i) for i in range(4000))
    textured = [combo for combo in scenes.held_out_objects() if combo[0] != "plain"]
    named = [c for c in textured if scenes.scene_name(c) in text]
    assert not named
    nouns = "|".join(scenes.SHAPES)
    pattern = re.compile(
        rf"({nouns}) (?:to the )?(left of|right of|above|below) an? (?:[a-z]+ )*?({nouns})\b"
    )
    seen = {m.groups() for i in range(4000) for m in pattern.finditer(scenes.scene_sentence(i))}
    assert len(seen) > 100  # the pattern does find relations
    assert not seen & set(scenes.held_out_relations())


@pytest.mark.parametrize(("name", "count"), [("scenes", 96), ("scenes-relations", 48)])
def test_test_set_is_balanced_and_fixed(name, count):
    test_set = scenes.scene_test_set(name, num_per_class=2)
    assert len(test_set) == 2 * count
    assert len(set(test_set.classnames)) == count
    labels = np.bincount([test_set.label(i) for i in range(len(test_set))])
    assert (labels == 2).all()
    assert test_set.image(7).tobytes() == test_set.image(7).tobytes()
    assert test_set.image(7).tobytes() != test_set.image(7 + count).tobytes()


def test_the_two_test_sets_share_no_image():
    first, second = (scenes.scene_test_set(n, num_per_class=1) for n in scenes_names())
    shown = {pixels_digest(first.image(i)) for i in range(20)}
    assert not shown & {pixels_digest(second.image(i)) for i in range(20)}


def scenes_names() -> tuple[str, str]:
    return "scenes", "scenes-relations"


def test_name_leaves_plain_out():
    assert scenes.scene_name(("plain", "red", "star")) == "red star"
    assert scenes.scene_name(("striped", "red", "star")) == "striped red star"


def test_every_training_combination_is_drawn_sooner_or_later():
    every = set(itertools.product(scenes.TEXTURES, COLOURS, scenes.SHAPES))
    rng = np.random.default_rng(0)
    drawn = {scenes._random_combo(rng) for _ in range(6000)}
    assert drawn == every - set(scenes.held_out_objects())
