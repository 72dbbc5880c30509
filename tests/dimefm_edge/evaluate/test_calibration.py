"""Expected calibration error against its formula, in float64 and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.calibration import measure_calibration, top_confidence


def cosines_of(confidence: list[float], num_classes: int = 2) -> np.ndarray:
    """Scores whose softmax at scale 1 gives the first class that probability."""
    rest = [(1 - p) / (num_classes - 1) for p in confidence]
    return np.asarray(
        [[math.log(p), *[math.log(r)] * (num_classes - 1)]
         for p, r in zip(confidence, rest, strict=True)]
    )  # fmt: skip


def test_by_hand():
    """Four images at 0.9, three of them right; one at 0.6, wrong."""
    scores = cosines_of([0.9, 0.9, 0.9, 0.9, 0.6])
    labels = np.asarray([0, 0, 0, 1, 1])
    report = measure_calibration("x", scores, labels, 1.0, num_bins=10)
    assert report.ece_pct == pytest.approx(100 * (4 / 5 * abs(0.75 - 0.9) + 1 / 5 * 0.6))
    assert report.accuracy_pct == pytest.approx(60)
    assert report.confidence_pct == pytest.approx(84)
    low, high = report.bins
    assert (low.count, high.count) == (1, 4)
    assert (low.accuracy_pct, high.accuracy_pct) == (0, 75)
    assert high.confidence_pct == pytest.approx(90)
    assert low.low < 0.6 <= low.high


def test_bins_hold_their_upper_edge():
    """Guo et al.: ((m - 1) / M, m / M]; probability 0.5 exactly, of two classes that tie."""
    report = measure_calibration("x", np.zeros((3, 2)), np.zeros(3, np.int64), 1.0, num_bins=2)
    assert [(b.low, b.high, b.count) for b in report.bins] == [(0.0, 0.5, 3)]


def test_the_logit_scale_is_one_over_the_temperature():
    scores = np.asarray([[0.3, 0.1, 0.2]])
    confidence, predicted = top_confidence(scores, 50.0)
    wanted = math.exp(15) / (math.exp(15) + math.exp(5) + math.exp(10))
    assert confidence[0] == pytest.approx(wanted, rel=1e-12)
    assert predicted.tolist() == [0]
    # no overflow at any scale
    assert np.isfinite(top_confidence(scores, 1e6)[0]).all()


def test_a_calibrated_model_has_a_small_error_and_a_sure_one_has_not():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    labels = (rng.random(20_000) > confidence).astype(np.int64)
    scores = cosines_of(confidence.tolist())
    honest = measure_calibration("x", scores, labels, 1.0)
    boastful = measure_calibration("x", scores, labels, 8.0)
    assert honest.ece_pct < 1.5
    assert honest.ece_equal_mass_pct < 1.5
    assert boastful.ece_pct > 15
    assert honest.accuracy_pct == boastful.accuracy_pct


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 15))
def test_against_the_formula(seed, count, num_bins):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, 4)).astype(np.float32)
    labels = rng.integers(0, 4, count)
    report = measure_calibration("x", scores, labels, 3.0, num_bins=num_bins)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(scores.tolist(), labels, strict=True):
        parts = [math.exp(3 * v) for v in row]
        sure = max(parts) / sum(parts)
        number = min(max(math.ceil(sure * num_bins) - 1, 0), num_bins - 1)
        bins.setdefault(number, []).append((sure, row.index(max(row)) == label))
    gaps = [
        abs(sum(right for _, right in found) - sum(sure for sure, _ in found))
        for found in bins.values()
    ]
    assert report.ece_pct == pytest.approx(100 * sum(gaps) / count, abs=1e-6)
    assert sum(b.count for b in report.bins) == count


def test_equal_mass_splits_by_rank():
    confidence = [0.55, 0.6, 0.9, 0.95]
    labels = np.asarray([0, 1, 0, 0])
    report = measure_calibration("x", cosines_of(confidence), labels, 1.0, num_bins=2)
    wanted = (abs(0.5 - 0.575) + abs(1 - 0.925)) / 2
    assert report.ece_equal_mass_pct == pytest.approx(100 * wanted)


def test_scores_that_are_not_finite():
    with pytest.raises(DataError, match="calibration on 'x' needs images"):
        measure_calibration("x", np.full((2, 2), np.nan), np.zeros(2, np.int64), 1.0)
    with pytest.raises(DataError, match="calibration on 'x' needs images"):
        measure_calibration("x", np.ones((0, 2)), np.zeros(0, np.int64), 1.0)
