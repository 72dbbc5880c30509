"""What kind of work an operator does, by the name that its runtime gives it."""

from __future__ import annotations

from collections.abc import Iterable

KINDS: dict[str, tuple[str, ...]] = {
    "attention": (
        "MultiHeadAttention", "Attention", "GroupQueryAttention", "QAttention",
        "DecoderMaskedMultiHeadAttention", "PackedMultiHeadAttention",
        # OpenVINO
        "ScaledDotProductAttention", "ScaledDotProductAttentionWithKVCache", "PagedAttention",
        # PyTorch
        "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math", "_transform_bias_rescale_qkv",
        "_native_multi_head_attention",
    ),
    "gemm": (
        "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits", "TransposeMatMul",
        "GemmFastGelu", "Einsum",
        "FullyConnected", "QKVProjection",
        "mm", "addmm", "bmm", "baddbmm", "linear", "einsum", "mkl_linear", "_linear_pointwise",
        "_mkl_linear", "dot", "mv", "addmv",
        "gemm", "MatrixMultiply",
    ),
    "convolution": (
        "Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "ConvTranspose",
        "NhwcConv",
        "Convolution", "GroupConvolution", "Deconvolution",
        "mkldnn_convolution", "thnn_conv2d", "_slow_conv2d_forward", "_conv_depthwise2d",
        "_convolution_pointwise", "convolution", "conv2d",
        "CaskConvolution", "CaskDeconvolution",
    ),
    "norm": (
        "LayerNormalization", "SkipLayerNormalization", "BatchNormalization", "LpNormalization",
        "GroupNormalization", "InstanceNormalization", "RMSNormalization",
        "SimplifiedLayerNormalization", "QOrderedLayerNormalization", "ReduceL2",
        "MVN", "NormalizeL2", "RMS", "RMSNorm", "GroupNorm",
        "native_layer_norm", "native_batch_norm", "native_group_norm", "linalg_vector_norm",
        "norm", "batch_norm", "_batch_norm_impl_index", "layer_norm",
    ),
    "softmax": (
        "Softmax", "QLinearSoftmax", "LogSoftmax",
        "SoftMax", "_softmax", "_log_softmax", "softmax", "SoftMaxV2",
    ),
    "activation": (
        "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Sigmoid", "HardSwish", "Relu",
        "HardSigmoid", "Tanh", "QLinearSigmoid", "QLinearLeakyRelu",
        "Swish", "HSwish", "HSigmoid", "PRelu",
        "gelu", "relu", "relu_", "clamp_min_", "sigmoid", "silu", "silu_", "hardswish",
        "hardswish_", "hardsigmoid", "erf", "tanh",
    ),
    "quantise": (
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
        "FakeQuantize", "quantize_per_tensor", "dequantize",
    ),
    "preprocessing": (
        "Resize", "Pad", "Interpolate", "upsample_bicubic2d", "upsample_bilinear2d",
        "Cast", "Convert",
    ),
    "movement": (
        "Transpose", "Reshape", "Concat", "Slice", "Gather", "Split", "Squeeze", "Unsqueeze",
        "Expand", "ReorderInput", "ReorderOutput", "Shape", "Identity", "Flatten", "Tile",
        "MemcpyFromHost", "MemcpyToHost",
        "Reorder", "Concatenation", "StridedSlice", "Broadcast", "ShapeOf", "Crop", "MemoryInput",
        "copy_", "cat", "clone", "contiguous", "as_strided", "as_strided_", "view", "reshape",
        "_reshape_alias", "_unsafe_view", "transpose", "t", "permute", "expand", "select",
        "slice", "narrow", "split", "chunk", "unbind", "squeeze", "unsqueeze", "index", "flatten",
        "to", "_to_copy", "empty", "empty_like", "empty_strided", "resize_", "detach", "alias",
        "resolve_conj", "resolve_neg", "expand_as", "index_select", "unflatten", "zeros", "zero_",
        "fill_",
        "Shuffle", "NoOp", "Reformat",
    ),
}  # fmt: skip
"""Operators of ONNX Runtime, OpenVINO, PyTorch (without `aten::`) and TensorRT by kind; all others
count as elementwise."""

ELEMENTWISE = "elementwise"
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
_OF_FUSED = (
    ("attention", ("attention", "mha")), ("convolution", ("conv",)),
    ("gemm", ("gemm", "matmul", "addmm", "_mm")), ("norm", ("norm",)),
    ("softmax", ("softmax",)), ("activation", ("gelu", "sigmoid", "relu", "silu")),
    ("movement", ("reformat", "copy", "transpose", "cat_")),
)  # fmt: skip


def kind_of(operator: str) -> str:
    """The kind of one operator; `aten::` before it is ignored."""
    return _KIND_OF.get(operator.rpartition("::")[2], ELEMENTWISE)


def kind_of_all(operators: Iterable[str]) -> str:
    """The kind of operators that run as one: of the one that weighs most, as `KINDS` lists them.

    A product, a softmax and a product are an attention.
    """
    kinds = [kind_of(operator) for operator in operators]
    if "softmax" in kinds and kinds.count("gemm") >= 2:
        return "attention"
    return next((kind for kind in KINDS if kind in kinds), ELEMENTWISE)


def kind_of_fused(name: str) -> str:
    """The kind of a kernel that a compiler made and named after what it fused."""
    lowered = name.lower()
    found = (kind for kind, parts in _OF_FUSED if any(part in lowered for part in parts))
    return next(found, ELEMENTWISE)
