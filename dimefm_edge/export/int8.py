"""An fp32 ONNX graph in int8 or fp8: Q/DQ pairs where the rules of a runtime want them.

Between tracing and checking of an export (onnx.py). quant_rules.py says what is quantised,
calibration.py how far activations reach; here products are found and the pairs put in.
A float tensor x stands as scale * (q - zero_point). What no product reads stays float: the
residual stream, norms, softmax, and GELU but where both its neighbours are integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError
from dimefm_edge.export.calibration import PROBABILITIES, Range, calibrate
from dimefm_edge.export.graph_view import GraphView, drop_unread_weights, prepared
from dimefm_edge.export.learned import LearnedProduct, match_products
from dimefm_edge.export.quant_rules import FP8, FP8_MAX, GELU_SLOPE, QuantRules
from dimefm_edge.manifest import INPUT_NAME

if TYPE_CHECKING:
    import onnx

_AROUND_SOFTMAX = ("Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity", "Reshape", "Transpose")


@dataclass(frozen=True)
class _Product:
    """A node that multiplies, and which of its inputs are what."""

    node: onnx.NodeProto
    activations: tuple[int, ...]
    weight: int | None = None
    axis: int | None = None
    """Of the weight's output channels; None quantises the whole tensor alike."""
    bias: int | None = None
    output: str | None = None
    """Tensor that the node's integer kernel writes, when it writes integers."""


def quantize_graph(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    *,
    rules: QuantRules,
    learned: Sequence[LearnedProduct] | None = None,
) -> onnx.ModelProto:
    """Quantise the products of a graph, by calibration on images or by what training learned.

    Args:
        model: fp32, opset 13 or later, without subgraphs; input `image`. Not changed.
        images: (N, 3, S, S) float32, preprocessed, of the kind that the model will see.
        rules: One of `QUANT_RULES`.
        learned: Ranges of the products that were trained in int8; the others stay float.

    Returns:
        The same graph with QuantizeLinear and DequantizeLinear nodes around its products, int8
        weights and no float copy of them. Equal input makes an equal graph.

    Raises:
        ExportError: If there is nothing to quantise, no image, an activation is not finite, or
            the graph is not the one that was trained.
    """
    import onnx

    model = prepared(model)
    graph = GraphView(model)
    products = [p for node in model.graph.node if (p := _product(graph, node, rules)) is not None]
    if not products:
        raise ExportError(
            f"the graph has no product that {rules.name} runs in {rules.precision}",
            hint="dimefm-edge export RUN --precision fp16",
        )
    if learned is None:
        ranges = _calibrated(model, products, images, rules)
    else:
        products, ranges = _learned(graph, products, learned)
    _Rewriter(graph, ranges, rules).rewrite(products)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return inferred


def _calibrated(
    model: onnx.ModelProto,
    products: list[_Product],
    images: npt.NDArray[np.float32],
    rules: QuantRules,
) -> dict[str, Range]:
    known = {n.output[0]: PROBABILITIES for n in model.graph.node if n.op_type == "Softmax"}
    tensors = dict.fromkeys(name for p in products for name in _activations(p) if name not in known)
    return known | calibrate(model, images, tensors=list(tensors), method=rules.calibration)


def _learned(
    graph: GraphView, products: list[_Product], learned: Sequence[LearnedProduct]
) -> tuple[list[_Product], dict[str, Range]]:
    """The products that were trained in integers, and the ranges of their tensors."""
    trained = []
    ranges: dict[str, Range] = {}
    weights = [_channels_first(graph, product) for product in products]
    for product, ours in zip(products, match_products(weights, learned), strict=True):
        if ours is not None:
            trained.append(product)
            reaches = ours.inputs if ours.output is None else (*ours.inputs, ours.output)
            ranges.update(zip(_activations(product), reaches, strict=True))
    return trained, ranges


def _channels_first(graph: GraphView, product: _Product) -> npt.NDArray[np.float32] | None:
    """A product's weight as torch has it; None for one of two activations."""
    if product.weight is None:
        return None
    return np.moveaxis(graph.array(product.node.input[product.weight]), product.axis or 0, 0)


def _product(graph: GraphView, node: onnx.NodeProto, rules: QuantRules) -> _Product | None:
    """What to quantise of a node; None leaves it in float."""
    if node.op_type not in rules.op_types or node.domain not in ("", "ai.onnx"):
        return None
    constants = [i for i in range(2) if node.input[i] in graph.weights]
    if not constants and node.op_type == "MatMul":
        return _Product(node, (0, 1)) if _is_attention(graph, node, rules) else None
    # A constant on the left has its channels where integer kernels have rows: it stays float.
    if constants != [1] or not _is_plain(graph, node) or not _is_wanted(graph, node, rules):
        return None
    rank = len(graph.weights[node.input[1]].dims)
    axis = {"Conv": 0, "Gemm": 1 - int(_attribute(node, "transB", 0)), "MatMul": rank - 1}
    has_bias = rules.is_bias_quantized and len(node.input) > 2 and bool(node.input[2])
    return _Product(
        node, (0,), 1, axis[node.op_type] if rank > 1 else None, 2 if has_bias else None,
        _integer_output(graph, node) if node.op_type in rules.output_op_types else None,
    )  # fmt: skip


def _is_wanted(graph: GraphView, node: onnx.NodeProto, rules: QuantRules) -> bool:
    """Whether the rules quantise this kind of convolution; all else they do."""
    if node.op_type != "Conv":
        return True
    shape = graph.weights[node.input[1]].dims
    return rules.takes_convolution(shape, is_stem=node.input[0] == INPUT_NAME)


def _is_plain(graph: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is x times a constant plus, at most, one constant per channel."""
    if node.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
        factors = [_attribute(node, "alpha", 1.0)]
    else:
        bias = graph.weights.get(node.input[2])
        if bias is None or max(bias.dims, default=1) != np.prod(bias.dims):
            return False
        factors = [_attribute(node, "alpha", 1.0), _attribute(node, "beta", 1.0)]
    return factors.count(1.0) == len(factors) and not _attribute(node, "transA", 0)


def _is_attention(graph: GraphView, node: onnx.NodeProto, rules: QuantRules) -> bool:
    """Whether a product of two activations is part of an attention that the rules quantise."""
    if _leads_to(graph.producers.get(node.input[0]), graph, is_up=True):
        num_tokens, head_dim = graph.width(node.input[0]), graph.width(node.output[0])
    elif any(_leads_to(r, graph, is_up=False) for r in graph.readers.get(node.output[0], ())):
        num_tokens, head_dim = graph.width(node.output[0]), graph.width(node.input[0])
    else:
        return False
    return 0 < num_tokens <= rules.attention_max_tokens and head_dim in rules.attention_head_dims


def _leads_to(node: onnx.NodeProto | None, graph: GraphView, *, is_up: bool) -> bool:
    """Whether a softmax is reached through scales, masks, casts and views only."""
    if node is None or node.op_type not in (*_AROUND_SOFTMAX, "Softmax"):
        return False
    if node.op_type == "Softmax":
        return True
    near: list[onnx.NodeProto | None]
    if is_up:
        near = [graph.producers.get(name) for name in node.input]
    else:
        near = list(graph.readers.get(node.output[0], ()))
    return any(_leads_to(other, graph, is_up=is_up) for other in near)


def _integer_output(graph: GraphView, node: onnx.NodeProto) -> str | None:
    """The tensor to quantise behind a node: its clipping is free when it happens in integers."""
    name = node.output[0]
    reader = graph.only_reader(name)
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        name = reader.output[0]
    return None if name in graph.outputs else name


def _activations(product: _Product) -> Iterator[str]:
    """Names of the tensors that get a Q/DQ pair for a product."""
    for index in product.activations:
        yield product.node.input[index]
    if product.output is not None:
        yield product.output


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else float(found.f or found.i)


class _Rewriter:
    """Puts Q/DQ pairs and integer weights into a graph: each tensor is quantised once."""

    def __init__(self, graph: GraphView, ranges: dict[str, Range], rules: QuantRules) -> None:
        self.graph = graph
        self.ranges = ranges
        self.rules = rules
        self.before: dict[str, list[onnx.NodeProto]] = {}  # new nodes, by the name of an old one
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.scales: dict[str, np.float32] = {}  # of dequantised activations
        self.dequantized: dict[Any, str] = {}  # names, by what was quantised
        self.quantized: dict[
            str, tuple[str, ...]
        ] = {}  # what DequantizeLinear reads, by what it makes
        self.labels: set[str] = set()

    def rewrite(self, products: list[_Product]) -> None:
        for product in products:
            if product.output is not None:
                self._quantize_output(product.output)
        for product in products:
            nodes = self.before.setdefault(product.node.name, [])
            for index in product.activations:
                product.node.input[index] = self._activation(product.node.input[index], nodes)
            if product.weight is not None:
                self._constants(product, nodes)
        if self.rules.has_integer_sigmoid:
            for node in self.graph.proto.node:
                if node.op_type == "Gelu" and self._is_between_integers(node):
                    self._gelu_in_integers(node)
        nodes = [
            new
            for node in self.graph.proto.node
            for new in (*self.before.get(node.name, ()), node, *self.after.get(node.name, ()))
        ]
        del self.graph.proto.node[:]
        self.graph.proto.node.extend(nodes)
        drop_unread_weights(self.graph.proto)

    def _quantize_output(self, name: str) -> None:
        """All readers of what an integer kernel writes read the integers."""
        nodes = self.after.setdefault(self.graph.producers[name].name, [])
        dequantized = self._activation(name, nodes)
        for node in self.graph.readers.get(name, ()):
            for index, other in enumerate(node.input):
                if other == name:
                    node.input[index] = dequantized

    def _is_between_integers(self, node: onnx.NodeProto) -> bool:
        """Whether a node reads integers and all that read it want integers."""
        name = node.output[0]
        are_others = any(name in other.input for other in self.graph.readers.get(name, ()))
        is_wanted = name in self.dequantized and name not in self.graph.outputs
        return node.input[0] in self.scales and is_wanted and not are_others

    def _gelu_in_integers(self, node: onnx.NodeProto) -> None:
        """The runtime looks the sigmoid of an integer up in a table, and multiplies integers."""
        from onnx.helper import make_node

        source, name = node.input[0], node.output[0]
        quantized, _, zero_point = self.quantized[source]
        steep_scale = self._store(
            f"{name}_steep_scale", self.scales[source] * np.float32(GELU_SLOPE)
        )
        share = self._parameters(f"{name}_share", *_affine(PROBABILITIES, self.rules))
        parts = ("steep", "sigmoid", "share_quantized", "share_dequantized")
        steep, sigmoid, stored, made = (f"{name}_{part}" for part in parts)
        self.before.setdefault(node.name, []).extend((
            make_node("DequantizeLinear", [quantized, steep_scale, zero_point], [steep], steep),
            make_node("Sigmoid", [steep], [sigmoid], sigmoid),
            make_node("QuantizeLinear", [sigmoid, *share], [stored], stored),
            make_node("DequantizeLinear", [stored, *share], [made], made),
        ))  # fmt: skip
        node.op_type = "Mul"
        node.input.append(made)
        del node.attribute[:]

    def _activation(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """A tensor's dequantised name; the pair is made where it is first needed."""
        from onnx.helper import make_node

        if name in self.scales:  # it is one
            return name
        if name not in self.dequantized:
            scale, zero_point = _affine(self.ranges[name], self.rules)
            parameters = self._parameters(name, scale, zero_point)
            quantized, made = f"{name}_quantized", f"{name}_dequantized"
            nodes += [
                make_node("QuantizeLinear", [name, *parameters], [quantized], quantized),
                make_node("DequantizeLinear", [quantized, *parameters], [made], made),
            ]
            self.dequantized[name] = made
            self.scales[made] = scale
            self.quantized[made] = (quantized, *parameters)
        return self.dequantized[name]

    def _constants(self, product: _Product, nodes: list[onnx.NodeProto]) -> None:
        """A product's weight and bias in integers."""
        node = product.node
        assert product.weight is not None
        weight = self.graph.array(node.input[product.weight])
        axis = product.axis if self.rules.is_weight_per_channel else None
        scale = _weight_scale(weight, axis, self.rules)
        if product.bias is not None:
            bias = self.graph.array(node.input[product.bias]).ravel()
            input_scale = self.scales[node.input[product.activations[0]]]
            # A channel of tiny weights must not push its bias out of 32 bits.
            scale = np.maximum(scale, np.abs(bias) / (input_scale * np.float32(2**30)))
            node.input[product.bias] = self._constant(
                node.input[product.bias], bias, input_scale * scale, 0, "int32", nodes
            )
        node.input[product.weight] = self._constant(
            node.input[product.weight], weight, scale, axis, self.rules.weight, nodes
        )

    def _constant(
        self,
        name: str,
        values: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        axis: int | None,
        dtype: str,
        nodes: list[onnx.NodeProto],
    ) -> str:
        """A weight's dequantised name; weights that are shared are stored once."""
        from onnx.helper import make_node

        key = (name, axis, scale.tobytes())
        if key not in self.dequantized:
            label = name if name not in self.labels else f"{name}_{len(self.labels)}"
            self.labels.add(label)
            made = f"{label}_dequantized"
            zero_point = 128 if dtype == "uint8" else 0
            zeros = np.full(scale.shape, zero_point).astype(_numpy_type(dtype))
            parameters = self._parameters(label, scale, zeros)
            stored = _stored(values / _along(scale, values.ndim, axis), zero_point, dtype)
            inputs = [self._store(f"{label}_quantized", stored), *parameters]
            # ONNX ignores the axis of a scale that is a single number.
            nodes.append(make_node("DequantizeLinear", inputs, [made], made, axis=axis or 0))
            self.dequantized[key] = made
        return self.dequantized[key]

    def _parameters(self, label: str, scale: Any, zero_point: Any) -> list[str]:
        return [
            self._store(f"{label}_scale", scale),
            self._store(f"{label}_zero_point", zero_point),
        ]

    def _store(self, name: str, values: Any) -> str:
        from onnx.numpy_helper import from_array

        self.graph.proto.initializer.append(from_array(np.asarray(values), name))
        return name


def _affine(reach: Range, rules: QuantRules) -> tuple[np.float32, npt.NDArray[Any]]:
    """Scale and zero point of an activation: 0 is always exact."""
    if rules.is_symmetric:
        largest = FP8_MAX if rules.activation == FP8 else np.iinfo(rules.activation).max
        step = max(-reach.low, reach.high) / largest
        return np.float32(step or 1.0), np.array(0).astype(_numpy_type(rules.activation))
    limits = np.iinfo(rules.activation)
    scale = np.float32((reach.high - reach.low) / (limits.max - limits.min) or 1.0)
    return scale, np.round(limits.min - reach.low / scale).astype(rules.activation)


def _numpy_type(name: str) -> Any:
    """numpy itself has no float of 8 bits; onnx brings one."""
    if name != FP8:
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.float8_e4m3fn)


def _stored(scaled: npt.NDArray[np.float32], zero_point: int, dtype: str) -> npt.NDArray[Any]:
    """A weight over its scale, in the numbers that the file holds."""
    if dtype == FP8:
        return scaled.clip(-FP8_MAX, FP8_MAX).astype(_numpy_type(dtype))
    limits = np.iinfo(dtype)
    return (np.round(scaled) + zero_point).clip(limits.min, limits.max).astype(dtype)


def _weight_scale(
    weight: npt.NDArray[np.float32], axis: int | None, rules: QuantRules
) -> npt.NDArray[np.float32]:
    """One scale per output channel; () when `axis` is None."""
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    peak = np.asarray(np.abs(weight).max(axis=others, initial=0))
    return np.where(peak > 0, peak, 1).astype(np.float32) / np.float32(rules.weight_max)


def _along(scale: npt.NDArray[np.float32], rank: int, axis: int | None) -> Any:
    """A vector of scales shaped to divide a tensor along an axis."""
    return scale if axis is None else np.expand_dims(scale, [i for i in range(rank) if i != axis])
