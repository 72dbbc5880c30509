"""Where time goes: summed by hand, and of real models in each runtime."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.operators import profile_operators, summarise
from dimefm_edge.bench.prepare import Prepared, prepare
from dimefm_edge.bench.profilers import OperatorTime
from dimefm_edge.bench.runnable import Load, load_runnable
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import InputError


def test_nodes_are_summed_by_kind():
    found = summarise([
        OperatorTime("b", "Conv", "convolution", 0.5), OperatorTime("a", "MatMul", "gemm", 3.0),
        OperatorTime("c", "SomethingNew", "elementwise", 0.5),
    ])  # fmt: skip
    assert found["operators_ms"] == pytest.approx(4.0)
    assert found["kinds"] == pytest.approx(
        {"gemm": 0.75, "convolution": 0.125, "elementwise": 0.125}
    )
    assert next(iter(found["kinds"])) == "gemm"
    assert found["top"][0] == {"node": "a", "operator": "MatMul", "ms": 3.0, "share": 0.75}


def test_the_ten_slowest():
    found = summarise([OperatorTime(str(ms), "Add", "elementwise", ms) for ms in range(1, 30)])
    assert [entry["ms"] for entry in found["top"]] == list(range(29, 19, -1))


def test_no_node():
    assert summarise([]) == {"operators_ms": 0, "kinds": {}, "top": []}


def test_one_model_in_each_runtime(prepared_run):
    load = Load(batch_size=64)  # OpenVINO counts whole microseconds: a few images take none
    found = {}
    for runtime in ("onnxruntime", "dynamic-int8", "openvino", "eager"):
        if runtime == "openvino":
            pytest.importorskip("openvino")
        prepared = prepared_run(runtime)
        found[runtime] = profile_operators(prepared, load_runnable(prepared, load), load)
        assert sum(found[runtime]["kinds"].values()) == pytest.approx(1)
        assert {"gemm", "norm"} <= set(found[runtime]["kinds"])
        assert 0 < len(found[runtime]["top"]) <= 10
        assert found[runtime]["operators_ms"] > 0
    for runtime in ("onnxruntime", "openvino", "eager"):
        assert "attention" in found[runtime]["kinds"], runtime
    assert "convolution" in found["eager"]["kinds"]  # in graphs for CPUs patches are a product
    assert found["onnxruntime"]["gmacs"] > 0
    assert found["dynamic-int8"]["gmacs"] == found["onnxruntime"]["gmacs"]
    assert found["openvino"]["gmacs"] == found["onnxruntime"]["gmacs"]
    assert found["eager"]["gmacs"] == pytest.approx(found["onnxruntime"]["gmacs"], rel=0.05)


def test_a_bundle(tiny_bundle_dir, tmp_path):
    (spec,) = parse_subjects([str(tiny_bundle_dir)])
    prepared = prepare(spec, tmp_path)
    found = profile_operators(prepared, load_runnable(prepared, Load()), Load())
    assert {"gemm", "norm"} <= set(found["kinds"])
    assert found["gmacs"] > 0


def test_what_has_no_profiler():
    with pytest.raises(InputError, match="Python has no profile by operator here"):
        profile_operators(Prepared("python", "Python", "f.py:f", "python"), None, Load())
