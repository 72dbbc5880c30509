"""Attention as our own operator: the same answers, its kernels in the bundle, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import ExportError, MissingExtraError
from dimefm_edge.export import GraphSpec, export_student, graph_spec
from dimefm_edge.export.parity import cpu_session
from dimefm_edge.export.plugin import kernel_specs, write_kernels
from dimefm_edge.export.trace import trace
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime import load_bundle
from dimefm_edge.students import LoadedStudent, build_student, vit_spec
from dimefm_edge.targets import load_target

pytest.importorskip("triton")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_brings_the_kernels_of_its_attentions(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=64, depth=3, num_heads=2)
    student = build_student(spec).eval()
    preprocess = PreprocessSpec(32)
    images = preprocess_images([scene_image(i) for i in range(4)], preprocess)
    graph = graph_spec(load_target("jetson-agx-thor"), precision=precision, attention="plugin")
    out = export_student(LoadedStudent(student, spec, preprocess, {}), tmp_path / "b",
                         graph=graph, parity_images=images, logit_scale=100.0)  # fmt: skip
    manifest = load_bundle(out).manifest
    # Only the class token asks in the last block: fewer queries than keys, which it is not for.
    assert manifest["graph"]["fusion"]["attention_forms"] == {"plugin node": 2, "decomposed": 1}
    assert manifest["graph"]["warnings"] == []
    assert manifest["parity"]["num_images"] == 4  # in ONNX Runtime, of this very file
    (kernel,) = manifest["graph"]["kernels"]
    assert (kernel["capability"], kernel["spill_bytes"]) == (110, 0)
    assert {"kernels/" + kernel[kind] for kind in ("ptx", "cubin")} < set(manifest["files"])
    model = onnx.load(str(out / "model.onnx"))
    own = [node for node in model.graph.node if node.domain == "dimefm"]
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in own:  # straight from one projection
        add = made_by[node.input[0]]
        assert (add.op_type, made_by[add.input[0]].op_type) == ("Add", "MatMul")
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 2 * 4 + 3 + 5


class TwoSources(nn.Module):
    """Queries and keys of other tokens than values: no packed projection makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(12, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(tokens).reshape(-1, 5, 2, 16).transpose(1, 2)
            for part, tokens in ((self.q, x), (self.k, x), (self.v, x.flip(1)))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return F.normalize(mixed.transpose(1, 2).flatten(2).mean(1), dim=-1)


def test_projections_that_cannot_be_packed_and_a_scale_that_is_not_one() -> None:
    torch.manual_seed(0)
    module = TwoSources().eval()
    x = torch.randn(3, 5, 12)
    model = trace(module, torch.zeros(2, 5, 12), input_name="x", output_name="y", opset=20,
                  attention="plugin")  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    (spec,) = kernel_specs(model, "fp16")
    assert (spec.num_tokens, spec.head_dim, spec.num_heads) == (5, 16, 2)
    assert spec.logit_scale == np.float32(0.3)
    (found,) = cpu_session(model.SerializeToString()).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("jetson-agx-thor", "int8", "--attention plugin is for fp32 and fp16 graphs, not int8"),
        ("jetson-orin", "fp16", r"TensorRT 10\.3 has no ahead-of-time Python plugins, .* 10\.16"),
    ],
)
def test_what_it_is_not_for(target: str, precision: str, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        graph_spec(load_target(target), precision=precision, attention="plugin")
    assert "leave out --attention plugin" in str(caught.value.hint)


def test_without_a_gpu_or_an_attention_there_is_nothing_to_compile(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no target says which\n  try: --target jetson-agx-thor"):
        GraphSpec(attention="plugin")
    model = trace(nn.Linear(4, 4), torch.zeros(2, 4), input_name="x", output_name="y", opset=20,
                  attention="plugin")  # fmt: skip
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="no attention of all tokens to all tokens"):
        write_kernels(tmp_path, tmp_path / "m.onnx", precision="fp16", sm="sm_110")
    assert not (tmp_path / "kernels").exists()


def test_what_cannot_be_compiled_is_an_export_error(tmp_path: Path, monkeypatch) -> None:
    model = trace(TwoSources().eval(), torch.zeros(2, 5, 12), input_name="x", output_name="y",
                  opset=20, attention="plugin")  # fmt: skip
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="cannot be compiled for sm_72: sm_72 is too old"):
        write_kernels(tmp_path, tmp_path / "m.onnx", precision="fp16", sm="sm_72")

    def missing(*_: object, **__: object) -> None:
        raise ImportError("triton")

    monkeypatch.setattr("dimefm_kernels.ahead_of_time.compile_kernels", missing)
    with pytest.raises(MissingExtraError, match=r"Triton, which is not installed\n  try: pip inst"):
        write_kernels(tmp_path, tmp_path / "m.onnx", precision="fp16", sm="sm_110")


def test_a_manifest_whose_kernels_are_not_there_is_refused(tmp_path: Path) -> None:
    from dimefm_edge.errors import CheckpointError
    from dimefm_edge.manifest import parse_manifest

    entry = {"spec": {}, "capability": 110, "entry": "k", "grid_x": 1, "num_threads": 32,
             "shared_bytes": 0, "ptx": "gone.ptx"}  # fmt: skip
    base = json.loads(_MANIFEST)
    with pytest.raises(CheckpointError, match=r"graph.kernels names 'gone.ptx', which is not"):
        parse_manifest(json.dumps(base | {"graph": {"kernels": [entry]}}).encode(), where="b")
    entry["grid_x"] = -1
    with pytest.raises(CheckpointError, match=r"graph.kernels: grid_x cannot be -1"):
        parse_manifest(json.dumps(base | {"graph": {"kernels": [entry]}}).encode(), where="b")


_MANIFEST = json.dumps({
    "format": "dimefm_edge.bundle", "format_version": 1, "created": "", "name": "n", "spec": {},
    "precision": "fp16", "opset": 20, "embed_dim": 4, "logit_scale": 1.0, "parity": {},
    "versions": {}, "label_sets": [], "preprocess": PreprocessSpec(32).to_dict(),
    "files": {"model.onnx": {"sha256": "0" * 64, "size_bytes": 1}},
})  # fmt: skip
