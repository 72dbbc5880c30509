"""Students to ONNX: one file, checked against torch before anyone sees it.

A module is traced once (trace.py), written as its runtime likes it (graph_spec.py, lower.py),
given its precision (fp16.py, int8.py), its input and its head (ends.py), checked, run beside
the module itself (parity.py), and only then appears under its name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, lookup
from dimefm_edge.export.attention_patterns import (
    AttentionMatch,
    find_attentions,
    find_unmatched_softmaxes,
)
from dimefm_edge.export.ends import add_head, normalised_to_pixels, take_pixels
from dimefm_edge.export.fp16 import check_fp16_range, convert_to_fp16
from dimefm_edge.export.graph_spec import QUANTIZED, GraphSpec
from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.integer_kernels import (
    IntegerKernels,
    QuantizedProducts,
    count_integer_kernels,
    quantized_products,
)
from dimefm_edge.export.learned import MIN_LEARNED_COSINE, FakeQuantised, LearnedProduct
from dimefm_edge.export.parity import (
    ParityReport,
    check_parity,
    module_embeds,
    onnxruntime_errors,
)
from dimefm_edge.export.patches import patches_as_products
from dimefm_edge.export.quant_rules import QUANT_RULES, QuantRules
from dimefm_edge.export.rows import linears_on_rows
from dimefm_edge.export.tensorrt import require_graph, rules_for
from dimefm_edge.export.trace import silence, trace
from dimefm_edge.export.weight_only import WeightReport
from dimefm_edge.manifest import INPUT_NAME, OUTPUT_NAME
from dimefm_edge.targets.cpu import cpu_quant_rules

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from dimefm_edge.labels import LabelBank
    from dimefm_edge.preprocess import PreprocessSpec

logger = logging.getLogger(__name__)

_MAX_ONNX_BYTES = 2**31 - 1  # a protobuf message; more would need a second file
EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants
_MAX_RANGE_INPUTS = 16
_MAX_PARITY_IMAGES = 64


@dataclass(frozen=True)
class FusionReport:
    """What a graph holds as one node, or as the pattern that its runtime fuses."""

    attentions: int
    attention_forms: dict[str, int]
    """How many attentions have which form: a node's name, or decomposed."""
    unmatched_softmaxes: tuple[str, ...]
    """Softmax nodes that belong to no attention that could be told."""
    norms: int
    """LayerNormalization nodes."""
    gelus: int
    """Gelu nodes."""

    def __str__(self) -> str:
        forms = ", ".join(f"{n} as {form}" for form, n in self.attention_forms.items())
        said = f"attention: {forms or 'none'}; {self.norms} LayerNorm, {self.gelus} GELU nodes"
        loose = len(self.unmatched_softmaxes)
        return said + (f"; {loose} softmax outside any attention" if loose else "")


@dataclass(frozen=True)
class OnnxGraph:
    """A written graph: `op_counts` maps each operator to how often it occurs."""

    path: Path
    opset: int
    op_counts: dict[str, int]
    parity: ParityReport
    fusion: FusionReport
    attentions: tuple[AttentionMatch, ...]
    warnings: tuple[str, ...]
    """What its runtime would read and then run slowly or wrongly."""
    integer_kernels: IntegerKernels | None = None
    """What ran in integers here; of int8 for ONNX Runtime on a CPU such as this one."""
    quantized: QuantizedProducts | None = None
    """What is asked to run in 8 bits, and what is left in float; of int8 and fp8."""
    weights: WeightReport | None = None
    """What is stored in integers; of a text tower in int8 or int4."""

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "nodes": sum(self.op_counts.values()),
            "op_counts": self.op_counts,
            "fusion": asdict(self.fusion) | {"summary": str(self.fusion)},
            "attentions": [asdict(match) for match in self.attentions],
            "warnings": list(self.warnings),
            "integer_kernels": self.integer_kernels
            and asdict(self.integer_kernels) | {"summary": str(self.integer_kernels)},
            "quantized": self.quantized
            and asdict(self.quantized) | {"summary": str(self.quantized)},
            "weights": self.weights and asdict(self.weights) | {"summary": str(self.weights)},
        }


def export_onnx(
    student: nn.Module,
    path: Path,
    *,
    image_size: int,
    parity_images: npt.NDArray[np.float32],
    metadata: Mapping[str, str],
    spec: GraphSpec | None = None,
    preprocess: PreprocessSpec | None = None,
    head: LabelBank | None = None,
    logit_scale: float = 1.0,
) -> OnnxGraph:
    """Write a student, or any image tower, as ONNX and check that it answers as torch does.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed. One that is fake-quantised
            (quantize/) brings its ranges along and is written in int8.
        path: The file to write, which appears when its parity is proven; its folder exists.
        image_size: S.
        parity_images: (N, 3, S, S) float32, preprocessed real images; int8 ranges are
            calibrated on all of them, parity is checked on the first 64.
        metadata: Put into the graph's metadata.
        spec: Runtime, precision, opset, input; default: fp32 for TensorRT 10.3.
        preprocess: Mean, std and resizing; needed where the graph takes pixels.
        head: Class embeddings baked in: the graph gives `logits`, (B, C), too.
        logit_scale: Exponentiated; of the head.

    Raises:
        ExportError: If torch cannot export the student, the graph is not valid, or its runtime
            would not read it.
        ParityError: If the graph's embeddings are not the student's, or leave fp16's range.
    """
    import torch

    spec = spec or GraphSpec()
    _check_images(parity_images, image_size)
    learned = student.learned() if isinstance(student, FakeQuantised) else None
    expected = module_embeds(student, parity_images[:_MAX_PARITY_IMAGES])
    model = trace(
        student.deployed() if isinstance(student, FakeQuantised) else student,
        torch.zeros(spec.batch_size or EXAMPLE_BATCH, 3, image_size, image_size),
        input_name=INPUT_NAME,
        output_name=OUTPUT_NAME,
        opset=spec.opset,
        attention=spec.attention,
        has_dynamic_batch=spec.batch_size is None,
    )
    if _are_patches_products(spec):
        patches_as_products(model)
    if is_float_on_cpu(spec):
        linears_on_rows(model)
    model = in_precision(model, spec, parity_images, learned=learned)
    inputs: npt.NDArray[Any] = parity_images[: len(expected)]
    if head is not None:
        add_head(model, head, logit_scale)
    if spec.image_input != "float":
        if preprocess is None:
            raise ExportError("a graph that takes pixels needs to know how they are prepared")
        take_pixels(model, preprocess, resize=spec.image_input == "image")
        inputs = normalised_to_pixels(inputs, preprocess)
    return land_graph(
        model, path, expected, inputs=inputs, spec=spec, metadata=metadata,
        min_cosine=None if learned is None else MIN_LEARNED_COSINE[spec.precision],
    )  # fmt: skip


def _are_patches_products(spec: GraphSpec) -> bool:
    if spec.precision in QUANTIZED:
        return _quant_rules(spec).are_patches_products
    return is_float_on_cpu(spec)


def is_float_on_cpu(spec: GraphSpec) -> bool:
    """Whether a graph is for the fp32 kernels that patches.py and rows.py write for."""
    return spec.runtime == "onnxruntime" and spec.precision == "fp32" and spec.providers[0] == "cpu"


def in_precision(
    model: onnx.ModelProto,
    spec: GraphSpec,
    inputs: npt.NDArray[Any],
    *,
    kind: str = "image",
    learned: Sequence[LearnedProduct] | None = None,
) -> onnx.ModelProto:
    """Give a traced graph its precision.

    Args:
        model: fp32; changed, use what is returned.
        spec: Which precision.
        inputs: (N, ...) real ones, as the graph takes them: to look for what fp16 cannot hold.
        kind: What one of them is, for errors.
        learned: Ranges of 8 bits that training learned; default: calibration on the inputs.

    Raises:
        ParityError: If an activation leaves fp16's range.
    """
    if spec.precision == "fp16":
        with silence():
            model = convert_to_fp16(model)
        with onnxruntime_errors():
            peak = check_fp16_range(
                model, inputs[:_MAX_RANGE_INPUTS], kind=kind, batch_size=spec.batch_size or 1
            )
        logger.info("the largest fp16 activation is %.4g of 65504", peak)
    if spec.precision in QUANTIZED:
        rules = _quant_rules(spec)
        rules = replace(rules, calibration=spec.calibration or rules.calibration)
        with onnxruntime_errors():
            model = quantize_graph(model, inputs, rules=rules, learned=learned)
    return model


def land_graph(
    model: onnx.ModelProto,
    path: Path,
    expected: npt.NDArray[np.float32],
    *,
    inputs: npt.NDArray[Any],
    spec: GraphSpec,
    metadata: Mapping[str, str],
    kind: str = "image",
    min_cosine: float | None = None,
    precision: str | None = None,
) -> OnnxGraph:
    """Check a finished graph, and let it appear at `path` when its parity is proven.

    Args:
        model: Of one input; its first output is compared.
        path: The file to write.
        expected: (N, E) what the module says.
        inputs: (N, ...) of what.
        spec: Runtime, precision and batch.
        metadata: Put into the graph's metadata.
        kind: What one input is, for errors.
        min_cosine: Demanded of each embedding; default: what the precision, or its rules, allow.
        precision: What errors call it; default: the spec's.

    Raises:
        ExportError: If the graph is not valid, or its runtime would not read it.
        ParityError: If it answers otherwise.
    """
    import onnx

    _strip_debug_info(model)
    onnx.helper.set_model_props(model, dict(metadata))
    _check_graph(model)
    warnings = _runtime_warnings(model, spec)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    is_quantized, integers = spec.precision in QUANTIZED, None
    if is_quantized and min_cosine is None:
        min_cosine = _quant_rules(spec).min_cosine
    try:
        part.write_bytes(model.SerializeToString(deterministic=True))
        parity = check_parity(
            part, expected, inputs=inputs, precision=precision or spec.precision,
            batch_size=spec.batch_size, kind=kind, min_cosine=min_cosine,
        )  # fmt: skip
        if is_quantized and spec.quant_rules == cpu_quant_rules():
            rows = np.arange(spec.batch_size or 1) % len(inputs)
            with onnxruntime_errors():
                integers = count_integer_kernels(part, inputs[rows])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    attentions = tuple(find_attentions(model))
    fusion = report_fusion(model, attentions)
    return OnnxGraph(
        path, spec.opset, _count_ops(model), parity, fusion, attentions, warnings, integers,
        quantized_products(model) if is_quantized else None,
    )  # fmt: skip


def _quant_rules(spec: GraphSpec) -> QuantRules:
    return lookup(QUANT_RULES, spec.quant_rules or "", kind="rules of 8 bits")


def report_fusion(model: onnx.ModelProto, attentions: Sequence[AttentionMatch]) -> FusionReport:
    """What of a graph its runtime runs as one kernel."""
    ops = _count_ops(model)
    forms: dict[str, int] = {}
    for match in attentions:
        name = match.form if match.form == "decomposed" else f"{match.form} node"
        forms[name] = forms.get(name, 0) + 1
    return FusionReport(
        attentions=len(attentions),
        attention_forms=forms,
        unmatched_softmaxes=tuple(find_unmatched_softmaxes(model, attentions)),
        norms=ops.get("LayerNormalization", 0),
        gelus=ops.get("Gelu", 0),
    )


def _check_graph(model: onnx.ModelProto) -> None:
    import onnx

    if model.ByteSize() > _MAX_ONNX_BYTES:
        raise ExportError(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds 2 GiB",
            hint="export a smaller student, or --precision fp16",
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"torch exported a graph that is not valid ONNX: {reason}") from error


def _runtime_warnings(model: onnx.ModelProto, spec: GraphSpec) -> tuple[str, ...]:
    """What the target's runtime would run badly; what it would not read is an ExportError."""
    if spec.runtime == "onnxruntime" and spec.precision == "int8" and spec.providers[0] != "cpu":
        return (
            f"int8 is written for the CPU, by {spec.quant_rules}: '{spec.providers[0]}' takes "
            "other graphs and may leave all of it to the CPU; --precision fp16 is not changed",
        )
    if spec.runtime != "tensorrt" or spec.runtime_version is None:
        return ()
    try:
        rules_for(spec.runtime_version)
    except ExportError as unknown:
        return (unknown.args[0],)
    findings = require_graph(model, spec.runtime_version, precision=spec.precision)
    return tuple(map(str, findings))


def _check_images(images: npt.NDArray[np.float32], image_size: int) -> None:
    shape = (3, image_size, image_size)
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.float32:
        raise ExportError(
            f"parity images must be (N, 3, {image_size}, {image_size}) float32, "
            f"got {images.shape} {images.dtype}"
        )
    if not len(images) or not np.isfinite(images).all():
        raise ExportError("parity needs at least one image, without NaN or infinity")


def _strip_debug_info(model: onnx.ModelProto) -> None:
    """Drop stack traces: they hold paths of the machine that exported."""
    graph = model.graph
    for items in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.ClearField("metadata_props")
            item.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    graph.name = "student"


def _count_ops(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
