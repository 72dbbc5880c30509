"""Which products of an int8 graph ONNX Runtime really runs in integers: read from its profile.

Q/DQ nodes only ask for integers; where ONNX Runtime has no kernel for what they stand around,
it multiplies in float, silently and slower than without them. What is asked for, and what stays
float, is told of any runtime's graph.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from dimefm_edge.export.parity import cpu_session
from dimefm_edge.export.patches import PATCHES
from dimefm_edge.export.quant_rules import PRODUCTS

if TYPE_CHECKING:
    import onnx

_INTEGER_KERNELS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger",
    "ConvInteger", "DynamicQuantizeMatMul",
)  # fmt: skip


_ATTENTIONS = ("Attention", "MultiHeadAttention")
_IMAGE_CHANNELS = 3
_STEM, _DEPTHWISE, _PAIR = "on the image", "depthwise", "of two activations"
_COMPUTED, _OTHER = "of computed weights", "of other kinds"
_LISTED = 5


@dataclass(frozen=True)
class QuantizedProducts:
    """Which products of a graph are asked to run in integers, by the names of its nodes."""

    quantized: tuple[str, ...]
    left_float: dict[str, str]
    """And of which kind each of them is."""

    def __str__(self) -> str:
        total = len(self.quantized) + len(self.left_float)
        said = f"{len(self.quantized)} of {total} products quantised"
        kinds = Counter(self.left_float.values())
        if kinds:
            said += "; left in float: "
            said += ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        others = [name for name, kind in self.left_float.items() if kind == _OTHER]
        if not others:
            return said
        more = ", ..." if len(others) > _LISTED else ""
        return f"{said} ({', '.join(others[:_LISTED])}{more})"


@dataclass(frozen=True)
class IntegerKernels:
    """How the products of a graph ran, by the names of its nodes."""

    counts: dict[str, int]
    """Integer kernels that ran, by kind."""
    fallen_back: tuple[str, ...]
    """Products with Q/DQ around them that ran in float all the same."""
    left_float: tuple[str, ...]
    """Products that were not quantised: attention, where the rules leave it in float."""

    @property
    def num_integer(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        said = f"products in integers: {self.num_integer}" + (f" ({kinds})" if kinds else "")
        said += f"; left in float: {len(self.left_float)}"
        fallen = self.fallen_back
        return said + (
            f"; fell back to float: {len(fallen)} ({', '.join(fallen)})" if fallen else ""
        )


def count_integer_kernels(path: Path, image: npt.NDArray[Any]) -> IntegerKernels:
    """Run an int8 graph once in ONNX Runtime on this CPU, as the runtime does, and see with what.

    Args:
        path: The `.onnx` file.
        image: (B, ...) as the graph takes it.
    """
    import onnx

    asked = quantized_products(onnx.load(str(path)))
    counts: dict[str, int] = {}
    in_integers = set()
    for kernel, name in _kernels(path, image):
        if kernel in _INTEGER_KERNELS:
            counts[kernel] = counts.get(kernel, 0) + 1
            in_integers.add(name)
    return IntegerKernels(
        dict(sorted(counts.items())),
        tuple(name for name in asked.quantized if name not in in_integers),
        tuple(asked.left_float),
    )


def quantized_products(model: onnx.ModelProto) -> QuantizedProducts:
    """Which products of a graph have Q/DQ around them, and what the others are."""
    dequantized = {
        node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    quantized, left_float = [], {}
    for node in model.graph.node:
        if node.op_type not in (*PRODUCTS, *_ATTENTIONS):
            continue
        if set(node.input[:2]) <= dequantized:
            quantized.append(node.name)
        else:
            left_float[node.name] = _kind(node, weights)
    return QuantizedProducts(tuple(quantized), left_float)


def _kind(node: onnx.NodeProto, weights: dict[str, tuple[int, ...]]) -> str:
    """What a product is that rules may leave in float."""
    if node.op_type in _ATTENTIONS:
        return "attention"
    shape = weights.get(node.input[1])
    if node.op_type == "MatMul" and not {*node.input} & {*weights}:
        return _PAIR
    if node.input[1].startswith(PATCHES):
        return _STEM
    if shape is None:
        return _OTHER if node.op_type == "MatMul" else _COMPUTED
    if node.op_type != "Conv":
        return _OTHER
    is_stem = shape[1] == _IMAGE_CHANNELS and all(
        a.name != "group" or a.i == 1 for a in node.attribute
    )
    return _STEM if is_stem else _DEPTHWISE if shape[1] == 1 else _OTHER


def _kernels(path: Path, image: npt.NDArray[Any]) -> list[tuple[str, str]]:
    """(kind, node) of every kernel that one run calls; nodes as the file names them."""
    with tempfile.TemporaryDirectory() as folder:
        session = cpu_session(str(path), precision="int8", profile=str(Path(folder, "profile")))
        session.run(None, {session.get_inputs()[0].name: image})
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return [
        (str(event["args"]["op_name"]), _node_name(str(event["name"])))
        for event in events
        if event.get("cat") == "Node" and str(event["name"]).endswith(_SUFFIX)
    ]


_SUFFIX = "_kernel_time"


def _node_name(event: str) -> str:
    """The file's name of a node; ONNX Runtime adds to those that it moved or fused."""
    return event.removesuffix(_SUFFIX).split("_token_")[0]
