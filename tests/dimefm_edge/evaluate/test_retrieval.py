"""Recall by hand on tiny matrices, and against a count that sorts everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.retrieval import RECALL_AT, measure_retrieval, unique_sentences


def indices(*groups: list[int]) -> list[np.ndarray]:
    return [np.asarray(group, np.int64) for group in groups]


def test_by_hand():
    """Two images, two captions each, cosines of images (rows) and captions given outright."""
    cosines = np.asarray([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.4, 0.1]], np.float32)
    # texts as unit axes: an image's score with a text is its own coordinate
    report = measure_retrieval("x", cosines, np.eye(4, dtype=np.float32),
                               indices([0, 1], [2, 3]))  # fmt: skip
    # image 0: its caption 0 is first; image 1: caption 0 comes before its caption 2
    assert report.image_to_text_pct == {1: 50, 5: 100, 10: 100}
    # captions 0 (0.9 over 0.8) and 3 (0.2 over 0.1, wrong), 1 (0.1 under 0.3), 2 (0.5 over 0.4)
    assert report.text_to_image_pct == {1: 25, 5: 100, 10: 100}
    assert report.mean_recall_pct == pytest.approx((50 + 100 + 100 + 25 + 100 + 100) / 6)
    assert (report.num_images, report.num_captions, report.num_sentences) == (2, 4, 4)


def test_a_sentence_of_two_images_finds_both():
    captions = [("a star", "one star"), ("A star ", "a ring")]
    sentences, own = unique_sentences(captions)
    assert sentences == ["a star", "one star", "a ring"]
    assert [o.tolist() for o in own] == [[0, 1], [0, 2]]
    images = np.asarray([[0.2, 0.1, 0.0], [0.9, 0.0, 0.3]], np.float32)
    report = measure_retrieval("x", images, np.eye(3, dtype=np.float32), own)
    assert report.image_to_text_pct[1] == 100
    # "a star" finds image 1 first and is right twice, once for each image that it describes
    assert report.text_to_image_pct[1] == 100
    assert (report.num_captions, report.num_sentences) == (4, 3)


def test_captions_count_as_often_as_they_occur():
    # sentence 0 is a caption of three images and right, sentence 1 of one and wrong
    images = np.asarray([[0.9, 0.5], [0.1, 0.1], [0.1, 0.1], [0.1, 0.2]], np.float32)
    own = indices([0], [0], [0], [1])
    report = measure_retrieval("x", images, np.eye(2, dtype=np.float32), own)
    assert report.text_to_image_pct[1] == 75


def test_of_equal_scores_the_first_comes_first():
    images, texts = np.ones((3, 1), np.float32), np.ones((3, 1), np.float32)
    report = measure_retrieval("x", images, texts, indices([0], [1], [2]))
    assert report.image_to_text_pct == {1: pytest.approx(100 / 3), 5: 100, 10: 100}


def test_captions_of_images_that_cannot_be_read_are_not_searched():
    texts = np.eye(3, dtype=np.float32)
    images = np.asarray([[0.5, 0.1, 0.9]], np.float32)
    report = measure_retrieval("x", images, texts, indices([0, 1]), num_bad=1)
    assert report.image_to_text_pct[1] == 100
    assert (report.num_sentences, report.num_bad) == (2, 1)


def test_scores_that_are_not_finite_find_nothing():
    images = np.asarray([[np.nan, 0], [0, 1]], np.float32)
    report = measure_retrieval("x", images, np.eye(2, dtype=np.float32), indices([0], [1]))
    assert report.image_to_text_pct[10] == 50


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_against_sorting(data):
    num_images, num_texts = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # few values, so that ties are common
    scores = rng.integers(0, 4, (num_images, num_texts)).astype(np.float32)
    own = [
        np.unique(data.draw(st.lists(st.integers(0, num_texts - 1), min_size=1, max_size=4)))
        for _ in range(num_images)
    ]
    used = sorted({int(t) for texts in own for t in texts})
    report = measure_retrieval("x", scores, np.eye(num_texts, dtype=np.float32), own)
    for k in RECALL_AT:
        hits = []
        for image in range(num_images):
            order = sorted(used, key=lambda t: (-scores[image, t], t))
            hits.append(bool(set(order[:k]) & set(own[image].tolist())))
        assert report.image_to_text_pct[k] == pytest.approx(100 * np.mean(hits))
        found = []
        for image in range(num_images):
            for text in own[image]:
                order = sorted(range(num_images), key=lambda i: (-scores[i, text], i))
                found.append(any(text in own[i] for i in order[:k]))
        assert report.text_to_image_pct[k] == pytest.approx(100 * np.mean(found))


def test_images_without_captions():
    texts = np.eye(2, dtype=np.float32)
    with pytest.raises(DataError, match="images that have a caption each"):
        measure_retrieval("x", texts, texts, indices([0], []))
    with pytest.raises(DataError, match="images that have a caption each"):
        measure_retrieval("x", texts[:0], texts, [])
    with pytest.raises(ValueError, match="2 images, captions of 1"):
        measure_retrieval("x", texts, texts, indices([0]))
