"""Small fp32 graphs to quantise, and how to run one exactly as it is written or as is fast."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import StudentSpec, build_student, hybrid_spec, vit_spec
from dimefm_edge.targets.cpu import unwanted_rewrites

SIDE = 32
_TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
_VISION: dict[str, dict[str, Any]] = {
    "open_clip_vit": {"patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "open_clip_resnet": {"patch_size": None, "width": 16, "layers": [1, 1, 1, 1]},
}
_SPECS = {
    "vit": vit_spec(image_size=SIDE, embed_dim=48, patch_size=8, width=192, depth=2, num_heads=6),
    "hybrid": hybrid_spec(image_size=SIDE, embed_dim=48, width=16, depth=(1, 1, 1, 1)),
    "timm": StudentSpec("timm:resnet10t", "timm", SIDE, 48, {"model": "resnet10t"}),
}
FAMILIES = (*_SPECS, *_VISION)


class _Unit(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(image), dim=-1)


@functools.cache
def scenes(count: int) -> npt.NDArray[np.float32]:
    """(count, 3, 32, 32) preprocessed."""
    return preprocess_images([scene_image(i) for i in range(count)], PreprocessSpec(SIDE))


def family_module(family: str) -> nn.Module:
    """A small model with random weights, answers of unit length."""
    torch.manual_seed(0)
    if family in _SPECS:
        return build_student(_SPECS[family]).eval()
    import open_clip

    vision = {"image_size": SIDE, **_VISION[family]}
    return _Unit(open_clip.CLIP(32, vision, _TEXT).visual).eval()


@functools.cache
def family_bytes(family: str) -> bytes:
    """The fp32 graph of a model with random weights; parsed anew by each who changes it."""
    module = family_module(family)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(module, path, image_size=SIDE,
                    parity_images=scenes(8), metadata={})  # fmt: skip
        return path.read_bytes()


def family_graph(family: str, *, batch: int | None = None) -> onnx.ModelProto:
    """The graph with a free batch dimension, or a fixed one."""
    model = onnx.load_from_string(family_bytes(family))
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        del model.graph.value_info[:]
    return model


def hand_made(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, npt.NDArray[Any]],
    *,
    shape: Sequence[int | str],
    out: Sequence[int | str],
    opset: int = 20,
) -> onnx.ModelProto:
    """A graph from `image` to `image_embeds`."""
    graph = helper.make_graph(
        list(nodes), "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    *,
    is_simulated: bool = False,
    is_exact: bool = False,
) -> npt.NDArray[np.float32]:
    """Answers in ONNX Runtime.

    Args:
        model: Any graph.
        images: All in one batch, or one by one if the graph's batch is fixed.
        is_simulated: Every node as it is written, in float; else ONNX Runtime's own kernels.
        is_exact: Kernels that do not saturate, as the runtime asks for.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if is_simulated:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    if is_exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    is_fp8 = any(t.data_type == TensorProto.FLOAT8E4M3FN for t in model.graph.initializer)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=unwanted_rewrites("fp8" if is_fp8 else "int8"),
    )  # fmt: skip
    size = session.get_inputs()[0].shape[0]
    step = size if isinstance(size, int) else len(images)
    rows = [session.run(None, {"image": images[i : i + step]})[0]
            for i in range(0, len(images), step)]  # fmt: skip
    found: npt.NDArray[np.float32] = np.concatenate(rows)
    return found


def cosines(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N,) between rows."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: npt.NDArray[Any] = (one * other).sum(axis=1) / lengths
    return found
