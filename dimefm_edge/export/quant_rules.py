"""Which tensors are quantised, and to what: one set of rules per runtime, as data.

Read by int8.py, which does what the rules say. A graph made by the rules of one runtime answers
on any, but only its own runs all of its products in integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CalibrationMethod = Literal["minmax", "percentile", "mse"]
IntType = Literal["int8", "uint8"]


@dataclass(frozen=True)
class QuantRules:
    """How one runtime wants its Q/DQ graphs."""

    name: str
    runtime: str
    """onnxruntime or tensorrt."""
    activation: IntType
    is_symmetric: bool
    """Zero point 0 (int8 only): activations are clipped at the same magnitude on both sides."""
    weight: IntType
    """uint8 weights have zero point 128: the same values, another kernel."""
    op_types: tuple[str, ...]
    """Operators whose product of activations with constant weights runs in integers."""
    output_op_types: tuple[str, ...]
    """Of these, those whose kernel also answers in integers: Q/DQ follows them."""
    is_attention_quantized: bool
    """Whether both products of a spelt-out attention are quantised too."""
    is_bias_quantized: bool
    """int32 biases, as the kernels of Conv and Gemm add them; else they stay float."""
    sources: tuple[str, ...]
    weight_bits: int = 8
    """7 keeps u8 x s8 pairs below 2**15, for kernels that add two of them in 16 bits."""
    calibration: CalibrationMethod = "percentile"

    @property
    def weight_max(self) -> int:
        """The largest weight, its zero point taken off; the smallest is as far below 0."""
        return int(2 ** (self.weight_bits - 1)) - 1


_PRODUCTS = ("Conv", "Gemm", "MatMul")

_ORT_DOC = "onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_ORT_KERNELS = (
    "MatMul answers in float from integers (MatMulIntegerToFloat), Gemm too (QGemm), Conv only in "
    "integers (QLinearConv): ONNX Runtime's qdq_transformer/selectors_actions"
)

QUANT_RULES: dict[str, QuantRules] = {
    rules.name: rules
    for rules in (
        QuantRules(
            name="onnxruntime-x86",
            runtime="onnxruntime",
            activation="uint8",
            is_symmetric=False,
            weight="int8",
            op_types=_PRODUCTS,
            output_op_types=("Conv",),
            is_attention_quantized=False,
            is_bias_quantized=True,
            sources=(),
        ),
        QuantRules(
            name="onnxruntime-x86-avx2",
            runtime="onnxruntime",
            activation="uint8",
            is_symmetric=False,
            weight="uint8",
            op_types=_PRODUCTS,
            output_op_types=("Conv",),
            is_attention_quantized=False,
            is_bias_quantized=True,
            sources=(),
        ),
        QuantRules(
            name="onnxruntime-arm",
            runtime="onnxruntime",
            activation="int8",
            is_symmetric=False,
            weight="int8",
            op_types=_PRODUCTS,
            output_op_types=("Conv",),
            is_attention_quantized=False,
            is_bias_quantized=True,
            sources=(),
        ),
        QuantRules(
            name="tensorrt",
            runtime="tensorrt",
            activation="int8",
            is_symmetric=True,
            weight="int8",
            op_types=_PRODUCTS,
            output_op_types=(),
            is_attention_quantized=True,
            is_bias_quantized=False,
            sources=(),
        ),
    )
}
