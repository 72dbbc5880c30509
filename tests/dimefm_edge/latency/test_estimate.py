"""The roofline: known counts, published latencies, and the same answer for torch and ONNX."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.errors import InputError, UnknownNameError
from dimefm_edge.latency.estimate import OpCost, estimate_latency, estimate_onnx, trace_ops
from dimefm_edge.latency.onnx_costs import onnx_ops
from dimefm_edge.latency.trace import trace_student, trace_timm
from dimefm_edge.students import build_student, hybrid_spec, vit_spec
from dimefm_edge.students.hybrid import reparameterise
from dimefm_edge.targets import load_target

VIT = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)
HYBRID = hybrid_spec(image_size=32, embed_dim=16, width=8, depth=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "gmacs", "params_m", "kernels"),
    [  # timm's own counts, classifiers left out; a ViT block has 7 kernels
        ("resnet50", 4.09, 23.51, (54, 60)),
        ("mobilenetv2_100", 0.30, 2.22, (53, 58)),
        ("vit_base_patch16_224", 17.56, 85.80, (86, 92)),
    ],
)
def test_counts_of_known_models(name, gmacs, params_m, kernels):
    ops = trace_timm(name, 224)
    estimate = estimate_latency(ops, load_target("jetson-orin"))
    assert estimate.gmacs == pytest.approx(gmacs, rel=0.01)
    assert estimate.params_m == pytest.approx(params_m, rel=0.005)
    assert kernels[0] <= len(ops) <= kernels[1]


@pytest.mark.parametrize(
    ("model", "batch", "precision", "published_ms"),
    [  # trtexec GPU times, Orin Nano 8 GB MAXN_SUPER: onnxsim/onnxsim scripts/nvidia/README.md
        ("resnet50", 1, "fp16", 1.814),
        ("resnet50", 8, "fp16", 8.816),
        ("resnet50", 1, "fp32", 3.596),
        ("resnet50", 1, "int8", 1.190),
        ("resnet18", 1, "fp16", 0.758),
        ("mobilenetv2_100", 1, "fp16", 0.850),
        ("mobilenetv2_100", 8, "int8", 2.446),
    ],
)
def test_published_latencies_lie_in_the_interval(model, batch, precision, published_ms):
    target = load_target("jetson-orin-nano@maxn_super")
    estimate = estimate_latency(trace_timm(model, 224, batch), target, precision=precision)
    assert estimate.low_ms < published_ms < estimate.high_ms
    assert 0.7 < estimate.latency_ms / published_ms < 1.3
    assert estimate.basis == "roofline"


def test_power_modes_and_precisions_are_ordered():
    ops = trace_timm("resnet50", 224)
    modes = [estimate_latency(ops, load_target(f"jetson-orin@{m}")) for m in ("15w", "30w", "maxn")]
    times = [e.latency_ms for e in modes]
    assert times == sorted(times, reverse=True)
    target = load_target("jetson-orin")
    times = [
        estimate_latency(ops, target, precision=p).latency_ms for p in ("fp32", "fp16", "int8")
    ]
    assert times == sorted(times, reverse=True)
    with pytest.raises(UnknownNameError, match="unknown precision on raspberry-pi-5 'fp16'"):
        estimate_latency(ops, load_target("raspberry-pi-5"), precision="fp16")


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic_plus_launch():
    target = replace(
        load_target("jetson-orin"),
        peak_tflops={"fp16": 10.0, "fp32": 5.0, "int8": 20.0},
        efficiency={"dense": 0.5, "attention": 0.1, "depthwise": 0.1, "bandwidth": 0.5},
        bandwidth_gbs=100.0,
        launch_us=3.0,
    )

    def us(op, precision="fp16"):
        return estimate_latency([op], target, precision=precision).latency_ms * 1e3

    assert us(OpCost("mm", 5e9, 1e3)) == pytest.approx(3 + 1000)
    assert us(OpCost("mm", 1e3, 1e8)) == pytest.approx(3 + 1000)
    assert us(OpCost("norm", 0, 1e8, "memory")) == pytest.approx(3 + 1000)
    assert us(OpCost("mm", 5e9, 1e3), "int8") == pytest.approx(3 + 500)
    assert us(OpCost("attention", 1e9, 1e3, "attention"), "int8") == pytest.approx(3 + 1000)


@pytest.mark.parametrize("spec", [VIT, HYBRID], ids=lambda s: s.family)
@pytest.mark.parametrize("batch", [1, 4])
def test_torch_and_onnx_agree(spec, batch, tmp_path):
    student = reparameterise(build_student(spec))
    with torch.no_grad():  # the exporter stores equal weights, such as zero biases, once
        for parameter in student.parameters():
            parameter.normal_()
    path = tmp_path / "student.onnx"
    torch.onnx.export(
        student, (torch.randn(2, 3, 32, 32),), path, dynamo=True, opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
    )  # fmt: skip
    target = load_target("jetson-orin")
    from_onnx = estimate_onnx(path, target, batch=batch)
    from_torch = estimate_latency(trace_student(spec, batch), target)
    assert from_onnx.gmacs == pytest.approx(from_torch.gmacs, rel=0.001)
    assert from_onnx.params_m == pytest.approx(from_torch.params_m, rel=0.01)
    assert from_onnx.latency_ms == pytest.approx(from_torch.latency_ms, rel=0.1)


def test_tracing_leaves_the_module_alone():
    student = build_student(VIT)
    student.trunk.blocks[0].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    flags = [m.training for m in student.modules()]
    ops = trace_ops(student, 32, 1)
    assert [m.training for m in student.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.device.type == "cpu" for p in student.parameters())
    assert tuple(ops) == trace_student(VIT)
    assert sum(op.params for op in ops) == sum(p.numel() for p in student.parameters())
    assert sum(op.kind == "attention" for op in ops) == 2


def test_branches_are_merged_before_tracing():
    student = build_student(HYBRID)
    keys = set(student.state_dict())
    ops = trace_ops(student, 32)
    assert [(o.flops, o.bytes) for o in ops] == [(o.flops, o.bytes) for o in trace_student(HYBRID)]
    assert set(student.state_dict()) == keys


def test_arithmetic_grows_with_the_batch():
    flops = [sum(op.flops for op in trace_student(HYBRID, batch)) for batch in (1, 3)]
    assert flops[1] == pytest.approx(3 * flops[0])


def save_conv(path: Path, *, batch="N", side="H", groups=1):
    """A 3 x 3 convolution of 8 channels, padded, with a ReLU."""
    weight = numpy_helper.from_array(np.ones((8, 8 // groups, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], group=groups, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, side, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_onnx_kernels_of_a_graph_counted_by_hand(tmp_path):
    path = tmp_path / "conv.onnx"
    save_conv(path)
    (op,) = onnx_ops(path, batch=2, image_size=16)
    pixels = 2 * 8 * 16 * 16
    assert op == OpCost("Conv+Relu", 2.0 * pixels * 72, 4.0 * (2 * pixels + 576), "dense", 576)
    save_conv(path, groups=8, side=16)
    (op,) = onnx_ops(path)
    assert (op.kind, op.flops) == ("depthwise", 2.0 * 8 * 256 * 9)


def test_bad_onnx_files_are_refused(tmp_path):
    path = tmp_path / "conv.onnx"
    save_conv(path)
    with pytest.raises(InputError, match=r"dimension 2 of input x has no fixed size") as caught:
        onnx_ops(path)
    assert caught.value.hint == "--image-size PIXELS"
    with pytest.raises(InputError, match="no ONNX file at"):
        onnx_ops(tmp_path / "missing.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="is not an ONNX file: it has no nodes"):
        onnx_ops(tmp_path / "empty.onnx")


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_never_taken_for_onnx(junk, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "junk.onnx"
    path.write_bytes(junk)
    with pytest.raises(InputError, match=r"junk\.onnx"):
        onnx_ops(path)


def test_estimating_needs_no_torch():
    code = "import sys, dimefm_edge.latency.estimate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
