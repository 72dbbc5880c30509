"""The shapes of all values of an ONNX graph, also past operators that onnx has no shapes of.

Weights are not read: sizes are worked out of small constants only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.errors import InputError, MissingExtraError

ATTENTIONS = {"Attention", "MultiHeadAttention"}
DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Whose operators are known by their names."""
_KEEP_SHAPE = {
    "MultiHeadAttention", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "SkipLayerNormalization",
}  # fmt: skip
"""Of com.microsoft, which onnx knows no shapes of: the first output is like the first input."""

_SMALL = 64
"""Elements of a value that may be a shape, or part of one."""
_FOLDS = 200
"""How often sizes may depend on shapes that depend on sizes: a few times in each block."""

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path, *, batch: int = 1, image_size: int | None = None) -> tuple[Any, Shapes]:
    """Read an ONNX file without the weights beside it.

    Args:
        path: The file.
        batch: Taken where the first dimension of an input is free.
        image_size: Taken where its other dimensions are free, in pixels.

    Returns:
        The graph, and the shape of each of its values that can be known, by name.

    Raises:
        InputError: If the file is missing or not ONNX, has no input or one whose shape stays
            unknown or is empty, or if shapes do not fit one another.
        MissingExtraError: If the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "estimating an ONNX file needs the onnx package",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no nodes")
    except FileNotFoundError as error:
        raise InputError(f"no ONNX file at {path}") from error
    except Exception as error:  # protobuf's DecodeError is not exported by name
        raise InputError(f"{path} is not an ONNX file: {error}") from error
    free = _fix_inputs(model, batch=batch, image_size=image_size, path=path)
    known = _shapes(model.graph, free, batch)
    for value in model.graph.output:  # of another batch, maybe
        value.type.tensor_type.ClearField("shape")
    try:
        shaped = _infer(model)
    except Exception as error:
        hint = "--batch-size as the graph was made for" if batch > 1 else None
        raise InputError(f"{path}: shapes do not fit: {str(error).strip()}", hint=hint) from error
    known |= {k: v for k, v in _shapes(shaped, {}, None).items() if k not in known or v}
    return model.graph, known


def _infer(model: Any) -> Any:
    """A graph with all shapes that can be known, also past operators that onnx has none of."""
    import onnx

    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    for weight in shaped.graph.initializer:  # each pass copies all: sizes are in small ones only
        if math.prod(weight.dims) > _SMALL:
            empty = onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
            weight.CopyFrom(empty)
    for node in shaped.graph.node:
        is_packed = node.op_type in ATTENTIONS and not (len(node.input) > 2 and node.input[1])
        if node.domain == DOMAINS[2] and node.op_type in _KEEP_SHAPE and not is_packed:
            stand_in = onnx.helper.make_node("Identity", node.input[:1], node.output[:1])
            node.CopyFrom(stand_in)
    failed: set[str] = set()
    for _ in range(_FOLDS):
        del shaped.graph.value_info[:]
        shaped = onnx.shape_inference.infer_shapes(shaped, strict_mode=True, data_prop=True)
        if not _fold_sizes(shaped, failed):
            break
    return shaped.graph


def _fold_sizes(model: Any, failed: set[str]) -> bool:
    """Work out arithmetic on known shapes, such as what a Resize scales by; whether any was.

    Outputs that are none, or too large, are added to `failed`.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    small = [w for w in graph.initializer if math.prod(w.dims) <= _SMALL and not w.external_data]
    values: dict[str, Any] = {w.name: onnx.numpy_helper.to_array(w) for w in small}
    shapes = _shapes(graph, {}, None)
    has_folded = False
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        inputs = [name for name in node.input if name]
        is_shape = node.op_type == "Shape" and inputs[0] in shapes
        if (
            not inputs
            or node.output[0] in failed
            or not (is_shape or all(name in values for name in inputs))
        ):
            continue
        feed = {i: np.empty(shapes[i]) if is_shape else values[i] for i in inputs}
        kinds = [onnx.helper.make_tensor_value_info(i, 0, None) for i in (*inputs, node.output[0])]
        alone = onnx.helper.make_graph([node], "sizes", kinds[:-1], kinds[-1:])
        try:
            sizes = onnx.helper.make_model(alone, opset_imports=model.opset_import)
            results: Any = ReferenceEvaluator(sizes).run(None, feed)
            value = np.asarray(results[0])
        except Exception:  # of a kind that is not there: its shape stays unknown
            failed.add(node.output[0])
            continue
        if value.size > _SMALL:
            failed.add(node.output[0])
            continue
        values[node.output[0]] = value
        tensor = onnx.numpy_helper.from_array(value)
        node.CopyFrom(onnx.helper.make_node("Constant", [], node.output[:1], value=tensor))
        has_folded = True
    return has_folded


def _fix_inputs(model: Any, *, batch: int, image_size: int | None, path: Path) -> dict[str, int]:
    """Give every input a size; returns what each free dimension was set to."""
    free: dict[str, int] = {}
    weights = {w.name for w in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if not inputs:
        raise InputError(f"{path} takes no input: there is nothing to estimate")
    for value in inputs:
        if not value.type.tensor_type.HasField("shape"):
            raise InputError(f"{path}: input {value.name} has no shape")
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value == 0:
                raise InputError(f"{path}: dimension {axis} of input {value.name} is 0")
            if dim.HasField("dim_value") and dim.dim_value > 0 and not (axis == 0 and batch > 1):
                continue
            size = batch if axis == 0 else image_size
            if size is None:
                raise InputError(
                    f"{path}: dimension {axis} of input {value.name} has no fixed size",
                    hint="--image-size PIXELS",
                )
            if dim.dim_param:
                free[dim.dim_param] = size
            dim.dim_value = size
    return free


def _shapes(graph: Any, free: dict[str, int], batch: int | None) -> Shapes:
    """Shapes by value name; free dimensions by name, else left out unless `batch` is given."""
    shapes = {w.name: tuple(w.dims) for w in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if not value.type.tensor_type.HasField("shape"):
            continue
        dims = [
            d.dim_value if d.HasField("dim_value") else free.get(d.dim_param, batch)
            for d in value.type.tensor_type.shape.dim
        ]
        if None not in dims:
            shapes[value.name] = tuple(int(d) for d in dims if d is not None)
    return shapes
