"""Dry builds by TensorRT for RTX itself, its parser and its compiler: no double, no GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import CheckpointError, ConfigError, ExportError, MissingExtraError
from dimefm_edge.export import GraphSpec, export_student, graph_spec
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime.bundle import Bundle, load_bundle
from dimefm_edge.runtime.tensorrt_build import EngineOptions
from dimefm_edge.runtime.tensorrt_rtx import can_dry_build, dry_build
from dimefm_edge.students import LoadedStudent, build_student, student_spec
from dimefm_edge.targets import load_target

rtx = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]'"
)


@pytest.fixture
def fp16(exported_bundles: dict[str, Path]) -> Bundle:
    return load_bundle(exported_bundles["fp16"])


def for_gpu(bundle: Bundle, sm: str) -> Bundle:
    graph = bundle.manifest["graph"] | {"sm": sm}
    return replace(bundle, manifest=bundle.manifest | {"graph": graph})


def test_its_compiler_fuses_the_attention(fp16: Bundle) -> None:
    built = dry_build(fp16)
    assert (built.compiled_for, built.stands_for) == ("sm_86", "sm_87")
    assert (built.attention.fused, built.attention.unfused) == (1, ())
    assert any("mha" in layer.name for layer in built.layers)
    assert 5 < built.num_kernels < len(fp16.manifest["graph"]["attentions"]) * 30
    assert built.size_mib > 0
    assert built.describe() == (
        f"TensorRT for RTX {rtx.__version__} compiles it in fp16 for sm_86, which stands for "
        f"sm_87: {built.num_kernels} kernels; attention: 1 of 1 fused"
    )


@pytest.mark.parametrize(
    ("name", "precision", "attentions"),
    [
        ("vit-p8-w64-d2", "int8", 2),
        ("vit-p8-w64-d2", "fp8", 2),
        ("vit-p8-w64-d2", "fp16", 2),
        ("hybrid-w16-d1.1.1.1", "fp16", 1),
        ("hybrid-w16-d1.1.1.1", "int8", 1),
        ("convnet-w16-d1.1.1.1", "int8", 0),
        ("timm:resnet10t", "fp16", 0),
    ],
)
def test_every_family_compiles_with_its_attentions_fused(
    name: str, precision: str, attentions: int, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(0)
    spec = student_spec(name, image_size=64, embed_dim=24)
    images = preprocess_images([scene_image(i) for i in range(16)], PreprocessSpec(64))
    student = build_student(spec).train()
    with torch.no_grad():
        for _ in range(30):  # batch norms know the images: without, int8 has little to go by
            student(torch.from_numpy(images))
    target = load_target("jetson-agx-thor" if precision == "fp8" else "jetson-orin")
    path = export_student(
        LoadedStudent(student.eval(), spec, PreprocessSpec(64), {}),
        tmp_path / "bundle", graph=graph_spec(target, precision=precision),
        parity_images=images, logit_scale=100.0,
    )  # fmt: skip
    built = dry_build(load_bundle(path))
    assert built.stands_for == target.sm
    assert (built.attention.expected, built.attention.fused) == (attentions, attentions)
    if precision in ("int8", "fp8"):
        assert any(layer.precision.lower().startswith(precision) for layer in built.layers)


def test_options_reach_the_builder(fp16: Bundle) -> None:
    asked = EngineOptions(batch=(2, 4, 16), opt_level=1, workspace_mib=64)
    assert dry_build(fp16, asked).attention.fused == 1
    with pytest.raises(ConfigError, match="is an fp16 graph and cannot become an fp32 engine"):
        dry_build(fp16, EngineOptions(precision="fp32"))
    with pytest.raises(ConfigError, match="there is no DLA 0 on an sm_86 GPU"):
        dry_build(fp16, EngineOptions(dla_core=0))


@pytest.mark.parametrize(
    ("sm", "stand_in"), [("sm_87", "sm_86"), ("sm_110", "sm_89"), ("sm_120", "sm_120")]
)
def test_the_nearest_older_architecture_stands_in(sm: str, stand_in: str, fp16: Bundle) -> None:
    built = dry_build(for_gpu(fp16, sm))
    assert (built.compiled_for, built.stands_for) == (stand_in, sm)
    assert ("stands for" in built.describe()) == (sm != stand_in)


def test_older_gpus_have_none(fp16: Bundle) -> None:
    assert can_dry_build(fp16)
    assert not can_dry_build(for_gpu(fp16, "sm_72"))
    with pytest.raises(ConfigError, match="compiles for sm_75 and newer, not for sm_72"):
        dry_build(for_gpu(fp16, "sm_72"))
    with pytest.raises(CheckpointError, match="bad manifest: a GPU cannot be ampere"):
        dry_build(for_gpu(fp16, "ampere"))


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"image_input": "uint8"}])
def test_graphs_of_other_inputs(changes: dict[str, Any], tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    spec = student_spec("vit-p16-w64-d1", image_size=32, embed_dim=16)
    images = preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(32))
    path = export_student(
        LoadedStudent(build_student(spec).eval(), spec, PreprocessSpec(32), {}),
        tmp_path / "bundle.zip", graph=GraphSpec(precision="fp16", **changes),
        parity_images=images, logit_scale=100.0,
    )  # fmt: skip
    bundle = load_bundle(path)
    assert dry_build(bundle).attention.fused == 1
    if "batch_size" in changes:
        with pytest.raises(ConfigError, match="was exported for batches of 3 only"):
            dry_build(bundle, EngineOptions(batch=(1, 2, 2)))


def test_what_the_parser_refuses_is_told(fp16: Bundle, tmp_path: Path) -> None:
    side = fp16.preprocess.image_size
    graph = helper.make_graph(
        [helper.make_node("Nothing", ["image"], ["image_embeds"], name="odd", domain="nowhere")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, side, side])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["b", 24])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"cannot read the graph of .* Nothing odd") as caught:
        dry_build(replace(fp16, model_path=tmp_path / "m.onnx"))
    assert f"TensorRT for RTX {rtx.__version__}" in str(caught.value)


def test_kernels_of_our_own_cannot_come_along(fp16: Bundle) -> None:
    graph = fp16.manifest["graph"] | {"kernels": [{"name": "fused_attention_qkv"}]}
    with pytest.raises(ConfigError, match="brings kernels of its own"):
        dry_build(replace(fp16, manifest=fp16.manifest | {"graph": graph}))


def test_without_it(fp16: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert not can_dry_build(fp16)
    with pytest.raises(MissingExtraError, match="TensorRT for RTX cannot be imported") as caught:
        dry_build(fp16)
    assert "dimefm_edge[rtx]" in str(caught.value.hint)
