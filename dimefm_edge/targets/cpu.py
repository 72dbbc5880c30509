"""What this CPU multiplies integers with, and so which int8 graphs suit it and ONNX Runtime.

Read by export, for the rules of a graph that is made for this machine, and by the runtime, to
see whether a bundle was made for another. The names are those of export/quant_rules.py.
"""

from __future__ import annotations

import platform
from collections.abc import Set
from pathlib import Path

ARM_RULES = "onnxruntime-arm"
VNNI_RULES = "onnxruntime-x86"
AVX2_RULES = "onnxruntime-x86-avx2"

_CPUINFO = Path("/proc/cpuinfo")
_ARM = ("aarch64", "arm64")
_VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})  # as Linux calls them


def cpu_features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """The instruction sets of this CPU in Linux's words: avx2, avx512_vnni, asimddp, i8mm ...

    Empty where the system does not tell, which stands for the least.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, values = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(values.split())
    return frozenset()


def cpu_quant_rules(machine: str | None = None, features: Set[str] | None = None) -> str:
    """Name of the int8 rules whose graphs run right and fast in ONNX Runtime on a CPU.

    Args:
        machine: As `platform.machine()` gives it, which is the default.
        features: As `cpu_features()` gives them, which is the default.
    """
    if (machine or platform.machine()).lower() in _ARM:
        return ARM_RULES
    found = cpu_features() if features is None else features
    return VNNI_RULES if found & _VNNI else AVX2_RULES


def int8_products_saturate() -> bool:
    """Whether ONNX Runtime's kernels for u8 x s8 go wrong on this CPU.

    On x86 without VNNI they add two 8-bit products in 16 bits (vpmaddubsw), and 2 x 255 x 127
    does not fit. Its option `session.x64quantprecision` takes exact u8 x u8 kernels instead
    (onnxruntime_session_options_config_keys.h).
    """
    return cpu_quant_rules() == AVX2_RULES


def unwanted_rewrites(precision: str) -> list[str]:
    """Names of ONNX Runtime's optimisations that spoil graphs of a precision.

    Version 1.32 quantises float weights of a Conv or Gemm by itself where what it reads was in
    integers, with one scale for all channels (weight_bias_quantization.cc): a depthwise convolution
    that the rules leave in float, a layer that `--max-drop` keeps. Of MatMul and Add of known
    shapes, those of a fixed batch, it makes a Gemm, whose Q/DQ pairs it then runs in float
    (matmul_add_fusion.cc): vit-p32-w384-d4 took 13.2 ms instead of 2.3, fp32 5.8. In fp8 it drops a
    Relu before a QuantizeLinear, as if 0 were the least number, and refuses a Clip there
    (relu_quantizelinear.cc and clip_quantizelinear.cc know integers only).
    """
    names = {"int8": ["WeightBiasQuantization", "MatMulAddFusion"]}
    names["fp8"] = [*names["int8"], "ReluQuantRewrite", "ClipQuantRewrite"]
    return names.get(precision, [])
