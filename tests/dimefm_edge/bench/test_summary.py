"""Figures of one model out of its times."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.results import SubjectResult
from dimefm_edge.bench.summary import summarise_calls, summarise_stages


def test_calls():
    first = SubjectResult("a", rounds_ms=[1.0, 2.0, 4.0])
    second = SubjectResult("b", batch_size=4, rounds_ms=[2.0, 4.0, 8.0])
    summarise_calls(second, [2.0, 4.0, 8.0, 2.0], first, [])
    assert (second.runs, second.p50_ms, second.mean_ms) == (4, 3.0, 4.0)
    assert second.images_per_s == 1000.0
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2.0, 2.0, 2.0)
    assert (second.quantiles_ms[0], second.quantiles_ms[-1]) == (2.0, 8.0)


def test_a_model_that_never_ran_keeps_its_blanks():
    result = SubjectResult("a")
    summarise_calls(result, [], result, [])
    assert result.p50_ms is None
    assert result.ratio is None


def test_stages():
    base = [[[1.0] * 5, [1.0] * 5], [[2.0] * 5]]
    twice = [[[2 * v for v in row] for row in turn] for turn in base]
    result = SubjectResult("b")
    summarise_stages(result, twice, base)
    assert result.stages_ms["decode"] == 2.0
    assert result.end_to_end["p50_ms"] == 10.0
    assert result.end_to_end["ratio"] == 2.0
    assert result.end_to_end["images_per_s"] == pytest.approx(3e3 / 40)
