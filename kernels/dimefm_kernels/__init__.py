"""Kernels of dimefm_edge, usable on their own: each op has a plain torch reference."""

from __future__ import annotations

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
