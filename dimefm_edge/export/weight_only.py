"""Weights in int8 or int4, the arithmetic as it was: what makes a text tower fit a device.

A label is embedded once, so a text tower costs its size and hardly its time. Products become ONNX
Runtime's `MatMulNBits`, which takes each weight's blocks with a scale each, and the table of words
its `GatherBlockQuantized`, in int8 even where products are int4: both run on its CPU provider.
ONNX Runtime's own quantiser (onnxruntime.quantization.matmul_nbits_quantizer) writes the same
layout; it takes each block's largest value for the scale's, where int4 here looks for the scale of
the least error, and importing it changes the logging of the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError
from dimefm_edge.export.graph_view import GraphView, drop_unread_weights
from dimefm_edge.export.lower import ORT_DOMAIN

if TYPE_CHECKING:
    import onnx

_LEAST_BLOCK = 16  # of both operators
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: its own int8 kernels, a third faster for one
# sentence of ViT-B/32 than rounding weights back to fp32, and 2e-4 of a cosine less exact
_ROWS_AT_ONCE = 4096
_SHRUNK = np.linspace(0.97, 0.76, 8, dtype=np.float32)
_TABLE_BITS = 8


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored, and how near the answers must then be."""

    bits: int
    block_size: int
    """Values that share a scale."""
    min_cosine: float


WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    "int8": WeightFormat(8, 128, 0.99),
    "int4": WeightFormat(4, 32, 0.95),
}


@dataclass(frozen=True)
class WeightReport:
    """What of a graph's weights became integers."""

    products: int
    tables: int
    """Gathers from a table, such as the words' embeddings."""
    float_products: tuple[str, ...]
    """Products with a constant that stayed as they were: too small, or no matrix."""
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        said = (
            f"{self.products} products and {self.tables} tables in integers, weights "
            f"{self.bytes_before / 2**20:.2f} to {self.bytes_after / 2**20:.2f} MiB"
        )
        left = len(self.float_products)
        return said + (f"; {left} products stayed float" if left else "")


def require_weight_only(precision: str, *, runtime: str) -> WeightFormat:
    """The format, if a runtime has its operators.

    Args:
        precision: A name in `WEIGHT_FORMATS`.
        runtime: The target's.

    Raises:
        ExportError: If it has not.
    """
    if runtime != "onnxruntime":
        raise ExportError(
            f"{runtime} has no MatMulNBits and no GatherBlockQuantized, which a text tower with "
            f"{precision} weights needs: they are ONNX Runtime's",
            hint="--text-precision fp16, or a target that runs ONNX Runtime, such as --target "
            "raspberry-pi-5",
        )
    return WEIGHT_FORMATS[precision]


def quantize_weights(model: onnx.ModelProto, weights: WeightFormat) -> WeightReport:
    """Store a graph's weights in few bits, in place.

    Args:
        model: fp32. Quantised: each MatMul by a constant matrix of 16 rows or more, each Gather
            of a constant matrix's rows.
        weights: How.
    """
    from onnx import helper

    view = GraphView(model)
    before = _weight_bytes(model)
    stored: dict[tuple[str, str], list[str]] = {}
    counts = {"MatMul": 0, "Gather": 0}
    left: list[str] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in view.weights:
            if not _is_matrix(view, node.input[1]):
                left.append(node.name or node.output[0])
                continue
            _to_matmul_nbits(view, node, weights, stored)
        elif node.op_type == "Gather" and _is_table(view, node):
            _to_gather_quantised(view, node, stored)
        else:
            continue
        counts["MatMul" if node.op_type == "MatMulNBits" else "Gather"] += 1
    drop_unread_weights(model.graph)
    if not any(entry.domain == ORT_DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(ORT_DOMAIN, 1))
    return WeightReport(
        counts["MatMul"], counts["Gather"], tuple(left), before, _weight_bytes(model)
    )


def quantize_blocks(
    rows: npt.NDArray[np.float32], *, bits: int, block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round each block of each row to `scale * (code - 2 ** (bits - 1))`.

    Args:
        rows: (R, K); K is filled up with zeros to whole blocks.
        bits: 4 or 8; with 4 the scale of the least squared error is looked for.
        block_size: Values that share a scale.

    Returns:
        Codes, (R, blocks, block_size) in 0 to 2 ** bits - 1, and scales, (R, blocks).
    """
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block_size)))
    blocks = filled.reshape(len(rows), -1, block_size)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(blocks.shape[:2], np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        codes[part], scales[part] = _best_scales(blocks[part], bits)
    return codes, scales


def _best_scales(
    blocks: npt.NDArray[np.float32], bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    half: int = 2 ** (bits - 1)
    peaks = np.abs(blocks).argmax(axis=2)
    extreme = np.take_along_axis(blocks, peaks[..., None], axis=2)[..., 0]
    # Codes reach one further down than up: the extreme goes there, whatever its sign.
    widest = (extreme / -half).astype(np.float32)
    tried = [widest]
    if bits < _TABLE_BITS:
        tried += [widest * shrink for shrink in _SHRUNK]
    best = np.full(widest.shape, np.inf, np.float32)
    codes: npt.NDArray[np.uint8] = np.full(blocks.shape, half, np.uint8)
    scales = np.zeros_like(widest)
    for scale in tried:
        whole = np.where(scale == 0, 1, scale)[..., None]
        rounded = np.rint(blocks / whole).clip(-half, half - 1)
        error = np.square(rounded * whole - blocks).sum(axis=2)
        is_better = error < best
        best = np.where(is_better, error, best)
        scales = np.where(is_better, scale, scales)
        codes = np.where(is_better[..., None], (rounded + half).astype(np.uint8), codes)
    return codes, scales


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes as they lie in memory: of 4 bits two a byte, the first one in the low half."""
    if bits == _TABLE_BITS:
        return codes
    packed: npt.NDArray[np.uint8] = codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def _to_matmul_nbits(
    view: GraphView, node: onnx.NodeProto, weights: WeightFormat,
    stored: dict[tuple[str, str], list[str]],
) -> None:  # fmt: skip
    matrix = node.input[1]
    inner, width = view.weights[matrix].dims
    block_size = _block_size(inner, weights.block_size)
    names = stored.get((matrix, "MatMul"))
    if names is None:
        codes, scales = quantize_blocks(
            view.array(matrix).T, bits=weights.bits, block_size=block_size
        )
        names = _store(view, matrix, pack_codes(codes, weights.bits), scales)
        stored[matrix, "MatMul"] = names
    _become(
        node, "MatMulNBits", [node.input[0], *names],
        K=inner, N=width, bits=weights.bits, block_size=block_size,
        accuracy_level=_INT8_ACTIVATIONS,
    )  # fmt: skip


def _to_gather_quantised(
    view: GraphView, node: onnx.NodeProto, stored: dict[tuple[str, str], list[str]]
) -> None:
    table = node.input[0]
    width = view.weights[table].dims[1]
    block_size = _block_size(width, WEIGHT_FORMATS["int8"].block_size)
    names = stored.get((table, "Gather"))
    if names is None:
        codes, scales = quantize_blocks(view.array(table), bits=_TABLE_BITS, block_size=block_size)
        whole = codes.reshape(len(codes), -1)[:, :width]
        names = stored[table, "Gather"] = _store(view, f"{table}_rows", whole, scales)
    _become(
        node, "GatherBlockQuantized", [names[0], node.input[1], names[1]],
        bits=_TABLE_BITS, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _become(node: onnx.NodeProto, op_type: str, inputs: list[str], **attributes: Any) -> None:
    from onnx import helper

    node.op_type, node.domain = op_type, ORT_DOMAIN
    del node.input[:]
    del node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())


def _store(
    view: GraphView, name: str, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]
) -> list[str]:
    from onnx import numpy_helper

    names = [f"{name}_codes", f"{name}_scales"]
    for stored, values in zip(names, (packed, scales), strict=True):
        view.proto.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), stored))
    return names


def _block_size(inner: int, wanted: int) -> int:
    """The wanted one, or the largest power of two that a short row fills."""
    return int(min(wanted, max(_LEAST_BLOCK, 2 ** (int(inner).bit_length() - 1))))


def _is_matrix(view: GraphView, name: str) -> bool:
    tensor = view.weights[name]
    return _is_float(tensor) and len(tensor.dims) == 2 and tensor.dims[0] >= _LEAST_BLOCK


def _is_table(view: GraphView, node: onnx.NodeProto) -> bool:
    tensor = view.weights.get(node.input[0])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return (
        tensor is not None and _is_float(tensor) and len(tensor.dims) == 2
        and tensor.dims[1] >= _LEAST_BLOCK and axis == 0
    )  # fmt: skip


def _is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == tensor.FLOAT


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)
