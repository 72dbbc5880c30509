"""Profiles of real runtimes; TensorRT's of the recorded API and a stand-in driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.profilers import (
    OperatorTime,
    onnxruntime_times,
    profile_nodes,
    tensorrt_times,
)
from dimefm_edge.bench.runnable import Load, load_runnable
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.runtime import load_bundle
from dimefm_edge.runtime.tensorrt_build import EngineOptions, build_engine
from dimefm_edge.runtime.tensorrt_inspect import EngineLayer


def profiled(word: str, folder, load: Load) -> list[OperatorTime]:
    folder.mkdir(exist_ok=True)
    (spec,) = parse_subjects([word])
    prepared = prepare(spec, folder)
    return profile_nodes(prepared, load_runnable(prepared, load), load)


def event(node, operator, us):
    args = {"op_name": operator}
    return {"cat": "Node", "name": f"{node}_kernel_time", "dur": us, "args": args}


def test_onnx_runtimes_last_runs():
    events = [
        event("a", "MatMul", 90_000),  # a warm-up run
        *[event("a", "MatMul", 3000)] * 2, *[event("b", "Conv", 500)] * 2,
        {"cat": "Session", "name": "model_run", "dur": 10**6},
        {"cat": "Node", "name": "a_fence_before", "dur": 10**6},
    ]  # fmt: skip
    assert onnxruntime_times(events, runs=2) == [
        OperatorTime("a", "MatMul", "gemm", 3.0), OperatorTime("b", "Conv", "convolution", 0.5)
    ]  # fmt: skip


def test_openvino_names_a_generated_attention(prepared_run):
    pytest.importorskip("openvino")
    prepared = prepared_run("openvino")
    found = profile_nodes(prepared, load_runnable(prepared, Load()), Load())
    attentions = [entry for entry in found if entry.kind == "attention"]
    assert {entry.operator for entry in attentions} <= {"Subgraph", "ScaledDotProductAttention"}
    assert attentions
    assert all(entry.ms > 0 for entry in found)
    assert sum(entry.operator == "FullyConnected" for entry in found) >= 4


def test_torch_operators_are_told_by_module_and_the_model_is_left_as_it_was(
    tiny_teacher_dir, tmp_path
):
    (spec,) = parse_subjects([f"{tiny_teacher_dir}@eager"])
    load = Load()
    runnable = load_runnable(prepare(spec, tmp_path), load)
    found = profile_nodes(prepare(spec, tmp_path), runnable, load)
    by_module = {(entry.node.rpartition(".")[2], entry.operator) for entry in found}
    assert ("c_fc", "aten::addmm") in by_module
    assert ("conv1", "aten::mkldnn_convolution") in by_module
    # Hooks would have kept it from the fused way.
    assert ("attn", "aten::_native_multi_head_attention") in by_module
    assert not [m for m in runnable.owner.modules() if "forward" in vars(m)]


@pytest.mark.slow
def test_generated_kernels_of_torch_compile(tiny_run_dir, tmp_path):
    found = profiled(f"{tiny_run_dir}@compile", tmp_path / "c", Load())
    operators = [entry.operator for entry in found]
    assert any("cpp_fused" in name for name in operators)
    assert not any("CompiledFxGraph" in name or "Dynamo" in name for name in operators)


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.4"])
def test_tensorrt_layers_of_the_recorded_api(
    version: str, tiny_bundle_dir, fake_tensorrt: Callable[[str], Any], tmp_path
):
    fake_tensorrt(version)
    built = build_engine(load_bundle(tiny_bundle_dir), EngineOptions(batch=(1, 2, 4)))
    found = profiled(f"{tiny_bundle_dir}@tensorrt", tmp_path / "t", Load(batch_size=2))
    assert [entry.node for entry in found] == [
        layer["name"] for layer in built.artifact.facts["layers"]
    ]
    assert {entry.ms for entry in found} == {0.25}
    kinds = {entry.kind for entry in found}
    assert {"attention", "gemm", "norm", "convolution"} <= kinds
    fused = [entry for entry in found if "_mha" in entry.node]
    assert fused
    assert {entry.kind for entry in fused} == {"attention"}


def test_layers_that_say_little():
    layers = [EngineLayer("{ForeignNode[a...b]}", "Myelin", "", "", ()),
              EngineLayer("x", "", "sm80_xmma_gemm_f16", "", ()),
              EngineLayer("y", "kgen", "", "", ("softmax_1", "add_1"))]  # fmt: skip
    times = {"{ForeignNode[a...b]}": 2.0, "x": 1.0, "y": 0.5, "Reformatting CopyNode": 0.1}
    found = tensorrt_times(times, layers, {"softmax_1": "Softmax", "add_1": "Add"})
    assert [(e.operator, e.kind, e.ms) for e in found] == [
        ("Myelin", "elementwise", 2.0), ("layer", "gemm", 1.0), ("kgen", "softmax", 0.5),
        ("layer", "movement", 0.1),
    ]  # fmt: skip
