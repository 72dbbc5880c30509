"""The fit on published latencies: contexts are parsed, prices add up, intervals are told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dimefm_edge.errors import UnknownNameError
from dimefm_edge.latency.operators import COST_NAMES, COSTS, PRIORS
from dimefm_edge.latency.published import (
    MODEL_PATH,
    context_of,
    load_published,
    parse_published,
    with_fallback,
)


@pytest.mark.parametrize(
    ("names", "levels"),
    [
        (
            ("Jetson Orin Nano 8GB (MAXN_SUPER)", "TensorRT 10.3 (trtexec GPU compute)", "fp16"),
            ("jetson orin nano", "tensorrt", "gpu", "fp16"),
        ),
        (
            ("Jetson Orin Nano Super 8GB (MAXN_SUPER)", "TensorRT", "int8 dense"),
            ("jetson orin nano", "tensorrt", "gpu", "int8"),
        ),
        (
            ("Samsung Galaxy S24", "onnx (NPU)", "w8a8"),
            ("samsung galaxy s24", "onnx-npu", "npu", "w8a8"),
        ),
        (
            ("Raspberry Pi 5", "ONNX Runtime CPU", "fp32"),
            ("raspberry pi 5", "onnx-cpu", "cpu", "fp32"),
        ),
        (("X", "my runtime", "bf16"), ("x", "my runtime", "other", "bf16")),
    ],
)
def test_contexts_of_published_names(names, levels):
    context = context_of(*names)
    assert (context.device, context.runtime, context.hardware, context.precision) == levels
    assert context.name == " | ".join(names)


VALUES = {
    "offsets": {
        "all": {"all": {"mac": 0.5}},
        "hardware": {"gpu": {"macs_linear": -1.0}},
        "hardware-precision": {},
        "runtime-precision": {"tensorrt/fp16": {"call": 0.25}},
        "device": {"board": {"mac": 0.125}},
        "context": {"Board | TensorRT 8 | fp16": {"weight": 2.0}},
    },
    "residuals": {"runtime-precision": {"tensorrt/fp16 net@224": 0.1}},
    "spreads": {"gpu/fp16": [0.1, 0.2], "other": [0.3, 0.5]},
}


def test_prices_are_sums_of_their_levels():
    model, context = parse_published(VALUES), context_of("Board", "TensorRT 8", "fp16")
    moved = dict(zip(COST_NAMES, model.log_prices(context) - PRIORS, strict=True))
    assert moved["macs_conv"] == pytest.approx(0.625)
    assert moved["macs_linear"] == pytest.approx(-0.375)
    assert (moved["calls"], moved["weights"], moved["kernels"]) == (0.25, 2.0, 0.0)
    costs = np.zeros(len(COSTS))
    costs[COST_NAMES.index("macs_conv")] = 1000.0
    expected = 1000 * math.exp(PRIORS[COST_NAMES.index("macs_conv")] + 0.625)
    assert model.latency_ms(context, costs) == pytest.approx(expected)
    known = model.latency_ms(context, costs, model="net@224")
    assert known == pytest.approx(expected * math.exp(0.1))


def test_intervals_grow_with_what_is_not_known():
    model = parse_published(VALUES)
    here = context_of("Board", "TensorRT 8", "fp16")
    assert model.spread(here, model="net@224") == 0.1
    assert model.spread(here) == 0.2
    assert model.spread(context_of("Board", "Other", "fp16")) == math.log(2)
    assert model.spread(context_of("Other board", "TensorRT", "fp16")) == math.log(2)
    with pytest.raises(UnknownNameError, match="Did you mean 'board'"):
        model.check_device("bord")


def test_transformers_fall_back_only_where_they_do():
    costs = np.zeros(len(COSTS))
    costs[COST_NAMES.index("macs_linear")] = 3.0
    costs[COST_NAMES.index("macs_attention")] = 2.0
    phone = "Samsung Galaxy S24"
    filled = with_fallback(costs, context_of(phone, "onnx (NPU)", "w8a8"))
    assert filled[COST_NAMES.index("macs_fallback")] == 5.0
    assert costs[COST_NAMES.index("macs_fallback")] == 0.0
    assert with_fallback(costs, context_of(phone, "onnx (NPU)", "fp16")) is costs
    assert with_fallback(costs, context_of(phone, "tflite (NPU)", "w8a8")) is costs


def test_the_shipped_fit_is_whole_and_small():
    model = load_published()
    assert MODEL_PATH.stat().st_size < 250_000
    for keys in model.offsets.values():
        assert all(np.isfinite(vector).all() for vector in keys.values())
    for known, unknown in model.spreads.values():
        assert 0 < known < 2
        assert 0 < unknown < 2
