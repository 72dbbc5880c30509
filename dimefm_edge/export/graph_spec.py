"""How a graph is written: what its runtime wants, and what the user asked for.

TensorRT 10 fuses attention that it finds as MatMul, Softmax, MatMul, and the parser of JetPack
6's 10.3 reads opsets up to 20 (onnx-tensorrt's operators.md). ONNX Runtime runs its own
MultiHeadAttention, and ONNX's Attention of opset 23 from release 1.23 on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dimefm_edge.errors import UnsupportedExportError, lookup
from dimefm_edge.export.quant_rules import CalibrationMethod
from dimefm_edge.targets import Target
from dimefm_edge.targets.cpu import cpu_quant_rules

QUANTIZED = ("int8", "fp8")
"""Precisions that Q/DQ nodes say; calibrated on images, or as trained."""
PRECISIONS = ("fp32", "fp16", *QUANTIZED)
FP8_OPSET = 19
OPSETS = (18, 19, 20, 21, 22, 23)
DEFAULT_OPSET = 20
"""The newest that JetPack 6's TensorRT reads, and the first with GELU as one node."""
ImageInput = Literal["float", "uint8", "image"]


@dataclass(frozen=True)
class GraphSpec:
    """What is written."""

    runtime: str = "tensorrt"
    """A key of `RUNTIME_ATTENTION`."""
    runtime_version: str | None = None
    """Such as 10.3; None: any."""
    precision: str = "fp32"
    """A name in `PRECISIONS`."""
    opset: int = DEFAULT_OPSET
    attention: str = "decomposed"
    """A name in `lower.ATTENTION_FORMS`."""
    batch_size: int | None = None
    """Images per call; None leaves it to the caller."""
    image_input: ImageInput = "float"
    """float: (B, 3, S, S) preprocessed; uint8: (B, S, S, 3) pixels, normalised in the graph;
    image: (B, H, W, 3) pixels of any size, resized in the graph too."""
    providers: tuple[str, ...] = ("cpu",)
    """ONNX Runtime's execution providers to be tried, the preferred one first."""
    quant_rules: str | None = None
    """A name in `quant_rules.QUANT_RULES`; int8 and fp8 only."""
    sm: str | None = None
    """CUDA architecture that kernels of our own are compiled for, such as sm_110."""
    calibration: CalibrationMethod | None = None
    """minmax, percentile or mse; None: as the rules say. int8 and fp8 only."""

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(PRECISIONS), self.precision, kind="ONNX precision")
        if self.opset not in OPSETS:
            raise UnsupportedExportError(
                f"opset {self.opset} is not one of {', '.join(map(str, OPSETS))}",
                hint=f"leave it out: {DEFAULT_OPSET} is what TensorRT 10.3 and ONNX Runtime read",
            )
        allowed = lookup(RUNTIME_ATTENTION, self.runtime, kind="runtime")
        lookup(dict.fromkeys(allowed), self.attention, kind=f"attention form for {self.runtime}")
        if self.attention == "Attention" and self.opset < ATTENTION_OPSET:
            raise UnsupportedExportError(
                f"opset {self.opset} has no Attention operator: it came with {ATTENTION_OPSET}",
                hint=f"--opset {ATTENTION_OPSET}, or --attention decomposed",
            )
        if self.attention == "plugin":
            self._check_plugin()
        if self.precision == "fp8" and self.opset < FP8_OPSET:
            raise UnsupportedExportError(
                f"opset {self.opset} has no fp8: it came with {FP8_OPSET}",
                hint=f"leave it out: {DEFAULT_OPSET} is what TensorRT 10.3 reads",
            )
        if self.calibration is not None and self.precision not in QUANTIZED:
            raise UnsupportedExportError(
                f"--calibration {self.calibration} says how far int8 reaches, and the graph is "
                f"{self.precision}",
                hint="--precision int8, or drop --calibration",
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise UnsupportedExportError(f"batch size must be positive, got {self.batch_size}")

    def _check_plugin(self) -> None:
        """TensorRT's Python plugins carry PTX for one GPU, and know nothing of our Q/DQ."""
        hint = "leave out --attention plugin: TensorRT then fuses attention itself"
        if self.precision in QUANTIZED:
            raise UnsupportedExportError(
                f"--attention plugin is for fp32 and fp16 graphs, not {self.precision}", hint=hint
            )
        if self.sm is None:
            raise UnsupportedExportError(
                "--attention plugin compiles kernels for one GPU, and no target says which",
                hint="--target jetson-agx-thor",
            )
        version = self.runtime_version or "0.0"
        if tuple(map(int, version.split(".")[:2])) < PLUGIN_TENSORRT:
            raise UnsupportedExportError(
                f"TensorRT {self.runtime_version} has no ahead-of-time Python plugins, which "
                f"--attention plugin needs: {'.'.join(map(str, PLUGIN_TENSORRT))} has",
                hint=hint,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest, which has `precision` and `opset` elsewhere."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in ("precision", "opset")}


ATTENTION_OPSET = 23
PLUGIN_TENSORRT = (10, 16)
"""The oldest TensorRT known here (by its bindings) to have them: JetPack 7.2's."""
RUNTIME_ATTENTION: dict[str, tuple[str, ...]] = {
    "tensorrt": ("packed", "decomposed", "plugin"),
    "onnxruntime": ("MultiHeadAttention", "decomposed", "Attention"),
}
"""Forms of attention that a runtime takes, its default first: ONNX Runtime's fastest; in TensorRT
the one of the fewest kernels (lower.py)."""


def graph_spec(
    target: Target | None,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    attention: str | None = None,
    batch_size: int | None = None,
    image_input: ImageInput = "float",
    calibration: CalibrationMethod | None = None,
) -> GraphSpec:
    """What a target's runtime wants, but for what the user wants otherwise.

    Args:
        target: Where it will run; None: ONNX Runtime anywhere.
        precision: A name in `PRECISIONS`.
        opset: Default: the newest that is read everywhere, or what the attention needs.
        attention: Default: the runtime's fastest.
        batch_size: None leaves it to the caller.
        image_input: See `GraphSpec`.
        calibration: Of int8 and fp8; default: what the rules say.

    Raises:
        ExportError: If two of them contradict each other, or the target has no such precision.
        UnknownNameError: If a name is not known.
    """
    if precision in QUANTIZED and target is not None:
        require_precision(
            target, precision, hint=f"--precision {target.precision}, or another --target"
        )
    elif precision == "fp8":
        raise UnsupportedExportError(
            "fp8 is for TensorRT on GPUs that have it, and no target says so",
            hint="--target jetson-agx-thor",
        )
    runtime = "onnxruntime" if target is None else target.runtime
    attention = attention or RUNTIME_ATTENTION[runtime][0]
    default_opset = ATTENTION_OPSET if attention == "Attention" else DEFAULT_OPSET
    rules = None if target is None else target.quant_rules
    if runtime == "tensorrt":
        rules = "tensorrt-fp8" if precision == "fp8" else "tensorrt"
    return GraphSpec(
        runtime=runtime,
        runtime_version=None if target is None else target.tensorrt,
        precision=precision,
        opset=opset or default_opset,
        attention=attention,
        batch_size=batch_size,
        image_input=image_input,
        providers=("cpu",) if target is None else target.providers,
        sm=None if target is None else target.sm,
        quant_rules=(rules or cpu_quant_rules()) if precision in QUANTIZED else None,
        calibration=calibration,
    )


def require_precision(target: Target, precision: str, *, hint: str) -> None:
    """Refuse int8 or fp8 where the hardware multiplies none: it would run in float.

    Args:
        target: The device.
        precision: int8 or fp8.
        hint: What to do instead.

    Raises:
        UnsupportedExportError: If it does not.
    """
    if precision not in target.precisions:
        raise UnsupportedExportError(
            f"{target.name} has no {precision}: {target.title} runs {', '.join(target.precisions)}",
            hint=hint,
        )
