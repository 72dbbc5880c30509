"""An ONNX graph in fp16 that keeps its accuracy: what needs fp32's range stays in fp32.

Weights, matrix products and activations become fp16; input, output, norms, softmax and the
final L2 normalisation stay fp32, with casts between. A norm costs two casts that engines
fuse; without them sums of squares leave fp16's range (TensorRT issues 2709, 2564).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ParityError
from dimefm_edge.export.parity import cpu_session

if TYPE_CHECKING:
    import onnx

# Kept in fp32: their sums and exponentials leave fp16's range or its 11 bits.
_FP32_OPS = (
    "Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "LpNormalization", "RMSNormalization",
    "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "GlobalAveragePool", "Pow",
    "Sqrt", "Reciprocal", "Exp", "Resize",
)  # fmt: skip
_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto's numbers, which never change
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")


def convert_to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a graph; its input and output stay fp32.

    Args:
        model: fp32, without subgraphs; changed, use what is returned.
    """
    import onnx
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # Else the converter takes the norms' own weights for tensors that it has made fp16.
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    half = float16.convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_FP32_OPS],
        node_block_list=_after_last_product(model),
    )
    OnnxModel.graph_topological_sort(half.graph, is_deterministic=True)
    _drop_cast_pairs(half)
    half.graph.ClearField("value_info")
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(half)
    return inferred


def check_fp16_range(
    model: onnx.ModelProto, inputs: npt.NDArray[Any], *, kind: str = "image", batch_size: int = 1
) -> float:
    """Look for values that fp16 cannot hold, in every tensor of the graph.

    ONNX Runtime's CPU kernels compute much of an fp16 graph in fp32, where a GPU would not:
    equal answers here do not prove that nothing overflows there. So each fp16 tensor is read.

    Args:
        model: As `convert_to_fp16` returns it.
        inputs: (N, ...) images or tokens; one at a time is run.
        kind: What one of them is, for errors.
        batch_size: The graph's, where it is fixed: the input is then repeated.

    Returns:
        The largest magnitude found; 65504 is the limit.

    Raises:
        ParityError: If a tensor overflows or is not a number.
    """
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in probe.graph.value_info}
    made = [(name, node) for node in probe.graph.node for name in node.output]
    watched = {name: node for name, node in made if kinds.get(name) == _FLOAT16}
    probe.graph.output.extend(v for v in probe.graph.value_info if v.name in watched)
    session = cpu_session(probe.SerializeToString())
    largest = 0.0
    input_name = model.graph.input[0].name
    for i in range(len(inputs)):
        batch = inputs[i : i + 1].repeat(batch_size, axis=0)
        values = session.run(list(watched), {input_name: batch})
        for (name, node), value in zip(watched.items(), values, strict=True):
            peak = float(np.abs(value).max(initial=0))
            if not np.isfinite(peak):
                raise ParityError(
                    f"the model leaves fp16's range (65504) on {kind} {i} of {len(inputs)}: "
                    f"{node.op_type} '{name}' gives {peak}",
                    hint="dimefm-edge export RUN --precision fp32",
                )
            largest = max(largest, peak)
    return largest


def _after_last_product(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes between the last matrix product and the output: the L2 norm."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    pending = [output.name for output in model.graph.output]
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.name in found or node.op_type in (*_PRODUCTS, "Shape"):
            continue
        found.add(node.name)
        pending.extend(node.input)
    return sorted(found)


def _drop_cast_pairs(model: onnx.ModelProto) -> None:
    """Read a tensor itself where it is cast to fp16 and straight back to fp32."""
    graph = model.graph
    nodes = list(graph.node)
    producers = {name: node for node in nodes for name in node.output}
    alias: dict[str, str] = {}  # nodes are sorted, so a source is final when it is stored
    for node in nodes:
        before = producers.get(node.input[0]) if _cast_type(node) == _FLOAT else None
        if before is not None and _cast_type(before) == _FLOAT16:
            alias[node.output[0]] = alias.get(before.input[0], before.input[0])
    for output in graph.output:
        source = alias.get(output.name, "")
        if source in producers:
            # The output keeps its name, so what computes it takes that name.
            alias = {k: output.name if v == source else v for k, v in alias.items()}
            alias[source] = output.name
            _rename(producers[source].output, {source: output.name})
            nodes.remove(producers[output.name])
            del alias[output.name]
    for node in nodes:
        _rename(node.input, alias)
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _cast_type(node: onnx.NodeProto) -> int | None:
    if node.op_type != "Cast":
        return None
    return next(int(a.i) for a in node.attribute if a.name == "to")


def _rename(names: Any, alias: Mapping[str, str]) -> None:
    """Replace names in a protobuf list, in place."""
    for i, name in enumerate(names):
        names[i] = alias.get(name, name)
