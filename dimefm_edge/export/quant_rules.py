"""Which tensors are quantised, and to what: one set of rules per runtime, as data.

Read by int8.py, which does what they say. A graph made by the rules of one runtime answers on
any, but only its own runs all of its products in integers.

Why the defaults are what they are, measured by benchmarks/bench_int8.py on an AMD EPYC of Zen 2
(AVX2 without VNNI), ONNX Runtime 1.32, one thread, batch 1, against quantize_static too; cosines
are to the fp32 graph's embeddings of real images that were not calibrated on, speeds are those of
the least disturbed run (on a busy machine fp32 suffers more, and int8 looks better):

- uint8 weights (zero point 128) take u8 x u8 kernels, which do not saturate, in the same time.
  s8 weights saturate (cosine down to 0.98 to the graph as it is written), and in 7 bits they lose
  accuracy (ViT-B/32: 0.99943 for 0.99976) without being faster.
- Zen 2 issues one integer and two float vector products a cycle, so int8 and fp32 have the same
  peak (53e9 multiply-adds a second). What int8 wins it wins from memory: 1.24x for ViT-B/32's
  50 tokens, 1.03x for ViT-S/16's 197, which keep the units busy in fp32 as well.
- Attention in integers gains -1 to 4% in ONNX Runtime and loses accuracy (ViT-S/16: 0.9984 for
  0.9999), so it stays float.
- Depthwise convolutions in integers are slow in ONNX Runtime on x86: a hybrid student runs at
  0.64x of fp32 with them and at 0.94x without. They hold few weights. So int8 makes a hybrid
  smaller on such a CPU, not faster.
- QLinearConv answers in 8 bits only, which for the stem is a ViT's residual stream: it is two
  fifths of the loss (1 - cosine) of the sample teacher. A ViT's patches become a MatMul first
  (patches.py), which answers in float: on a Zen 5 with VNNI a ViT-B/32 is then 3.18 times as fast
  as in fp32 for 2.96, a ViT-S/16 2.37 for 2.30, and as near (1 - cosine 2.4e-4 and 1.1e-4 both
  ways). Other stems stay float.
- Q/DQ on residual adds, norms and GELU, as quantize_static puts them, win no time and lose
  accuracy: 0.9970 for 0.9998 on the sample teacher, 0.912 on ViT-B/32 with random weights.
- GELU between two convolutions, x * sigmoid(1.702 x) in integers: ONNX Runtime looks the sigmoid up
  in a table, half the time of going to float and back (0.49 for 1.04 ns an element on a Xeon with
  VNNI), and hybrids are as near to fp32 as they were (1 - cosine 4.1e-4 both ways). By Arm's rules,
  which quantise more convolutions, they were less near (9.4e-4 for 7.7e-4), and no Arm was timed:
  there it is off. Behind a MatMul, which answers in float, it would win nothing.
- MatMul + Add takes as long as Reshape, Gemm with an int32 bias, Reshape: MatMul stays MatMul.
- Percentile (one value in 1e5 clipped on each side), MSE and min-max are alike by the rules of
  ONNX Runtime; by TensorRT's, on the sample teacher, they give 0.99888, 0.99883 and 0.99852.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

CalibrationMethod = Literal["minmax", "percentile", "mse"]
QuantType = Literal["int8", "uint8", "float8_e4m3fn"]
FP8: QuantType = "float8_e4m3fn"
"""Called so by torch and numpy alike."""
FP8_MAX = 448

PRODUCTS = ("Conv", "Gemm", "MatMul")
GELU_SLOPE = 1.702
"""GELU is x * sigmoid(1.702 x), within 0.021 (arXiv 1606.08415)."""


@dataclass(frozen=True)
class QuantRules:
    """How one runtime wants its Q/DQ graphs."""

    name: str
    activation: QuantType
    weight: QuantType
    """uint8 weights have zero point 128: the same values, another kernel."""
    is_symmetric: bool
    """Activations have zero point 0 (not uint8): clipped at one magnitude on both sides."""
    attention_head_dims: tuple[int, ...]
    """Sizes of head at which both products of a spelt-out attention are quantised too."""
    is_depthwise_quantized: bool
    """Whether convolutions with one input channel per group are."""
    is_stem_quantized: bool
    """Whether convolutions of the image itself are: a ViT's patches, a CNN's first layer."""
    are_patches_products: bool
    """Whether a ViT's patch embedding is written as a MatMul (patches.py), and quantised."""
    is_bias_quantized: bool
    """int32 biases, as the kernels of Conv and Gemm add them; else they stay float."""
    output_op_types: tuple[str, ...]
    """Operators whose integer kernel answers in integers only: Q/DQ follows them too."""
    min_cosine: float
    """What an export demands of each image's embedding, to fp32; trained and random weights of
    every family gave 0.993 and more for ONNX Runtime, 0.990 and more for TensorRT."""
    sources: tuple[str, ...]
    attention_max_tokens: int = 512
    op_types: tuple[str, ...] = PRODUCTS
    """Operators whose products of activations with constant weights are quantised."""
    weight_bits: int = 8
    """7 keeps two u8 x s8 products below 2**15, for kernels that add them in 16 bits."""
    calibration: CalibrationMethod = "percentile"
    is_weight_per_channel: bool = True
    """Whether each output channel has a scale of its own, or the weight one in all."""
    has_integer_sigmoid: bool = False
    """Whether a GELU between two integer kernels is made of the integer sigmoid."""
    conv_min_channels: int = 1
    """Convolutions with fewer, in a group or out, stay float."""
    conv_max_taps: float = math.inf
    """Convolutions with a larger kernel, height times width, stay float."""

    @property
    def precision(self) -> str:
        """What the graph is then called: int8 or fp8."""
        return "fp8" if self.activation == FP8 else "int8"

    @property
    def weight_max(self) -> int:
        """The largest weight, its zero point taken off; the smallest is as far below 0."""
        return FP8_MAX if self.weight == FP8 else int(2 ** (self.weight_bits - 1)) - 1

    def takes_convolution(self, shape: Sequence[int], *, is_stem: bool) -> bool:
        """Whether a convolution is quantised.

        Args:
            shape: Of its weight: (O, I / groups, kernel...).
            is_stem: Whether it reads the image.
        """
        channels_out, channels_in, *kernel = shape
        if is_stem and not self.is_stem_quantized:
            return False
        if channels_in == 1 and channels_out > 1 and not (is_stem or self.is_depthwise_quantized):
            return False
        narrowest = channels_out if is_stem else min(channels_out, channels_in)
        return narrowest >= self.conv_min_channels and math.prod(kernel) <= self.conv_max_taps


_ORT_DOC = "onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_ORT_FUSIONS = (
    "which Q/DQ patterns become QLinearConv, QGemm and MatMulIntegerToFloat: ONNX Runtime's "
    "core/optimizer/qdq_transformer; checked here by export/integer_kernels.py"
)
_TENSORRT_DOC = (
    "docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "work-quantized-types.html and quantized-types-explicit-quantization.html"
)


def _onnxruntime(
    name: str, activation: QuantType, weight: QuantType, *sources: str, is_depthwise: bool = False
) -> QuantRules:
    return QuantRules(
        name=name,
        activation=activation,
        weight=weight,
        is_symmetric=False,
        attention_head_dims=(),
        is_depthwise_quantized=is_depthwise,
        is_stem_quantized=False,
        are_patches_products=True,
        is_bias_quantized=True,
        output_op_types=("Conv",),
        has_integer_sigmoid=not is_depthwise,
        min_cosine=0.99,
        sources=(*sources, _ORT_FUSIONS),
    )


_TENSORRT = QuantRules(
    name="tensorrt",
    activation="int8",
    weight="int8",
    is_symmetric=True,
    attention_head_dims=(16, 32, 64),
    is_depthwise_quantized=True,
    is_stem_quantized=True,
    are_patches_products=False,
    is_bias_quantized=False,
    output_op_types=(),
    min_cosine=0.98,
    sources=(
        f"symmetric, per-tensor activations, per-channel weights, int8 weights behind a "
        f"DequantizeLinear: {_TENSORRT_DOC}",
        "Q/DQ before the first product of an attention, after its softmax and around the "
        "second, heads of 16, 32 or 64 and up to 512 tokens: NVIDIA/TensorRT issue 4167",
        "nothing on residual adds and norms, where int8 collapses a ViT: onnxsim PR 1742",
    ),
)

_TENSORRT_FP8 = replace(
    _TENSORRT,
    name="tensorrt-fp8",
    activation=FP8,
    weight=FP8,
    calibration="minmax",
    is_weight_per_channel=False,
    is_depthwise_quantized=False,
    is_stem_quantized=False,
    conv_min_channels=17,
    conv_max_taps=32,
    sources=(
        "x is cast to e4m3 after x / scale is clipped at 448, one scale per tensor: "
        "docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
        "quantized-types-schemes.html",
        "convolutions of 16 channels or fewer, or of more than 32 taps, have no fp8 kernel: "
        "NVIDIA/Model-Optimizer, modelopt/onnx/quantization, find_nodes_from_convs_to_exclude",
        "Q/DQ around attention as in int8; heads up to 64: TensorRT 10.6's release notes",
        "per channel, weights gain where a kernel has it (10.6, Hopper): not used",
    ),
)

_RULES = (
    _onnxruntime(
        "onnxruntime-x86", "uint8", "int8",
        f"u8 activations and s8 weights on x86 with VNNI: {_ORT_DOC}, section Data type selection",
    ),
    _onnxruntime(
        "onnxruntime-x86-avx2", "uint8", "uint8",
        f"u8 x s8 saturates on AVX2 and AVX-512 without VNNI; try u8 x u8 or 7 bits: {_ORT_DOC}, "
        "section When and why do I need to try U8U8; measured here, see above",
    ),
    _onnxruntime(
        "onnxruntime-arm", "int8", "int8",
        f"s8 activations and weights on Arm: {_ORT_DOC}; not measured on a device",
        "depthwise s8 kernels for Arm: ONNX Runtime's core/mlas/lib/aarch64/"
        "DepthwiseQConvSymS8KernelNeon.S",
        is_depthwise=True,
    ),
    _TENSORRT,
    _TENSORRT_FP8,
)  # fmt: skip

QUANT_RULES: dict[str, QuantRules] = {rules.name: rules for rules in _RULES}
"""By name; `targets.cpu.cpu_quant_rules` says which suit this CPU."""
