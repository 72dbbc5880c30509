"""Which products of an int8 graph ONNX Runtime really runs in integers: read from its profile.

Q/DQ nodes only ask for integers; where ONNX Runtime has no kernel for what they stand around,
it multiplies in float, silently and slower than without them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dimefm_edge.export.parity import cpu_session
from dimefm_edge.export.quant_rules import PRODUCTS

_INTEGER_KERNELS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger",
    "ConvInteger", "DynamicQuantizeMatMul",
)  # fmt: skip


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

    model = onnx.load(str(path))
    dequantized = {
        node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    quantized = {node.name for node in products if set(node.input[:2]) <= dequantized}
    counts: dict[str, int] = {}
    in_integers = set()
    for kernel, name in _kernels(path, image):
        if kernel in _INTEGER_KERNELS:
            counts[kernel] = counts.get(kernel, 0) + 1
            in_integers.add(name)
    names = [node.name for node in products]
    return IntegerKernels(
        dict(sorted(counts.items())),
        tuple(name for name in names if name in quantized and name not in in_integers),
        tuple(name for name in names if name not in quantized),
    )


def _kernels(path: Path, image: npt.NDArray[Any]) -> list[tuple[str, str]]:
    """(kind, node) of every kernel that one run calls; nodes as the file names them."""
    with tempfile.TemporaryDirectory() as folder:
        session = cpu_session(str(path), profile=str(Path(folder, "profile")))
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
