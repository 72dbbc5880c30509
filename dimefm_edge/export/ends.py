"""The two ends of a graph: pixels in instead of prepared numbers, class scores out as well.

The device then needs no code of its own between a camera and an answer. Resizing follows
`preprocess.resize_image`: sizes in whole numbers, Pillow's filters (antialias, cubic with
a = -0.5), the crop and the padding to the same pixel. Where `nearest` falls on the edge between
two pixels, exactly, it may take the other one: ONNX Runtime computes places in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.manifest import INPUT_NAME, LOGITS_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    import onnx

    from dimefm_edge.labels import LabelBank
    from dimefm_edge.preprocess import PreprocessSpec

_PREPARED = "prepared"  # what the graph's input is called behind the pixels
_FILTERS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "antialias": 1, "exclude_outside": 1},
    "bilinear": {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    "nearest": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
}


def add_head(model: onnx.ModelProto, bank: LabelBank, logit_scale: float) -> None:
    """Let a graph also give `logits`, (B, C): logit_scale * cosine to each class; in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = (logit_scale * bank.embeds.T).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weights, "class_embeds"))
    graph.node.append(
        helper.make_node("MatMul", [OUTPUT_NAME, "class_embeds"], [LOGITS_NAME], name="head")
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0]
    sides = [batch.dim_param or batch.dim_value, len(bank.classnames)]
    graph.output.append(helper.make_tensor_value_info(LOGITS_NAME, TensorProto.FLOAT, sides))


def take_pixels(model: onnx.ModelProto, preprocess: PreprocessSpec, *, resize: bool) -> None:
    """Let a graph take (B, H, W, 3) uint8 RGB pixels and prepare them itself; in place.

    Args:
        model: With the input `image`, (B, 3, S, S) float.
        preprocess: What `normalise_pixels` and `resize_image` would do.
        resize: Take any H and W; else both are S.
    """
    from onnx import TensorProto, helper

    graph, side = model.graph, preprocess.image_size
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == INPUT_NAME:
                node.input[i] = _PREPARED
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    sides = ["height", "width"] if resize else [side, side]
    shape = [batch.dim_param or batch.dim_value, *sides, 3]
    del graph.input[0]
    graph.input.insert(0, helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, shape))
    front = _Front(graph)
    x = front.add("Transpose", [front.add("Cast", [INPUT_NAME], to=TensorProto.FLOAT)],
                  perm=[0, 3, 1, 2])  # fmt: skip
    if resize:
        x = _resized(front, x, preprocess)
    std, mean = (np.array(v).reshape(1, 3, 1, 1) for v in (preprocess.std, preprocess.mean))
    x = front.add("Mul", [x, front.constant((1 / (255 * std)).astype(np.float32))])
    front.add("Sub", [x, front.constant((mean / std).astype(np.float32))], output=_PREPARED)
    front.close()


def normalised_to_pixels(
    images: npt.NDArray[np.float32], preprocess: PreprocessSpec
) -> npt.NDArray[np.uint8]:
    """Undo `normalise_pixels`: (N, 3, S, S) float32 -> (N, S, S, 3) uint8."""
    std, mean = (np.array(v).reshape(3, 1, 1) for v in (preprocess.std, preprocess.mean))
    levels = np.rint((images * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


class _Front:
    """Nodes to be put before a graph's own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._nodes: list[onnx.NodeProto] = []

    def add(
        self, op_type: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any
    ) -> str:
        from onnx import helper

        name = output or f"front_{len(self._nodes)}_{op_type}"
        self._nodes.append(
            helper.make_node(op_type, inputs, [name], name=f"front/{name}", **attributes)
        )
        return name

    def constant(self, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"front_constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def double(self, value: float) -> str:
        return self.constant(np.array(value, np.float64))

    def close(self) -> None:
        nodes = [*self._nodes, *self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(nodes)


def _resized(front: _Front, x: str, preprocess: PreprocessSpec) -> str:
    """(B, 3, H, W) in 0..255 -> (B, 3, S, S), rounded to whole levels as Pillow does."""
    side, mode = preprocess.image_size, preprocess.resize_mode
    sides = front.add("Slice", [front.add("Shape", [x]), front.ints(2), front.ints(4)])
    size = {"squash": _squashed, "shortest": _shortest, "longest": _longest}[mode](
        front, sides, side
    )
    x = front.add(
        "Resize",
        [x, "", "", size],
        axes=[2, 3],
        coordinate_transformation_mode="half_pixel",
        **_FILTERS[preprocess.interpolation],
    )
    bounds = [front.constant(np.array(v, np.float32)) for v in (0, 255)]
    x = front.add("Round", [front.add("Clip", [x, *bounds])])
    if mode == "shortest":
        extra = front.add("Sub", [size, front.ints(side, side)])
        start = _half_to_even(front, extra)
        end = front.add("Add", [start, front.ints(side, side)])
        x = front.add("Slice", [x, start, end, front.ints(2, 3)])
    if mode == "longest":
        missing = front.add("Sub", [front.ints(side, side), size])
        before = front.add("Div", [missing, front.ints(2)])
        pads = front.add("Concat", [before, front.add("Sub", [missing, before])], axis=0)
        fill = front.constant(np.array(preprocess.fill_color, np.float32))
        x = front.add("Pad", [x, pads, fill, front.ints(2, 3)])
    return x


def _squashed(front: _Front, sides: str, side: int) -> str:
    return front.ints(side, side)


def _shortest(front: _Front, sides: str, side: int) -> str:
    """int(side * size / shorter): exact in whole numbers."""
    shorter = front.add("ReduceMin", [sides], keepdims=1)
    return front.add("Div", [front.add("Mul", [sides, front.ints(side)]), shorter])


def _longest(front: _Front, sides: str, side: int) -> str:
    """max(1, round(size / (longer / side)))."""
    from onnx import TensorProto

    longer = front.add("ReduceMax", [sides], keepdims=1)
    real, top = (front.add("Cast", [v], to=TensorProto.DOUBLE) for v in (sides, longer))
    ratio = front.add("Div", [top, front.double(side)])
    near = front.add("Round", [front.add("Div", [real, ratio])])
    whole = front.add("Cast", [near], to=TensorProto.INT64)
    return front.add("Max", [whole, front.ints(1)])


def _half_to_even(front: _Front, whole: str) -> str:
    """round(whole / 2), as Python rounds."""
    from onnx import TensorProto

    real = front.add("Cast", [whole], to=TensorProto.DOUBLE)
    half = front.add("Round", [front.add("Mul", [real, front.double(0.5)])])
    return front.add("Cast", [half], to=TensorProto.INT64)
