"""Pairs: sentences that belong to an image's label, drawn by a generator alone."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.data.images import LabelledSet
from dimefm_edge.data.pairs import Pairs, class_pairs
from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.errors import DataError


def encode(sentences) -> np.ndarray:
    """Length, first and last letter, normalised: tells sentences apart."""
    rows = np.asarray([[len(s), ord(s[0]), ord(s[-1])] for s in sentences], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def labelled(classnames: tuple[str, ...]) -> LabelledSet:
    labels = np.asarray([2, 0, 1, 2, 2], np.int64) % len(classnames)
    return LabelledSet("three", scene_test_set(), labels, classnames, ("a {c}.", "{c}", "its {c}"))


def test_every_image_gets_a_sentence_of_its_class():
    pairs = class_pairs(labelled(("cat", "zebra", "ox")), encode)
    assert pairs.embeds.shape == (3, 3, 3)
    rows, rng = np.asarray([4, 1, 2, 4]), np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        found = pairs.sentence_embeds(rows, rng)
        for embed, name in zip(found, ("ox", "cat", "zebra", "ox"), strict=True):
            own = encode([f"a {name}.", name, f"its {name}"])
            assert (np.abs(own - embed).max(1) == 0).any()
        seen.add(found.tobytes())
    assert len(seen) > 20  # templates are drawn


def test_the_draw_is_the_generators_alone_and_the_fingerprint_the_contents():
    pairs = class_pairs(labelled(("cat", "zebra", "ox")), encode)
    rows = np.arange(5)
    draws = [pairs.sentence_embeds(rows, np.random.default_rng([1, 4, 7])) for _ in range(2)]
    assert np.array_equal(*draws)
    same = class_pairs(labelled(("cat", "zebra", "ox")), encode)
    other = class_pairs(labelled(("cat", "zebra", "ram")), encode)
    assert pairs.fingerprint == same.fingerprint != other.fingerprint


def test_what_cannot_be_paired():
    with pytest.raises(DataError, match="less than two classes"):
        class_pairs(labelled(("cat",)), encode)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        Pairs(np.asarray([0, 2]), np.ones((2, 1, 4), np.float32))
    with pytest.raises(ValueError, match=r"embeds \(C, P, E\)"):
        Pairs(np.asarray([0, 1]), np.ones((2, 4), np.float32))
