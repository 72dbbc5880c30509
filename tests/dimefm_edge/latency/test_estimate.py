"""Estimates: known counts, published latencies, and the same answer for torch and ONNX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dimefm_edge.errors import InputError, UnknownNameError
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.latency.estimate import (
    GraphFacts,
    estimate_at,
    estimate_latency,
    estimate_onnx,
    graph_facts,
    place_of,
    place_on,
    published_place,
)
from dimefm_edge.latency.operators import COST_NAMES, cost_vector
from dimefm_edge.latency.trace import trace_student, trace_timm
from dimefm_edge.students import build_student, hybrid_spec, student_spec, vit_spec
from dimefm_edge.students.hybrid import reparameterise
from dimefm_edge.targets import list_targets, load_target

VIT = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)
HYBRID = hybrid_spec(image_size=32, embed_dim=16, width=8, depth=(1, 1, 1, 1))
CPUS = [
    (target.name, precision)
    for target in list_targets()
    if target.runtime == "onnxruntime" and target.providers == ("cpu",)
    for precision in target.precisions
]
NANO = ("Jetson Orin Nano 8GB (MAXN_SUPER)", "TensorRT 10.3 (trtexec GPU compute)", "fp16")


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
    assert 0.6 < estimate.latency_ms / published_ms < 1.7  # the target is no one context
    assert estimate.basis == "published"


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


def test_modes_and_siblings_are_scaled_by_peaks_and_say_so():
    """Arithmetic by peak, memory by bandwidth; the anchor's own mode is the fit itself."""
    own, scaled = (place_on(load_target(f"jetson-orin@{mode}"), "fp16") for mode in ("maxn", "15w"))
    assert (own.basis, scaled.basis) == ("published", "roofline")
    shift = dict(zip(COST_NAMES, scaled.log_prices - own.log_prices, strict=True))
    assert shift["macs_conv"] == pytest.approx(np.log(42.6 / 5.01))
    assert shift["weights"] == pytest.approx(np.log(204.8 / 136.5))
    assert shift["kernels"] == pytest.approx((shift["macs_conv"] + shift["weights"]) / 2)
    assert scaled.spread >= np.log(2) > own.spread


def test_rows_may_name_published_devices_or_our_targets():
    costs = cost_vector(trace_timm("resnet50", 224))
    rows = place_of(*NANO).estimate(costs)
    ours = place_on(load_target("jetson-orin-nano@maxn_super"), "fp16").estimate(costs)
    named = place_of("jetson-orin-nano@maxn_super", "TensorRT", "fp16").estimate(costs)
    assert named == ours
    assert rows == ours
    with pytest.raises(UnknownNameError, match="unknown device with published latencies 'toaster'"):
        place_of("Toaster", "TensorRT", "fp16")


@pytest.mark.parametrize(
    ("device", "runtime", "basis"),
    [  # the target's own, however it is spelt
        ("raspberry-pi-5", "", "own"),
        ("raspberry-pi-5", "ONNX Runtime 1.18", "own"),
        ("raspberry-pi-5", "ort cpu", "own"),
        ("snapdragon-x-elite", "onnxruntime", "own"),
        ("jetson-orin-nano", "torch2trt", "own"),
        ("jetson-orin-nano", "trtexec", "own"),
        # others on the same processor: as the published rows of the board have it, or its kin
        ("raspberry-pi-5", "NCNN CPU", "published"),
        ("rk3588", "NCNN CPU", "roofline"),
        ("jetson-orin-nano@maxn_super", "onnxruntime", "roofline"),
        ("x86-cpu", "OpenVINO", "roofline"),
    ],
)
def test_a_target_in_another_runtime_has_other_prices(device, runtime, basis):
    target, costs = load_target(device), cost_vector(trace_timm("resnet18", 224))
    place, own = place_of(device, runtime, target.precision), place_on(target, target.precision)
    is_as_own = place.estimate(costs) == own.estimate(costs)
    assert is_as_own == (basis == "own")
    assert place.basis == (own.basis if basis == "own" else basis)


@pytest.mark.parametrize("runtime", ["tensorrt", "CoreML", "ONNX Runtime TensorRT EP", "rknn"])
def test_a_target_does_not_run_what_is_for_other_hardware(runtime):
    told = f"raspberry-pi-5 runs onnxruntime \\(cpu\\), not '{runtime}'"
    with pytest.raises(InputError, match=told):
        place_of("raspberry-pi-5", runtime, "fp32")
    assert place_of("Raspberry Pi 5", runtime, "fp32")  # a published name is answered as it was


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


def test_the_default_student_is_traced_as_it_is_exported(tmp_path):
    """What `fit` went by and what the report says of the graph are one estimate."""
    spec = student_spec("vit-p8-w192-d3", image_size=64, embed_dim=64)
    student, path = build_student(spec), tmp_path / "model.onnx"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    export_onnx(student, path, image_size=64, parity_images=images, metadata={})
    target = load_target("jetson-orin")
    exported, traced = estimate_onnx(path, target), estimate_latency(trace_student(spec), target)
    assert traced.latency_ms == pytest.approx(exported.latency_ms, rel=0.02)


@pytest.mark.parametrize(("name", "precision"), CPUS)
def test_a_vit_costs_a_cpu_about_what_its_products_do(name, precision):
    """ViT-Ti/16 takes 0.7 to 4 times as long as ResNet-18 for each multiply-add.

    Most of both are products, at the rate of one GEMM. Measured with ONNX Runtime: 1.2 on one
    thread of an x86 CPU. On a Raspberry Pi 5, 60 to 120 ms against 37 would be 2.4 to 4.7. Next to
    no ViT was published for CPUs, so nothing but priors keeps what NPUs pay for attention and
    norms (31 and 47 ms a million elements on a Pi, 8.6 times in all) out of here.
    """
    place = published_place(load_target(name), precision)
    vit, resnet = (
        estimate_at(trace_timm(model, 224), place) for model in ("vit_tiny_patch16_224", "resnet18")
    )
    assert 0.7 < (vit.latency_ms / vit.gmacs) / (resnet.latency_ms / resnet.gmacs) < 4


@pytest.mark.parametrize(
    ("shape", "told", "facts"),
    [
        (["n", 3, 64, 64], {"precision": "int8", "image_size": "64"}, ("int8", 64, False)),
        (["n", "h", "w", 3], {"precision": "fp16", "image_size": "64"}, ("fp16", 64, True)),
        ([1, 48, 48, 3], None, (None, 48, False)),
        (["n", 3, "h", "w"], None, (None, None, True)),
    ],
)
def test_a_graph_says_what_it_is(shape, told, facts, tmp_path):
    image, out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("image", "out")
    )
    node = onnx.helper.make_node("Relu", ["image"], ["out"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [image], [out]))
    if told is not None:
        onnx.helper.set_model_props(model, told | {"producer": "dimefm_edge"})
    onnx.save(model, tmp_path / "model.onnx")
    assert graph_facts(tmp_path / "model.onnx") == GraphFacts(*facts)


def test_a_file_that_is_no_graph_says_nothing(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"junk")
    for name in ("model.onnx", "gone.onnx"):
        assert graph_facts(tmp_path / name) == GraphFacts(None, None, takes_any_size=True)


def test_estimating_needs_no_torch():
    code = "import sys, dimefm_edge.latency.estimate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
