"""Parity of everything that can be exported: families, precisions, batches, runtimes.

Each export runs onnx's checker and compares the graph with torch; here its report must also say
that no attention was left in pieces, and the answers of each batch size are compared once more.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.encoders import Normalised
from dimefm_edge.export import GraphSpec, OnnxGraph, export_onnx, graph_spec
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.targets import load_target
from dimefm_edge.targets.cpu import int8_products_saturate
from dimefm_edge.teacher import load_teacher
from tests.dimefm_edge.export.int8_case import FAMILIES, SIDE, family_module, scenes

PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, None)
TARGETS = (None, "jetson-orin")
ATTENTIONS = {"vit": 2, "open_clip_vit": 2, "open_clip_resnet": 1}
TOWERS = {"ViT-B-32": 12, "ViT-B-16": 12, "RN50": 1, "MobileCLIP2-S0": None}
FAST = [
    ("vit", "int8", 1, None), ("hybrid", "int8", 1, None), ("vit", "fp16", 1, "jetson-orin"),
    ("timm", "fp16", 1, None),
]  # fmt: skip


def spec_of(precision: str, batch: int | None, target: str | None) -> GraphSpec:
    return graph_spec(
        load_target(target) if target else None, precision=precision, batch_size=batch
    )


def check(
    graph: OnnxGraph, module: nn.Module, images: np.ndarray, spec: GraphSpec, *,
    attentions: int | None,
) -> None:  # fmt: skip
    form = "microsoft node" if spec.runtime == "onnxruntime" else "decomposed"
    fusion = graph.fusion
    assert fusion.unmatched_softmaxes == ()
    assert set(fusion.attention_forms) <= {form}
    assert fusion.attentions == sum(fusion.attention_forms.values())
    if attentions is not None:
        assert fusion.attentions == attentions
    batch = onnx.load(graph.path).graph.input[0].type.tensor_type.shape.dim[0]
    assert (batch.dim_value, batch.dim_param) == (spec.batch_size or 0, "" if spec.batch_size
                                                  else "batch")  # fmt: skip
    options = onnxruntime.SessionOptions()
    if int8_products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        str(graph.path), options, providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        wanted = module(torch.from_numpy(images)).numpy()
    for size in (1,) if spec.batch_size else (1, 3):
        (found,) = session.run(None, {"image": images[:size]})
        cosines = (found * wanted[:size]).sum(axis=1)
        least = {"fp32": 1 - 1e-6, "fp16": 0.999, "int8": 0.98}[spec.precision]
        assert (cosines / np.linalg.norm(found, axis=1)).min() >= least
    if spec.precision == "int8":
        assert graph.op_counts["DequantizeLinear"] > 4
    if spec.precision == "fp16":
        kinds = {tensor.data_type for tensor in onnx.load(graph.path).graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds


@pytest.mark.parametrize(
    ("family", "precision", "batch", "target"),
    [
        case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(FAMILIES, PRECISIONS, BATCHES, TARGETS)
    ],
)
def test_every_family(
    family: str, precision: str, batch: int | None, target: str | None, tmp_path: Path
) -> None:
    module, images = family_module(family), scenes(16)
    spec = spec_of(precision, batch, target)
    graph = export_onnx(
        module, tmp_path / "m.onnx", image_size=SIDE, spec=spec, parity_images=images, metadata={}
    )
    check(graph, module, images, spec, attentions=ATTENTIONS.get(family))


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(TOWERS))
def test_open_clip_towers(name: str, precision: str, batch: int | None, tmp_path: Path) -> None:
    """Random weights: the architecture is what is proven."""
    torch.manual_seed(0)
    teacher = load_teacher(f"{name}:random", device="cpu")
    module = Normalised(teacher.image_tower).eval()
    images = preprocess_images([scene_image(i) for i in range(4)], teacher.preprocess)
    spec = spec_of(precision, batch, None)
    graph = export_onnx(
        module, tmp_path / "m.onnx", image_size=teacher.preprocess.image_size, spec=spec,
        parity_images=images, metadata={},
    )  # fmt: skip
    check(graph, module, images, spec, attentions=TOWERS[name])
