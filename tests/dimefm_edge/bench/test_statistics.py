"""Percentiles and intervals, against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.bench.statistics import paired_ratio, percentiles, unpaired_ratio


def test_percentiles_by_name():
    found = percentiles(np.arange(1001.0))
    assert found == {
        "p50_ms": 500, "p90_ms": 900, "p95_ms": 950, "p99_ms": 990, "p999_ms": pytest.approx(999)
    }  # fmt: skip


def test_a_paired_ratio_sees_through_drift_that_both_share():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 90)
    base = drift * rng.normal(1, 0.02, 90)
    slower = 1.05 * drift * rng.normal(1, 0.02, 90)
    ratio = paired_ratio(slower, base)
    assert ratio.value == pytest.approx(1.05, abs=0.01)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.is_different
    assert not unpaired_ratio(slower, base).is_different  # which is why rounds are paired


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_intervals_hold_the_truth_as_often_as_they_say(correlation):
    """300 experiments of no difference, rounds that depend on their neighbours, three
    generations each with its own luck."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(300):
        noise = rng.normal(0, 0.02, 90)
        for i in range(1, 90):
            noise[i] += correlation * noise[i - 1]
        luck = np.repeat(rng.normal(0, 0.01, 3), 30)
        ratio = paired_ratio(np.exp(noise + luck), np.ones(90), starts=(30, 60), seed=trial)
        held += not ratio.is_different
    assert held / 300 > 0.8  # three generations cannot give all of 95%
    assert held / 300 < 1


def test_generations_widen_the_interval():
    rng = np.random.default_rng(2)
    values = np.repeat([1.0, 1.015, 1.03], 60) + rng.normal(0, 0.001, 180)
    blind, aware = (paired_ratio(values, np.ones(180), starts=s) for s in ((), (60, 120)))
    assert blind.value == aware.value == pytest.approx(1.015, abs=0.001)
    assert blind.low > 1.005
    assert aware.low == pytest.approx(1.0, abs=0.001)
    assert aware.high == pytest.approx(1.03, abs=0.001)


def test_generations_of_unequal_length():
    ratio = paired_ratio(np.full(10, 2.0), np.ones(10), starts=(1, 4))
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)


def test_no_rounds():
    with pytest.raises(ValueError, match="one at least"):
        paired_ratio([], [])
    with pytest.raises(ValueError, match="a round of both"):
        unpaired_ratio([1.0], [])
