"""Will TensorRT read a graph, and fuse its attention? Told from the graph, before a device is.

Rules are data, one file per version in tensorrt_versions/, from onnx-tensorrt's operator tables.
Errors are what its parser refuses; warnings are what it reads and then runs slowly or wrongly:
fused attention (NVIDIA/TensorRT issues 4167 and 3243, and NVIDIA's "Fused Attention" page),
layer norms spelt out in fp16 (issues 2709, 2564), Q/DQ on the residual stream (onnxsim PR 1742),
casts between Q/DQ and products (NVIDIA/Model-Optimizer PR 1289).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dimefm_edge.errors import ExportError
from dimefm_edge.export.attention_patterns import (
    AttentionMatch,
    find_attentions,
    find_unmatched_softmaxes,
    node_name,
)

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

if TYPE_CHECKING:
    import onnx

_FOLDER = Path(__file__).parent / "tensorrt_versions"
# onnx.TensorProto's numbers, which never change.
_TYPES = {
    1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64",
    16: "bf16", 17: "fp8", 22: "int4", 23: "fp4",
}  # fmt: skip
_FP16_HEAD_DIMS = range(16, 257, 8)
_INT8_HEAD_DIMS = (16, 32, 64)
_INT8_MAX_TOKENS = 512
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_LISTED = 5
_FIXES = {
    ("Resize", "antialias"): "export with --input uint8: the device resizes the image, as it does "
    "for any other graph, and hands over pixels",
}
"""What to do about an attribute, where another value of it would give other answers."""


@dataclass(frozen=True)
class TensorRtRules:
    """What one version's ONNX parser reads."""

    version: str
    max_opset: int
    max_ir_version: int
    is_strongly_typed_only: bool
    operators: dict[str, frozenset[str]]
    """Operator -> types that its first input may have."""
    constant_inputs: dict[str, tuple[int, ...]]
    first_output_only: frozenset[str]
    attributes: dict[str, dict[str, tuple[Any, ...]]]
    """Operator -> attribute -> values it may have."""
    ranks: dict[str, tuple[tuple[int, ...], int]]
    """Operator -> inputs by place, and the rank they must have."""


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT would refuse (error) or run badly (warning)."""

    severity: Literal["error", "warning"]
    node: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what} ({self.why}); {self.fix}"


def rules_for(version: str) -> TensorRtRules:
    """The rules of the newest known version that is not newer than the one asked for.

    Args:
        version: Such as 10.3, 10.3.0 or 11.

    Raises:
        ExportError: If it is older than any that is known.
    """
    known = sorted((path.stem for path in _FOLDER.glob("*.toml")), key=_numbers)
    older = [name for name in known if _numbers(name) <= _numbers(version)]
    if not older:
        raise ExportError(
            f"what TensorRT {version} reads is not known here; the oldest known is {known[0]}",
            hint="a target with JetPack 6 or newer; or try it on the device: dimefm-edge build",
        )
    return _load_rules(older[-1])


def check_graph(
    model: onnx.ModelProto, version: str, *, precision: str, plugins: Sequence[str] = ()
) -> list[Finding]:
    """Look for what TensorRT would refuse, or run slowly or wrongly.

    Args:
        model: The graph as it will be built; not changed.
        version: The device's TensorRT, such as 10.3.
        precision: What the engine will run in: fp32, fp16, bf16, int8 or fp8.
        plugins: Operators, as `domain::Name`, that plugins on the device provide.

    Returns:
        Errors first, each kind in the graph's order.

    Raises:
        ExportError: If nothing is known about so old a version.
    """
    rules, graph = rules_for(version), _Graph(model)
    found = list(_check_model(model, rules))
    known = {*plugins, *(f"{function.domain}::{function.name}" for function in model.functions)}
    for node in graph.nodes:
        found += _check_node(node, graph, rules, known)
    matches = find_attentions(model)
    for match in matches:
        found += _check_attention(match, graph, precision)
    found += [
        _warning(name, "a softmax that is part of no attention", "it runs as a kernel of its own",
                 "nothing, unless it should be one: see find_attentions")
        for name in find_unmatched_softmaxes(model, matches)
    ]  # fmt: skip
    if precision != "fp32":
        found += _check_norms(graph)
    return sorted(found, key=lambda finding: finding.severity != "error")


def require_graph(
    model: onnx.ModelProto, version: str, *, precision: str, plugins: Sequence[str] = ()
) -> list[Finding]:
    """`check_graph`, but errors are raised.

    Returns:
        The warnings.

    Raises:
        ExportError: If TensorRT would refuse the graph; it names the nodes and the fix.
    """
    findings = check_graph(model, version, precision=precision, plugins=plugins)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f"; and {len(errors) - _LISTED} more" if len(errors) > _LISTED else ""
        raise ExportError(
            f"TensorRT {version} cannot read this graph: "
            + "; ".join(f"{e.node}: {e.what} ({e.why})" for e in errors[:_LISTED]) + more,
            hint=errors[0].fix,
        )  # fmt: skip
    return findings


class _Graph:
    """A graph's nodes, with the type and rank of each tensor and who makes it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(model).graph
        except Exception:  # over 2 GiB: what is written there remains
            graph = model.graph
        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.constants = {t.name for t in graph.initializer} | {
            node.output[0] for node in self.nodes if node.op_type == "Constant"
        }
        self.types = {t.name: t.data_type for t in graph.initializer}
        self.ranks = {t.name: len(t.dims) for t in graph.initializer}
        self.zeros = {t.name for t in graph.initializer if _is_zero(t)}
        self.scalars = {t.name for t in graph.initializer if not t.dims or list(t.dims) == [1]}
        for value in (*graph.value_info, *graph.input, *graph.output):
            self.types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                self.ranks[value.name] = len(value.type.tensor_type.shape.dim)

    def made_by(self, name: str) -> str:
        """Operator that makes a tensor; empty for inputs and constants."""
        node = self.producers.get(name)
        return "" if node is None else str(node.op_type)


def _check_model(model: onnx.ModelProto, rules: TensorRtRules) -> Iterator[Finding]:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > rules.max_opset:
            yield Finding(
                "error", "graph", f"opset {opset.version}",
                f"TensorRT {rules.version} reads up to {rules.max_opset}",
                f"export it for this target, or with opset {rules.max_opset}",
            )  # fmt: skip
    if model.ir_version > rules.max_ir_version:
        yield _warning(
            "graph", f"ONNX IR version {model.ir_version}",
            f"the parser of TensorRT {rules.version} is built for {rules.max_ir_version}",
            "set model.ir_version lower; newer fields of the format are not used here",
        )  # fmt: skip


def _check_node(
    node: onnx.NodeProto, graph: _Graph, rules: TensorRtRules, known: set[str]
) -> Iterator[Finding]:
    name, op = node_name(node), str(node.op_type)
    domain = "" if node.domain == "ai.onnx" else str(node.domain)
    if f"{domain}::{op}" in known:  # a plugin, or a function of the graph's own
        return
    allowed = rules.operators.get(op) if not domain else None
    by = f"TensorRT {rules.version}"
    if allowed is None:
        shown = f"{domain}::{op}" if domain else op
        yield _error(
            name, f"operator {shown}", f"{by} has none",
            "export it for TensorRT rather than ONNX Runtime" if domain
            else "another student family, or an opset where it is spelt out",
        )  # fmt: skip
        return
    kind = _TYPES.get(graph.types.get(node.input[0], 0)) if node.input else None
    if kind is not None and kind not in allowed and not (kind == "fp64" and "fp32" in allowed):
        yield _error(name, f"{op} of {kind}", f"{by} has it for {', '.join(sorted(allowed))}",
                     "cast before it, or export another precision")  # fmt: skip
    for place in rules.constant_inputs.get(op, ()):
        if len(node.input) > place and node.input[place] not in graph.constants | {""}:
            yield _error(name, f"input {place} of {op} is computed", f"{by} wants a constant",
                         "export it with fixed axes")  # fmt: skip
    if op in rules.first_output_only and any(node.output[1:]):
        yield _error(name, f"more than one output of {op}", f"{by} gives the first only",
                     "leave the others out")  # fmt: skip
    for attribute in node.attribute:
        values = rules.attributes.get(op, {}).get(attribute.name)
        if values is not None and not set(_values(attribute)) <= set(values):
            yield _error(
                name, f"{op} with {attribute.name} {', '.join(map(str, _values(attribute)))}",
                f"{by} has {', '.join(map(str, values))}",
                _FIXES.get((op, attribute.name), f"write {op} with {attribute.name} {values[0]}"),
            )  # fmt: skip
    places, rank = rules.ranks.get(op, ((), 0))
    for place in places:
        found = graph.ranks.get(node.input[place]) if len(node.input) > place else None
        if found is not None and found != rank:
            yield _error(name, f"input {place} of {op} has {found} dimensions",
                         f"{by} wants {rank}", f"reshape it to {rank} dimensions")  # fmt: skip
    if op in _QDQ:
        yield from _check_qdq(node, graph, by)


def _check_qdq(node: onnx.NodeProto, graph: _Graph, by: str) -> Iterator[Finding]:
    """Symmetric, per tensor for activations (TensorRT, "Working with Quantized Types")."""
    name = node_name(node)
    if len(node.input) > 2 and node.input[2] and node.input[2] not in graph.zeros:
        yield _error(name, "a zero point that is not zero", f"{by} quantises symmetrically",
                     "quantise symmetrically: int8, zero point 0")  # fmt: skip
    # int8 weights are stored quantised, or as fp32 with a Q in front of the DQ.
    source = node.input[0]
    if node.op_type == "DequantizeLinear" and graph.made_by(source) == "QuantizeLinear":
        source = graph.producers[source].input[0]
    is_activation = source not in graph.constants
    if is_activation and node.input[1] in graph.constants - graph.scalars:
        yield _error(name, "an activation quantised per channel", f"{by} wants one scale",
                     "quantise activations per tensor, weights per channel")  # fmt: skip


def _check_attention(match: AttentionMatch, graph: _Graph, precision: str) -> Iterator[Finding]:
    name, lost = match.nodes[0], "it is not fused, and slower"
    kinds = {node_name(node): str(node.op_type) for node in graph.nodes}
    ops = [kinds[n] for n in match.nodes]
    if match.form == "decomposed" and {"Mul", "Div"} & set(
        ops[ops.index("MatMul") : ops.index("Softmax")]
    ):
        yield _warning(name, "scores are scaled after the first product",
                       "TensorRT fuses it where queries or keys are scaled before it",
                       "scale the queries")  # fmt: skip
    if precision == "fp32" or match.head_dim is None:
        return
    parts = (match.has_qdq_before_bmm1, match.has_qdq_after_softmax, match.has_qdq_around_bmm2)
    if not any(parts):
        if match.head_dim not in _FP16_HEAD_DIMS:
            yield _warning(name, f"head_dim {match.head_dim}", lost,
                           "head_dim 16 to 256, a multiple of 8")  # fmt: skip
        return
    if not all(parts):
        missing = [
            text for is_there, text in zip(
                parts, ("before the first product", "after the softmax",
                        "around the second product"), strict=True,
            ) if not is_there
        ]  # fmt: skip
        yield _warning(name, f"no Q/DQ {' nor '.join(missing)}",
                       "half quantised, it is fused neither in int8 nor in fp16",
                       "quantise the whole attention, or none of it")  # fmt: skip
    if match.head_dim not in _INT8_HEAD_DIMS:
        yield _warning(name, f"int8 attention with head_dim {match.head_dim}", lost,
                       "head_dim 16, 32 or 64, or leave its Q/DQ out")  # fmt: skip
    if match.num_tokens is not None and match.num_tokens > _INT8_MAX_TOKENS:
        yield _warning(name, f"int8 attention over {match.num_tokens} tokens", lost,
                       f"at most {_INT8_MAX_TOKENS} tokens, or leave its Q/DQ out")  # fmt: skip


def _check_norms(graph: _Graph) -> Iterator[Finding]:
    """Layer norms spelt out, and Q/DQ where they cost accuracy or gain nothing."""
    for node in graph.nodes:
        name, makers = node_name(node), [graph.made_by(i) for i in node.input]
        if node.op_type == "Sqrt" and _is_variance(node, graph):
            yield _warning(name, "a layer norm spelt out", "its squares overflow fp16",
                           "opset 17 or later, where it is one node")  # fmt: skip
        is_residual = node.op_type == "Add" and not graph.constants & set(node.input)
        if "DequantizeLinear" in makers and (is_residual or node.op_type == "LayerNormalization"):
            where = "the residual stream" if is_residual else "a layer norm's input"
            yield _warning(name, f"Q/DQ on {where}", "it can cost most of the accuracy",
                           "quantise inputs of products only")  # fmt: skip
        if node.op_type == "Cast" and "DequantizeLinear" in makers:
            yield _warning(name, "a cast behind a DequantizeLinear",
                           "it hides the Q/DQ from the product that it is for",
                           "scales of the product's own type: fp16 ones, opset 19")  # fmt: skip


def _is_variance(sqrt: onnx.NodeProto, graph: _Graph) -> bool:
    """Whether a root is of a mean of squares, with or without an epsilon."""
    node = graph.producers.get(sqrt.input[0])
    if node is not None and node.op_type == "Add":
        node = next((graph.producers[n] for n in node.input if n in graph.producers), None)
    return (
        node is not None
        and node.op_type == "ReduceMean"
        and graph.made_by(node.input[0]) in ("Pow", "Mul")
    )


@functools.cache
def _load_rules(name: str) -> TensorRtRules:
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    base = _load_rules(values["base"]) if "base" in values else None
    operators = dict(base.operators) if base else {}
    for types, names in values.get("operators", {}).items():
        operators.update(dict.fromkeys(names.split(), frozenset(types.split())))
    constants = dict(base.constant_inputs) if base else {}
    constants.update({op: tuple(p) for op, p in values.get("constant_inputs", {}).items()})
    for op in values.get("dropped_constant_inputs", ()):
        del constants[op]
    attributes = dict(base.attributes) if base else {}
    for op, allowed in values.get("attributes", {}).items():
        attributes[op] = {name: tuple(some) for name, some in allowed.items()}
    ranks = dict(base.ranks) if base else {}
    ranks.update({op: (tuple(r["inputs"]), r["rank"]) for op, r in values.get("ranks", {}).items()})
    return TensorRtRules(
        version=values["version"],
        max_opset=values["max_opset"],
        max_ir_version=values["max_ir_version"],
        is_strongly_typed_only=values.get("is_strongly_typed_only", False),
        operators=operators,
        constant_inputs=constants,
        first_output_only=(base.first_output_only if base else frozenset())
        | frozenset(values.get("outputs", {}).get("first_only", ())),
        attributes=attributes,
        ranks=ranks,
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _is_zero(tensor: onnx.TensorProto) -> bool:
    import onnx

    return tensor.name != "" and not onnx.numpy_helper.to_array(tensor).any()


def _values(attribute: onnx.AttributeProto) -> list[Any]:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    values = value if isinstance(value, list | tuple) else [value]
    return [v.decode() if isinstance(v, bytes) else v for v in values]


def _error(node: str, what: str, why: str, fix: str) -> Finding:
    return Finding("error", node, what, why, fix)


def _warning(node: str, what: str, why: str, fix: str) -> Finding:
    return Finding("warning", node, what, why, fix)
