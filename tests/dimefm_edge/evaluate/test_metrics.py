"""Metrics against counts by hand and against scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import DataError, MissingExtraError
from dimefm_edge.evaluate.metrics import (
    eleven_point_map_pct,
    label_ranks,
    mean_per_class_pct,
    roc_auc_pct,
    score_metric,
)


def test_ranks_by_hand():
    scores = np.asarray([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [np.nan, 1, 0]])
    assert label_ranks(scores, np.asarray([2, 1, 1])).tolist()[:2] == [1, 1]
    assert label_ranks(scores, np.asarray([2, 1, 1]))[2] > 3


def test_every_class_counts_the_same():
    # class 0: 1 of 4, class 2: 1 of 1; class 1 has no image
    is_right = np.asarray([True, False, False, False, True])
    labels = np.asarray([0, 0, 0, 0, 2])
    assert mean_per_class_pct(is_right, labels) == pytest.approx((25 + 100) / 2)


def test_mean_per_class_is_balanced_accuracy():
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(300, 7)), rng.integers(0, 7, 300)
    wanted = 100 * balanced_accuracy_score(labels, scores.argmax(1))
    assert score_metric("mean_per_class", scores, labels) == pytest.approx(wanted)


def test_eleven_points_by_hand():
    """Right images at ranks 1, 3 and 5 of 5: precision 1, 2/3 and 3/5 at recall 1/3, 2/3, 1."""
    scores = np.asarray([[0.9], [0.8], [0.7], [0.6], [0.5]])
    targets = np.asarray([[True], [False], [True], [False], [True]])
    wanted = (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11  # recalls to 0.3, to 0.6, to 1.0
    assert eleven_point_map_pct(scores, targets) == pytest.approx(100 * wanted)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(2, 25), st.integers(1, 4))
def test_eleven_points_are_those_of_the_curve_of_scikit_learn(seed, count, num_classes):
    from sklearn.metrics import precision_recall_curve

    rng = np.random.default_rng(seed)
    targets = rng.random((count, num_classes)) < 0.4
    targets[0] = True
    scores = rng.permuted(np.tile(np.arange(count), (num_classes, 1)), axis=1).T.astype(float)
    wanted = []
    for column in range(num_classes):
        precision, recall, _ = precision_recall_curve(targets[:, column], scores[:, column])
        # its last point, (recall 0, precision 1), is no point of the data
        wanted.append(
            np.mean([precision[:-1][recall[:-1] >= t / 10 - 1e-12].max() for t in range(11)])
        )
    assert eleven_point_map_pct(scores, targets) == pytest.approx(100 * np.mean(wanted))


def test_classes_that_no_image_shows_are_left_out():
    scores = np.asarray([[0.9, 0.1], [0.1, 0.2]])
    targets = np.asarray([[True, False], [False, False]])
    assert eleven_point_map_pct(scores, targets) == pytest.approx(100)
    with pytest.raises(DataError, match="no image shows any class"):
        eleven_point_map_pct(scores, np.zeros((2, 2), bool))


def test_area_under_the_curve_by_hand_and_by_scikit_learn():
    from sklearn.metrics import roc_auc_score

    # margins 0.2, 0.6 of class 0 and 0.4, 0.9 of class 1: 3 of 4 pairs in order
    scores = np.asarray([[0.0, 0.2], [0.1, 0.7], [0.3, 0.7], [0.0, 0.9]])
    labels = np.asarray([0, 0, 1, 1])
    assert roc_auc_pct(scores, labels) == pytest.approx(75)
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(200, 2)).astype(np.float32), rng.integers(0, 2, 200)
    wanted = 100 * roc_auc_score(labels, scores[:, 1].astype(float) - scores[:, 0])
    assert score_metric("roc_auc", scores, labels) == pytest.approx(wanted)


def test_what_has_no_metric():
    scores, labels = np.ones((3, 2)), np.asarray([0, 0, 0])
    with pytest.raises(DataError, match="two classes, with images of both"):
        roc_auc_pct(scores, labels)
    with pytest.raises(DataError, match="two classes, with images of both"):
        roc_auc_pct(np.ones((3, 3)), np.asarray([0, 1, 2]))
    with pytest.raises(DataError, match="not all finite"):
        roc_auc_pct(np.full((2, 2), np.nan), np.asarray([0, 1]))
    with pytest.raises(DataError, match="a set with one class an image"):
        score_metric("map_11_point", scores, labels)
    with pytest.raises(DataError, match="a set with several classes an image"):
        score_metric("accuracy", scores, np.ones((3, 2), bool))


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError) as caught:
        roc_auc_pct(np.asarray([[0.0, 1.0], [1.0, 0.0]]), np.asarray([1, 0]))
    assert caught.value.hint == "pip install 'dimefm_edge[eval]'"
