"""Where time goes: ONNX Runtime's profile, summed by hand and on a real bundle."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.operators import KINDS, profile_operators, summarise_events
from dimefm_edge.bench.prepare import Prepared, prepare
from dimefm_edge.bench.runnable import Load, load_runnable
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import InputError


def event(node, operator, us):
    args = {"op_name": operator}
    return {"cat": "Node", "name": f"{node}_kernel_time", "dur": us, "args": args}


def test_events_are_summed_by_kind_over_the_last_runs():
    events = [
        event("a", "MatMul", 90_000),  # a warm-up run
        *[event("a", "MatMul", 3000)] * 2, *[event("b", "Conv", 500)] * 2,
        *[event("c", "SomethingNew", 500)] * 2,
        {"cat": "Session", "name": "model_run", "dur": 10**6},
        {"cat": "Node", "name": "a_fence_before", "dur": 10**6},
    ]  # fmt: skip
    found = summarise_events(events, runs=2)
    assert found["operators_ms"] == pytest.approx(4.0)
    assert found["kinds"] == pytest.approx(
        {"gemm": 0.75, "convolution": 0.125, "elementwise": 0.125}
    )
    assert found["top"][0] == {"node": "a", "operator": "MatMul", "ms": 3.0, "share": 0.75}


def test_no_events():
    assert summarise_events([], runs=2) == {"operators_ms": 0, "kinds": {}, "top": []}


def test_each_operator_is_of_one_kind():
    names = [name for kind in KINDS.values() for name in kind]
    assert len(names) == len(set(names))


def test_a_bundle_and_its_dynamic_int8(tiny_bundle_dir, tmp_path):
    load = Load(batch_size=2)
    found = {}
    for runtime in ("onnxruntime", "dynamic-int8"):
        (spec,) = parse_subjects([f"{tiny_bundle_dir}@{runtime}"])
        folder = tmp_path / runtime
        folder.mkdir()
        prepared = prepare(spec, folder)
        found[runtime] = profile_operators(prepared, load_runnable(prepared, load), load)
        assert sum(found[runtime]["kinds"].values()) == pytest.approx(1)
        assert {"gemm", "norm"} <= set(found[runtime]["kinds"])
        assert 0 < len(found[runtime]["top"]) <= 10
    assert found["onnxruntime"]["gmacs"] > 0
    assert found["dynamic-int8"]["gmacs"] == found["onnxruntime"]["gmacs"]


def test_other_runtimes_have_none(tmp_path):
    with pytest.raises(InputError, match="PyTorch has no profile by operator"):
        profile_operators(Prepared("torch", "PyTorch", "sample", "teacher"), None, Load())
