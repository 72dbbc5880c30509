"""The linear probe on features whose answer is known, and its search."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.linear_probe import (
    MAX_TRIED,
    STRENGTHS,
    evaluate_linear_probe,
    fit_linear_probe,
    search_strength,
    validation_split,
)


def separable(count: int, num_classes: int, *, seed: int = 0, noise: float = 0.1):
    """Unit embeddings around one direction a class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    centres = np.random.default_rng(99).normal(size=(num_classes, 16))
    embeds = centres[labels] + noise * rng.normal(size=(count, 16))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return embeds.astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_separable_features_are_learned(num_classes):
    embeds, labels = separable(60, num_classes)
    steps = []
    probe = fit_linear_probe(embeds, labels, num_classes, name="train", advance=steps.append)
    test, truth = separable(40, num_classes, seed=1)
    report = evaluate_linear_probe(probe, test, truth, name="test", train_name="train")
    assert (report.value_pct, report.val_pct) == (100, 100)
    assert (report.num_train, report.num_images, report.num_classes) == (60, 40, num_classes)
    assert report.has_converged
    assert report.c in STRENGTHS
    assert len(steps) == len(probe.tried) <= MAX_TRIED


def test_features_that_say_nothing_stay_at_chance():
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(300, 8)).astype(np.float32)
    labels = rng.integers(0, 3, 300)
    probe = fit_linear_probe(embeds, labels, 3, name="train")
    test = rng.normal(size=(600, 8)).astype(np.float32)
    report = evaluate_linear_probe(
        probe, test, rng.integers(0, 3, 600), name="test", train_name="train"
    )
    assert 25 < report.value_pct < 42


def test_the_strength_is_that_of_the_validation_split_and_the_fit_is_on_all():
    """The same by scikit-learn alone: split, best C among those tried, fitted again on all."""
    from sklearn.linear_model import LogisticRegression

    embeds, labels = separable(80, 4, noise=1.2)
    probe = fit_linear_probe(embeds, labels, 4, name="train", seed=3)
    is_val = validation_split(labels, seed=3)
    scores = {
        c: 100
        * LogisticRegression(C=c, max_iter=1000)
        .fit(embeds[~is_val], labels[~is_val])
        .score(embeds[is_val], labels[is_val])
        for c, _ in probe.tried
    }
    assert dict(probe.tried) == pytest.approx(scores)
    assert probe.val_pct == pytest.approx(max(scores.values()))
    again = LogisticRegression(C=probe.c, max_iter=1000).fit(embeds, labels)
    assert np.array_equal(again.predict(embeds), probe.scores(embeds).argmax(1))
    same = fit_linear_probe(embeds, labels, 4, name="train", seed=3)
    assert (same.c, same.tried) == (probe.c, probe.tried)


def test_two_classes_score_like_more():
    embeds, labels = separable(40, 2, noise=1.0)
    probe = fit_linear_probe(embeds, labels, 2, name="train")
    scores = probe.scores(embeds)
    assert scores.shape == (40, 2)
    assert np.allclose(scores[:, 1] - scores[:, 0], probe.model.decision_function(embeds))
    report = evaluate_linear_probe(
        probe, embeds, labels, name="t", train_name="train", metric="roc_auc"
    )
    assert 50 < report.value_pct <= 100


def test_a_class_without_training_images_is_never_predicted():
    embeds, labels = separable(60, 3)
    kept = labels != 1
    probe = fit_linear_probe(embeds[kept], labels[kept], 3, name="train")
    report = evaluate_linear_probe(
        probe, embeds, labels, name="t", train_name="train", metric="mean_per_class"
    )
    assert report.value_pct == pytest.approx(200 / 3)
    assert 1 not in probe.scores(embeds).argmax(1)


def test_several_classes_an_image_have_a_regression_each():
    """Classes are signs of coordinates; the third is in no training image, the fourth in all."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(150, 6)).astype(np.float32)
    targets = np.stack([embeds[:, 0] > 0, embeds[:, 1] > 0.3, np.zeros(150, bool),
                        np.ones(150, bool)], axis=1)  # fmt: skip
    probe = fit_linear_probe(embeds[:100], targets[:100], 4, name="train")
    assert probe.has_converged
    assert probe.scores(embeds).shape == (150, 4)
    report = evaluate_linear_probe(
        probe, embeds[100:], targets[100:], name="t", train_name="train", metric="map_11_point"
    )
    assert report.value_pct > 95
    alone = LogisticRegression(C=probe.c, max_iter=1000).fit(embeds[:100], targets[:100, 0])
    assert np.allclose(probe.scores(embeds)[:, 0], alone.decision_function(embeds))
    with pytest.raises(DataError, match="two classes or more; 'train' has 1"):
        fit_linear_probe(embeds, targets[:, 3:], 1, name="train")


@pytest.mark.parametrize("peak", [0, 5, 16, 33, 48, 96])
def test_the_search_ends_at_a_peak_within_its_steps(peak):
    asked = set()

    def accuracy(index: int) -> float:
        asked.add(index)
        return -abs(index - peak)

    assert search_strength(accuracy) == peak
    assert len(asked) <= MAX_TRIED
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e6)


def test_of_equals_the_most_regular_wins():
    assert search_strength(lambda index: 1.0) == 0


def test_the_split_takes_one_in_five_of_every_class():
    labels = np.asarray([0] * 50 + [1] * 10 + [2] * 2 + [3])
    is_val = validation_split(labels, seed=0)
    assert np.bincount(labels[is_val], minlength=4).tolist() == [10, 2, 1, 0]
    assert np.array_equal(is_val, validation_split(labels, seed=0))
    assert not np.array_equal(is_val, validation_split(labels, seed=1))


def test_training_sets_that_cannot_be_learned_from():
    embeds, labels = separable(12, 2)
    with pytest.raises(DataError, match="two classes or more; 'train' has 1") as caught:
        fit_linear_probe(embeds, np.zeros(12, np.int64), 2, name="train")
    assert "--linear-probe" in str(caught.value)
    with pytest.raises(DataError, match="too small for a validation split"):
        fit_linear_probe(embeds[:2], labels[:2], 2, name="train")
    with pytest.raises(DataError, match="not all finite"):
        fit_linear_probe(np.full_like(embeds, np.nan), labels, 2, name="train")
