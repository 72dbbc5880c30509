"""MLPerf's LoadGen on a real model and on calls of known length."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dimefm_edge.bench.load_generator import (
    SCENARIOS,
    parse_log,
    run_scenario,
    summarise_log,
)
from dimefm_edge.bench.runnable import Load, Runnable
from dimefm_edge.errors import DimeFMError, MissingExtraError

NEEDS_LOADGEN = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("mlperf_loadgen") is None,
    reason="mlcommons-loadgen has wheels for x86-64 only",
)


def sleeper(seconds, *, fixed_batch=None, batches=None):
    def run(feed):
        if batches is not None:
            batches.append(len(feed["x"]))
        time.sleep(seconds)

    return Runnable(run, lambda rng, n: {"x": np.zeros((n, 1))}, fixed_batch=fixed_batch)


def run(runnable, scenario, *, batch_size=1, seconds=0.5, expected_ms=2.0, **settings):
    options = {"server_qps": 100.0, "bound_ms": 50.0} | settings
    return run_scenario(
        runnable, Load(batch_size=batch_size), scenario=scenario, seconds=seconds,
        expected_ms=expected_ms, **options,
    )  # fmt: skip


@NEEDS_LOADGEN
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_scenario_agrees_with_a_call_of_known_length(scenario):
    call_ms = 1 if scenario == "multi-stream" else 4  # it makes 662 queries of eight
    found = run(sleeper(call_ms / 1000), scenario, expected_ms=float(call_ms), seconds=1.0)
    assert found["scenario"] == scenario
    if scenario == "single-stream":
        assert found["is_valid"], found["why_invalid"]
        assert 4 <= found["p50_ms"] < 8
        assert 60 < found["samples_per_s"] <= 250
        assert found["answered"] == found["queries"] >= 64
    elif scenario == "multi-stream":
        assert 8 <= found["p50_ms"] < 16
        assert found["answered"] == 8 * found["queries"]
    elif scenario == "offline":
        assert 60 < found["samples_per_s"] <= 250
    else:
        assert found["queries"] >= 100
        assert found["p50_ms"] >= 4


@NEEDS_LOADGEN
def test_batches_are_filled_where_queries_wait_and_padded_where_they_must_be():
    batches: list[int] = []
    run(sleeper(0.002, batches=batches), "offline", batch_size=4)
    assert max(batches) == 4
    batches.clear()
    run(sleeper(0.002, fixed_batch=4, batches=batches), "single-stream", batch_size=4)
    assert set(batches) == {4}


@NEEDS_LOADGEN
def test_a_server_that_is_asked_too_much_is_invalid_and_says_why():
    found = run(sleeper(0.01), "server", expected_ms=10.0, server_qps=400.0, bound_ms=12.0)
    assert not found["is_valid"]
    assert "Reduce target QPS" in found["why_invalid"]


@NEEDS_LOADGEN
def test_a_model_that_fails_under_load_is_told():
    def fails(feed):
        raise ValueError("out of memory")

    broken = Runnable(fails, lambda rng, n: {"x": np.zeros((n, 1))})
    with pytest.raises(DimeFMError, match="failed under LoadGen: out of memory"):
        run(broken, "single-stream")


def test_without_loadgen(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingExtraError, match="pip install mlcommons-loadgen"):
        run(sleeper(0.001), "offline")


def test_logs_that_are_cut_or_strange():
    text = (
        'noise\n:::MLLOG {"key": "result_validity", "value": "INVALID"}\n'
        ':::MLLOG {"key": "result_50.00_percentile_latency_ns", "value": 2000000}\n'
        ':::MLLOG [1]\n:::MLLOG {"key": "early_stopping_result", "value": " * Only  3.\\n"}\n'
        ':::MLLOG {"key": "cut'
    )
    found = summarise_log(parse_log(text), "single-stream")
    assert found["p50_ms"] == 2.0
    assert (found["is_valid"], found["why_invalid"]) == (False, "Only 3.")
    assert found["samples_per_s"] is None
