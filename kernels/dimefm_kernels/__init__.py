"""Kernels of dimefm_edge, usable on their own: each op has a plain torch reference.

The ops are imported when they are asked for: a device that only builds or runs TensorRT engines
reads `tensorrt_plugin` from here and has no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dimefm_kernels.attention import (
        fused_attention,
        fused_attention_qkv,
        fused_attention_qkv_int8,
    )
    from dimefm_kernels.reference import attention_qkv_reference, attention_reference

__all__ = [
    "attention_qkv_reference", "attention_reference", "fused_attention", "fused_attention_qkv",
    "fused_attention_qkv_int8",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "reference" if name.endswith("reference") else "attention"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
